"""TokenFiles: token ids written by other tools: nanoGPT, llm.c, NumPy, and Megatron-LM (`.bin` and `.idx`)."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from components.data.dataset import TokenDataset
from components.data.file_hash_cache import HASH_CACHE_FILE, FileHashCache
from components.data.sources.text_io import known_format
from components.data.token_reader import TokenReader, map_array
from components.errors import InputError, MissingFileError
from components.interfaces import Tokenizer
from components.paths import is_file
from components.storage.address import display
from components.storage.local_copy import fetch, fetch_file

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<QBQQ")  # version, code of the type, sequences, documents
_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""Integer types by code, from Megatron-LM's megatron/core/datasets/indexed_dataset.py."""

_CHECKED_DOCUMENTS = 1000

_LLMC_BYTES = 1024  # 256 int32: magic, version, ids; the rest is not used
_LLMC_TYPES = {(20240520, 1): "<u2", (20240801, 7): "<u4"}
"""Types by magic and version, from write_datafile in llm.c's dev/data/data_common.py."""

_MAX_PROBES, _PROBE_IDS = 512, 4096
"""Number of probes of ids when files are opened, over all files, and ids per probe."""
_MAX_PROBES_PER_FILE = 16
_HASHED_WHOLE = 2**28
"""Bytes of the largest file that is hashed as a whole: of terabytes it would take hours."""
_HASHED_BLOCKS, _BLOCK_BYTES = 1024, 2**16
_MIN_IDS = 64
"""With fewer ids, every other one may be 0 by chance."""


class _Tokens(NamedTuple):
    """The ids of a file, and its document boundaries if the file has them."""

    dtype: np.dtype
    spans: np.ndarray
    """(n, 2) int64: first id in the file, number of ids."""
    ends: np.ndarray | None
    """(documents,) int64: positions of the last id of each document in the concatenated spans."""
    has_dtype: bool = True
    """Whether the dtype is stored in the file; otherwise it is that of the key `dtype`."""


@dataclass(kw_only=True)
class TokenFiles:
    """A [data] section: files of token ids, made with the tokenizer of the recipe and read in place.

    A `.bin` file with an `.idx` file of the same name is read as Megatron-LM; llm.c and NumPy files are detected by
    their first bytes; other files are read as nanoGPT, ids without a header. Several files are concatenated. Ids from
    all parts of each file are checked against the vocabulary when they are opened. Files are hashed, of
    large ones a part, so that a run that resumes with other ids says so.
    """

    path: Path | list[Path]
    """One file, or several."""
    dtype: Literal["uint16", "uint32", "int32", "int64"] = "uint16"
    """Type of the ids, little-endian, in files without a header: uint16 for nanoGPT."""

    def build(
        self, *, tokenizer: Tokenizer, sequence_length: int, cache_dir: Path, progress: Callable[[str], None]
    ) -> TokenDataset:
        """Open the files. Raises FileNotFoundError, or ValueError with the file and the problem."""
        paths = self.path if isinstance(self.path, list) else [self.path]
        found = [self._read_tokens(path, tokenizer.vocab_size) for path in paths]
        for path, tokens in zip(paths, found, strict=True):
            _check_ids(path, tokens, tokenizer.vocab_size, min(_MAX_PROBES_PER_FILE, max(1, _MAX_PROBES // len(paths))))
        if not found:
            raise MissingFileError("path", "[] is empty; expected at least one file")
        if len({tokens.dtype for tokens in found}) > 1:
            types = ", ".join(f"{path} {tokens.dtype}" for path, tokens in zip(paths, found, strict=True))
            raise InputError("path", f"all files must have the same dtype: {types}")
        numbered = [
            np.concatenate([np.full((len(tokens.spans), 1), number), tokens.spans], axis=1)
            for number, tokens in enumerate(found)
        ]
        source = ", ".join(map(display, paths))
        reader = TokenReader(paths, found[0].dtype, np.concatenate(numbered).astype(np.int64))
        samples = TokenDataset(reader, sequence_length=sequence_length, vocab_size=tokenizer.vocab_size, source=source)
        start, end = 0, tokenizer.end_of_document
        for path, tokens in zip(paths, found, strict=True):
            ends = [] if tokens.ends is None else (start + tokens.ends[:_CHECKED_DOCUMENTS]).tolist()
            if any(samples.tokens(position, 1)[0] != end for position in ends):
                progress(
                    f"{path}: its documents do not end with id {end}, the end_of_document of this "
                    "tokenizer, so they are not separated (Megatron-LM writes the id with --append-eod)"
                )
            start += int(tokens.spans[:, 1].sum())
        with FileHashCache(cache_dir / HASH_CACHE_FILE) as hashes:
            samples.fingerprint = hashlib.sha256(self.fingerprint(hashes).encode()).hexdigest()[:16]
        return samples

    def fingerprint(self, hashes: FileHashCache) -> str:
        """Return a string that changes with the ids; of a large file only a part of them is read."""
        paths = self.path if isinstance(self.path, list) else [self.path]
        read = [file for path in paths for file in (path, _index_of(path)) if file is not None]
        return f"TokenFiles-2 {json.dumps([self.dtype, [_content_of(file, hashes) for file in read]])}"

    def _read_tokens(self, path: Path, vocab_size: int) -> _Tokens:
        fetch_file(path)
        index = _index_of(path)
        if index is not None:
            return _read_megatron(index, path.stat().st_size)
        with path.open("rb") as file:
            start = file.read(_LLMC_BYTES)
        other = known_format(start)
        if other == "NumPy":
            return _read_numpy(path)
        if other is not None:
            raise ValueError(f"{path} is a {other} file; expected one of nanoGPT, llm.c, NumPy or Megatron-LM")
        if len(start) == _LLMC_BYTES and (header := struct.unpack("<3i", start[:12]))[:2] in _LLMC_TYPES:
            return _read_llmc(path, np.dtype(_LLMC_TYPES[header[:2]]), header[2])
        if self.dtype == "uint16" and vocab_size > 2**16:
            raise InputError(
                "dtype",
                f"uint16 cannot hold the {vocab_size:,} ids of the tokenizer; set it to uint32, or use the "
                f"tokenizer that made {path}",
            )
        dtype = np.dtype(self.dtype).newbyteorder("<")
        count, rest = divmod(path.stat().st_size, dtype.itemsize)
        if rest:
            raise ValueError(f"{path} has {path.stat().st_size:,} bytes, not a multiple of the size of {self.dtype}")
        return _Tokens(dtype, np.array([[0, count]], dtype=np.int64), None, has_dtype=False)


def _content_of(path: Path, hashes: FileHashCache) -> str:
    """Return a hash of a file, of a large one that of its size and of evenly spaced blocks."""
    size = path.stat().st_size
    if size <= _HASHED_WHOLE:
        return hashes.sha256(path)
    content = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for number in range(_HASHED_BLOCKS):
            file.seek(number * (size - _BLOCK_BYTES) // (_HASHED_BLOCKS - 1))
            content.update(file.read(_BLOCK_BYTES))
    return content.hexdigest()


def _index_of(path: Path) -> Path | None:
    if path.suffix != ".bin":
        return None
    index = path.with_suffix(".idx")
    fetch(index, missing_ok=True)
    return index if is_file(index) else None


def _check_ids(path: Path, tokens: _Tokens, vocab_size: int, probes: int) -> None:
    """Raise ValueError if ids in `probes` places, spread over the file, cannot be of the vocabulary."""
    ids = _probe_ids(path, tokens, probes)
    low, high = (int(ids.min()), int(ids.max())) if len(ids) else (0, 0)
    if low < 0 or high >= vocab_size:
        problem = f"token id {low if low < 0 else high} is outside the vocabulary of {vocab_size}"
    elif not tokens.has_dtype and len(ids) >= _MIN_IDS and ids[0::2].any() and not ids[1::2].any():
        problem = "every other id is 0, as in ids of twice the size"  # their upper halves, in a small vocabulary
    else:
        return
    remedy = "" if tokens.has_dtype else f", or its ids are not little-endian {tokens.dtype.name}: set dtype"
    raise ValueError(f"{path}: {problem}; it was made with another tokenizer, or has another format{remedy}")


def _probe_ids(path: Path, tokens: _Tokens, probes: int) -> np.ndarray:
    """Return (n,) ids from `probes` places. The start in the span and the number of ids are even."""
    lengths = tokens.spans[:, 1]
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    positions = np.unique(np.linspace(0, max(total - 1, 0), probes, dtype=np.int64))
    parts = [np.empty(0, tokens.dtype)]
    for position in positions[positions < total].tolist():
        span = int(np.searchsorted(ends, position, side="right"))
        skipped = (position - int(ends[span] - lengths[span])) // 2 * 2
        count = min(_PROBE_IDS, max(total // probes, 2), int(lengths[span]) - skipped)
        offset = (int(tokens.spans[span, 0]) + skipped) * tokens.dtype.itemsize
        parts.append(np.fromfile(path, tokens.dtype, count // 2 * 2, offset=offset))
    return np.concatenate(parts)


def _read_llmc(path: Path, dtype: np.dtype, count: int) -> _Tokens:
    size, whole = path.stat().st_size, _LLMC_BYTES + count * dtype.itemsize
    if size != whole:
        raise ValueError(
            f"{path} is damaged: {size:,} bytes, expected {whole:,} from the {count:,} ids in its llm.c header"
        )
    return _Tokens(dtype, np.array([[_LLMC_BYTES // dtype.itemsize, count]], dtype=np.int64), None)


def _read_numpy(path: Path) -> _Tokens:
    try:
        array: Any = map_array(path)
    except ValueError as error:
        raise ValueError(f"{path} is damaged, or is not a NumPy file of numbers: {error}") from None
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"{path} holds {array.dtype} of shape {array.shape}; expected integers of one dimension")
    first, rest = divmod(array.offset, array.dtype.itemsize)
    if rest:
        raise ValueError(f"{path}: its ids start at byte {array.offset}, not aligned; save it again with numpy.save")
    return _Tokens(array.dtype, np.array([[first, len(array)]], dtype=np.int64), None)


def _read_megatron(path: Path, bin_bytes: int) -> _Tokens:
    """Read the index of a Megatron-LM `MMapIndexedDataset`. Raises ValueError if it is damaged or of another format."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(len(_MAGIC) + _HEADER.size)
        if not header.startswith(_MAGIC) or len(header) < len(_MAGIC) + _HEADER.size:
            raise ValueError(f"{path} is not an index of Megatron-LM: it does not start with MMIDIDX and a header")
        version, code, sequences, documents = _HEADER.unpack(header[len(_MAGIC) :])
        if version != 1 or code not in _TYPES:
            raise ValueError(
                f"{path}: version {version}, type code {code}; expected version 1 and one of {sorted(_TYPES)}"
            )
        # (sequences,) int32 lengths and int64 pointers, then (documents,) int64 first sequences; modes may follow
        if len(header) + 12 * sequences + 8 * documents > size:
            raise ValueError(f"{path} is truncated: {size:,} bytes are too few for {sequences:,} sequences")
        lengths = np.fromfile(file, "<i4", sequences).astype(np.int64)
        pointers = np.fromfile(file, "<i8", sequences)
        starts = np.fromfile(file, "<i8", documents)
    dtype = np.dtype(_TYPES[code])
    firsts, rest = np.divmod(pointers, dtype.itemsize)
    if rest.any() or (lengths < 0).any() or (firsts < 0).any():
        raise ValueError(f"{path} is damaged: a sequence does not start at an id")
    end = int(((firsts + lengths) * dtype.itemsize).max()) if sequences else 0
    if end > bin_bytes:
        raise ValueError(
            f"{path.with_suffix('.bin')} is truncated: it has {bin_bytes:,} bytes, its index needs {end:,}"
        )
    if end < bin_bytes:
        raise ValueError(f"{path} is the index of another file: it covers {end:,} of {bin_bytes:,} bytes")
    if (np.diff(starts) < 0).any() or (documents and not 0 <= starts[0] <= starts[-1] <= sequences):
        raise ValueError(f"{path} is damaged: its documents are not in order")
    after = np.cumsum(lengths)
    last = np.unique(starts[1:][starts[1:] > 0]) - 1  # last sequence of each document
    ends = after[last][lengths[last] > 0] - 1
    return _Tokens(dtype, _merge_spans(firsts, lengths), ends)


def _merge_spans(firsts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return (n, 2) int64 spans (first id, number of ids), with contiguous ones merged."""
    if not len(firsts):
        return np.empty((0, 2), dtype=np.int64)
    starts = np.flatnonzero(np.concatenate([[True], firsts[1:] != firsts[:-1] + lengths[:-1]]))
    return np.stack([firsts[starts], np.add.reduceat(lengths, starts)], axis=1)
