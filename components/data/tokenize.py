"""Tokenizing documents into shards, the slow part of preparing a data set. The steps of `tokenize_missing`:

1. group neighboring files, and skip those that are in the store already;
2. `tokenize_group`, on all processors (tokenize_workers.py): find the existing shards of the group,
3. read the documents after those (`_read_chunks`),
4. encode them in batches (`_batches`, `_encode`),
5. append the ids to shards, each in a temporary directory until it is complete (shard_writer.py).

Complete shards of a killed process are kept. Shard boundaries depend only on the text, so the next process writes
exactly the same shards as an uninterrupted one.
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
"""A shard is closed after the document with which it exceeds this number of tokens: 128 MiB of uint16."""

_GROUP_BYTES = 2**25
_GROUP_FILES = 2**12
"""Neighboring files form a group up to this size and number; a larger file is a group by itself."""

_BATCH_CHARACTERS = 2**22
_BATCH_CHUNKS = 2**12

_PARALLEL_THRESHOLD_BYTES = 2**26
"""Source bytes from which starting processes saves time."""


@dataclass
class Preparation:
    """Progress of tokenization; `str` returns a line for display."""

    source: str
    total_bytes: int
    """0 if unknown."""
    report: Callable[[Preparation], None]
    """Called every `report_seconds`."""
    report_seconds: float
    done_bytes: int = 0
    tokens: int = 0
    seconds: float = 0.0
    """When it was reported last, since the start."""

    def __post_init__(self) -> None:
        self._started = time.monotonic()

    def add(self, read_bytes: int, tokens: int) -> None:
        self.done_bytes, self.tokens = self.done_bytes + read_bytes, self.tokens + tokens
        seconds = time.monotonic() - self._started
        if seconds - self.seconds >= self.report_seconds:
            self.seconds = seconds
            self.report(self)

    def __str__(self) -> str:
        bytes_per_second = self.done_bytes / max(self.seconds, 1e-9)
        line = f"preparing {self.source}: {self.done_bytes / 1e6:,.1f}"
        if self.total_bytes:
            eta = max(0, self.total_bytes - self.done_bytes) / max(bytes_per_second, 1e-9)
            line += f" of {self.total_bytes / 1e6:,.1f} MB ({self.done_bytes / self.total_bytes:.0%}), eta {eta:,.0f} s"
        else:
            line += " MB"
        return f"{line}; {self.tokens:,} tokens, {bytes_per_second / 1e6:.1f} MB/s"


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
    """Tokenize the source files that are not in `store`. Returns content -> encoded file of all files in `store`.

    Several processes may do the same at once: the first to finish a shard wins, and all succeed. `source` is a name for
    display; `report` is called at most every `report_seconds`; by default, `processes` depends on the processors and
    the amount of text. Raises ValueError or OSError for a file that cannot be read or encoded; finished shards stay.
    """
    existing = list_encoded(store)
    wanted = list({source_file.content: source_file for source_file in source_files}.values())
    neighbors = group_neighbors(wanted, group_bytes)
    groups = [missing for group in neighbors if (missing := [file for file in group if file.content not in existing])]
    if not groups:
        return existing
    total = sum(source_file.size_bytes for group in groups for source_file in group)
    progress = Preparation(source, total, report, report_seconds)
    work = partial(tokenize_group, store=store, shard_tokens=shard_tokens)
    if processes is None:
        processes = min(len(groups), num_cpus()) if total >= _PARALLEL_THRESHOLD_BYTES else 1
    if processes > 1 and is_picklable(tokenizer, groups):
        run_in_processes(work, groups, tokenizer, processes, progress.add)
    else:
        for group in groups:
            work(group, tokenizer=tokenizer, encode=tokenizer.encode_batch, on_progress=progress.add)
    return list_encoded(store)


def group_neighbors(source_files: Sequence[SourceFile], group_bytes: int) -> Iterator[list[SourceFile]]:
    """Yield groups of neighboring source files of at most `group_bytes`."""
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
    """Write the shards of `source_files` that do not exist yet. Other processes may do the same at the same time.

    `encode` is `encode_batch` of the tokenizer, on the wanted number of threads. `on_progress` receives the bytes read
    and the tokens written since its last call, including those of existing shards.
    """
    group = group_name(source_files)
    existing = list(shards_of(store, group))
    if existing and existing[-1].last:
        on_progress(sum(file.size_bytes for file in source_files), sum(shard.tokens for shard in existing))
        return
    records = [record for shard in existing for record in shard.source_files]
    ended = {record.content for record in records if record.ended}
    skip_documents = 0  # documents in existing shards of the first unfinished file
    for record in records:
        skip_documents = 0 if record.ended else skip_documents + record.read
    if existing:
        done = sum(file.size_bytes for file in source_files if file.content in ended)
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
    """Yield (chunk, source bytes read for it) of all documents after the first `skip_documents`."""
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
    """Yield (batch, source bytes read for it), with enough text to keep the threads of a tokenizer busy."""
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
    """Yield the (n,) ids of each chunk, None without text. Raises ValueError for ids outside the vocabulary."""
    encoded = iter(encode([chunk.text for chunk in batch if chunk.text is not None]))
    for chunk in batch:
        ids = None if chunk.text is None else next(encoded)
        if ids is not None and len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
            raise ValueError(
                f"the tokenizer returned ids from {ids.min()} to {ids.max()}; its vocab_size is {vocab_size}"
            )
        yield ids
