"""From documents to shards: the slow part of preparing a data set. `tokenize_missing` takes these steps:

1. leave out the files that the store holds already, and put neighbouring files together into groups;
2. `tokenize_group`, on all processors (tokenize_workers.py): find the shards of the group that exist already,
3. read the documents after those (`_read_chunks`),
4. encode them in batches (`_batches`, `_encode`),
5. append the ids to shards, each under a temporary name until it is complete (shard_writer.py).

Complete shards of a killed process stay. The cuts depend on the text alone, so the next process writes the same shards,
byte by byte, as an uninterrupted one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from components.cpu import num_cpus
from components.data.document import ReadStats, SourceFile, to_utf8
from components.data.shard_writer import Chunk, ShardWriter
from components.data.shards import EncodedFile, group_name, list_encoded, shards_of
from components.data.tokenize_workers import is_picklable, run_in_processes
from components.interfaces import Tokenizer

SHARD_TOKENS = 2**26
"""A shard is closed after the document that takes it past this many tokens: 128 MiB of uint16."""

_GROUP_BYTES = 2**25
_GROUP_FILES = 2**12
"""Neighbouring files are tokenized together up to this size and number; a larger file is a group by itself."""

_BATCH_CHARACTERS = 2**22
_BATCH_CHUNKS = 2**12

_PARALLEL_THRESHOLD_BYTES = 2**26
"""Bytes of source below which starting processes takes longer than it saves."""


@dataclass(frozen=True)
class Preparation:
    """How far the preparation has come; `str` makes a line to display."""

    source: str
    done_bytes: int
    total_bytes: int
    """0 where the source does not know."""
    tokens: int
    seconds: float

    def __str__(self) -> str:
        rate = self.done_bytes / max(self.seconds, 1e-9)
        line = f"preparing {self.source}: {self.done_bytes / 1e6:,.1f}"
        if self.total_bytes:
            left = max(0, self.total_bytes - self.done_bytes) / max(rate, 1e-9)
            line += (
                f" of {self.total_bytes / 1e6:,.1f} MB ({self.done_bytes / self.total_bytes:.0%}), {left:,.0f} s left"
            )
        else:
            line += " MB"
        return f"{line}; {self.tokens:,} tokens, {rate / 1e6:.1f} MB/s"


class _ProgressReporter:
    """Adds up what was done, and reports it every `report_seconds`."""

    def __init__(self, source: str, total_bytes: int, report: Callable[[Preparation], None], report_seconds: float):
        self._source, self._total = source, total_bytes
        self._report, self._seconds = report, report_seconds
        self._started = self._reported = time.monotonic()
        self._bytes = self._tokens = 0

    def add(self, read_bytes: int, tokens: int) -> None:
        self._bytes, self._tokens = self._bytes + read_bytes, self._tokens + tokens
        now = time.monotonic()
        if now - self._reported >= self._seconds:
            self._reported = now
            self._report(Preparation(self._source, self._bytes, self._total, self._tokens, now - self._started))


def tokenize_missing(
    source_files: Sequence[SourceFile],
    store: Path,
    *,
    tokenizer: Tokenizer,
    source: str,
    report: Callable[[Preparation], None],
    report_seconds: float,
    shard_tokens: int = SHARD_TOKENS,
    group_bytes: int = _GROUP_BYTES,
    processes: int | None = None,
) -> dict[str, EncodedFile]:
    """Tokenize the source_files that `store` does not hold; return where every source_file lies, by content.

    If another process does the same meanwhile, the first to finish a shard wins and both succeed. `source` is a name to
    display; `report` is called at most every `report_seconds`; `processes` is by default chosen by processors and work.
    Raises ValueError or OSError for what cannot be read or encoded; what was tokenized until then stays.
    """
    existing = list_encoded(store)
    wanted = list({source_file.content: source_file for source_file in source_files}.values())
    groups = [
        missing
        for group in group_neighbours(wanted, group_bytes)
        if (missing := [source_file for source_file in group if source_file.content not in existing])
    ]
    if not groups:
        return existing
    total = sum(source_file.size_bytes for group in groups for source_file in group)
    reporter = _ProgressReporter(source, total, report, report_seconds)
    work = partial(tokenize_group, store=store, shard_tokens=shard_tokens)
    if processes is None:
        processes = min(len(groups), num_cpus()) if total >= _PARALLEL_THRESHOLD_BYTES else 1
    if processes > 1 and is_picklable(tokenizer, groups):
        run_in_processes(work, groups, tokenizer, processes, reporter.add)
    else:
        for group in groups:
            work(group, tokenizer=tokenizer, encode=tokenizer.encode_batch, on_progress=reporter.add)
    return list_encoded(store)


def group_neighbours(source_files: Sequence[SourceFile], group_bytes: int) -> Iterator[list[SourceFile]]:
    """Yield neighbouring source_files together until they are large enough."""
    group: list[SourceFile] = []
    size = 0
    for source_file in source_files:
        if group and (size + source_file.size_bytes > group_bytes or len(group) >= _GROUP_FILES):
            yield group
            group, size = [], 0
        group.append(source_file)
        size += source_file.size_bytes
    if group:
        yield group


def tokenize_group(
    source_files: Sequence[SourceFile],
    store: Path,
    *,
    tokenizer: Tokenizer,
    encode: Callable[[Sequence[str]], list[np.ndarray]],
    shard_tokens: int,
    on_progress: Callable[[int, int], None],
) -> None:
    """Write the shards of `source_files` that do not exist yet. Another process may do the same at the same time.

    `encode` is the tokenizer's, on as many threads as are to work. `on_progress` receives the bytes read and the tokens
    written since its last call; what existed already counts.
    """
    group = group_name(source_files)
    existing = list(shards_of(store, group))
    if existing and existing[-1].last:
        on_progress(
            sum(source_file.size_bytes for source_file in source_files), sum(shard.tokens for shard in existing)
        )
        return
    records = [record for shard in existing for record in shard.source_files]
    ended = {record.content for record in records if record.ended}
    skip_documents = 0  # of the first source_file that has not ended
    for record in records:
        skip_documents = 0 if record.ended else skip_documents + record.read
    if existing:
        done = sum(source_file.size_bytes for source_file in source_files if source_file.content in ended)
        on_progress(done, sum(shard.tokens for shard in existing))
    remaining = [source_file for source_file in source_files if source_file.content not in ended]
    with ShardWriter(store, group, len(existing), tokenizer, shard_tokens) as writer:
        for batch, read_bytes in _batches(_read_chunks(remaining, skip_documents)):
            tokens_before = writer.tokens
            for chunk, ids in zip(batch, _encode(batch, encode, tokenizer.vocab_size), strict=True):
                writer.add(chunk, ids)
            on_progress(read_bytes, writer.tokens - tokens_before)
        writer.finish()


def _read_chunks(source_files: Sequence[SourceFile], skip_documents: int) -> Iterator[tuple[Chunk, int]]:
    """Yield the chunks of all documents but the first `skip_documents`, each with the bytes of source read for it."""
    for source_file in source_files:
        log, before = ReadStats(), 0
        for document in source_file.read(log):
            text, data = to_utf8(document.text, log)
            if skip_documents:
                skip_documents -= document.complete
                continue
            yield Chunk(source_file, text, data, document.complete), log.source_bytes - before
            before = log.source_bytes
        yield Chunk(source_file, None, fixups=log.fixups), log.source_bytes - before
        skip_documents = 0


def _batches(chunks: Iterable[tuple[Chunk, int]]) -> Iterator[tuple[list[Chunk], int]]:
    """Yield batches and their bytes of source: enough text to keep a tokenizer's threads busy, not more."""
    batch: list[Chunk] = []
    characters = read_bytes = 0
    for chunk, chunk_bytes in chunks:
        batch.append(chunk)
        characters, read_bytes = characters + len(chunk.text or ""), read_bytes + chunk_bytes
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_CHUNKS:
            yield batch, read_bytes
            batch, characters, read_bytes = [], 0, 0
    if batch:
        yield batch, read_bytes


def _encode(
    batch: Sequence[Chunk], encode: Callable[[Sequence[str]], list[np.ndarray]], vocab_size: int
) -> Iterator[np.ndarray | None]:
    """Yield the ids of each chunk, None for one without text. Raises ValueError for ids outside the vocabulary."""
    encoded = iter(encode([chunk.text for chunk in batch if chunk.text is not None]))
    for chunk in batch:
        ids = None if chunk.text is None else next(encoded)
        if ids is not None and len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
            raise ValueError(f"the tokenizer gave ids from {ids.min()} to {ids.max()}; its vocabulary is {vocab_size}")
        yield ids
