"""PickledWeights: safe reading of pytorch_model.bin, a single file or several with an index."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components.errors import first_line
from components.paths import is_file
from components.safetensors.directory import choose_files
from components.safetensors.reader import DTYPES, INDEX, SINGLE, TensorSpec

_SINGLE, _INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def has_only_pickles(directory: Path) -> bool:
    """Return whether `directory` has pickled weights and no safetensors."""
    if is_file(directory / SINGLE) or is_file(directory / INDEX):
        return False
    return is_file(directory / _SINGLE) or is_file(directory / _INDEX)


class PickledWeights:
    """The same interface as `Weights`, for pickled files, which are memory-mapped and loaded with `weights_only`.

    Raises ValueError for files that contain anything but tensors, and for compressed ones.
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
            raise ValueError(f"{table[missing[0]]} has no tensor {missing[0]}, which {_INDEX} lists")
        ignored = tuple(ignore)
        self.dropped = [name for name in self._tensors if name.endswith(ignored)]
        for name in self.dropped:
            del self._tensors[name]
        for name, tensor in self._tensors.items():
            if tensor.dtype not in DTYPES.values():
                raise ValueError(f"{directory}: {name} is stored as {tensor.dtype}; expected a floating-point dtype")
        self.specs = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in self._tensors.items()}

    def read(self, name: str, slices: tuple[slice, ...] = ()) -> Tensor:
        """Return a tensor, or the part of it selected by `slices`, one per dimension."""
        return self._tensors[name][slices]


def _load(path: Path) -> dict[str, Tensor]:
    _check_size(path)
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        reason = first_line(error)
        raise ValueError(
            f"{path} is damaged, or holds more than tensors, which is never loaded: {reason}; convert it to safetensors"
        ) from None
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
    ):
        raise ValueError(f"{path} is not a dict of tensors by name")
    for name, tensor in content.items():
        if tensor.layout != torch.strided or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"{path}: {name} is not a dense tensor, or claims more bytes than it has")
    return dict(content)


def _check_size(path: Path) -> None:
    """Raise ValueError unless the file is a zip archive of uncompressed entries no larger than the file."""
    if not is_file(path):
        raise ValueError(f"{path} is missing, or is not a file")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise ValueError(
            f"{path} is not a zip archive as torch has written since 1.6 ({error}); convert it to safetensors"
        ) from None
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or (
        sum(entry.file_size for entry in entries) > path.stat().st_size
    ):
        raise ValueError(f"{path} would unpack to more than its size, so torch has not written it")
