"""Prepared data on disk: a directory with an index, token shards and the lengths of the documents in them.

    index.json               what it was made from, and the size and SHA-256 of every file below
    tokens-00000.bin         token ids, little-endian uint16 or uint32, each document followed by end_of_document
    documents-00000.bin      (documents, 2) little-endian int64: tokens with the end token, bytes of text

A document never crosses shards. Nothing here is ever unpickled, and no size is believed before the file has it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from components.data.content import FileHashes
from components.data.document import EncodesText

FORMAT: Literal[1] = 1
"""Raised whenever the same text and tokenizer would give other files."""

INDEX = "index.json"
_LARGEST_INDEX = 2**26
DOCUMENT_DTYPE = np.dtype("<i8")

_Size = Annotated[int, Field(ge=0, lt=2**62)]
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Shard(BaseModel):
    """A pair of files, `tokens_file(number)` and `documents_file(number)`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    number: Annotated[int, Field(ge=0, lt=100_000)]
    tokens: _Size
    documents: _Size
    text_bytes: _Size
    tokens_sha256: _Digest
    documents_sha256: _Digest


class Index(BaseModel):
    """index.json"""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal[1]
    source: str
    """Where the text came from, for people."""
    content: str
    """Fingerprint of that text."""
    tokenizer: str
    """Fingerprint of the tokenizer."""
    vocab_size: Annotated[int, Field(ge=1, lt=2**31)]
    end_of_document: _Size
    dtype: Literal["uint16", "uint32"]
    repairs: dict[str, int]
    """What was found and put right while reading, by name."""
    shards: Annotated[list[Shard], Field(min_length=1)]

    @property
    def token_dtype(self) -> np.dtype:
        """Of the ids in a shard: little-endian on every machine."""
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    @property
    def text_bytes(self) -> int:
        return sum(shard.text_bytes for shard in self.shards)

    def __str__(self) -> str:
        text = f"{self.documents:,} documents, {self.text_bytes:,} bytes, {self.tokens:,} tokens"
        repairs = ", ".join(f"{count:,} {name}" for name, count in sorted(self.repairs.items()) if count)
        return f"{text}; put right: {repairs}" if repairs else text


def tokens_file(number: int) -> str:
    return f"tokens-{number:05d}.bin"


def documents_file(number: int) -> str:
    return f"documents-{number:05d}.bin"


def token_dtype(vocab_size: int) -> Literal["uint16", "uint32"]:
    """The smallest type that holds every id."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def read_index(directory: Path) -> Index:
    """The index of a prepared directory. Raises ValueError, naming file and remedy, for anything but a sound one."""
    path = directory / INDEX
    try:
        if path.stat().st_size > _LARGEST_INDEX:
            raise ValueError(f"{path.stat().st_size:,} bytes is no size for an index")
        index = Index.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(_refusal(path, "is missing")) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ValueError(_refusal(path, f"is damaged or of another version ({where}: {first['msg']})")) from None
    except ValueError as error:
        raise ValueError(_refusal(path, f"is damaged ({error})")) from None
    return index


def open_shards(directory: Path, *, tokenizer: EncodesText, hashes: FileHashes) -> Index:
    """The index of `directory` once its tokenizer and the size and content of every shard are known to be right.

    Contents are hashed in full the first time and whenever a file's size or times changed since (see FileHashes).
    Raises ValueError naming the file that is wrong and the remedy.
    """
    index = read_index(directory)
    if index.tokenizer != tokenizer.fingerprint:
        raise ValueError(
            _refusal(
                directory / INDEX,
                f"was made with another tokenizer ({_short(index.tokenizer)}, this run has "
                f"{_short(tokenizer.fingerprint)})",
            )
        )
    for shard in index.shards:
        token_bytes = shard.tokens * index.token_dtype.itemsize
        _check_file(directory / tokens_file(shard.number), token_bytes, shard.tokens_sha256, hashes)
        document_bytes = shard.documents * 2 * DOCUMENT_DTYPE.itemsize
        _check_file(directory / documents_file(shard.number), document_bytes, shard.documents_sha256, hashes)
    return index


def _check_file(path: Path, size: int, sha256: str, hashes: FileHashes) -> None:
    if not path.is_file():
        raise ValueError(_refusal(path, "is missing"))
    found = path.stat().st_size
    if found != size:
        kind = "truncated" if found < size else "altered"
        raise ValueError(_refusal(path, f"is {kind}: {found:,} bytes where the index says {size:,}"))
    if hashes.sha256(path) != sha256:
        raise ValueError(_refusal(path, "was altered: its SHA-256 is not the one in the index"))


def _refusal(path: Path, problem: str) -> str:
    return f"{path} {problem}. Delete the directory {path.parent}; it is prepared anew at the next start."


def _short(fingerprint: str) -> str:
    return fingerprint if len(fingerprint) <= 24 else f"{fingerprint[:24]}..."
