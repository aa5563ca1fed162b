"""From documents to token shards on disk, atomically: the directory is complete or it is not there."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from components.data.atomic import sync_file, written_aside
from components.data.document import Document, EncodesText, ReadingLog
from components.data.shards import DOCUMENT_DTYPE, FORMAT, INDEX, Index, Shard, documents_file, token_dtype, tokens_file

SHARD_TOKENS = 2**28
"""A shard is closed after the document that takes it past this many tokens: half a gigabyte of uint16."""

_BATCH_CHARACTERS = 2**22
_BATCH_DOCUMENTS = 2**12


@dataclass(frozen=True)
class Preparation:
    """How far preparing has come; `str` makes a line for people."""

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


def prepare(
    documents: Iterable[Document],
    directory: Path,
    *,
    tokenizer: EncodesText,
    source: str,
    content: str,
    log: ReadingLog,
    total_bytes: int,
    report: Callable[[Preparation], None],
    report_seconds: float,
    shard_tokens: int = SHARD_TOKENS,
) -> None:
    """Write `directory`. If another process writes the same one meanwhile, the first to finish wins and both succeed.

    `source` and `content` name the text for people and for machines (its fingerprint); `log` is the one that iterating
    `documents` fills. `report` is called at most every `report_seconds`. Raises ValueError if there is no text at all.
    """
    started = reported = time.monotonic()
    with written_aside(directory) as aside:
        writer = _Writer(aside, tokenizer, log, shard_tokens)
        for batch in _batches(documents):
            writer.add(batch)
            if time.monotonic() - reported >= report_seconds:
                reported = time.monotonic()
                report(Preparation(source, log.source_bytes, total_bytes, writer.tokens, reported - started))
        shards = writer.finish()
        if not shards:
            raise ValueError(f"{source} holds no text: {log.repairs['empty documents']:,} empty documents")
        index = Index(
            format=FORMAT,
            source=source,
            content=content,
            tokenizer=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            end_of_document=tokenizer.end_of_document,
            dtype=token_dtype(tokenizer.vocab_size),
            repairs=dict(sorted(log.repairs.items())),
            shards=shards,
        )
        with (aside / INDEX).open("wb") as file:
            file.write(index.model_dump_json(indent=2).encode())
            sync_file(file)


class _Writer:
    """Encodes documents and appends them to shards in `directory`."""

    def __init__(self, directory: Path, tokenizer: EncodesText, log: ReadingLog, shard_tokens: int):
        self._directory = directory
        self._tokenizer = tokenizer
        self._log = log
        self._shard_tokens = shard_tokens
        self._dtype = np.dtype(token_dtype(tokenizer.vocab_size)).newbyteorder("<")
        self._end = np.array([tokenizer.end_of_document], dtype=self._dtype)
        self._shards: list[Shard] = []
        self._open: _OpenShard | None = None
        self._tokens = self._bytes = 0  # of the document that is being written
        self.tokens = 0
        """Written so far."""

    def add(self, batch: list[Document]) -> None:
        texts, sizes = zip(*(self._storable(document.text) for document in batch), strict=True)
        encoded = self._tokenizer.encode_batch(texts)
        self._check(np.concatenate(encoded))
        for document, size, ids in zip(batch, sizes, encoded, strict=True):
            if self._tokens == 0 and document.complete and not document.text.strip():
                self._log.repairs["empty documents"] += 1
                continue
            self._append(ids)
            self._bytes += size
            if document.complete:
                self._end_document()

    def finish(self) -> list[Shard]:
        """What was written, every file on the disk."""
        if self._tokens:
            self._end_document()
        self._close_shard()
        return self._shards

    def _storable(self, text: str) -> tuple[str, int]:
        """Text that UTF-8 can hold, and its bytes: a lone surrogate (JSON can spell one) becomes U+FFFD."""
        try:
            return text, len(text.encode())
        except UnicodeEncodeError:
            repaired = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            self._log.repairs["replaced characters"] += repaired.count("\ufffd") - text.count("\ufffd")
            return repaired, len(repaired.encode())

    def _check(self, ids: np.ndarray) -> None:
        """A tokenizer of the user's own may be wrong; an id that does not fit would be stored as another one."""
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self._tokenizer.vocab_size:
            size = self._tokenizer.vocab_size
            raise ValueError(f"the tokenizer gave ids from {ids.min()} to {ids.max()}; its vocabulary is {size}")

    def _append(self, ids: np.ndarray) -> None:
        if self._open is None:
            self._open = _OpenShard(self._directory, len(self._shards))
        self._open.tokens.write(ids.astype(self._dtype, copy=False))
        self._tokens += len(ids)
        self.tokens += len(ids)

    def _end_document(self) -> None:
        self._append(self._end)
        assert self._open is not None
        self._open.documents.write(np.array([self._tokens, self._bytes], dtype=DOCUMENT_DTYPE))
        self._open.text_bytes += self._bytes
        self._tokens = self._bytes = 0
        if self._open.tokens.count >= self._shard_tokens:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._open is not None:
            self._shards.append(self._open.close())
            self._open = None


class _OpenShard:
    """The two files of a shard that is being written."""

    def __init__(self, directory: Path, number: int):
        self._number = number
        self.tokens = _HashedFile(directory / tokens_file(number))
        self.documents = _HashedFile(directory / documents_file(number))
        self.text_bytes = 0

    def close(self) -> Shard:
        return Shard(
            number=self._number,
            tokens=self.tokens.count,
            documents=self.documents.count // 2,
            text_bytes=self.text_bytes,
            tokens_sha256=self.tokens.close(),
            documents_sha256=self.documents.close(),
        )


class _HashedFile:
    """A file of numbers that knows how many it has and their SHA-256."""

    def __init__(self, path: Path):
        self._file = path.open("wb", buffering=2**20)
        self._digest = hashlib.sha256()
        self.count = 0

    def write(self, numbers: np.ndarray) -> None:
        data = numbers.tobytes()
        self._digest.update(data)
        self._file.write(data)
        self.count += numbers.size

    def close(self) -> str:
        sync_file(self._file)
        self._file.close()
        return self._digest.hexdigest()


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Enough text at a time to keep the threads of a tokenizer busy, little enough to hold."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
