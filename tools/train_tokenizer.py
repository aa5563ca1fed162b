"""Train a byte-pair encoding and write it as a tiktoken rank file.

    python -m tools.train_tokenizer --vocab-size 4096 --output my.tiktoken                     # on the default corpus
    python -m tools.train_tokenizer --vocab-size 32_000 --output my.tiktoken --path "corpus/**/*.jsonl.gz"

Use the file with [tokenizer] use = "components.tokenizers:TiktokenFile", path = ..., pattern = the same.
"""

from __future__ import annotations

import argparse
import base64
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from components.data import StandardLibrary, TextFiles
from components.data.document import ReadingLog
from components.data.source import TextSource
from components.tokenizers import TiktokenFile
from components.tokenizers.patterns import PATTERNS, resolve_pattern

_PROOF_CHARACTERS = 2_000_000


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 for what the user can put right."""
    parser = argparse.ArgumentParser(prog="python -m tools.train_tokenizer", description=__doc__.split("\n")[0])
    parser.add_argument("--vocab-size", type=int, required=True, help="number of ids, the end of a document among them")
    parser.add_argument("--output", type=Path, required=True, help="the rank file to write")
    parser.add_argument(
        "--pattern", default="cl100k", help=f"{', '.join(PATTERNS)} or a regular expression (default: cl100k)"
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--source", choices=["stdlib"], default="stdlib", help="the default corpus, its training split")
    source.add_argument("--path", type=Path, nargs="+", help="text files, directories or glob patterns instead")
    parser.add_argument("--text-key", default="text", help="the key of the text in JSON lines (default: text)")
    options = parser.parse_args(arguments)
    try:
        corpus: TextSource = (
            TextFiles(path=options.path, text_key=options.text_key) if options.path else StandardLibrary(split="train")
        )
        pattern = resolve_pattern(options.pattern)
        ranks = train(corpus, vocab_size=options.vocab_size, pattern=pattern)
        write_ranks(options.output, ranks)
        print(prove(options.output, corpus, ranks, pattern))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f'wrote {options.output}: {len(ranks):,} ranks; use it with pattern = "{options.pattern}"')
    return 0


def train(corpus: TextSource, *, vocab_size: int, pattern: str) -> dict[bytes, int]:
    """Token bytes -> rank, for `vocab_size` - 1 tokens: the last id is left for the end of a document.

    Raises ValueError if the `tokenizers` library is missing or the text does not hold that many tokens.
    """
    if vocab_size < 257:
        raise ValueError(f"--vocab-size {vocab_size}: expected at least 257, the bytes and the end of a document")
    library = _library()
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = _pre_tokenizer(pattern)
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(_texts(corpus), trainer)
    byte_of = {character: byte for byte, character in _byte_characters().items()}
    ranks = {bytes(byte_of[c] for c in token): rank for token, rank in tokenizer.get_vocab().items()}
    if len(ranks) < vocab_size - 1:
        raise ValueError(
            f"{corpus} gives only {len(ranks):,} tokens; use --vocab-size {len(ranks) + 1} or train on more text"
        )
    return ranks


def write_ranks(path: Path, ranks: dict[bytes, int]) -> None:
    """A tiktoken rank file: `base64(token) rank` a line, by rank."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    with aside.open("wb") as file:
        for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
            file.write(base64.b64encode(token) + b" %d\n" % rank)
    aside.replace(path)


def prove(path: Path, corpus: TextSource, ranks: dict[bytes, int], pattern: str) -> str:
    """Encode the corpus' first documents with tiktoken, from the file, and with `tokenizers`: a line about it.

    Raises ValueError at the first document on which they differ, or that does not come back as it was.
    """
    ours = TiktokenFile(path=path, pattern=pattern).build()
    theirs = hugging_face(ranks, pattern)
    characters = tokens = 0
    for text in _texts(corpus):
        ids = ours.encode_batch([text])[0].tolist()
        if ids != theirs.encode(text).ids:
            raise ValueError(f"tiktoken and tokenizers encode {text[:80]!r}... differently under {pattern!r}")
        if ours.decode(ids) != text:
            raise ValueError(f"{text[:80]!r}... does not come back from its ids")
        characters, tokens = characters + len(text), tokens + len(ids)
        if characters > _PROOF_CHARACTERS:
            break
    return f"tiktoken and tokenizers agree on {characters:,} characters: {characters / tokens:.2f} characters per token"


def hugging_face(ranks: dict[bytes, int], pattern: str) -> Any:
    """The same encoding as a `tokenizers.Tokenizer`.

    tiktoken joins any two neighbours whose joint bytes are a token, lowest rank first; so the merges are *all* the ways
    to cut each token in two tokens, in the order of the ranks, and not only those that training happened to take.
    """
    library = _library()
    character = _byte_characters()
    spelled = {token: "".join(character[byte] for byte in token) for token in ranks}
    merges = [
        (spelled[token[:cut]], spelled[token[cut:]])
        for token in sorted(ranks, key=ranks.__getitem__)
        for cut in sorted(
            range(1, len(token)), key=lambda cut: (ranks.get(token[:cut], -1), ranks.get(token[cut:], -1))
        )
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    vocabulary = {spelled[token]: rank for token, rank in ranks.items()}
    tokenizer = library.Tokenizer(library.models.BPE(vocabulary, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = _pre_tokenizer(pattern)
    return tokenizer


def _pre_tokenizer(pattern: str) -> Any:
    library = _library()
    try:
        regex = library.Regex(pattern)
    except Exception as error:  # the library has no class of its own for it
        raise ValueError(f"--pattern {pattern!r}: {error}; the names are {', '.join(PATTERNS)}") from None
    split = library.pre_tokenizers.Split(regex, behavior="isolated")
    byte_level = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return library.pre_tokenizers.Sequence([split, byte_level])


def _texts(corpus: TextSource) -> Iterator[str]:
    return (document.text for document in corpus.documents(ReadingLog()))


def _byte_characters() -> dict[int, str]:
    """byte -> the printable character that stands for it in GPT-2's and Hugging Face's byte-level vocabularies."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _library() -> Any:
    try:
        import tokenizers
    except ModuleNotFoundError:
        raise ValueError("training needs the `tokenizers` library: pip install 'powertrain[hf]'") from None
    return tokenizers


if __name__ == "__main__":
    sys.exit(main())
