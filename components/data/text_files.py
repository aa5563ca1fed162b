"""Text files of one's own: plain text and JSON lines, compressed or not."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from components.data.document import Document, ReadingLog
from components.data.reading import line_feeds, read_blocks, read_lines
from components.data.source import FileSource

_TEXT = (".txt", ".txt.gz")
_JSON_LINES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
SUFFIXES = _TEXT + _JSON_LINES

_PART_CHARACTERS = 2**22
"""A document longer than this is handed on in parts, cut after a line where it has any."""


@dataclass(kw_only=True)
class TextFiles(FileSource):
    """`.txt` and JSON lines (`.jsonl`, or `.json` as C4 has it), each also `.gz`, in the order of their names.

    A `.txt` file is one document, a JSON line is one. Byte-order marks, CRLF and invalid UTF-8 are put right and
    counted, documents without text are dropped and counted. A line that is no JSON object, or has no text where
    `text_key` says, stops the preparation with its file and line: it may be one of very many, and silence would hide
    that.
    """

    path: Path | list[Path]
    """A file, a directory (searched with all below it) or a glob pattern such as "corpus/**/*.jsonl.gz"; or several."""
    text_key: str = "text"
    """The key of the text in a JSON line."""
    document_separator: str | None = None
    """Cuts `.txt` files into documents, for example "<|endoftext|>\\n". Without it a file is one document."""

    def __post_init__(self) -> None:
        if self.document_separator == "":
            raise ValueError('document_separator: "" separates nothing; leave the key out')

    def read(self, path: Path, log: ReadingLog) -> Iterator[Document]:
        return self._text(path, log) if path.name.endswith(_TEXT) else self._json_lines(path, log)

    def manner(self, path: Path) -> str:
        if path.name.endswith(_TEXT):
            return f"text-1 {json.dumps(self.document_separator)}"
        return f"json-lines-1 {json.dumps(self.text_key)}"

    def __str__(self) -> str:
        return ", ".join(map(str, self.path)) if isinstance(self.path, list) else str(self.path)

    def files(self) -> dict[str, Path]:
        """Name, relative to the directory all have in common, -> file; sorted by name.

        Raises FileNotFoundError where a path matches nothing, ValueError for a file of another kind.
        """
        found: set[Path] = set()
        for path in self.path if isinstance(self.path, list) else [self.path]:
            found.update(file.resolve() for file in _matches(path))
        if not found:
            raise FileNotFoundError("path: [] names no file, directory or glob pattern")
        common = os.path.commonpath([file.parent for file in found])
        return {file.relative_to(common).as_posix(): file for file in sorted(found)}

    def _text(self, path: Path, log: ReadingLog) -> Iterator[Document]:
        separator = self.document_separator
        pending = ""
        for block in read_blocks(path, log):
            pending += block
            if separator:
                *finished, pending = pending.split(separator)
                yield from map(Document, finished)
            if len(pending) > _PART_CHARACTERS:
                # Not within the last characters: they may be the first half of a separator.
                end = len(pending) - len(separator or "")
                cut = pending.rfind("\n", 0, end) + 1 or end
                yield Document(pending[:cut], complete=False)
                pending = pending[cut:]
        if pending or not separator:
            yield Document(pending)

    def _json_lines(self, path: Path, log: ReadingLog) -> Iterator[Document]:
        for number, line in read_lines(path, log):
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}:{number}: expected a JSON object on each line ({error})") from None
            if not isinstance(value, dict):
                raise ValueError(f"{path}:{number}: expected a JSON object on each line, found {line[:60]}")
            text = value.get(self.text_key)
            if not isinstance(text, str):
                keys = ", ".join(sorted(value)[:10])
                raise ValueError(f"{path}:{number}: no text under text_key = {self.text_key!r}; the line has {keys}")
            yield Document(line_feeds(text, log))


def _matches(path: Path) -> list[Path]:
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise ValueError(f"path: {path} does not end in {', '.join(SUFFIXES)}")
        return [path]
    if path.is_dir():
        found = [file for file in path.rglob("*") if file.name.endswith(SUFFIXES) and file.is_file()]
    else:
        names = [name for name in glob.glob(str(path), recursive=True) if Path(name).is_file()]  # noqa: PTH207
        found = [Path(name) for name in names if name.endswith(SUFFIXES)]
        if names and not found:
            raise ValueError(f"path: {path} matches {len(names)} files, none of which ends in {', '.join(SUFFIXES)}")
    if not found:
        raise FileNotFoundError(f"path: {path} matches no file that ends in {', '.join(SUFFIXES)}")
    return found
