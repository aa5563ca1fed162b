"""Train a byte-pair encoding and write it as a tiktoken rank file and as a tokenizer.json.

    python -m tools.train_tokenizer --vocab-size 4096 --output my.tiktoken                     # on the default corpus
    python -m tools.train_tokenizer --vocab-size 32_000 --output my.tiktoken --path "corpus/**/*.jsonl.gz"
    python -m tools.train_tokenizer --vocab-size 32_000 --output my.tiktoken --recipe my.toml   # on its [data]

Use the file with [tokenizer] use = "components.tokenizers:TiktokenFile", path = ..., pattern = the same; or
my.tokenizer.json with use = "components.tokenizers:TokenizerJson". Exit status: 0 done, 2 for a user error.
"""

from __future__ import annotations

import argparse
import base64
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from components.atomic_files import atomic_write
from components.data import HuggingFaceDataset, StandardLibrary, TextFiles
from components.data.document import ReadStats, to_utf8
from components.data.mixture import sources_in
from components.data.sources.base import TextSource
from components.paths import check_output_file
from components.standard_streams import run_command
from components.tokenizers import TiktokenFile, TokenizerJson
from components.tokenizers.hf_conversion import byte_characters, import_tokenizers, pre_tokenizer, to_hugging_face
from components.tokenizers.patterns import PATTERNS, resolve_pattern
from recipes.cli import reports_bad_input
from recipes.config import load

END_OF_DOCUMENT = "<|endoftext|>"
_VERIFIED_CHARACTERS = 2_000_000


@reports_bad_input
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.train_tokenizer", description=__doc__.split("\n")[0])
    parser.add_argument("--vocab-size", type=int, required=True, help="number of ids, including the end of a document")
    parser.add_argument("--output", type=Path, required=True, help="the rank file to write")
    parser.add_argument(
        "--pattern", default="cl100k", help=f"{', '.join(PATTERNS)} or a regular expression (default: cl100k)"
    )
    source = parser.add_mutually_exclusive_group()
    text = "files, directories or globs, or hf://dataset/config/split (default: the default corpus)"
    source.add_argument("--path", nargs="+", help=text)
    source.add_argument("--recipe", type=Path, help="the [data] of a recipe, or all sources of its mixture")
    parser.add_argument("--text-key", default="text", help="key or column of the text (default: text)")
    options = parser.parse_args(arguments)
    check_output_file(options.output)
    json_path = options.output.with_name(options.output.name.removesuffix(".tiktoken") + ".tokenizer.json")
    check_output_file(json_path)
    corpus = list(text_sources(options.path, options.recipe, options.text_key))
    pattern = resolve_pattern(options.pattern)
    ranks = train_ranks(corpus, vocab_size=options.vocab_size, pattern=pattern)
    write_ranks(options.output, ranks)
    to_hugging_face(ranks, pattern, {END_OF_DOCUMENT: len(ranks)}).save(str(json_path))
    print(verify_equal_encodings(options.output, json_path, corpus, pattern))
    print(f'wrote {options.output}: {len(ranks):,} ranks; use it with pattern = "{options.pattern}"')
    print(f"wrote {json_path}: the same for Hugging Face")
    return 0


def text_sources(paths: Sequence[str] | None, recipe: Path | None, text_key: str) -> Iterator[TextSource]:
    """Yield the text sources of the command line. Raises ConfigError or ValueError."""
    if recipe is not None:
        data = load(recipe, []).recipe.data
        for section, source in sources_in("data", data).items():
            if not isinstance(source, TextSource):
                raise ValueError(f"--recipe {recipe}: [{section}] is not a text source")
            yield source
        return
    files = [Path(path) for path in paths or () if not path.startswith("hf://")]
    yield from (HuggingFaceDataset(path=path, text_key=text_key) for path in paths or () if path.startswith("hf://"))
    if files:
        yield TextFiles(path=files, text_key=text_key)
    if not paths:
        yield StandardLibrary(split="train")


def train_ranks(corpus: Sequence[TextSource], *, vocab_size: int, pattern: str) -> dict[bytes, int]:
    """Return token bytes -> rank, for `vocab_size` - 1 tokens: the last id is reserved for the end of a document.

    Raises ValueError if the `tokenizers` library is missing or the text is too short for that many tokens.
    """
    if vocab_size < 257:
        raise ValueError(f"--vocab-size {vocab_size}: expected at least 257, the bytes and the end of a document")
    library = import_tokenizers()
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer(pattern)
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(_read_texts(corpus), trainer)
    byte_of = {character: byte for byte, character in byte_characters().items()}
    ranks = {bytes(byte_of[c] for c in token): rank for token, rank in tokenizer.get_vocab().items()}
    if len(ranks) < vocab_size - 1:
        raise ValueError(
            f"{', '.join(map(str, corpus))} gives only {len(ranks):,} tokens; use --vocab-size {len(ranks) + 1} or "
            "train on more text"
        )
    return ranks


def write_ranks(path: Path, ranks: dict[bytes, int]) -> None:
    """Write a tiktoken rank file: a line `base64(token) rank` for each token, by rank."""
    path.parent.mkdir(parents=True, exist_ok=True)
    in_order = sorted(ranks.items(), key=lambda item: item[1])
    atomic_write(path, "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in in_order))


def verify_equal_encodings(path: Path, json_path: Path, corpus: Sequence[TextSource], pattern: str) -> str:
    """Encode the first documents with tiktoken and with `tokenizers`, each from its file; return a line of statistics.

    Raises ValueError at the first document that they encode differently, or that does not decode to itself.
    """
    by_tiktoken = TiktokenFile(path=path, pattern=pattern).build()
    by_tokenizers = TokenizerJson(path=json_path).build()
    characters = tokens = 0
    for text in _read_texts(corpus):
        ids = by_tiktoken.encode_batch([text])[0].tolist()
        if ids != by_tokenizers.encode_batch([text])[0].tolist():
            raise ValueError(f"tiktoken and tokenizers encode {text[:80]!r}... differently under {pattern!r}")
        if by_tiktoken.decode(ids) != text:
            raise ValueError(f"{text[:80]!r}... does not decode to itself")
        characters, tokens = characters + len(text), tokens + len(ids)
        if characters > _VERIFIED_CHARACTERS:
            break
    return f"tiktoken and tokenizers agree on {characters:,} characters: {characters / tokens:.2f} characters per token"


def _read_texts(corpus: Sequence[TextSource]) -> Iterator[str]:
    """Yield the documents as they would be tokenized: a lone surrogate, which UTF-8 cannot encode, is replaced."""
    log = ReadStats()
    return (to_utf8(document.text, log)[0] for source in corpus for document in source.documents(log))


if __name__ == "__main__":
    sys.exit(run_command(main))
