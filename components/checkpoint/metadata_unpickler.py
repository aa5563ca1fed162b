"""Safe unpickling of `.metadata`, the untrusted pickle in which torch.distributed.checkpoint lists tensors and places.

Unpickling can import and call anything. Here every class that the pickle may name is replaced by a stand-in that only
stores its arguments, and every other class is refused; the stored values are then checked and written to arrays.
safe_tensor_reader.py reads the tensors themselves.
"""

from __future__ import annotations

import gc
import io
import math
import pickle
import pickletools
import re
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from components.checkpoint.tensor_index import Entry, TensorIndex

FILE = ".metadata"
_LARGEST_BYTES = 2**32
"""Ten times the size for a 70B model saved by 1,024 ranks. The size of the tensor files is a limit too: a chunk takes
about 200 bytes in the metadata, and more than 1,000 in its file."""
_LARGEST_TENSOR = 2**48
_LARGEST_OBJECT = 2**20
"""Bytes of an object that is not a tensor: a setting of the optimizer."""
_LARGEST_NUMBER = 2**62
_FILE_NAME = re.compile(r"__\d{1,9}_\d{1,9}\.distcp")
_DCP = "torch.distributed.checkpoint"
_STAND_INS = {
    **dict.fromkeys(
        f"{_DCP}.metadata.{name}" for name in (
            "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
            "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
        )
    ),
    f"{_DCP}.filesystem._StorageInfo": None,
    "torch.Size": None,
    "torch.serialization._get_layout": None,
    **dict.fromkeys(f"{module}.PosixPath" for module in ("pathlib", "pathlib._local")),
}  # fmt: skip
_PLAIN_OPERATIONS = [
    "MARK", "NONE", "NEWTRUE", "NEWFALSE", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND",
    "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS", "MEMOIZE", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD",
]  # fmt: skip
_OPERATIONS = {
    **dict.fromkeys(_PLAIN_OPERATIONS, 0),
    **dict.fromkeys(["PROTO", "BININT1", "BINGET"], 1),
    "BININT2": 2,
    **dict.fromkeys(["BININT", "LONG_BINGET"], 4),
    **dict.fromkeys(["BINFLOAT", "FRAME"], 8),
}
"""Allowed operations of pickle protocols 4 and 5, with the bytes of their argument. LONG1 and SHORT_BINUNICODE, whose
argument has a length prefix, are also allowed. Other operations can allocate far more memory than their size."""


def _allowed_operations() -> re.Pattern[bytes]:
    """Return a pattern that matches 1 to 4,096 allowed operations, each with its argument.

    A loop in Python takes fifteen times as long as this regular expression: a minute for a large run.
    """
    codes = {operation.name: re.escape(operation.code.encode("latin-1")) for operation in pickletools.opcodes}
    single = b"[" + b"".join(codes[name] for name in _PLAIN_OPERATIONS) + b"]"  # one step for the most frequent ones
    fixed = [codes[name] + b".{%d}" % size for name, size in _OPERATIONS.items() if size]
    counted = [
        codes[name] + re.escape(bytes([length])) + b".{%d}" % length
        for name, longest in (("LONG1", 8), ("SHORT_BINUNICODE", 255))
        for length in range(longest + 1)
    ]
    return re.compile(b"(?:" + b"|".join([single, *fixed, *counted]) + b"){1,4096}", re.DOTALL)


_ALLOWED = _allowed_operations()


def read_index(checkpoint: Path) -> TensorIndex:
    """Return the index of `checkpoint`; every place in it lies within a file of this directory.

    Raises ValueError, naming the file, for metadata that torch.distributed.checkpoint would not have written.
    """
    path = checkpoint / FILE
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    most = min(_LARGEST_BYTES, 2**20 + sum(file.stat().st_size for file in checkpoint.glob("*.distcp")))
    if (size := path.stat().st_size) > most:
        raise ValueError(f"{path} has {size:,} bytes; with tensor files of this size, at most {most:,} are accepted")
    content = path.read_bytes()
    try:
        _check_operations(content)
        with _no_collection():
            return _index(_Unpickler(content).load(), checkpoint)
    except Exception as error:  # a damaged pickle may raise any exception
        raise ValueError(f"{path} is damaged, or is not the metadata of a checkpoint: {error}") from None


class _StandIn:
    """Replaces a class that the pickle names: it stores its arguments and state, without a copy."""

    __slots__ = ("arguments", "state")
    name = ""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content))
        self.stand_ins: dict[str, type] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if f"{module}.{name}" in _STAND_INS:
            if name not in self.stand_ins:  # one class per name, however often it is requested
                self.stand_ins[name] = type("StandIn", (_StandIn,), {"name": name, "__slots__": ()})
            return self.stand_ins[name]
        raise ValueError(f"it names {module}.{name}, which is not allowed in metadata and was not loaded")


def _check_operations(content: bytes) -> None:
    position = 0
    while match := _ALLOWED.match(content, position):
        position = match.end()
    if content[position : position + 1] != pickle.STOP:
        code = content[position : position + 1].decode("latin-1")
        name = next((known.name for known in pickletools.opcodes if known.code == code), repr(code))
        raise ValueError(f"it holds the pickle operation {name} at byte {position:,}, which is not allowed in metadata")


@contextmanager
def _no_collection() -> Iterator[None]:
    """Disable the garbage collector, which would traverse millions of new objects repeatedly."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _index(top: Any, checkpoint: Path) -> TensorIndex:
    state = _fields(top, "Metadata")
    entries, tables = state["state_dict_metadata"], state["storage_data"]
    numbers, files, places = _places(_table(tables), checkpoint)
    found: dict[str, Entry] = {}
    order, boxes = array("q"), array("q")
    for name, value in _table(entries).items():
        first, box = len(order), len(boxes)
        if isinstance(value, _StandIn) and value.name == "BytesStorageMetadata":
            order.append(_number_of(numbers, _text(name), None))
            found[name] = Entry(None, (), first, 1, box)
            continue
        dtype, shape, chunks = _tensor(value)
        if len(chunks) > len(numbers) - first:  # or a long list shared by many tensors would be traversed for each
            _refuse(f"it has fewer places than chunks of {name}")
        for chunk in chunks:
            part = _fields(chunk, "ChunkStorageMetadata")
            offsets, sizes = _lengths(part["offsets"]), _lengths(part["sizes"])
            if len(offsets) != len(shape) or len(sizes) != len(shape):
                _refuse("a chunk and its tensor differ in their number of dimensions")
            boxes.extend(offsets)
            boxes.extend(sizes)
            order.append(_number_of(numbers, _text(name), offsets))
        found[name] = Entry(dtype, shape, first, len(chunks), box)
    for fqn, _ in numbers:
        if fqn not in found:
            _refuse(f"it has a place for {fqn}, but no such tensor")
    index = TensorIndex(found, files, places[_numbers(order)], _numbers(boxes))
    _check_extents(index, checkpoint)
    return index


def _places(
    table: dict[Any, Any], checkpoint: Path
) -> tuple[dict[tuple[str, tuple[int, ...] | None], int], list[str], np.ndarray]:
    """Return the number of each chunk by (name, offsets), the files, and (chunks, 3) int64 as `TensorIndex.places`."""
    numbers: dict[tuple[str, tuple[int, ...] | None], int] = {}
    files: dict[str, int] = {}
    places = array("q")
    for key, value in table.items():
        index, place = _fields(key, "MetadataIndex"), _fields(value, "_StorageInfo")
        offset, file = index.get("offset"), place["relative_path"]
        if place.get("transform_descriptors"):
            _refuse(f"{file} is stored with a transformation, which is not supported")
        numbers[_text(index["fqn"]), None if offset is None else _lengths(offset)] = len(numbers)
        places.append(files.setdefault(_text(file), len(files)))
        places.append(place["offset"])
        places.append(place["length"])
    if len(places) != 3 * len(numbers):
        _refuse("a chunk has two places")
    for file in files:
        _check_file(checkpoint, file)
    return numbers, list(files), _numbers(places).reshape(-1, 3)


def _tensor(value: Any) -> tuple[torch.dtype, tuple[int, ...], list[Any]]:
    state = _fields(value, "TensorStorageMetadata")
    properties, shape, chunks = state["properties"], _lengths(state["size"]), state["chunks"]
    if not isinstance(properties, _StandIn) or properties.name != "TensorProperties":
        _refuse("a tensor has no properties")
    dtype = properties.state[0]
    if not isinstance(dtype, torch.dtype):
        _refuse("a tensor has no dtype")
    if any(type(length) is not int or length < 0 for length in shape):
        _refuse("a dimension is not a whole number of at least 0")
    if len(shape) > 64 or math.prod(shape) > _LARGEST_TENSOR:
        _refuse(f"a tensor has {len(shape)} dimensions and {math.prod(shape):,} elements")
    if not isinstance(chunks, list) or not chunks:
        _refuse("a tensor has no chunks")
    return dtype, shape, chunks


def _check_extents(index: TensorIndex, checkpoint: Path) -> None:
    """Raise ValueError unless every chunk lies within its tensor and within its file."""
    sizes = np.array([(checkpoint / file).stat().st_size for file in index.files], dtype=np.int64)
    file, offset, length = index.places.T
    beyond = offset + length > sizes[file]
    for name, entry in index.entries.items():
        rows = slice(entry.first, entry.first + entry.chunks)
        if beyond[rows].any():
            _refuse(f"{name} lies beyond the end of {index.files[file[rows][beyond[rows].argmax()]]}")
        if entry.dtype is None:
            if length[entry.first] > _LARGEST_OBJECT:
                size = f"{length[entry.first]:,} bytes; at most {_LARGEST_OBJECT:,} are accepted"
                _refuse(f"{name} is not a tensor and has {size}")
            continue
        boxes = index.boxes_of(entry)
        if (boxes.sum(axis=1) > np.array(entry.shape, dtype=np.int64)).any():
            _refuse(f"a chunk lies outside its tensor {name}")


def _check_file(checkpoint: Path, file: str) -> None:
    path = checkpoint / file
    if not _FILE_NAME.fullmatch(file) or path.resolve().parent != checkpoint.resolve() or not path.is_file():
        _refuse(f"{file!r} is not a file of this checkpoint")


def _number_of(
    numbers: dict[tuple[str, tuple[int, ...] | None], int], name: str, offsets: tuple[int, ...] | None
) -> int:
    if (number := numbers.get((name, offsets))) is None:
        _refuse(f"it has no place for {name}" + (f" at {offsets}" if offsets else ""))
    return number


def _numbers(values: array[int]) -> np.ndarray:
    """Return `values` as (n,) int64 from 0 to below 2**62, so that the sum of two does not overflow."""
    numbers = np.frombuffer(values, dtype=np.int64) if values else np.empty(0, dtype=np.int64)
    if len(numbers) and (numbers.min() < 0 or numbers.max() >= _LARGEST_NUMBER):
        _refuse("a number is negative or too large")
    return numbers


def _lengths(size: Any) -> tuple[int, ...]:
    """Return the tuple in the stand-in of a torch.Size. Its items are checked where they are used."""
    if not isinstance(size, _StandIn) or size.name != "Size":
        _refuse("a size is not a torch.Size")
    lengths = size.arguments[0] if size.arguments else ()
    if type(lengths) is not tuple:
        _refuse("a size is not a tuple")
    return lengths


def _fields(part: Any, name: str) -> dict[str, Any]:
    if not isinstance(part, _StandIn) or part.name != name or not isinstance(part.state, dict):
        _refuse(f"{name} is missing")
    return part.state


def _table(table: Any) -> dict[Any, Any]:
    if not isinstance(table, dict):
        _refuse("a table is not a dict")
    return table


def _text(text: Any) -> str:
    if type(text) is not str:
        _refuse("a name is not a string")
    return text


def _refuse(problem: str) -> NoReturn:
    raise ValueError(problem)
