"""PythonCompletion: multiple choice made from the standard library of the running interpreter, without a file."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from components.python_library import Split, library_files, source_encoding
from components.tasks.question import Question, Request
from components.units import PositiveCount

Kind = Literal["call", "name", "import"]
KINDS: tuple[Kind, ...] = ("call", "name", "import")
NUM_CHOICES = 4


@dataclass(frozen=True)
class _Place:
    """An identifier in a file, to be predicted from the text before it."""

    kind: Kind
    file: str
    start: int
    """Offset in bytes of its first character."""
    identifier: str

    @property
    def pool(self) -> str:
        """The places whose identifiers are its wrong choices: those of its file, and for the few imports of all."""
        return "" if self.kind == "import" else self.file

    def key(self, more: str = "") -> str:
        """Return a number that orders places, or choices of one, in a fixed pseudo-random order."""
        return hashlib.sha256(f"{self.kind} {self.file} {self.start} {more}".encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class PythonCompletion:
    """Complete a call, a name or an import in a file of the standard library: acc, acc_norm, bits_per_byte.

    The wrong choices are called, named or imported elsewhere in the same file, or imported in another one. The
    questions depend only on the version of Python.
    """

    rows: PositiveCount = 300
    """Number of questions, as far as possible in equal parts of each kind."""
    split: Split = "test"
    """The files; `components.data:StandardLibrary` trains on the split "train"."""
    context_chars: PositiveCount = 160
    """Characters of the file before the identifier, from the next beginning of a line on."""
    interval_steps: PositiveCount | None = None
    """Optimizer steps between evaluations; unset: only at the end of the run."""

    def questions(self) -> Sequence[Question]:
        """Return the questions. Raises ValueError if the files of the library are missing."""
        return _make_questions(self)


@lru_cache(maxsize=8)
def _make_questions(task: PythonCompletion) -> tuple[Question, ...]:
    """Return the questions of `task`, made once per process: parsing the files takes a second."""
    texts: dict[str, bytes] = {}
    places: dict[Kind, list[_Place]] = {kind: [] for kind in KINDS}
    for name, path in library_files(task.split).items():
        data = path.read_bytes()
        texts[name] = data.decode(source_encoding(data), "replace").replace("\r\n", "\n").encode()
        for place in _find_places(name, texts[name]):
            places[place.kind].append(place)
    questions: list[Question] = []
    for left, kind in zip((3, 2, 1), sorted(KINDS, key=lambda kind: len(places[kind])), strict=True):
        pools: dict[str, set[str]] = {}
        for place in places[kind]:
            pools.setdefault(place.pool, set()).add(place.identifier)
        usable = (place for place in places[kind] if len(pools[place.pool]) >= NUM_CHOICES)
        for place in sorted(usable, key=_Place.key)[: (task.rows - len(questions)) // left]:
            questions.append(_make_question(task, place, texts[place.file], pools[place.pool]))
    return tuple(questions)


def _make_question(task: PythonCompletion, place: _Place, text: bytes, pool: set[str]) -> Question:
    wrong = sorted(pool - {place.identifier}, key=place.key)[: NUM_CHOICES - 1]
    choices = sorted([place.identifier, *wrong], key=place.key)
    before = text[: place.start].decode()
    context = before[-task.context_chars :]
    if len(before) > len(context) and "\n" in context[:-1]:
        context = context[context.index("\n") + 1 :]
    end = "(" if place.kind == "call" else ""
    requests = [Request(context, choice + end, "") for choice in choices]
    return Question(requests, choices.index(place.identifier), f"{place.kind} in {place.file}")


def _find_places(name: str, text: bytes) -> Iterator[_Place]:
    """Yield the called methods, the names that are read, and the imported names of a file."""
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for node in ast.walk(ast.parse(text.decode())):
        if isinstance(node, ast.Call) and isinstance(called := node.func, ast.Attribute):
            end = starts[(called.end_lineno or 1) - 1] + (called.end_col_offset or 0)
            found: tuple[Kind, int, str] = ("call", end - len(called.attr.encode()), called.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            found = ("name", starts[node.lineno - 1] + node.col_offset, node.id)
        elif isinstance(node, ast.ImportFrom):
            first = node.names[0]
            found = ("import", starts[first.lineno - 1] + first.col_offset, first.name)
        else:
            continue
        kind, start, identifier = found
        if text[start : start + len(identifier.encode())] == identifier.encode() and len(identifier) > 2:
            yield _Place(kind, name, start, identifier)
