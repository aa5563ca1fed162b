"""TokenizerJson: a tokenizer.json of Hugging Face, read by their `tokenizers` library."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from components.errors import InputError
from components.json_files import read_limited, read_object
from components.storage.local_copy import fetch, fetch_file
from components.tokenizers.hf_conversion import byte_characters, import_tokenizers
from components.unicode_text import replace_surrogates

_LARGEST_FILE = 2**28
_MAX_VOCABULARY = 2**24
"""As of the models of Hugging Face; an id of 4 bytes would need 32 GB of memory for its length."""
_ONE_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "\u2581"
"""The character for a space in SentencePiece."""


@dataclass(kw_only=True)
class TokenizerJson:
    """A tokenizer.json, such as that of a Hugging Face model. It needs the `hf` extra."""

    path: Path
    """The tokenizer.json file."""
    end_of_document: str = "<|endoftext|>"
    """The token that is appended to every document."""
    start_of_document: str | None = None
    """The token that begins every document and prompt, such as <s>; "auto": the one that this tokenizer.json, or
    add_bos_token in the tokenizer_config.json beside it, adds to text; unset: none."""
    parse_special: bool = False
    """Encode special tokens that occur in text as such; otherwise they are encoded as ordinary text."""

    def build(self) -> JsonEncoder:
        """Return the tokenizer. Raises FileNotFoundError, or ValueError for an invalid file or a missing token."""
        fetch_file(self.path)
        library = import_tokenizers()
        try:
            text = read_limited(self.path, _LARGEST_FILE)
            tokenizer = library.Tokenizer.from_str(text)
        except OSError:
            raise
        except Exception as error:  # the library raises a plain Exception
            raise InputError("path", f"{self.path} is not a tokenizer.json: {str(error)[:200]}") from None
        end = _id_of(tokenizer, self.end_of_document)
        if end is None:
            raise InputError("end_of_document", f"{self.path} has no token {self.end_of_document!r}")
        name = self._added_start(tokenizer) if self.start_of_document == "auto" else self.start_of_document
        start = None if name is None else _id_of(tokenizer, name)
        if name is not None and start is None:
            raise InputError("start_of_document", f"{self.path} has no token {name!r}; name another one, or add none")
        digest = hashlib.sha256(text.encode()).hexdigest()
        return JsonEncoder(tokenizer, end, digest, start_of_document=start, parse_special=self.parse_special)

    def _added_start(self, tokenizer: Any) -> str | None:
        """Return the token that is added before every text. Raises InputError unless it is one of the vocabulary."""
        before: list[Any]
        before, after = added_tokens(tokenizer)
        config = self.path.parent / "tokenizer_config.json"
        fetch(config, missing_ok=True)
        try:
            settings = read_object(config) if config.is_file() else {}
        except ValueError as error:
            raise InputError("path", f"{config} is not a JSON object: {error}") from None
        added, bos = settings.get("add_bos_token"), settings.get("bos_token")
        if added is not None:  # it overrides the post-processor, as in torchtitan and transformers 4
            before = [bos.get("content") if isinstance(bos, dict) else bos] if added else []
        if before == [None]:
            raise InputError("start_of_document", f"{config} sets add_bos_token, but no bos_token")
        if len(before) > 1 or after not in ([], [self.end_of_document]):
            raise InputError(
                "start_of_document",
                f"{self.path} adds {before} before and {after} after every text; expected at most one token before, "
                f"and after it none or end_of_document = {self.end_of_document!r}. Name the start token, or add none",
            )
        return before[0] if before else None


def _id_of(tokenizer: Any, token: object) -> int | None:
    """Return the id of `token`, which a file may name; None if it is not a token of the vocabulary, or not text."""
    is_text = isinstance(token, str) and replace_surrogates(token) == token
    return tokenizer.token_to_id(token) if is_text else None


def added_tokens(tokenizer: Any) -> tuple[list[str], list[str]]:
    """Return the tokens that the post-processor adds before and after a text. Raises InputError for one with an id
    that the vocabulary does not have, or gives to another token."""
    text = tokenizer.encode("", add_special_tokens=False)
    text.pad(1)  # stands for a text, and has attention 0
    encoded = tokenizer.post_process(text, None, True)
    place = encoded.attention_mask.index(0)
    for number, (token, id) in enumerate(zip(encoded.tokens, encoded.ids, strict=True)):
        if number != place and tokenizer.token_to_id(token) != id:
            raise InputError(
                "start_of_document",
                f"the post-processor adds {token!r} as id {id}, which is not in the vocabulary; name the start token, "
                "or add none",
            )
    return encoded.tokens[:place], encoded.tokens[place + 1 :]


class JsonEncoder:
    """Encodes with the library, without adding special tokens. It can be pickled."""

    def __init__(
        self,
        tokenizer: Any,
        end_of_document: int,
        digest: str,
        *,
        start_of_document: int | None = None,
        parse_special: bool = False,
    ) -> None:
        tokenizer.encode_special_tokens = not parse_special
        self._parse_special = parse_special
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        if self.vocab_size > _MAX_VOCABULARY:
            raise InputError(
                "path", f"a token has the id {self.vocab_size - 1:,}; the limit is {_MAX_VOCABULARY - 1:,}"
            )
        self.end_of_document = end_of_document
        self.start_of_document = start_of_document
        self.fingerprint = f"tokenizer-json-1-{digest}-{end_of_document}" + "-special" * parse_special
        self.fingerprint += "" if start_of_document is None else f"-start-{start_of_document}"
        self.byte_lengths = np.zeros(self.vocab_size, dtype=np.int64)
        """(vocab_size,) int64 bytes of each id; 0 for special tokens."""
        special = {id for id, added in tokenizer.get_added_tokens_decoder().items() if added.special}
        byte_chars = set(byte_characters().values())
        byte_level = "ByteLevel" in repr(tokenizer.decoder)
        for token, id in vocabulary.items():
            if id not in special:
                self.byte_lengths[id] = len(token) if byte_level and byte_chars.issuperset(token) else _num_bytes(token)
        if start_of_document is not None:
            self.byte_lengths[start_of_document] = 0

    def leave_out_special(self, rows: int) -> None:
        """Limit the ids to those below `rows` if all others are special tokens that are never encoded."""
        added = self._tokenizer.get_added_tokens_decoder()
        others = {id for id in self._tokenizer.get_vocab(with_added_tokens=True).values() if id >= rows}
        encoded = {self.end_of_document, self.start_of_document}
        if not self._parse_special and not others & encoded and all(id in added and added[id].special for id in others):
            self.vocab_size, self.byte_lengths = rows, self.byte_lengths[:rows]
            self.fingerprint += f"-below-{rows}"

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the (tokens,) uint32 ids of each text."""
        encoded = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [np.array(each.ids, dtype=np.uint32) for each in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, including special tokens. Raises ValueError for an id outside the vocabulary."""
        if not all(0 <= id < self.vocab_size for id in ids):
            raise ValueError(f"an id is outside the vocabulary of {self.vocab_size}")
        text: str = self._tokenizer.decode([int(id) for id in ids], skip_special_tokens=False)
        return text

    def hugging_face(self) -> Any:
        return self._tokenizer

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._tokenizer.encode_special_tokens = not self._parse_special  # pickling loses this setting


def _num_bytes(token: str) -> int:
    """Return the number of UTF-8 bytes of a SentencePiece or added token."""
    return 1 if _ONE_BYTE.fullmatch(token) else len(token.replace(_SPACE, " ").encode("utf-8", "replace"))
