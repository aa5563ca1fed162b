"""The tensors of safetensors files, one file or many with an index: specs first, read slice by slice."""

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
"""What a weight may be stored as. Everything else is quantised or no weight."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that was not read yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Weights:
    """The safetensors of a directory. Files are memory-mapped; nothing is read before `read`.

    Raises FileNotFoundError if there are none, ValueError naming the file for what is damaged: a header longer than
    its file, tensors beyond its end, an index that names what is not there or a place outside the directory.
    """

    def __init__(self, directory: Path, *, ignore: Iterable[str] = ()) -> None:
        """Tensors whose names end with one of `ignore` may have any dtype, and are left out of `specs`."""
        self._open = ExitStack()
        self._home: dict[str, Any] = {}
        self.specs: dict[str, TensorSpec] = {}
        ignored = tuple(ignore)
        table, self.notes = choose_files(directory / SINGLE, directory / INDEX)
        """`notes`: what there is to tell of the choice of files."""
        if table is None:
            handle, names = self._file(directory / SINGLE)
            self._home = dict.fromkeys(names, handle)
        else:
            opened = {file: self._file(file) for file in sorted(set(table.values()))}
            for name, file in table.items():
                if name not in opened[file][1]:
                    raise ValueError(f"{file} has no {name}, which {INDEX} says it has")
                self._home[name] = opened[file][0]
        for name, handle in self._home.items():
            view = handle.get_slice(name)
            if (stored := view.get_dtype()) in DTYPES:
                self.specs[name] = TensorSpec(tuple(view.get_shape()), DTYPES[stored])
            elif not name.endswith(ignored or ("\0",)):
                raise ValueError(f"{directory}: {name} is stored as {stored}; only {', '.join(DTYPES)} can be read")
        self.dropped = [name for name in self._home if ignored and name.endswith(ignored)]
        for name in self.dropped:
            self.specs.pop(name, None)

    def read(self, name: str, slices: tuple[slice, ...] = ()) -> Tensor:
        """The tensor, or the part of it that `slices` cut out, one for each dimension."""
        handle = self._home[name]
        tensor: Tensor = handle.get_slice(name)[slices] if slices else handle.get_tensor(name)
        return tensor

    def close(self) -> None:
        self._open.close()

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _file(self, path: Path) -> tuple[Any, set[str]]:
        from safetensors import SafetensorError, safe_open

        if not is_file(path):
            raise ValueError(f"{path} is missing, or no file")
        path.open("rb").close()  # the library says of what may not be read that it does not exist
        try:
            handle = self._open.enter_context(safe_open(path, framework="pt", device="cpu"))
            return handle, set(handle.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged, or no safetensors file: {error}") from None
