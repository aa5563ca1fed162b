"""Which tensors a checkpoint holds and where their chunks lie, in arrays.

A 70B model saved by 1,024 ranks has two million chunks. As objects of torch.distributed.checkpoint they take gigabytes
on every rank; here a rank makes objects of those chunks alone that it reads.
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
    """One tensor, or one setting of the optimizer."""

    dtype: torch.dtype | None
    """None: not a tensor."""
    shape: tuple[int, ...]
    first: int
    """Its chunks are `first` to `first + chunks` of all, in the order of `TensorIndex.places`."""
    chunks: int
    box: int
    """Where the offsets and sizes of its chunks begin in `TensorIndex.boxes`."""


class TensorIndex(NamedTuple):
    """What is in a checkpoint, by name. It has been checked; it travels between processes of one run by pickle."""

    entries: dict[str, Entry]
    files: list[str]
    places: np.ndarray
    """(chunks, 3) int64: number of the file, first byte, bytes."""
    boxes: np.ndarray
    """int64: of each tensor in turn (chunks, 2, dimensions), the offsets and the sizes of its chunks."""

    def boxes_of(self, entry: Entry) -> np.ndarray:
        """(chunks, 2, dimensions) int64: offsets and sizes."""
        dimensions = len(entry.shape)
        end = entry.box + entry.chunks * 2 * dimensions
        return self.boxes[entry.box : end].reshape(entry.chunks, 2, dimensions)

    def metadata(self, wanted: Mapping[str, Any]) -> Metadata:
        """What torch.distributed.checkpoint needs to fill `wanted`, a flat state dict of this rank: of each tensor the
        chunks that overlap the local part, and nothing of what is not wanted.
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
    """Numbers of the chunks (chunks, 2, dimensions) that hold something of the local part of `value`.

    All of them where `value` is not a tensor of these dimensions: torch then says what is wrong with it.
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
