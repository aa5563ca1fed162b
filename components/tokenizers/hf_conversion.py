"""Conversion of byte-level encodings to a `tokenizers.Tokenizer`, which Hugging Face stores as tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from components.errors import InputError, extra_required
from components.interfaces import Tokenizer
from components.token_ids import start_of_document
from components.tokenizers.patterns import PATTERNS

_PROBE = (
    "I had written 1851 letters; they'd laughed, HE'S told.\n\n\tdef f(x):\r\n        return x**2  # ok?  \n   \n"
    "Ça va très bien ... été naïve — 鯨鯨 и 🐋🏽 1234567890 ½ ٣٤٥ \u2028 \u00a0x\u3000 don\u2019t  e\u0301 <|x|> \x00 "
)


class ConvertibleTokenizer(Tokenizer, Protocol):
    """A tokenizer that can be converted to a Hugging Face tokenizer."""

    def hugging_face(self) -> Any:
        """Return the same encoding as a `tokenizers.Tokenizer`. Raises ValueError if it cannot be converted."""
        ...


def save(encoder: ConvertibleTokenizer, directory: Path, *, max_length: int) -> list[str]:
    """Write the tokenizer files for `AutoTokenizer`; return their names.

    Raises ValueError, before writing, if the converted tokenizer encodes a test text or a token differently.
    """
    tokenizer = encoder.hugging_face()
    _verify_roundtrip(encoder, tokenizer)
    end = encoder.decode([encoder.end_of_document])
    start_id = start_of_document(encoder)
    start = None if start_id is None else tokenizer.id_to_token(start_id)
    if start is not None or tokenizer.num_special_tokens_to_add(False):  # text begins as in the training
        prefix, special = ("", []) if start is None else (f"{start} ", [(start, start_id)])
        tokenizer.post_processor = import_tokenizers().processors.TemplateProcessing(
            single=f"{prefix}$A", pair=f"{prefix}$A {prefix}$B", special_tokens=special
        )
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "bos_token": start or end,
        "add_bos_token": start is not None,
        "eos_token": end,
        "pad_token": end,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return ["tokenizer.json", "tokenizer_config.json"]


def to_hugging_face(ranks: dict[bytes, int], pattern: str | None, special: Mapping[str, int] | None = None) -> Any:
    """Return the encoding of a rank file as a `tokenizers.Tokenizer`; without a pattern, text is not split first.

    tiktoken merges any two neighbors whose joined bytes are a token, lowest rank first. The merges are therefore *all*
    ways to split each token into two tokens, in the order of the ranks, not only the merges found in training.
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
    # In the vocabulary, special tokens keep their ids; otherwise they would get the next free ids after gaps of ranks.
    vocabulary = {spelled[token]: rank for token, rank in ranks.items()}
    if taken := sorted(vocabulary.keys() & (special or {}).keys()):
        raise InputError("special_tokens", f"{taken[0]!r} is also an ordinary token of the file; use another name")
    tokenizer = library.Tokenizer(library.models.BPE({**vocabulary, **(special or {})}, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizer(pattern)
    tokenizer.decoder = library.decoders.ByteLevel()
    tokenizer.add_special_tokens([library.AddedToken(token, special=True, normalized=False) for token in special or {}])
    return tokenizer


def pre_tokenizer(pattern: str | None) -> Any:
    """Return a pre-tokenizer that splits text by `pattern` and maps bytes to characters."""
    library = import_tokenizers()
    byte_level = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if pattern is None:
        return byte_level
    try:
        regex = library.Regex(pattern)
    except Exception as error:  # the library raises a plain Exception
        raise ValueError(f"pattern {pattern!r}: {error}; known names: {', '.join(PATTERNS)}") from None
    return library.pre_tokenizers.Sequence([library.pre_tokenizers.Split(regex, behavior="isolated"), byte_level])


def byte_characters() -> dict[int, str]:
    """Return byte -> the character that represents it in the byte-level vocabularies of GPT-2 and Hugging Face."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def import_tokenizers() -> Any:
    """Return the `tokenizers` library. Raises ValueError if it is missing."""
    with extra_required("this tokenizer", "tokenizers", "hf"):
        import tokenizers
    return tokenizers


def _verify_roundtrip(encoder: ConvertibleTokenizer, tokenizer: Any) -> None:
    """Raise ValueError for the first text that the two encode differently: a test text, or the text of a token."""
    special = {added.content for added in tokenizer.get_added_tokens_decoder().values()}
    texts = [_PROBE]
    for token in sorted(set(tokenizer.get_vocab(with_added_tokens=True).values()) & set(range(encoder.vocab_size))):
        text = encoder.decode([token])
        if text not in special and "\ufffd" not in text:
            texts.append(text)
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    for text, expected, found in zip(texts, encoder.encode_batch(texts), encoded, strict=True):
        if list(expected) != found.ids:
            raise ValueError(
                f"the `tokenizers` library encodes {text[:60]!r} as {found.ids[:9]}, expected {expected[:9]}"
            )
