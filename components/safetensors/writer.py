"""Writing tensors to safetensors files of a limited size, with one file in memory at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from components.atomic_files import fsync_file
from components.safetensors.directory import write_json
from components.safetensors.reader import INDEX, SINGLE, TensorSpec

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_bytes(text: str) -> int:
    """Return the bytes of a size such as "5GB", "300 MB" or "1000". Raises ValueError for other text."""
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,9})?)\s*([A-Z]*)", text.strip().upper())
    if not match or match[2] not in _UNITS or not (size := int(float(match[1]) * _UNITS[match[2]])):
        raise ValueError(f"{text!r} is not a size; expected a number with a unit, such as 5GB or 300MB")
    return size


def write_weights(
    directory: Path,
    tensors: Mapping[str, TensorSpec],
    read: Callable[[Sequence[str]], Mapping[str, Tensor]],
    *,
    max_shard_bytes: int,
) -> int:
    """Write `tensors` in order, calling `read` for those of one file at a time; return the number of files.

    A tensor larger than `max_shard_bytes` gets a separate file. A single file has no index.
    """
    from safetensors.torch import save_file

    groups: list[list[str]] = [[]]
    free = max_shard_bytes
    for name, tensor in tensors.items():
        if groups[-1] and tensor.bytes > free:
            groups.append([])
            free = max_shard_bytes
        groups[-1].append(name)
        free -= tensor.bytes
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        file = SINGLE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        content = read(group)
        for name in group:
            if (found := TensorSpec(tuple(content[name].shape), content[name].dtype)) != tensors[name]:
                raise ValueError(f"{name} is {found}, expected {tensors[name]}")
        (directory / file).touch()
        mode = (directory / file).stat().st_mode & 0o777  # safetensors creates files that only their owner can read
        save_file({name: content[name].contiguous() for name in group}, directory / file, {"format": "pt"})
        (directory / file).chmod(mode)
        fsync_file(directory / file)
        weight_map |= dict.fromkeys(group, file)
    if len(groups) > 1:
        total = sum(tensor.bytes for tensor in tensors.values())
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return len(groups)
