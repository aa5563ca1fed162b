"""The index of a prepared data set: its documents in the shards of the cache, in order. It contains no tokens.

TextFiles-<content>/
    index.json          counts, dropped documents by reason, and the shards it refers to, beside it in the cache
    spans.npy           (n, 5) int64; a row is a run of documents: shard, first token, tokens, first document, documents
    source_files.json   [name, documents] of each source file, in order
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
    FORMAT,
    EncodedFile,
    Shard,
    check_file,
    check_shard,
    read_documents,
    read_record,
    rebuild_error,
    token_dtype,
)
from components.data.token_reader import map_array
from components.interfaces import Tokenizer
from components.json_files import Digest, Size, StrictModel

INDEX, SPANS, SOURCE_FILES = "index.json", "spans.npy", "source_files.json"
_BLOCK_SPANS = 2**20


class Index(StrictModel):
    """The content of index.json."""

    format: Literal[3]
    source: str
    """The source, for display."""
    content: str
    """Fingerprint of the text and of the document filter."""
    tokenizer: str
    """Fingerprint of the tokenizer."""
    vocab_size: Annotated[int, Field(ge=1, lt=2**31)]
    end_of_document: Size
    dtype: Literal["uint16", "uint32"]
    documents: Size
    text_bytes: Size
    tokens: Size
    dropped: dict[str, int]
    """Documents that are not used, by reason: "empty", "duplicate", "not in the train split", ..."""
    fixups: dict[str, int]
    """Number of fixes of the text by kind, as in `ReadStats`."""
    store: Annotated[str, Field(pattern=r"^encoded-[0-9a-f]{20}$")]
    """Name of the directory of the shards, beside this one."""
    shards: Annotated[list[Annotated[str, Field(pattern=r"^shard-[0-9a-f]{20}-\d{5}$")]], Field(min_length=1)]
    spans: Size
    spans_sha256: Digest

    def __str__(self) -> str:
        text = f"{self.documents:,} documents, {self.text_bytes:,} bytes, {self.tokens:,} tokens"
        if self.tokens:
            text += f", {self.text_bytes / self.tokens:.2f} bytes per token"
        for what, counts in (("dropped", self.dropped), ("fixed", self.fixups)):
            if listed := ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items()) if count):
                text += f"; {what}: {listed}"
        return text


class DocumentFilter(StrictModel):
    """Selects the documents of a source that are used."""

    deduplicate: bool
    validation_fraction: float
    split: Literal["train", "validation"]

    def keep(self, hashes: np.ndarray, dropped: Counter[str]) -> np.ndarray:
        """Return (n,) bool from the (n, 2) uint64 hashes of all documents in order. Counts the others in `dropped`."""
        kept = np.ones(len(hashes), dtype=bool)
        if self.deduplicate:
            order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: of equal documents, the first is kept
            is_duplicate = (hashes[order[1:]] == hashes[order[:-1]]).all(axis=1)
            kept[order[1:][is_duplicate]] = False
            dropped["duplicate"] = int(is_duplicate.sum())
        if self.validation_fraction:
            # The first half of the hash is uniform below 2**64; its upper 53 bits are compared, exact as a float.
            in_validation = (hashes[:, 0] >> np.uint64(11)) < np.uint64(round(self.validation_fraction * 2**53))
            wanted = in_validation == (self.split == "validation")
            dropped[f"not in the {self.split} split"] = int((kept & ~wanted).sum())
            kept &= wanted
        return kept


class FileCounts(RootModel[list[tuple[str, Size]]]):
    """The content of source_files.json: (name, number of used documents) of each source file."""

    model_config = ConfigDict(frozen=True, strict=True)


def write_index(
    directory: Path,
    source_files: Sequence[tuple[str, EncodedFile]],
    *,
    source: str,
    content: str,
    tokenizer: Tokenizer,
    store: str,
    document_filter: DocumentFilter,
) -> None:
    """Write the data set `directory` from the (name, encoded file) pairs `source_files`, in their order.

    Raises ValueError if no document is left.
    """
    file_spans = [span for _, source_file in source_files for span in source_file.spans if span.documents]
    documents = _documents(directory.parent / store, file_spans)
    dropped: Counter[str] = Counter()
    read = sum(source_file.read for _, source_file in source_files)
    dropped["empty"] = read - len(documents)
    kept = document_filter.keep(documents["hash"], dropped)
    shards = list(dict.fromkeys(span.shard for span in file_spans))
    spans = _select_spans(file_spans, {shard: number for number, shard in enumerate(shards)}, documents["tokens"], kept)
    if not len(spans):
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items() if count)
        raise ValueError(f"{source} holds no text: of {read:,} documents, {reasons or 'none'} were dropped")
    fixups: Counter[str] = Counter()
    ends = np.cumsum([sum(span.documents for span in source_file.spans) for _, source_file in source_files])
    kept_before = np.concatenate([[0], np.cumsum(kept)])[np.concatenate([[0], ends])]
    for _, source_file in source_files:
        fixups.update(source_file.fixups)
    names = [
        # bytes of a file name that are not UTF-8 are escaped
        [os.fsencode(name).decode("utf-8", "backslashreplace"), int(count)]
        for (name, _), count in zip(source_files, np.diff(kept_before), strict=True)
    ]
    buffer = io.BytesIO()
    np.save(buffer, spans, allow_pickle=False)
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
        tokens=int(spans[:, 2].sum()),
        dropped=dict(sorted(dropped.items())),
        fixups=dict(sorted(fixups.items())),
        store=store,
        shards=shards,
        spans=len(spans),
        spans_sha256=hashlib.sha256(buffer.getvalue()).hexdigest(),
    )
    with atomic_directory(directory) as temporary:
        write_fsync(temporary / SPANS, buffer.getvalue())
        write_fsync(temporary / SOURCE_FILES, json.dumps(names))
        write_fsync(temporary / INDEX, index.model_dump_json(indent=1))


def open_index(directory: Path, *, tokenizer: Tokenizer, hashes: FileHashCache) -> tuple[Index, np.ndarray]:
    """Return the index of `directory` and its (n, 5) spans, after verifying them and all shards.

    Raises ValueError, naming the damaged file and the remedy.
    """
    index = read_record(directory / INDEX, Index)
    shards = [
        check_shard(directory.parent / index.store / shard, tokenizer=tokenizer, hashes=hashes)
        for shard in index.shards
    ]
    path = directory / SPANS
    check_file(path, None, index.spans_sha256, hashes)
    # Memory-mapped: where documents are dropped there is a row for each run between them, 4 GB for a trillion tokens,
    # and every process of a machine would have a copy.
    try:
        spans = map_array(path)
    except ValueError as error:
        raise ValueError(rebuild_error(path, f"is damaged ({error})")) from None
    fits = (
        spans.shape == (index.spans, 5) and spans.dtype == np.int64 and {each.dtype for each in shards} == {index.dtype}
    )
    if not fits or int(spans[:, 2].sum()) != index.tokens or not _lie_within(spans, shards):
        raise ValueError(rebuild_error(path, "does not belong to its index"))
    return index, spans


def _lie_within(spans: np.ndarray, shards: Sequence[Shard]) -> bool:
    """Return whether the tokens and documents of all (n, 5) spans exist in the shards; read in blocks."""
    tokens, documents = (np.array([getattr(shard, name) for shard in shards]) for name in ("tokens", "documents"))
    for at in range(0, len(spans), _BLOCK_SPANS):
        shard, token, count, document, documents_here = spans[at : at + _BLOCK_SPANS].T
        if (spans[at : at + _BLOCK_SPANS] < 0).any() or (shard >= len(shards)).any():
            return False
        if (count > tokens[shard] - token).any() or (documents_here > documents[shard] - document).any():
            return False
    return True


def _documents(store: Path, file_spans: Sequence[tuple[str, int, int, int, int]]) -> np.ndarray:
    """Return the (documents,) rows of DOCUMENT_DTYPE of all spans, in order."""
    rows = [read_documents(store / shard, first, count) for shard, _, _, first, count in file_spans]
    return np.concatenate(rows) if rows else np.empty(0, dtype=DOCUMENT_DTYPE)


def _select_spans(
    file_spans: Sequence[tuple[str, int, int, int, int]],
    numbers: dict[str, int],
    lengths: np.ndarray,
    kept: np.ndarray,
) -> np.ndarray:
    """Return (n, 5) int64: the longest runs of kept documents that are contiguous in a shard.

    `numbers` maps shard names to indices; `lengths` and `kept`, (documents,), cover the documents of `file_spans`.
    """
    if not len(lengths):
        return np.empty((0, 5), dtype=np.int64)
    counts = [count for *_, count in file_spans]
    if kept.all():  # no arrays with an entry per document are needed
        rows = [(numbers[name], token, tokens, first, count) for name, token, tokens, first, count in file_spans]
        return _merge_rows(np.array(rows, dtype=np.int64))
    # (documents,) arrays: shard, index in the shard, and first token in the shard of each document.
    shard = np.repeat([numbers[name] for name, *_ in file_spans], counts)
    in_span = np.arange(len(lengths)) - np.repeat(np.cumsum(counts) - counts, counts)
    document = np.repeat([first for *_, first, _ in file_spans], counts) + in_span
    ends = np.cumsum(lengths)
    before_span = np.repeat((ends - lengths)[np.cumsum(counts) - counts], counts)
    token = np.repeat([first for _, first, *_ in file_spans], counts) + (ends - lengths) - before_span
    rows = np.stack([shard, token, lengths, document, np.ones_like(document)], axis=1)[kept].astype(np.int64)
    return _merge_rows(rows) if len(rows) else rows


def _merge_rows(rows: np.ndarray) -> np.ndarray:
    joined = (rows[1:, 0] == rows[:-1, 0]) & (rows[1:, 3] == rows[:-1, 3] + rows[:-1, 4])
    starts = np.flatnonzero(np.concatenate([[True], ~joined]))
    spans: np.ndarray = rows[starts]
    for column in (2, 4):
        spans[:, column] = np.add.reduceat(rows[:, column], starts)
    return spans
