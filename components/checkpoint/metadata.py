"""`.metadata`, in which torch.distributed.checkpoint notes which tensors there are and where: a pickle, not trusted.

A pickle is a program that may import and call anything. This one is run with stand-ins that do nothing for the classes
it may name, and none for any other; what they have gathered is then checked and made into the real thing.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

FILE = ".metadata"
_LARGEST_BYTES = 2**28
_LARGEST_TENSOR = 2**48
_LARGEST_OBJECT = 2**20
"""Bytes of what is no tensor: a setting of the optimizer."""
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
_OPERATIONS = {
    "PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1",
    "BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
    "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS", "MEMOIZE", "BINPUT", "LONG_BINPUT",
    "BINGET", "LONG_BINGET", "GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD",
}  # fmt: skip
"""What a pickle of metadata is made of, of protocols 2 to 5. Others can allocate far more than their own size."""


def read_metadata(checkpoint: Path) -> Metadata:
    """The metadata of `checkpoint`; every place it names lies within a file of this directory.

    Raises ValueError, naming the file, for anything that torch.distributed.checkpoint would not have written.
    """
    path = checkpoint / FILE
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    if (size := path.stat().st_size) > _LARGEST_BYTES:
        raise ValueError(f"{path} has {size:,} bytes; at most {_LARGEST_BYTES:,} are read")
    content = path.read_bytes()
    try:
        _check_operations(content)
        stood_in = _Unpickler(content).load()
        return _metadata(stood_in, checkpoint)
    except Exception as error:  # a damaged pickle can raise anything at all
        raise ValueError(f"{path} is damaged, or no metadata of a checkpoint: {error}") from None


class _StandIn:
    """In place of a class that a pickle names: keeps what it is given."""

    name = ""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content))

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if f"{module}.{name}" in _STAND_INS:
            return type("StandIn", (_StandIn,), {"name": name})
        raise ValueError(f"it names {module}.{name}, which has no place there and was not loaded")


def _check_operations(content: bytes) -> None:
    for count, (operation, argument, _) in enumerate(pickletools.genops(content)):
        if operation.name not in _OPERATIONS:
            raise ValueError(f"it holds the operation {operation.name}, which has no place there")
        if operation.name == "LONG_BINPUT" and int(argument or 0) > count:
            raise ValueError("it asks for more memory than it can use")


def _metadata(top: Any, checkpoint: Path) -> Metadata:
    state = _fields(top, "Metadata")
    tensors = {_text(name): _entry(entry) for name, entry in _table(state["state_dict_metadata"])}
    sizes: dict[str, int] = {}
    places = {}
    for key, value in _table(state["storage_data"]):
        index, place = _index(key), _fields(value, "_StorageInfo")
        file, offset, length = _text(place["relative_path"]), _count(place["offset"]), _count(place["length"])
        if index.fqn not in tensors:
            _refuse(f"there is a place for {index.fqn}, and no such tensor")
        if place.get("transform_descriptors"):
            _refuse(f"{file} is said to be transformed")
        if file not in sizes:
            sizes[file] = _size_of(checkpoint, file)
        if offset + length > sizes[file]:
            _refuse(f"{index.fqn} is said to lie beyond the end of {file}")
        if isinstance(tensors[index.fqn], BytesStorageMetadata) and length > _LARGEST_OBJECT:
            _refuse(f"{index.fqn} is no tensor, and has {length:,} bytes")
        places[index] = _StorageInfo(file, offset, length)
    for name, entry in tensors.items():
        chunks = entry.chunks if isinstance(entry, TensorStorageMetadata) else []
        wanted = [MetadataIndex(name, chunk.offsets) for chunk in chunks] or [MetadataIndex(name)]
        if missing := [index for index in wanted if index not in places]:
            _refuse(f"there is no place for {missing[0]}")
    return Metadata(state_dict_metadata=tensors, planner_data={}, storage_data=places, storage_meta=StorageMeta())


def _entry(entry: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if isinstance(entry, _StandIn) and entry.name == "BytesStorageMetadata":
        return BytesStorageMetadata()
    state = _fields(entry, "TensorStorageMetadata")
    properties, size = state["properties"], _size(state["size"])
    if not isinstance(properties, _StandIn) or properties.name != "TensorProperties":
        _refuse("a tensor has no properties")
    dtype = properties.state[0]
    if not isinstance(dtype, torch.dtype):
        _refuse("a tensor has no dtype")
    chunks = []
    for chunk in state["chunks"]:
        part = _fields(chunk, "ChunkStorageMetadata")
        offsets, sizes = _size(part["offsets"]), _size(part["sizes"])
        if any(first + length > whole for first, length, whole in zip(offsets, sizes, size, strict=True)):
            _refuse("a chunk lies beyond its tensor")
        chunks.append(ChunkStorageMetadata(offsets, sizes))
    if not chunks:
        _refuse("a tensor has no chunks")
    return TensorStorageMetadata(TensorProperties(dtype=dtype), size, chunks)


def _index(index: Any) -> MetadataIndex:
    state = _fields(index, "MetadataIndex")
    offset, number = state.get("offset"), state.get("index")
    return MetadataIndex(
        _text(state["fqn"]), None if offset is None else _size(offset), None if number is None else _count(number)
    )


def _size(size: Any) -> torch.Size:
    if not isinstance(size, _StandIn) or size.name != "Size":
        _refuse("a size is none")
    lengths = [_count(length) for length in (size.arguments[0] if size.arguments else ())]
    if len(lengths) > 64 or math.prod(lengths) > _LARGEST_TENSOR:
        _refuse(f"a tensor of {math.prod(lengths):,} elements")
    return torch.Size(lengths)


def _size_of(checkpoint: Path, file: str) -> int:
    path = checkpoint / file
    if not _FILE_NAME.fullmatch(file) or path.resolve().parent != checkpoint.resolve() or not path.is_file():
        _refuse(f"{file!r} is no file of this checkpoint")
    return path.stat().st_size


def _fields(part: Any, name: str) -> dict[str, Any]:
    if not isinstance(part, _StandIn) or part.name != name or not isinstance(part.state, dict):
        _refuse(f"{name} is missing")
    return part.state


def _table(table: Any) -> Iterator[tuple[Any, Any]]:
    if not isinstance(table, dict):
        _refuse("a table is none")
    return iter(table.items())


def _text(text: Any) -> str:
    if not isinstance(text, str):
        _refuse("a name is none")
    return text


def _count(number: Any) -> int:
    if type(number) is not int or not 0 <= number < 2**62:
        _refuse("a number is none")
    return number


def _refuse(why: str) -> NoReturn:
    raise ValueError(why)
