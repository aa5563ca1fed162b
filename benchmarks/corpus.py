"""Text of any size for the data benchmarks: paragraphs of real text, drawn with replacement by a seed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from benchmarks.shared import ROOT
from components.data import StandardLibrary, TextFiles
from components.data.document import ReadStats
from components.data.sources.base import TextSource
from components.tokenizers import TiktokenFile
from components.tokenizers.tiktoken_file import RankEncoder

_DOCUMENT_CHARACTERS = 4_000


def tokenizer() -> RankEncoder:
    """Return the tokenizer of the debug recipe."""
    return TiktokenFile(path=ROOT / "assets/tokenizers/stdlib-4096.tiktoken", pattern="cl100k").build()


def documents(characters: int, text: Path | None, seed: int = 0) -> Iterator[str]:
    """Yield documents of about 4,000 characters, `characters` in total, from `text` or the standard library."""
    source: TextSource = TextFiles(path=text) if text else StandardLibrary()
    paragraphs = [part for document in source.documents(ReadStats()) for part in document.text.split("\n\n")]
    generator = random.Random(seed)
    done = 0
    while done < characters:
        parts: list[str] = []
        size = 0
        while size < _DOCUMENT_CHARACTERS:
            parts.append(generator.choice(paragraphs))
            size += len(parts[-1]) + 2
        done += size
        yield "\n\n".join(parts)


def write_files(folder: Path, characters: int, text: Path | None, file_characters: int = 16_000_000) -> list[Path]:
    """Write the documents as JSON lines, in files of about 16 MB; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number in range(-(-characters // file_characters)):
        files.append(folder / f"{number:04d}.jsonl")
        with files[-1].open("w", encoding="utf-8") as file:
            wanted = min(file_characters, characters - number * file_characters)
            for document in documents(wanted, text, seed=number):
                file.write(json.dumps({"text": document}) + "\n")
    return files
