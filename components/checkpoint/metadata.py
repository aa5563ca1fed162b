"""`.metadata`, in which torch.distributed.checkpoint notes which tensors there are and where: a pickle, not trusted.

A pickle is a program that may import and call anything. This one is run with stand-ins that do nothing for the classes
it may name, and none for any other; what they have gathered is then checked and put into arrays.
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
"""Ten times what a 70B model saved by 1,024 ranks needs. A smaller checkpoint may have as much as its tensors take: a
chunk of one is some 200 bytes in here, and more than 1,000 in its file."""
_LARGEST_TENSOR = 2**48
_LARGEST_OBJECT = 2**20
"""Bytes of what is no tensor: a setting of the optimizer."""
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
"""What pickles of protocols 4 and 5 are made of, and the bytes of each argument; short numbers and texts come besides,
which say their length themselves. Other operations can allocate far more than their own size."""


def _allowed_operations() -> re.Pattern[bytes]:
    """Matches any sequence of operations that metadata may consist of, up to 4,096 of them.

    A regular expression, because a loop in Python takes fifteen times as long: a minute for a large run. It reads the
    bytes as the unpickler does, one operation with its argument after the other.
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
    """What `checkpoint` holds; every place that is named lies within a file of this directory.

    Raises ValueError, naming the file, for anything that torch.distributed.checkpoint would not have written.
    """
    path = checkpoint / FILE
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    most = min(_LARGEST_BYTES, 2**20 + sum(file.stat().st_size for file in checkpoint.glob("*.distcp")))
    if (size := path.stat().st_size) > most:
        raise ValueError(f"{path} has {size:,} bytes; beside tensors of this size at most {most:,} are read")
    content = path.read_bytes()
    try:
        _check_operations(content)
        with _no_collection():
            return _index(_Unpickler(content).load(), checkpoint)
    except Exception as error:  # a damaged pickle can raise anything at all
        raise ValueError(f"{path} is damaged, or no metadata of a checkpoint: {error}") from None


class _StandIn:
    """In place of a class that a pickle names: keeps what it is given, and copies none of it."""

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
            if name not in self.stand_ins:  # one each, however often a pickle asks for it
                self.stand_ins[name] = type("StandIn", (_StandIn,), {"name": name, "__slots__": ()})
            return self.stand_ins[name]
        raise ValueError(f"it names {module}.{name}, which has no place there and was not loaded")


def _check_operations(content: bytes) -> None:
    position = 0
    while match := _ALLOWED.match(content, position):
        position = match.end()
    if content[position : position + 1] != pickle.STOP:
        code = content[position : position + 1].decode("latin-1")
        name = next((known.name for known in pickletools.opcodes if known.code == code), repr(code))
        raise ValueError(f"it holds the operation {name} at byte {position:,}, which has no place there")


@contextmanager
def _no_collection() -> Iterator[None]:
    """Without the garbage collector, which would go through millions of new objects again and again."""
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
        if len(chunks) > len(numbers) - first:  # a list that many tensors share would be gone through for each
            _refuse(f"there are fewer places than chunks of {name}")
        for chunk in chunks:
            part = _fields(chunk, "ChunkStorageMetadata")
            offsets, sizes = _lengths(part["offsets"]), _lengths(part["sizes"])
            if len(offsets) != len(shape) or len(sizes) != len(shape):
                _refuse("a chunk has other dimensions than its tensor")
            boxes.extend(offsets)
            boxes.extend(sizes)
            order.append(_number_of(numbers, _text(name), offsets))
        found[name] = Entry(dtype, shape, first, len(chunks), box)
    for fqn, _ in numbers:
        if fqn not in found:
            _refuse(f"there is a place for {fqn}, and no such tensor")
    index = TensorIndex(found, files, places[_numbers(order)], _numbers(boxes))
    _check_extents(index, checkpoint)
    return index


def _places(
    table: dict[Any, Any], checkpoint: Path
) -> tuple[dict[tuple[str, tuple[int, ...] | None], int], list[str], np.ndarray]:
    """(name, offsets) -> number, the files, and of each number (file, first byte, bytes)."""
    numbers: dict[tuple[str, tuple[int, ...] | None], int] = {}
    files: dict[str, int] = {}
    places = array("q")
    for key, value in table.items():
        index, place = _fields(key, "MetadataIndex"), _fields(value, "_StorageInfo")
        offset, file = index.get("offset"), place["relative_path"]
        if place.get("transform_descriptors"):
            _refuse(f"{file} is said to be transformed")
        numbers[_text(index["fqn"]), None if offset is None else _lengths(offset)] = len(numbers)
        places.append(files.setdefault(_text(file), len(files)))
        places.append(place["offset"])
        places.append(place["length"])
    if len(places) != 3 * len(numbers):
        _refuse("two places are for one chunk")
    for file in files:
        _check_file(checkpoint, file)
    return numbers, list(files), _numbers(places).reshape(-1, 3)


def _tensor(value: Any) -> tuple[torch.dtype, tuple[int, ...], list[Any]]:
    """dtype, shape and chunks"""
    state = _fields(value, "TensorStorageMetadata")
    properties, shape, chunks = state["properties"], _lengths(state["size"]), state["chunks"]
    if not isinstance(properties, _StandIn) or properties.name != "TensorProperties":
        _refuse("a tensor has no properties")
    dtype = properties.state[0]
    if not isinstance(dtype, torch.dtype):
        _refuse("a tensor has no dtype")
    if any(type(length) is not int or length < 0 for length in shape):
        _refuse("a size is none")
    if len(shape) > 64 or math.prod(shape) > _LARGEST_TENSOR:
        _refuse(f"a tensor of {math.prod(shape):,} elements")
    if not isinstance(chunks, list) or not chunks:
        _refuse("a tensor has no chunks")
    return dtype, shape, chunks


def _check_extents(index: TensorIndex, checkpoint: Path) -> None:
    """Every chunk lies within its tensor, and within its file."""
    sizes = np.array([(checkpoint / file).stat().st_size for file in index.files], dtype=np.int64)
    file, offset, length = index.places.T
    beyond = offset + length > sizes[file]
    for name, entry in index.entries.items():
        own = slice(entry.first, entry.first + entry.chunks)
        if beyond[own].any():
            _refuse(f"{name} is said to lie beyond the end of {index.files[file[own][beyond[own].argmax()]]}")
        if entry.dtype is None:
            if length[entry.first] > _LARGEST_OBJECT:
                _refuse(f"{name} is no tensor, and has {length[entry.first]:,} bytes")
            continue
        boxes = index.boxes_of(entry)
        if (boxes.sum(axis=1) > np.array(entry.shape, dtype=np.int64)).any():
            _refuse(f"a chunk lies beyond its tensor {name}")


def _check_file(checkpoint: Path, file: str) -> None:
    path = checkpoint / file
    if not _FILE_NAME.fullmatch(file) or path.resolve().parent != checkpoint.resolve() or not path.is_file():
        _refuse(f"{file!r} is no file of this checkpoint")


def _number_of(
    numbers: dict[tuple[str, tuple[int, ...] | None], int], name: str, offsets: tuple[int, ...] | None
) -> int:
    if (number := numbers.get((name, offsets))) is None:
        _refuse(f"there is no place for {name}" + (f" at {offsets}" if offsets else ""))
    return number


def _numbers(values: array[int]) -> np.ndarray:
    """(n,) int64 from 0 to 2**62, so that the sum of two is one as well. `array` takes nothing but integers."""
    numbers = np.frombuffer(values, dtype=np.int64) if values else np.empty(0, dtype=np.int64)
    if len(numbers) and (numbers.min() < 0 or numbers.max() >= _LARGEST_NUMBER):
        _refuse("a number is none")
    return numbers


def _lengths(size: Any) -> tuple[int, ...]:
    """What a torch.Size was made of; whether it is numbers shows where they are used."""
    if not isinstance(size, _StandIn) or size.name != "Size":
        _refuse("a size is none")
    lengths = size.arguments[0] if size.arguments else ()
    if type(lengths) is not tuple:
        _refuse("a size is none")
    return lengths


def _fields(part: Any, name: str) -> dict[str, Any]:
    if not isinstance(part, _StandIn) or part.name != name or not isinstance(part.state, dict):
        _refuse(f"{name} is missing")
    return part.state


def _table(table: Any) -> dict[Any, Any]:
    if not isinstance(table, dict):
        _refuse("a table is none")
    return table


def _text(text: Any) -> str:
    if type(text) is not str:
        _refuse("a name is none")
    return text


def _refuse(why: str) -> NoReturn:
    raise ValueError(why)
