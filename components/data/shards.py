"""Encoded text on disk: a shard is a directory that holds some pieces of text, encoded by one tokenizer.

    encoded-<tokenizer>/shard-<group>-00000/
        shard.json       which pieces, how many documents of each, and the size and SHA-256 of the files below
        tokens.bin       token ids, little-endian uint16 or uint32, each document followed by end_of_document
        documents.bin    of each document: tokens with the end token, bytes of text, BLAKE2b-128 of the text

Pieces that are encoded together make a group; one that grows large is several shards, of which the last says so. A
document never crosses shards. Shards know nothing of the order of files, nor of which documents are wanted: a data set
(components/data/index.py) refers to them. Nothing here is unpickled, and no size is believed before the file has it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from components.data.document import SourceFile
from components.data.file_hash_cache import FileHashCache
from components.interfaces import Tokenizer

FORMAT: Literal[2] = 2
"""Raised whenever the same text and tokenizer would give other files. It enters the names: others lie elsewhere."""

RECORD, TOKENS, DOCUMENTS = "shard.json", "tokens.bin", "documents.bin"
DOCUMENT_DTYPE = np.dtype([("tokens", "<i8"), ("bytes", "<i8"), ("hash", "<u8", (2,))])
_LARGEST_RECORD = 2**28

Size = Annotated[int, Field(ge=0, lt=2**62)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
AnyModel = TypeVar("AnyModel", bound=BaseModel)


class StrictModel(BaseModel):
    """A file of ours: what is not in the model, or of another type, is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class PieceRecord(StrictModel):
    """A piece of text, or as much of it as lies in this shard."""

    content: str
    read: Size
    """Documents that were read; more than `documents` where some had no text."""
    documents: Size
    tokens: Size
    ended: bool
    """Whether this is the end of the piece."""
    repairs: dict[str, int]
    """What was put right while the whole piece was read, by name; told where it ends."""


class Shard(StrictModel):
    """shard.json"""

    format: Literal[2]
    tokenizer: str
    """Fingerprint of the tokenizer."""
    dtype: Literal["uint16", "uint32"]
    tokens: Size
    documents: Size
    tokens_sha256: Digest
    documents_sha256: Digest
    pieces: Annotated[list[PieceRecord], Field(min_length=1)]
    last: bool
    """Whether this is the last shard of its group."""

    @property
    def token_dtype(self) -> np.dtype:
        """Of the ids in a shard: little-endian on every machine."""
        return np.dtype(self.dtype).newbyteorder("<")


class ShardSpan(NamedTuple):
    """Where (a part of) a piece lies."""

    shard: str
    """Name of the shard's directory."""
    first_token: int
    tokens: int
    first_document: int
    documents: int


@dataclass(frozen=True)
class EncodedFile:
    """A piece that is encoded."""

    fragments: tuple[ShardSpan, ...]
    read: int
    repairs: dict[str, int]


def token_dtype(vocab_size: int) -> Literal["uint16", "uint32"]:
    """The smallest type that holds every id."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def store_name(tokenizer: Tokenizer) -> str:
    """The directory, in the cache, of all shards of a tokenizer."""
    return f"encoded-{hashlib.sha256(f'{FORMAT} {tokenizer.fingerprint}'.encode()).hexdigest()[:20]}"


def group_name(pieces: Sequence[SourceFile]) -> str:
    """What the shards of these pieces, encoded together, are called."""
    return f"shard-{hashlib.sha256(repr([piece.content for piece in pieces]).encode()).hexdigest()[:20]}"


def shard_name(group: str, part: int) -> str:
    return f"{group}-{part:05d}"


def shards_of(store: Path, group: str) -> Iterator[Shard]:
    """The shards of a group that are there, up to the first that is not."""
    part = 0
    while (directory := store / shard_name(group, part)).is_dir():
        yield read_record(directory / RECORD, Shard)
        part += 1


def list_encoded(store: Path) -> dict[str, EncodedFile]:
    """Content -> the piece as it is encoded, for every group that is complete."""
    found: dict[str, EncodedFile] = {}
    # not glob, which takes a folder that may not be listed for an empty one
    names = [path.name for path in store.iterdir()] if store.is_dir() else []
    for group in sorted(name.removesuffix("-00000") for name in names if re.fullmatch(r"shard-.*-00000", name)):
        parts = list(shards_of(store, group))
        if parts[-1].last:
            found |= _pieces_of(group, parts)
    return found


def _pieces_of(group: str, parts: Sequence[Shard]) -> Iterator[tuple[str, EncodedFile]]:
    fragments: list[ShardSpan] = []
    read = 0
    for number, shard in enumerate(parts):
        token = document = 0
        for piece in shard.pieces:
            fragments.append(ShardSpan(shard_name(group, number), token, piece.tokens, document, piece.documents))
            token, document, read = token + piece.tokens, document + piece.documents, read + piece.read
            if piece.ended:
                yield piece.content, EncodedFile(tuple(fragments), read, piece.repairs)
                fragments, read = [], 0


def read_record(path: Path, model: type[AnyModel]) -> AnyModel:
    """The file `path` as `model`. Raises ValueError, naming file and remedy, for anything but a sound one."""
    try:
        if path.stat().st_size > _LARGEST_RECORD:
            raise ValueError(f"{path.stat().st_size:,} bytes is no size for it")
        return model.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(rebuild_error(path, "is missing")) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ValueError(rebuild_error(path, f"is damaged or of another version ({where}: {first['msg']})")) from None
    except ValueError as error:
        raise ValueError(rebuild_error(path, f"is damaged ({error})")) from None


def check_shard(directory: Path, *, tokenizer: Tokenizer, hashes: FileHashCache) -> Shard:
    """The record of a shard once its tokenizer and the size and content of its files are known to be right.

    Contents are hashed in full the first time and whenever a file's size or times changed since (see FileHashes).
    Raises ValueError naming the file that is wrong and the remedy.
    """
    shard = read_record(directory / RECORD, Shard)
    if shard.tokenizer != tokenizer.fingerprint:
        theirs, ours = _short(shard.tokenizer), _short(tokenizer.fingerprint)
        raise ValueError(
            rebuild_error(directory / RECORD, f"was made with another tokenizer ({theirs}, this run has {ours})")
        )
    check_file(directory / TOKENS, shard.tokens * shard.token_dtype.itemsize, shard.tokens_sha256, hashes)
    check_file(directory / DOCUMENTS, shard.documents * DOCUMENT_DTYPE.itemsize, shard.documents_sha256, hashes)
    return shard


def check_file(path: Path, size: int, sha256: str, hashes: FileHashCache) -> None:
    """Raises ValueError if the file is not what its record says."""
    if not path.is_file():
        raise ValueError(rebuild_error(path, "is missing"))
    found = path.stat().st_size
    if found != size:
        kind = "truncated" if found < size else "altered"
        raise ValueError(rebuild_error(path, f"is {kind}: {found:,} bytes where its record says {size:,}"))
    if hashes.sha256(path) != sha256:
        raise ValueError(rebuild_error(path, "was altered: its SHA-256 is not the one in its record"))


def rebuild_error(path: Path, problem: str) -> str:
    return f"{path} {problem}. Delete the directory {path.parent}; it is prepared anew at the next start."


def _short(fingerprint: str) -> str:
    return fingerprint if len(fingerprint) <= 24 else f"{fingerprint[:24]}..."
