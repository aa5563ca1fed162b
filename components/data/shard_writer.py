"""ShardWriter: writes the token ids of documents to the shards of a group (layout: shards.py)."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from components.atomic_files import atomic_directory, write_fsync
from components.data.document import SourceFile
from components.data.shards import DOCUMENTS, FORMAT, RECORD, TOKENS, FileRecord, Shard, shard_name, token_dtype
from components.interfaces import Tokenizer
from components.token_ids import prepended_id

_DOCUMENT = struct.Struct("<qq16s")
"""One row of DOCUMENT_DTYPE."""


class Chunk(NamedTuple):
    """A document or a part of a long one; without text, it marks the end of the source file."""

    source_file: SourceFile
    text: str | None
    data: bytes = b""
    """The text in UTF-8."""
    complete: bool = True
    """Whether the document ends with this chunk."""
    fixups: Mapping[str, int] = MappingProxyType({})
    """Number of fixes in the whole source file by kind; only at its end."""


class ShardWriter:
    """Appends documents to a series of shards. A context manager; an error removes the unfinished shard."""

    def __init__(self, store: Path, group: str, number: int, tokenizer: Tokenizer, shard_tokens: int):
        """`number` is the index of the first shard to write; a shard is closed once it has `shard_tokens` tokens."""
        self._store, self._group, self._number = store, group, number
        self._tokenizer = tokenizer
        self._shard_tokens = shard_tokens
        self._dtype = np.dtype(token_dtype(tokenizer.vocab_size)).newbyteorder("<")
        start = prepended_id(tokenizer)
        self._start = np.array([] if start is None else [start], dtype=self._dtype)
        self._end = np.array([tokenizer.end_of_document], dtype=self._dtype)
        self._open: _OpenShard | None = None
        self.tokens = 0
        """Tokens written so far."""
        self._new_document()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *error: object) -> None:
        if self._open is not None:
            self._open.discard()

    def add(self, chunk: Chunk, ids: np.ndarray | None) -> None:
        """Append a chunk and the ids (n,) of its text; `ids` is None for the end of a source file."""
        shard = self._shard()
        if chunk.text is None or ids is None:
            if self._bytes:  # the last document was not marked complete
                self._end_document(shard)
            shard.end_file(chunk.source_file, ended=True, fixups=chunk.fixups)
            return
        shard.source_file = chunk.source_file
        self._hash.update(chunk.data)
        self._bytes += len(chunk.data)
        self._add_text(shard, ids, blank=not chunk.text.strip())
        if chunk.complete:
            self._end_document(shard)

    def finish(self) -> None:
        """Close the last shard of the group."""
        self._shard().close(last=True)
        self._open = None

    def _new_document(self) -> None:
        self._tokens = self._bytes = 0
        self._blank: list[np.ndarray] | None = []  # ids held back while the document is only white space
        self._hash = hashlib.blake2b(digest_size=16)

    def _shard(self) -> _OpenShard:
        """Return the open shard. A full shard is closed only when more follows, so the last one is known."""
        if self._open is not None and not self._bytes and self._open.tokens.count >= self._shard_tokens:
            self._open.close(last=False)
            self._open, self._number = None, self._number + 1
        if self._open is None:
            self._open = _OpenShard(self._store / shard_name(self._group, self._number), self._tokenizer)
        return self._open

    def _add_text(self, shard: _OpenShard, ids: np.ndarray, *, blank: bool) -> None:
        if self._blank is None:
            self._append(shard, ids)
            return
        self._blank.append(ids)
        if not blank:
            for held_back in (self._start, *self._blank):
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
    """A shard being written in a temporary directory."""

    def __init__(self, directory: Path, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._stack = ExitStack()
        self._folder = self._stack.enter_context(atomic_directory(directory))
        self.tokens, self.documents = _HashedFile(self._folder / TOKENS), _HashedFile(self._folder / DOCUMENTS)
        self._stack.callback(self.tokens.file.close)
        self._stack.callback(self.documents.file.close)
        self._records: list[FileRecord] = []
        self._before = (0, 0)  # tokens and documents before the current source file
        self.source_file: SourceFile | None = None
        self.read = 0
        """Documents read of the current source file, including those without text."""

    def end_file(self, source_file: SourceFile, *, ended: bool, fixups: Mapping[str, int]) -> None:
        """Record the part of `source_file` in this shard; `ended` is whether it ends here."""
        tokens, documents = self.tokens.count - self._before[0], self.documents.count - self._before[1]
        self._before = self.tokens.count, self.documents.count
        self._records.append(
            FileRecord(
                content=source_file.content,
                read=self.read,
                documents=documents,
                tokens=tokens,
                ended=ended,
                fixups={name: count for name, count in sorted(fixups.items()) if count},
            )
        )
        self.source_file, self.read = None, 0

    def close(self, *, last: bool) -> None:
        """Write shard.json and rename the directory to its final name."""
        if self.source_file is not None:
            self.end_file(self.source_file, ended=False, fixups={})
        shard = Shard(
            format=FORMAT,
            tokenizer=self._tokenizer.fingerprint,
            dtype=token_dtype(self._tokenizer.vocab_size),
            tokens=self.tokens.count,
            documents=self.documents.count,
            tokens_sha256=self.tokens.fsync(),
            documents_sha256=self.documents.fsync(),
            source_files=self._records,
            last=last,
        )
        write_fsync(self._folder / RECORD, shard.model_dump_json(indent=1))
        self._stack.close()

    def discard(self) -> None:
        error = InterruptedError("unfinished shard")
        self._stack.__exit__(type(error), error, None)


class _HashedFile:
    """A file with the number of items and the SHA-256 of what was written."""

    def __init__(self, path: Path):
        self.file = path.open("wb", buffering=2**20)
        self._digest = hashlib.sha256()
        self.count = 0

    def write(self, data: bytes, count: int) -> None:
        self._digest.update(data)
        self.file.write(data)
        self.count += count

    def fsync(self) -> str:
        """Flush to the disk and return the SHA-256 in hex."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return self._digest.hexdigest()
