"""Byte-level encodings as a `tokenizers.Tokenizer`, which Hugging Face stores as tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from components.errors import InputError
from components.tokenizers.patterns import PATTERNS

_PROBE = (
    "I had written 1851 letters; they'd laughed, HE'S told.\n\n\tdef f(x):\r\n        return x**2  # ok?  \n   \n"
    "Ça va très bien ... été naïve — 鯨鯨 и 🐋🏽 1234567890 ½ ٣٤٥ \u2028 \u00a0x\u3000 don\u2019t  e\u0301 <|x|> \x00 "
)


class ConvertibleTokenizer(Protocol):
    """A tokenizer that has a counterpart."""

    @property
    def end_of_document(self) -> int: ...
    def encode_batch(self, texts: Sequence[str]) -> Sequence[Any]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def hugging_face(self) -> Any:
        """The same encoding as a `tokenizers.Tokenizer`. Raises ValueError where there is none."""
        ...


def save(encoder: ConvertibleTokenizer, directory: Path, *, max_length: int) -> list[str]:
    """Write what `AutoTokenizer` opens; returns the names of the files.

    Raises ValueError, before writing, if the counterpart encodes a probing text or the text of a token otherwise.
    """
    tokenizer = encoder.hugging_face()
    _verify_roundtrip(encoder, tokenizer)
    end = encoder.decode([encoder.end_of_document])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "bos_token": end,
        "eos_token": end,
        "pad_token": end,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return ["tokenizer.json", "tokenizer_config.json"]


def to_hugging_face(ranks: dict[bytes, int], pattern: str | None, special: Mapping[str, int] | None = None) -> Any:
    """The encoding of a rank file as a `tokenizers.Tokenizer`; without a pattern, text is not cut before merging.

    tiktoken joins any two neighbours whose joint bytes are a token, lowest rank first; so the merges are *all* the ways
    to cut each token in two tokens, in the order of the ranks, and not only those that training happened to take.
    """
    library = import_tokenizers()
    character = byte_characters()
    spelled = {token: "".join(character[byte] for byte in token) for token in ranks}
    merges = [
        (spelled[token[:cut]], spelled[token[cut:]])
        for token in sorted(ranks, key=ranks.__getitem__)
        for cut in sorted(
            range(1, len(token)), key=lambda cut: (ranks.get(token[:cut], -1), ranks.get(token[cut:], -1))
        )
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    # A special token that is in the vocabulary keeps its id; otherwise it gets the next free one, and ranks have holes.
    vocabulary = {spelled[token]: rank for token, rank in ranks.items()}
    if taken := sorted(vocabulary.keys() & (special or {}).keys()):
        raise InputError("special_tokens", f"{taken[0]!r} is an ordinary token of the file too")
    tokenizer = library.Tokenizer(library.models.BPE({**vocabulary, **(special or {})}, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizer(pattern)
    tokenizer.decoder = library.decoders.ByteLevel()
    tokenizer.add_special_tokens([library.AddedToken(token, special=True, normalized=False) for token in special or {}])
    return tokenizer


def pre_tokenizer(pattern: str | None) -> Any:
    """Cuts text by `pattern`, then spells its bytes as characters. Raises ValueError for no regular expression."""
    library = import_tokenizers()
    byte_level = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if pattern is None:
        return byte_level
    try:
        regex = library.Regex(pattern)
    except Exception as error:  # the library has no class of its own for it
        raise ValueError(f"pattern {pattern!r}: {error}; the names are {', '.join(PATTERNS)}") from None
    return library.pre_tokenizers.Sequence([library.pre_tokenizers.Split(regex, behavior="isolated"), byte_level])


def byte_characters() -> dict[int, str]:
    """byte -> the printable character that stands for it in GPT-2's and Hugging Face's byte-level vocabularies."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def import_tokenizers() -> Any:
    try:
        import tokenizers
    except ModuleNotFoundError:
        raise ValueError("this needs the `tokenizers` library: pip install -e '.[hf]'") from None
    return tokenizers


def _verify_roundtrip(encoder: ConvertibleTokenizer, tokenizer: Any) -> None:
    """Raises ValueError at the first text that the two encode otherwise: a probe, and the text of every token."""
    special = {added.content for added in tokenizer.get_added_tokens_decoder().values()}
    texts = [_PROBE]
    for token in sorted(set(tokenizer.get_vocab(with_added_tokens=True).values())):
        text = encoder.decode([token])
        if text not in special and "\ufffd" not in text:
            texts.append(text)
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    for text, ours, theirs in zip(texts, encoder.encode_batch(texts), encoded, strict=True):
        if list(ours) != theirs.ids:
            raise ValueError(f"the `tokenizers` library would encode {text[:60]!r} as {theirs.ids[:9]}, not {ours[:9]}")
