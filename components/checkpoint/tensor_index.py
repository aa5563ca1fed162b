"""TensorIndex: the tensors of a checkpoint and the places of their chunks, stored in arrays.

A 70B model saved by 1,024 ranks has two million chunks. As objects of torch.distributed.checkpoint they take gigabytes
on every rank; with arrays, a rank creates objects only for the chunks it reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
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
from torch.distributed.checkpoint.planner_helpers import _create_chunk_list


class Entry(NamedTuple):
    """One tensor, or one setting of the optimizer, of a checkpoint."""

    dtype: torch.dtype | None
    """None: not a tensor."""
    shape: tuple[int, ...]
    first: int
    """Its chunks are rows `first` to `first + chunks` of `TensorIndex.places`."""
    chunks: int
    box: int
    """Position of the offsets and sizes of its chunks in `TensorIndex.boxes`."""


class TensorIndex(NamedTuple):
    """The checked content of a checkpoint, by name. It is pickled only between processes of one run."""

    entries: dict[str, Entry]
    files: list[str]
    places: np.ndarray
    """(chunks, 3) int64: index into `files`, first byte, number of bytes."""
    boxes: np.ndarray
    """(n,) int64: the flattened (chunks, 2, dimensions) offsets and sizes of the chunks of one tensor after another."""

    def boxes_of(self, entry: Entry) -> np.ndarray:
        """Return (chunks, 2, dimensions) int64: offsets and sizes of the chunks of `entry`."""
        dimensions = len(entry.shape)
        end = entry.box + entry.chunks * 2 * dimensions
        return self.boxes[entry.box : end].reshape(entry.chunks, 2, dimensions)

    def metadata(self, wanted: Mapping[str, Any]) -> Metadata:
        """Return the metadata that torch.distributed.checkpoint needs to fill `wanted`, a flat state dict of this rank:
        only the tensors in `wanted`, and of each only the chunks that overlap the local shard.
        """
        entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        storage: dict[MetadataIndex, _StorageInfo] = {}
        for name in wanted.keys() & self.entries.keys():
            entry = self.entries[name]
            if entry.dtype is None:
                entries[name] = BytesStorageMetadata()
                storage[MetadataIndex(name)] = self._place(entry.first)
                continue
            chunks = []
            boxes = self.boxes_of(entry)
            for number in _overlapping(boxes, wanted[name]):
                offsets, sizes = (torch.Size(lengths) for lengths in boxes[number].tolist())
                chunks.append(ChunkStorageMetadata(offsets, sizes))
                storage[MetadataIndex(name, offsets)] = self._place(entry.first + number)
            properties = TensorProperties(dtype=entry.dtype)
            entries[name] = TensorStorageMetadata(properties, torch.Size(entry.shape), chunks)
        return Metadata(state_dict_metadata=entries, storage_data=storage, storage_meta=StorageMeta())

    def _place(self, number: int) -> _StorageInfo:
        file, offset, length = self.places[number].tolist()
        return _StorageInfo(self.files[file], offset, length)


def _overlapping(boxes: np.ndarray, value: Any) -> list[int]:
    """Return the indices of the chunks, `boxes` (chunks, 2, dimensions), that overlap the local shard of `value`.

    Returns all where `value` is not a tensor with as many dimensions: torch then reports the mismatch.
    """
    count, _, dimensions = boxes.shape
    if not isinstance(value, Tensor) or value.dim() != dimensions:
        return list(range(count))
    overlap = np.zeros(count, dtype=bool)
    for chunk in _create_chunk_list(value):
        start = np.array(chunk.offsets, dtype=np.int64)
        end = start + np.array(chunk.sizes, dtype=np.int64)
        overlap |= ((boxes[:, 0] < end) & (boxes[:, 0] + boxes[:, 1] > start)).all(axis=1)
    numbers: list[int] = np.flatnonzero(overlap).tolist()
    return numbers
