"""Weights: the tensors of safetensors files; shapes are known on opening, data is read on request."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components.paths import is_file
from components.safetensors.directory import choose_files

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Accepted dtypes of weights; other dtypes are quantized weights or buffers."""


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor that was not read yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Weights:
    """The safetensors files of a directory, a single one or several with an index. They are memory-mapped.

    Raises FileNotFoundError if there are none, and ValueError with the file if one is damaged: a header or tensors
    beyond the end of the file, or an index with missing tensors or with files outside the directory.
    """

    def __init__(self, directory: Path, *, ignore: Iterable[str] = ()) -> None:
        """Tensors whose names end with one of `ignore` may have any dtype, and are excluded from `specs`."""
        self._open = ExitStack()
        self._handles: dict[str, Any] = {}
        self.specs: dict[str, TensorSpec] = {}
        self.dropped: list[str] = []
        ignored = tuple(ignore)
        table, self.notes = choose_files(directory / SINGLE, directory / INDEX)
        """`notes` are warnings about the choice of files."""
        if table is None:
            handle, names = self._open_file(directory / SINGLE)
            self._handles = dict.fromkeys(names, handle)
        else:
            opened = {file: self._open_file(file) for file in sorted(set(table.values()))}
            for name, file in table.items():
                if name not in opened[file][1]:
                    raise ValueError(f"{file} has no tensor {name}, which {INDEX} lists")
                self._handles[name] = opened[file][0]
        for name, handle in self._handles.items():
            if name.endswith(ignored):
                self.dropped.append(name)
                continue
            view = handle.get_slice(name)
            if (stored := view.get_dtype()) not in DTYPES:
                raise ValueError(f"{directory}: {name} is stored as {stored}; only {', '.join(DTYPES)} are supported")
            self.specs[name] = TensorSpec(tuple(view.get_shape()), DTYPES[stored])

    def read(self, name: str, slices: tuple[slice, ...] = ()) -> Tensor:
        """Return a tensor, or the part of it selected by `slices`, one per dimension."""
        handle = self._handles[name]
        tensor: Tensor = handle.get_slice(name)[slices] if slices else handle.get_tensor(name)
        return tensor

    def close(self) -> None:
        self._open.close()

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_file(self, path: Path) -> tuple[Any, set[str]]:
        from safetensors import SafetensorError, safe_open

        if not is_file(path):
            raise ValueError(f"{path} is missing, or is not a file")
        path.open("rb").close()  # raises the error of the system, where the library reports a missing file
        try:
            handle = self._open.enter_context(safe_open(path, framework="pt", device="cpu"))
            return handle, set(handle.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged, or is not a safetensors file: {error}") from None
