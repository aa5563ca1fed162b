"""Shards: directories that hold the token ids of several source files, encoded by one tokenizer.

    encoded-<tokenizer>/shard-<group>-00000/
        shard.json       the source files, their documents and tokens, and the SHA-256 of the files below
        tokens.bin       token ids, little-endian uint16 or uint32, each document with its start and end token
        documents.bin    of each document: tokens including those two, bytes of text, BLAKE2b-128 of the text

Source files that are encoded together form a group; a large group has several shards, and the last one is marked. A
document never crosses shards. The order of files and the selection of documents are stored in the index of a data set
(document_index.py), which refers to shards. Nothing is unpickled, and all sizes are checked.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, TypeVar

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from components.data.document import SourceFile
from components.data.file_hash_cache import FileHashCache
from components.interfaces import Tokenizer
from components.json_files import Digest, Size, StrictModel, first_problem, read_limited

FORMAT: Literal[3] = 3
"""Increased whenever the same text and tokenizer give other files. Directory names depend on it."""

RECORD, TOKENS, DOCUMENTS = "shard.json", "tokens.bin", "documents.bin"
DOCUMENT_DTYPE = np.dtype([("tokens", "<i8"), ("bytes", "<i8"), ("hash", "<u8", (2,))])
_LARGEST_RECORD = 2**28

AnyModel = TypeVar("AnyModel", bound=BaseModel)


class FileRecord(StrictModel):
    """A source file, or the part of it in this shard."""

    content: str
    """`SourceFile.content`."""
    read: Size
    """Documents that were read, including those without text, which `documents` excludes."""
    documents: Size
    tokens: Size
    ended: bool
    """Whether the source file ends in this shard."""
    fixups: dict[str, int]
    """Number of fixes in the whole source file by kind; stored where it ends."""


class Shard(StrictModel):
    """The content of shard.json."""

    format: Literal[3]
    tokenizer: str
    """Fingerprint of the tokenizer."""
    dtype: Literal["uint16", "uint32"]
    tokens: Size
    documents: Size
    tokens_sha256: Digest
    documents_sha256: Digest
    source_files: Annotated[list[FileRecord], Field(min_length=1)]
    last: bool
    """Whether this is the last shard of its group."""


class ShardSpan(NamedTuple):
    """The place of a source file, or a part of it, in a shard."""

    shard: str
    """Name of the shard's directory."""
    first_token: int
    tokens: int
    first_document: int
    documents: int


@dataclass(frozen=True)
class EncodedFile:
    """The result of encoding a source file."""

    spans: tuple[ShardSpan, ...]
    read: int
    fixups: dict[str, int]


def token_dtype(vocab_size: int) -> Literal["uint16", "uint32"]:
    """Return the smallest type that holds every id."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def store_name(tokenizer: Tokenizer) -> str:
    """Return the name of the directory in the cache for all shards of `tokenizer`."""
    return f"encoded-{hashlib.sha256(f'{FORMAT} {tokenizer.fingerprint}'.encode()).hexdigest()[:20]}"


def group_name(source_files: Sequence[SourceFile]) -> str:
    """Return the name prefix of the shards of `source_files`, encoded together."""
    contents = [source_file.content for source_file in source_files]
    return f"shard-{hashlib.sha256(repr(contents).encode()).hexdigest()[:20]}"


def shard_name(group: str, part: int) -> str:
    return f"{group}-{part:05d}"


def shards_of(store: Path, group: str) -> Iterator[Shard]:
    """Yield the existing shards of a group, up to the first missing one."""
    part = 0
    while (directory := store / shard_name(group, part)).is_dir():
        yield read_record(directory / RECORD, Shard)
        part += 1


def list_encoded(store: Path) -> dict[str, EncodedFile]:
    """Return content -> encoded file for the source files of all complete groups."""
    found: dict[str, EncodedFile] = {}
    # glob would return nothing for a directory that cannot be listed
    names = [path.name for path in store.iterdir()] if store.is_dir() else []
    for group in sorted(name.removesuffix("-00000") for name in names if re.fullmatch(r"shard-.*-00000", name)):
        parts = list(shards_of(store, group))
        if parts[-1].last:
            found |= _encoded_files(group, parts)
    return found


def _encoded_files(group: str, parts: Sequence[Shard]) -> Iterator[tuple[str, EncodedFile]]:
    spans: list[ShardSpan] = []
    read = 0
    for number, shard in enumerate(parts):
        token = document = 0
        for file in shard.source_files:
            spans.append(ShardSpan(shard_name(group, number), token, file.tokens, document, file.documents))
            token, document, read = token + file.tokens, document + file.documents, read + file.read
            if file.ended:
                yield file.content, EncodedFile(tuple(spans), read, file.fixups)
                spans, read = [], 0


def read_record(path: Path, model: type[AnyModel]) -> AnyModel:
    """Return the file `path` as `model`. Raises ValueError, naming file and remedy, for a missing or damaged file."""
    try:
        return model.model_validate_json(read_limited(path, _LARGEST_RECORD))
    except FileNotFoundError:
        raise ValueError(rebuild_error(path, "is missing")) from None
    except ValidationError as error:
        raise ValueError(rebuild_error(path, f"is damaged or of another version ({first_problem(error)})")) from None
    except ValueError as error:
        raise ValueError(rebuild_error(path, f"is damaged ({error})")) from None


def check_shard(directory: Path, *, tokenizer: Tokenizer, hashes: FileHashCache) -> Shard:
    """Return the record of a shard after verifying its tokenizer and the size and content of its files.

    A file is hashed the first time and whenever its size or times have changed (see FileHashCache). Raises ValueError,
    naming the damaged file and the remedy.
    """
    shard = read_record(directory / RECORD, Shard)
    if shard.tokenizer != tokenizer.fingerprint:
        made, wanted = _short(shard.tokenizer), _short(tokenizer.fingerprint)
        raise ValueError(
            rebuild_error(directory / RECORD, f"was made with another tokenizer ({made}, this run has {wanted})")
        )
    check_file(directory / TOKENS, shard.tokens * np.dtype(shard.dtype).itemsize, shard.tokens_sha256, hashes)
    check_file(directory / DOCUMENTS, shard.documents * DOCUMENT_DTYPE.itemsize, shard.documents_sha256, hashes)
    return shard


def read_documents(shard: Path, first: int, count: int) -> np.ndarray:
    """Return `count` rows of DOCUMENT_DTYPE of the directory `shard`. Raises ValueError if it has fewer."""
    path = shard / DOCUMENTS
    rows = np.fromfile(path, DOCUMENT_DTYPE, count=count, offset=first * DOCUMENT_DTYPE.itemsize)
    if len(rows) < count:
        raise ValueError(rebuild_error(path, "is truncated"))
    return rows


def check_file(path: Path, size: int | None, sha256: str, hashes: FileHashCache) -> None:
    """Raise ValueError if size or hash of a file differ from its record; `size` is None if that has only the hash."""
    if not path.is_file():
        raise ValueError(rebuild_error(path, "is missing"))
    found = path.stat().st_size
    if size is not None and found != size:
        kind = "truncated" if found < size else "altered"
        raise ValueError(rebuild_error(path, f"is {kind}: it has {found:,} bytes, its record says {size:,}"))
    if hashes.sha256(path) != sha256:
        raise ValueError(rebuild_error(path, "was altered: its SHA-256 differs from the one in its record"))


def rebuild_error(path: Path, problem: str) -> str:
    """Return an error message with the remedy for damaged prepared data."""
    return f"{path} {problem}. Delete the directory {path.parent}; the next start prepares it again."


def _short(fingerprint: str) -> str:
    return fingerprint if len(fingerprint) <= 24 else f"{fingerprint[:24]}..."
