"""Byte-pair encoding from a tiktoken rank file: `base64(bytes) rank`, one token per line."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tiktoken

from components.cpu import num_cpus
from components.errors import InputError
from components.storage.local_copy import fetch_file
from components.tokenizers.patterns import PATTERNS, resolve_pattern
from components.unicode_text import replace_surrogates

_MAX_RANKS = 2**22
"""Limits the memory for a damaged or malicious file; the largest vocabulary in use is about 2**18."""

_LARGEST_FILE = 2**28

_MAX_RUN = 2**14
"""Characters. Longer runs are split: tiktoken's regular expression overflows its stack on a megabyte of spaces."""


LLAMA3_SPECIAL_TOKENS = [
    *("<|begin_of_text|>", "<|end_of_text|>"),
    *(f"<|reserved_special_token_{number}|>" for number in range(4)),
    *("<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>"),
    *(f"<|reserved_special_token_{number}|>" for number in range(5, 251)),
]
"""The 256 special tokens of Meta's llama3/tokenizer.py: ids 128000 to 128255 with its rank file."""


@dataclass(kw_only=True)
class TiktokenFile:
    """A tiktoken rank file, such as r50k_base.tiktoken, Llama 3's tokenizer.model or one from tools/train_tokenizer."""

    path: Path
    """The rank file."""
    pattern: str
    """How text is split before merging: "gpt2", "cl100k", "llama3", "o200k" or a regular expression. The file does not
    contain it, and another pattern silently gives other ids."""
    special_tokens: Literal["llama3"] | list[str] = field(default_factory=lambda: ["<|endoftext|>"])
    """Tokens with the ids after the largest rank, in this order; "llama3": the 256 of Llama 3."""
    end_of_document: str = "<|endoftext|>"
    """The special token that is appended to every document; for Llama 3, <|end_of_text|>."""
    parse_special: bool = False
    """Encode special tokens that occur in text as such; otherwise they are encoded as ordinary text."""

    def build(self) -> RankEncoder:
        """Return the tokenizer. Raises FileNotFoundError, or ValueError for an invalid file or setting."""
        tokens = LLAMA3_SPECIAL_TOKENS if self.special_tokens == "llama3" else list(self.special_tokens)
        end = self.end_of_document
        if end not in tokens:
            hint = "; for Llama 3, set it to '<|end_of_text|>'" if self.special_tokens == "llama3" else ""
            raise InputError("end_of_document", f"{end!r} is not among special_tokens = {self.special_tokens}{hint}")
        if len(set(tokens)) < len(tokens):
            raise InputError("special_tokens", f"{tokens} contains a token twice")
        ranks = read_ranks(self.path)
        first = max(ranks.values()) + 1
        special = {token: first + number for number, token in enumerate(tokens)}
        return RankEncoder(ranks, resolve_pattern(self.pattern), special, end, parse_special=self.parse_special)


@dataclass(kw_only=True)
class TiktokenEncoding:
    """An encoding of tiktoken, by name. Its ranks are downloaded once and cached (TIKTOKEN_CACHE_DIR)."""

    name: str
    """The name in tiktoken.get_encoding: "gpt2", "cl100k_base", "o200k_base", ..."""
    end_of_document: str = "<|endoftext|>"
    """The special token that is appended to every document."""
    parse_special: bool = False
    """Encode special tokens that occur in text as such; otherwise they are encoded as ordinary text."""

    def build(self) -> RankEncoder:
        """Return the tokenizer. Raises ValueError for an unknown name, OSError if the ranks cannot be downloaded."""
        names = tiktoken.list_encoding_names()
        if self.name not in names:
            raise InputError("name", f"{self.name!r} is not one of {', '.join(names)}")
        encoding = tiktoken.get_encoding(self.name)
        special = encoding._special_tokens
        if self.end_of_document not in special:
            raise InputError("end_of_document", f"{self.end_of_document!r} is not among {', '.join(special)}")
        pattern = PATTERNS.get(_PATTERN_OF.get(self.name, ""), encoding._pat_str)
        return RankEncoder(
            encoding._mergeable_ranks, pattern, special, self.end_of_document, parse_special=self.parse_special
        )


_PATTERN_OF = {
    **dict.fromkeys(("gpt2", "r50k_base", "p50k_base", "p50k_edit"), "gpt2"),
    "cl100k_base": "cl100k",
    **dict.fromkeys(("o200k_base", "o200k_harmony"), "o200k"),
}
"""Patterns used instead of tiktoken's, which the `tokenizers` library interprets differently."""


def read_ranks(path: Path) -> dict[bytes, int]:
    """Return token bytes -> rank of a rank file. Ranks may have gaps; every single byte must have one.

    Raises FileNotFoundError, or ValueError with file, line and problem.
    """
    fetch_file(path)
    if path.stat().st_size > _LARGEST_FILE:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes; at most {_LARGEST_FILE:,} are accepted")
    ranks: dict[bytes, int] = {}
    lines: dict[int, int] = {}  # rank -> line, to name both lines of a duplicate
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            token, rank = _parse_line(line, f"{path}:{number}")
            if token in ranks or rank in lines:
                first = lines[ranks.get(token, rank)]
                raise ValueError(f"{path}:{number}: token {token!r} or rank {rank} is already on line {first}")
            ranks[token], lines[rank] = rank, number
    missing = [byte for byte in range(256) if bytes((byte,)) not in ranks]
    if missing:
        raise ValueError(
            f"{path}: {len(missing)} of the 256 single bytes have no rank (first: 0x{missing[0]:02x}); "
            "is this a tiktoken rank file?"
        )
    return ranks


def _parse_line(line: bytes, where: str) -> tuple[bytes, int]:
    try:
        encoded, number = line.split()
        token, rank = base64.b64decode(encoded, validate=True), int(number)
    except (ValueError, binascii.Error):
        raise ValueError(f"{where}: expected `base64 rank`, found {line[:60]!r}") from None
    if not token or not 0 <= rank < _MAX_RANKS:
        raise ValueError(f"{where}: expected a token and a rank from 0 to {_MAX_RANKS - 1}, found {line[:60]!r}")
    return token, rank


class RankEncoder:
    """Encodes with tiktoken, on one thread per core, at most 16. It can be pickled."""

    def __init__(
        self,
        ranks: dict[bytes, int],
        pattern: str,
        special: dict[str, int],
        end_of_document: str,
        *,
        parse_special: bool = False,
    ):
        """`special` is token -> id; ids may have gaps. Raises ValueError for an invalid `pattern`."""
        try:
            self._encoding = tiktoken.Encoding(
                "powertrain", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
            )
        except ValueError as error:
            raise InputError(
                "pattern", f"{pattern!r} is not a regular expression that tiktoken accepts: {error}"
            ) from error
        self._parts = (ranks, pattern, special)
        self._parsed = frozenset(special) if parse_special else frozenset()
        self.vocab_size = 1 + max(*ranks.values(), *special.values())
        self.end_of_document = special[end_of_document]
        self.byte_lengths = np.zeros(self.vocab_size, dtype=np.int64)
        """(vocab_size,) int64 bytes of each id; 0 for special tokens and for gaps between ranks."""
        self.byte_lengths[list(ranks.values())] = [len(token) for token in ranks]
        self.fingerprint = _fingerprint(ranks, pattern, special, end_of_document, parse_special)
        self._dtype = np.uint16 if self.vocab_size <= 2**16 else np.uint32

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the (tokens,) uint16 or uint32 ids of each text, without the end of document."""
        threads = min(len(texts), num_cpus(), 16)
        if threads < 2:
            return [self._encode(text) for text in texts]
        with ThreadPoolExecutor(threads) as pool:  # tiktoken releases the GIL
            return list(pool.map(self._encode, texts))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, including special tokens. Raises ValueError for an id without a token."""
        try:
            return self._encoding.decode_bytes([int(token) for token in ids]).decode("utf-8", errors="replace")
        except (KeyError, OverflowError):
            raise ValueError(f"an id is outside the vocabulary of {self.vocab_size}, or in a gap of it") from None

    def hugging_face(self) -> Any:
        """Return the same encoding as a `tokenizers.Tokenizer`.

        It differs in that special tokens in text are encoded as such, and long runs are not split. Raises ValueError if
        the library is missing, or does not accept the pattern.
        """
        from components.tokenizers.hf_conversion import to_hugging_face

        return to_hugging_face(*self._parts)

    def _encode(self, text: str) -> np.ndarray:
        parts = [self._encode_part(part).astype(self._dtype, copy=False) for part in split_long_runs(text)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _encode_part(self, text: str) -> np.ndarray:
        try:
            return self._encoding.encode_to_numpy(text, allowed_special=self._parsed, disallowed_special=())
        except UnicodeEncodeError:  # a lone surrogate, which UTF-8 cannot represent
            return self._encode_part(replace_surrogates(text))


def split_long_runs(text: str, longest: int = _MAX_RUN) -> Iterator[str]:
    """Yield `text` in parts, split only within runs of more than `longest` characters that are all space or all not.

    It tests aligned windows of `longest` characters: a window without a change between space and text lies within such
    a run, and every run of twice that length contains one, so no part has a run of more than three windows.
    """
    start = 0
    for window in range(0, len(text) - longest, longest):
        part = text[window : window + longest]
        if part.isspace() or len(part.split(None, 1)[0]) == longest:
            yield text[start : window + longest]
            start = window + longest
    yield text[start:]


def _fingerprint(
    ranks: dict[bytes, int], pattern: str, special: dict[str, int], end_of_document: str, parse_special: bool
) -> str:
    digest = hashlib.sha256()
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        digest.update(b"%d %s\n" % (rank, base64.b64encode(token)))
    digest.update(repr((pattern, _MAX_RUN, sorted(special.items()), end_of_document)).encode())
    digest.update(b"parse_special" * parse_special)
    return f"tiktoken-1-{digest.hexdigest()}"
