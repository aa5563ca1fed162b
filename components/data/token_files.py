"""Token files that other tools wrote: nanoGPT's `.bin`, and Megatron-LM's `.bin` with its `.idx`."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from components.data.content import FileHashes
from components.data.document import EncodesText
from components.data.packed import PackedTokens
from components.data.stored_tokens import StoredTokens

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<QBQQ")  # version, code of the type, sequences, documents
_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""The whole-number types of Megatron-LM's megatron/core/datasets/indexed_dataset.py, by code."""

_CHECKED_DOCUMENTS = 1000


class _Tokens(NamedTuple):
    """A file's ids, and where its documents end, if it says so."""

    dtype: np.dtype
    segments: np.ndarray
    """(n, 2) int64: first id in the file, ids."""
    ends: np.ndarray | None
    """Positions of the last id of each document, in the whole of the segments; int64."""


@dataclass(kw_only=True)
class TokenFiles:
    """A [data] section: token ids as they lie, made with the tokenizer of the recipe. Nothing is prepared.

    A `.bin` with an `.idx` of the same name beside it is Megatron-LM's, whose index says the type of the ids; another
    is taken for nanoGPT's, ids without a header. Several files come one after the other.
    """

    path: Path | list[Path]
    """One `.bin` file, or several."""
    dtype: Literal["uint16", "uint32"] = "uint16"
    """Type of the ids where no index says it: nanoGPT's are uint16."""

    def build(
        self, *, tokenizer: EncodesText, sequence_length: int, cache_dir: Path, progress: Callable[[str], None]
    ) -> PackedTokens:
        """Raises FileNotFoundError, or ValueError naming the file and what is wrong with it."""
        paths = self.path if isinstance(self.path, list) else [self.path]
        found = [self._open(path, tokenizer.vocab_size) for path in paths]
        if not found:
            raise FileNotFoundError("path: [] names no file")
        if len({tokens.dtype for tokens in found}) > 1:
            types = ", ".join(f"{path} {tokens.dtype}" for path, tokens in zip(paths, found, strict=True))
            raise ValueError(f"path: files of different types cannot be one source: {types}")
        numbered = [
            np.concatenate([np.full((len(tokens.segments), 1), number), tokens.segments], axis=1)
            for number, tokens in enumerate(found)
        ]
        source = ", ".join(map(str, paths))
        stored = StoredTokens(paths, found[0].dtype, np.concatenate(numbered).astype(np.int64))
        samples = PackedTokens(stored, sequence_length=sequence_length, vocab_size=tokenizer.vocab_size, source=source)
        start = 0
        for path, tokens in zip(paths, found, strict=True):
            if tokens.ends is not None and not _ends_are(tokenizer.end_of_document, stored, start + tokens.ends):
                progress(
                    f"{path}: its documents do not end with id {tokenizer.end_of_document}, the end of a document of "
                    "this tokenizer; they follow one another without a mark (Megatron-LM writes one with --append-eod)"
                )
            start += int(tokens.segments[:, 1].sum())
        return samples

    def fingerprint(self, hashes: FileHashes) -> str:
        """Text that changes whenever the ids could be others."""
        paths = self.path if isinstance(self.path, list) else [self.path]
        read = [file for path in paths for file in (path, _index_of(path)) if file is not None]
        return f"TokenFiles-1 {json.dumps([self.dtype, [hashes.sha256(file) for file in read]])}"

    def _open(self, path: Path, vocab_size: int) -> _Tokens:
        if not path.is_file():
            raise FileNotFoundError(f"path: {path} does not exist")
        index = _index_of(path)
        if index is not None:
            return _read_megatron(index, path.stat().st_size)
        if self.dtype == "uint16" and vocab_size > 2**16:
            raise ValueError(
                f"dtype: uint16 cannot hold the {vocab_size:,} ids of the tokenizer; set it to uint32, or name the "
                f"tokenizer that made {path}"
            )
        dtype = np.dtype(self.dtype).newbyteorder("<")
        count, rest = divmod(path.stat().st_size, dtype.itemsize)
        if rest:
            raise ValueError(f"{path} holds {path.stat().st_size:,} bytes, which are no whole {self.dtype} ids")
        return _Tokens(dtype, np.array([[0, count]], dtype=np.int64), None)


def _index_of(path: Path) -> Path | None:
    index = path.with_suffix(".idx")
    return index if path.suffix == ".bin" and index.is_file() else None


def _read_megatron(path: Path, bin_bytes: int) -> _Tokens:
    """The index of `MMapIndexedDataset`, versions of 2019 to now. Raises ValueError for anything but a sound one."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(len(_MAGIC) + _HEADER.size)
        if not header.startswith(_MAGIC) or len(header) < len(_MAGIC) + _HEADER.size:
            raise ValueError(f"{path} is no index of Megatron-LM: it does not begin with MMIDIDX and a header")
        version, code, sequences, documents = _HEADER.unpack(header[len(_MAGIC) :])
        if version != 1 or code not in _TYPES:
            raise ValueError(f"{path}: version {version} with ids of type {code}; version 1 and whole numbers are read")
        # lengths int32, pointers int64, then for each document its first sequence, int64; modes may follow
        if len(header) + 12 * sequences + 8 * documents > size:
            raise ValueError(f"{path} is truncated: {size:,} bytes do not hold {sequences:,} sequences")
        lengths = np.fromfile(file, "<i4", sequences).astype(np.int64)
        pointers = np.fromfile(file, "<i8", sequences)
        starts = np.fromfile(file, "<i8", documents)
    dtype = np.dtype(_TYPES[code])
    firsts, rest = np.divmod(pointers, dtype.itemsize)
    if rest.any() or (lengths < 0).any() or (firsts < 0).any():
        raise ValueError(f"{path} is damaged: it points between ids")
    if sequences and int(((firsts + lengths) * dtype.itemsize).max()) > bin_bytes:
        raise ValueError(f"{path.with_suffix('.bin')} is truncated: its index points beyond its {bin_bytes:,} bytes")
    if (np.diff(starts) < 0).any() or (documents and not 0 <= starts[0] <= starts[-1] <= sequences):
        raise ValueError(f"{path} is damaged: its documents are out of order")
    after = np.cumsum(lengths)
    last = np.unique(starts[1:][starts[1:] > 0]) - 1  # last sequence of each document
    ends = after[last][lengths[last] > 0] - 1
    return _Tokens(dtype, _joined(firsts, lengths), ends)


def _joined(firsts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """(n, 2): runs of ids, neighbours that touch made one."""
    if not len(firsts):
        return np.empty((0, 2), dtype=np.int64)
    starts = np.flatnonzero(np.concatenate([[True], firsts[1:] != firsts[:-1] + lengths[:-1]]))
    return np.stack([firsts[starts], np.add.reduceat(lengths, starts)], axis=1)


def _ends_are(token: int, stored: StoredTokens, ends: np.ndarray) -> bool:
    last = np.empty(1, dtype=np.int64)
    for position in ends[:_CHECKED_DOCUMENTS].tolist():
        stored.read(position, last)
        if last[0] != token:
            return False
    return True
