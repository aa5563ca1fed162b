"""Reads the tensors of a checkpoint from an untrusted source: stored code is never executed, sizes are checked."""

from __future__ import annotations

import io
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, LoadPlan, LoadPlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadItemType
from torch.futures import Future

from components.errors import first_line


class UntrustedReader(FileSystemReader):
    """A FileSystemReader that, unlike torch's, unpickles neither the metadata nor objects other than tensors."""

    def __init__(self, checkpoint: Path, metadata: Metadata) -> None:
        """`metadata` must have been checked (see metadata.py)."""
        super().__init__(checkpoint)
        self.metadata = metadata

    def read_metadata(self, *arguments: Any, **options: Any) -> Metadata:
        return self.metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            place = self.storage_data[item.storage_index]
            with (Path(self.path) / place.relative_path).open("rb") as file:
                file.seek(place.offset)
                content = file.read(place.length)
            what = f"{item.storage_index.fqn} in {place.relative_path}"
            loaded = _load(content, what)
            if item.type == LoadItemType.BYTE_IO:
                planner.load_bytes(item, _resaved(loaded, what))
                continue
            if not isinstance(loaded, Tensor):
                raise ValueError(f"{what} is not a tensor")
            for dimension, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                loaded = loaded.narrow(dimension, start, length)
            target = planner.resolve_tensor(item).detach()
            if target.size() != loaded.size():
                raise ValueError(f"{what} has shape {tuple(loaded.size())}, expected {tuple(target.size())}")
            target.copy_(loaded)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _load(content: bytes, what: str) -> Any:
    """Return the object that `torch.save` wrote. Raises ValueError if loading it needs code or its size is false."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise ValueError("it is compressed, and may unpack to any size")
            byte_orders = [archive.read(entry) for entry in entries if entry.filename.endswith("/byteorder")]
        if any(order != sys.byteorder.encode() for order in byte_orders):
            raise ValueError("it was written on a machine with another byte order")
        loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        stored = sum(entry.file_size for entry in entries if "/data/" in entry.filename)
        if isinstance(loaded, Tensor):
            # torch does not check the length in the pickle
            if loaded.layout != torch.strided or loaded.untyped_storage().nbytes() > stored:
                raise ValueError("it claims more bytes than it has")
        elif stored:
            raise ValueError("it holds tensors where only settings are expected")
        return loaded
    except Exception as error:  # a damaged archive may raise any exception
        reason = first_line(error)
        raise ValueError(f"{what} is damaged, or holds more than tensors, which is never loaded: {reason}") from None


def _resaved(value: Any, what: str) -> io.BytesIO:
    """Return `value`, a plain one, pickled again: the planner of torch unpickles it unchecked."""
    if not isinstance(value, (bool, int, float, str, type(None), list, tuple, dict)):
        raise ValueError(f"{what} is a {type(value).__name__}, not a setting")
    stream = io.BytesIO()
    torch.save(value, stream)
    stream.seek(0)
    return stream
