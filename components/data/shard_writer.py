"""From documents to shards: reads pieces of text, encodes them, and writes each shard aside until it is whole.

What a killed process wrote in whole shards stays. The cuts depend on the text alone, so who takes the work up writes
the same shards, byte by byte, as if nobody had been killed.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np

from components.atomic_files import atomic_directory, write_fsync
from components.data.document import Piece, ReadingLog, storable
from components.data.shards import (
    DOCUMENTS,
    FORMAT,
    RECORD,
    TOKENS,
    PieceRecord,
    Shard,
    group_name,
    parts_of,
    shard_name,
    token_dtype,
)
from components.interfaces import Tokenizer

SHARD_TOKENS = 2**26
"""A shard is closed after the document that takes it past this many tokens: 128 MiB of uint16."""

_BATCH_CHARACTERS = 2**22
_BATCH_PARTS = 2**12

_DOCUMENT = struct.Struct("<qq16s")
"""DOCUMENT_DTYPE of one document."""

Encode = Callable[[Sequence[str]], list[np.ndarray]]


class _Part(NamedTuple):
    """A document or a part of one, on its way; or, without text, the end of its piece."""

    piece: Piece
    text: str | None
    data: bytes = b""
    complete: bool = True
    repairs: Counter[str] | None = None


def encode_group(
    pieces: Sequence[Piece],
    store: Path,
    tokenizer: Tokenizer,
    *,
    encode: Encode,
    shard_tokens: int,
    advance: Callable[[int, int], None],
) -> None:
    """Write the shards of `pieces` that are not there yet. Another process that does the same is no harm.

    `encode` is the tokenizer's, on as many threads as are to work. `advance` is told the bytes read and tokens written
    since it was last called, what was there already included.
    """
    group = group_name(pieces)
    there = list(parts_of(store, group))
    if there and there[-1].last:
        advance(sum(piece.size_bytes for piece in pieces), sum(shard.tokens for shard in there))
        return
    records = [record for shard in there for record in shard.pieces]
    ended = {record.content for record in records if record.ended}
    skip = 0  # documents of the first piece that has not ended
    for record in records:
        skip = 0 if record.ended else skip + record.read
    if there:
        done = sum(piece.size_bytes for piece in pieces if piece.content in ended)
        advance(done, sum(shard.tokens for shard in there))
    rest = [piece for piece in pieces if piece.content not in ended]
    with _GroupWriter(store, group, len(there), tokenizer, shard_tokens) as writer:
        tokens = 0
        for batch, read_bytes in _batches(_parts(rest, skip)):
            writer.add(batch, _encoded(batch, encode, tokenizer.vocab_size))
            advance(read_bytes, writer.tokens - tokens)
            tokens = writer.tokens
        writer.finish()


def _parts(pieces: Sequence[Piece], skip: int) -> Iterator[tuple[_Part, int]]:
    """The parts of all documents but the first `skip`, and the bytes of source read for each."""
    for piece in pieces:
        log, before = ReadingLog(), 0
        for document in piece.read(log):
            text, data = storable(document.text, log)
            if skip:
                skip -= document.complete
                continue
            yield _Part(piece, text, data, document.complete), log.source_bytes - before
            before = log.source_bytes
        yield _Part(piece, None, repairs=log.repairs), log.source_bytes - before
        skip = 0


def _batches(parts: Iterable[tuple[_Part, int]]) -> Iterator[tuple[list[_Part], int]]:
    """Enough text at a time to keep the threads of a tokenizer busy, little enough to hold; and bytes of source."""
    batch: list[_Part] = []
    characters = read_bytes = 0
    for part, bytes_ in parts:
        batch.append(part)
        characters, read_bytes = characters + len(part.text or ""), read_bytes + bytes_
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_PARTS:
            yield batch, read_bytes
            batch, characters, read_bytes = [], 0, 0
    if batch:
        yield batch, read_bytes


def _encoded(batch: Sequence[_Part], encode: Encode, vocab_size: int) -> Iterator[np.ndarray]:
    """Ids of each part that has text. A tokenizer of the user's own may be wrong: an id must fit the vocabulary."""
    encoded = encode([part.text for part in batch if part.text is not None])
    for ids in encoded:
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
            raise ValueError(f"the tokenizer gave ids from {ids.min()} to {ids.max()}; its vocabulary is {vocab_size}")
    return iter(encoded)


class _GroupWriter:
    """Appends documents to one shard after another."""

    def __init__(self, store: Path, group: str, part: int, tokenizer: Tokenizer, shard_tokens: int):
        self._store, self._group, self._part = store, group, part
        self._tokenizer = tokenizer
        self._shard_tokens = shard_tokens
        self._dtype = np.dtype(token_dtype(tokenizer.vocab_size)).newbyteorder("<")
        self._end = np.array([tokenizer.end_of_document], dtype=self._dtype)
        self._open: _OpenShard | None = None
        self.tokens = 0
        """Written so far."""
        self._new_document()

    def _new_document(self) -> None:
        self._tokens = self._bytes = 0
        self._blank: list[np.ndarray] | None = []  # ids of a document as long as it has only white space
        self._hash = hashlib.blake2b(digest_size=16)

    def add(self, batch: Sequence[_Part], encoded: Iterator[np.ndarray]) -> None:
        for part in batch:
            shard = self._shard()
            if part.text is None:
                if self._bytes:  # the source never said that its last document is complete
                    self._end_document(shard)
                shard.end_piece(part)
                continue
            shard.piece = part.piece
            self._hash.update(part.data)
            self._bytes += len(part.data)
            self._add_text(shard, next(encoded), blank=not part.text.strip())
            if part.complete:
                self._end_document(shard)

    def finish(self) -> None:
        self._shard().close(last=True)
        self._open = None

    def __enter__(self) -> _GroupWriter:
        return self

    def __exit__(self, *error: object) -> None:
        if self._open is not None:
            self._open.discard()

    def _shard(self) -> _OpenShard:
        """The shard for what comes next; a full one is closed only now, so that the last one is known to be last."""
        if self._open is not None and not self._bytes and self._open.tokens.count >= self._shard_tokens:
            self._open.close(last=False)
            self._open, self._part = None, self._part + 1
        if self._open is None:
            directory = self._store / shard_name(self._group, self._part)
            self._open = _OpenShard(directory, self._tokenizer)
        return self._open

    def _add_text(self, shard: _OpenShard, ids: np.ndarray, *, blank: bool) -> None:
        if self._blank is None:
            self._append(shard, ids)
            return
        self._blank.append(ids)
        if not blank:
            for held_back in self._blank:
                self._append(shard, held_back)
            self._blank = None

    def _append(self, shard: _OpenShard, ids: np.ndarray) -> None:
        shard.tokens.write(ids.astype(self._dtype, copy=False).tobytes(), len(ids))
        self._tokens += len(ids)
        self.tokens += len(ids)

    def _end_document(self, shard: _OpenShard) -> None:
        shard.read += 1
        if self._blank is None:
            self._append(shard, self._end)
            shard.documents.write(_DOCUMENT.pack(self._tokens, self._bytes, self._hash.digest()), 1)
        self._new_document()


class _OpenShard:
    """A shard that is being written."""

    def __init__(self, directory: Path, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._aside = ExitStack()
        folder = self._aside.enter_context(atomic_directory(directory))
        self._record = folder / RECORD
        self.tokens = _HashedFile(folder / TOKENS)
        self.documents = _HashedFile(folder / DOCUMENTS)
        self._aside.callback(self.tokens.close)
        self._aside.callback(self.documents.close)
        self._pieces: list[PieceRecord] = []
        self._before = (0, 0)  # tokens and documents before the open piece
        self.piece: Piece | None = None
        self.read = 0

    def end_piece(self, part: _Part) -> None:
        self._note(part.piece, ended=True, repairs=dict(sorted((part.repairs or {}).items())))

    def _note(self, piece: Piece, *, ended: bool, repairs: dict[str, int]) -> None:
        tokens, documents = self.tokens.count - self._before[0], self.documents.count - self._before[1]
        self._before = self.tokens.count, self.documents.count
        self._pieces.append(
            PieceRecord(
                content=piece.content,
                read=self.read,
                documents=documents,
                tokens=tokens,
                ended=ended,
                repairs={name: count for name, count in repairs.items() if count},
            )
        )
        self.piece, self.read = None, 0

    def close(self, *, last: bool) -> None:
        """Give the shard its name."""
        if self.piece is not None:
            self._note(self.piece, ended=False, repairs={})
        shard = Shard(
            format=FORMAT,
            tokenizer=self._tokenizer.fingerprint,
            dtype=token_dtype(self._tokenizer.vocab_size),
            tokens=self.tokens.count,
            documents=self.documents.count,
            tokens_sha256=self.tokens.finish(),
            documents_sha256=self.documents.finish(),
            pieces=self._pieces,
            last=last,
        )
        write_fsync(self._record, shard.model_dump_json(indent=1))
        self._aside.close()

    def discard(self) -> None:
        """Leave nothing of it."""
        error = InterruptedError("a shard that was not finished")
        self._aside.__exit__(type(error), error, None)


class _HashedFile:
    """A file of numbers that knows how many it has, and its SHA-256."""

    def __init__(self, path: Path):
        self._file = path.open("wb", buffering=2**20)
        self._digest = hashlib.sha256()
        self.count = 0

    def write(self, data: bytes, count: int) -> None:
        self._digest.update(data)
        self._file.write(data)
        self.count += count

    def finish(self) -> str:
        """Bring everything to the disk; the SHA-256 in hex."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._digest.hexdigest()

    def close(self) -> None:
        self._file.close()
