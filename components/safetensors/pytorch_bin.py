"""Weights of before safetensors: pytorch_model.bin, one or many with an index; nothing in them is ever executed."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components.paths import is_file
from components.safetensors.directory import choose_files
from components.safetensors.reader import DTYPES, INDEX, SINGLE, TensorSpec

_SINGLE, _INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def has_only_pickles(directory: Path) -> bool:
    """Return whether the weights of `directory` are pickled, and not, or not also, safetensors."""
    if is_file(directory / SINGLE) or is_file(directory / INDEX):
        return False
    return is_file(directory / _SINGLE) or is_file(directory / _INDEX)


class PickledWeights:
    """What `Weights` is for safetensors; but files are mapped whole, and `torch.load` builds only tensors from them.

    Raises ValueError for a file that asks for anything else, and for one that would unpack to more than its own size.
    """

    def __init__(self, directory: Path, *, ignore: Iterable[str] = ()) -> None:
        table, self.notes = choose_files(directory / _SINGLE, directory / _INDEX)
        files = sorted(set(table.values())) if table is not None else [directory / _SINGLE]
        self._tensors: dict[str, Tensor] = {}
        for file in files:
            for name, tensor in _load(file).items():
                if table is None or table.get(name) == file:
                    self._tensors[name] = tensor
        if table is not None and (missing := sorted(table.keys() - self._tensors.keys())):
            raise ValueError(f"{table[missing[0]]} has no {missing[0]}, which {_INDEX} says it has")
        ignored = tuple(ignore)
        self.dropped = [name for name in self._tensors if ignored and name.endswith(ignored)]
        for name in self.dropped:
            del self._tensors[name]
        for name, tensor in self._tensors.items():
            if tensor.dtype not in DTYPES.values():
                raise ValueError(
                    f"{directory}: {name} is stored as {tensor.dtype}; it can only be a floating-point one"
                )
        self.specs = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in self._tensors.items()}

    def read(self, name: str, slices: tuple[slice, ...] = ()) -> Tensor:
        return self._tensors[name][slices]


def _load(path: Path) -> dict[str, Tensor]:
    _check_size(path)
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{path} is damaged, or holds more than tensors, which is never loaded: {reason}; "
            "ask for a safetensors file"
        ) from None
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
    ):
        raise ValueError(f"{path} is no table of tensors by name")
    for name, tensor in content.items():
        if tensor.layout != torch.strided or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"{path}: {name} is no plain tensor of its own size")
    return dict(content)


def _check_size(path: Path) -> None:
    """Raises ValueError unless the file is a zip archive of stored, not compressed, entries no larger than itself."""
    if not is_file(path):
        raise ValueError(f"{path} is missing, or no file")
    path.open("rb").close()  # what may not be read is no archive to `is_zipfile`
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is no archive that torch has written since 1.6; ask for a safetensors file")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or (
        sum(entry.file_size for entry in entries) > path.stat().st_size
    ):
        raise ValueError(f"{path} would unpack to more than its size, which no file that torch wrote does")
