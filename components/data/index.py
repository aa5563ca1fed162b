"""A prepared data set: which documents of which shards, in which order. It holds no tokens of its own.

TextFiles-<content>/
    index.json       counts, what was dropped and why, and the shards it refers to, beside it in the cache
    segments.npy     (n, 5) int64, a run of documents a row: shard, first token, tokens, first document, documents
    pieces.json      [name, documents] of each piece of the source, in order
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import ConfigDict, Field, RootModel

from components.atomic_files import atomic_directory, write_fsync
from components.data.file_hash_cache import FileHashCache
from components.data.shards import (
    DOCUMENT_DTYPE,
    DOCUMENTS,
    FORMAT,
    Digest,
    EncodedFile,
    Size,
    StrictModel,
    check_file,
    check_shard,
    read_record,
    rebuild_error,
    token_dtype,
)
from components.interfaces import Tokenizer

INDEX, SEGMENTS, PIECES = "index.json", "segments.npy", "pieces.json"


class Index(StrictModel):
    """index.json"""

    format: Literal[2]
    source: str
    """Where the text came from, for people."""
    content: str
    """Fingerprint of that text and of the selection."""
    tokenizer: str
    """Fingerprint of the tokenizer."""
    vocab_size: Annotated[int, Field(ge=1, lt=2**31)]
    end_of_document: Size
    dtype: Literal["uint16", "uint32"]
    documents: Size
    text_bytes: Size
    tokens: Size
    dropped: dict[str, int]
    """Documents that were left out, by reason: "empty", "duplicate", "held out", "not held out"."""
    repairs: dict[str, int]
    """What was found and put right while reading, by name."""
    store: Annotated[str, Field(pattern=r"^encoded-[0-9a-f]{20}$")]
    """The directory of the shards, beside this one."""
    shards: Annotated[list[Annotated[str, Field(pattern=r"^shard-[0-9a-f]{20}-\d{5}$")]], Field(min_length=1)]
    segments: Size
    segments_sha256: Digest

    @property
    def token_dtype(self) -> np.dtype:
        """Of the ids in a shard: little-endian on every machine."""
        return np.dtype(self.dtype).newbyteorder("<")

    def __str__(self) -> str:
        text = f"{self.documents:,} documents, {self.text_bytes:,} bytes, {self.tokens:,} tokens"
        if self.tokens:
            text += f", {self.text_bytes / self.tokens:.2f} bytes a token"
        for what, counts in (("dropped", self.dropped), ("put right", self.repairs)):
            if listed := ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items()) if count):
                text += f"; {what}: {listed}"
        return text


class DocumentFilter(StrictModel):
    """Which documents of a source are wanted."""

    deduplicate: bool
    validation_fraction: float
    split: Literal["train", "validation"]

    def keep(self, hashes: np.ndarray, dropped: Counter[str]) -> np.ndarray:
        """(n,) bool, from the (n, 2) uint64 hashes of all documents in their order. Counts what it leaves out."""
        kept = np.ones(len(hashes), dtype=bool)
        if self.deduplicate:
            order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: the first of equals stays first
            again = (hashes[order[1:]] == hashes[order[:-1]]).all(axis=1)
            kept[order[1:][again]] = False
            dropped["duplicate"] = int(again.sum())
        if self.validation_fraction:
            # The first half of the hash is a number below 2**64; compared as 53 bits, so that a float holds it.
            in_validation = (hashes[:, 0] >> np.uint64(11)) < np.uint64(round(self.validation_fraction * 2**53))
            wanted = in_validation == (self.split == "validation")
            dropped[f"not in the {self.split} split"] = int((kept & ~wanted).sum())
            kept &= wanted
        return kept


class Pieces(RootModel[list[tuple[str, Size]]]):
    """pieces.json: of each piece of text its name, and how many of its documents are used."""

    model_config = ConfigDict(frozen=True, strict=True)


def write_index(
    directory: Path,
    pieces: Sequence[tuple[str, EncodedFile]],
    *,
    source: str,
    content: str,
    tokenizer: Tokenizer,
    store: str,
    selection: DocumentFilter,
) -> None:
    """Write the data set `directory` of encoded pieces, each with its name, in their order.

    Raises ValueError if nothing is left of the text.
    """
    fragments = [fragment for _, piece in pieces for fragment in piece.fragments if fragment.documents]
    documents = _documents(directory.parent / store, fragments)
    dropped: Counter[str] = Counter()
    read = sum(piece.read for _, piece in pieces)
    dropped["empty"] = read - len(documents)
    kept = selection.keep(documents["hash"], dropped)
    shards = list(dict.fromkeys(fragment.shard for fragment in fragments))
    segments = _segments(fragments, {shard: number for number, shard in enumerate(shards)}, documents["tokens"], kept)
    if not len(segments):
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items() if count)
        raise ValueError(f"{source} holds no text: of {read:,} documents, {reasons or 'none'} were dropped")
    repairs: Counter[str] = Counter()
    ends = np.cumsum([sum(fragment.documents for fragment in piece.fragments) for _, piece in pieces])
    kept_before = np.concatenate([[0], np.cumsum(kept)])[np.concatenate([[0], ends])]
    for _, piece in pieces:
        repairs.update(piece.repairs)
    names = [[_printable(name), int(count)] for (name, _), count in zip(pieces, np.diff(kept_before), strict=True)]
    stored = io.BytesIO()
    np.save(stored, segments, allow_pickle=False)
    index = Index(
        format=FORMAT,
        source=source,
        content=content,
        tokenizer=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        end_of_document=tokenizer.end_of_document,
        dtype=token_dtype(tokenizer.vocab_size),
        documents=int(kept.sum()),
        text_bytes=int(documents["bytes"][kept].sum()),
        tokens=int(segments[:, 2].sum()),
        dropped=dict(sorted(dropped.items())),
        repairs=dict(sorted(repairs.items())),
        store=store,
        shards=shards,
        segments=len(segments),
        segments_sha256=hashlib.sha256(stored.getvalue()).hexdigest(),
    )
    with atomic_directory(directory) as aside:
        files = {SEGMENTS: stored.getvalue(), PIECES: json.dumps(names).encode(), INDEX: _json(index)}
        for name, data in files.items():
            write_fsync(aside / name, data)


def open_index(directory: Path, *, tokenizer: Tokenizer, hashes: FileHashCache) -> tuple[Index, np.ndarray]:
    """The index of `directory` and its segments, once they and all shards are known to be right.

    Raises ValueError naming the file that is wrong and the remedy.
    """
    index = read_record(directory / INDEX, Index)
    found = {
        check_shard(directory.parent / index.store / shard, tokenizer=tokenizer, hashes=hashes).dtype
        for shard in index.shards
    }
    path = directory / SEGMENTS
    if not path.is_file():
        raise ValueError(rebuild_error(path, "is missing"))
    check_file(path, path.stat().st_size, index.segments_sha256, hashes)
    # Mapped: with documents left out there is a row for each run of them, 4 GB of a trillion tokens, and every process
    # of a machine would hold its own.
    segments: np.ndarray = np.load(path, allow_pickle=False, mmap_mode="r")
    if segments.shape != (index.segments, 5) or int(segments[:, 2].sum()) != index.tokens or found != {index.dtype}:
        raise ValueError(rebuild_error(path, "does not belong to its index"))
    return index, segments


def _printable(name: str) -> str:
    """A file name that is no UTF-8 as one that is."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _json(index: Index) -> bytes:
    return index.model_dump_json(indent=1).encode()


def _documents(store: Path, fragments: Sequence[tuple[str, int, int, int, int]]) -> np.ndarray:
    """The DOCUMENT_DTYPE rows of all fragments in order."""
    rows = []
    for shard, _, _, first, count in fragments:
        path = store / shard / DOCUMENTS
        rows.append(np.fromfile(path, DOCUMENT_DTYPE, count=count, offset=first * DOCUMENT_DTYPE.itemsize))
        if len(rows[-1]) < count:
            raise ValueError(rebuild_error(path, "is truncated"))
    return np.concatenate(rows) if rows else np.empty(0, dtype=DOCUMENT_DTYPE)


def _segments(
    fragments: Sequence[tuple[str, int, int, int, int]],
    numbers: dict[str, int],
    lengths: np.ndarray,
    kept: np.ndarray,
) -> np.ndarray:
    """(n, 5) int64: runs of kept documents that lie one after the other in a shard, as long as they can be."""
    if not len(lengths):
        return np.empty((0, 5), dtype=np.int64)
    counts = [count for *_, count in fragments]
    if kept.all():  # the fragments say it all, without an array of numbers for each document
        rows = [(numbers[name], token, tokens, first, count) for name, token, tokens, first, count in fragments]
        return _joined(np.array(rows, dtype=np.int64))
    shard = np.repeat([numbers[name] for name, *_ in fragments], counts)
    in_fragment = np.arange(len(lengths)) - np.repeat(np.cumsum(counts) - counts, counts)
    document = np.repeat([first for *_, first, _ in fragments], counts) + in_fragment
    ends = np.cumsum(lengths)
    before_fragment = np.repeat((ends - lengths)[np.cumsum(counts) - counts], counts)
    token = np.repeat([first for _, first, *_ in fragments], counts) + (ends - lengths) - before_fragment
    rows = np.stack([shard, token, lengths, document, np.ones_like(document)], axis=1)[kept].astype(np.int64)
    return _joined(rows) if len(rows) else rows


def _joined(rows: np.ndarray) -> np.ndarray:
    """Rows as those of `_segments`, of which those that follow one another in a shard become one."""
    joined = (rows[1:, 0] == rows[:-1, 0]) & (rows[1:, 3] == rows[:-1, 3] + rows[:-1, 4])
    starts = np.flatnonzero(np.concatenate([[True], ~joined]))
    segments: np.ndarray = rows[starts]
    for column in (2, 4):
        segments[:, column] = np.add.reduceat(rows[:, column], starts)
    return segments
