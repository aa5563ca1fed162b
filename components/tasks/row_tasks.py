"""MultipleChoice and Cloze: tasks from rows in a file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Annotated, ClassVar

from pydantic import Field

from components.errors import InputError
from components.tasks.question import Question, Request
from components.tasks.rows import Row, read_rows
from components.units import Count, PositiveCount

EXAMPLE_SEPARATOR = "\n\n"
"""Text between the examples of few-shot, as in lm-evaluation-harness."""


@dataclass(frozen=True, kw_only=True)
class _RowTask:
    path: Path
    """The JSONL file: one row per line, or the samples_*.jsonl that lm-evaluation-harness writes with --log_samples."""
    interval_steps: PositiveCount | None = None
    """Optimizer steps between evaluations; unset: only at the end of the run."""
    max_rows: PositiveCount | None = None
    """Use only this many rows, spread over the file; unset: all rows."""
    target_delimiter: str = " "
    """Text between a context and its continuation."""
    num_fewshot: Count = 0
    """Number of solved rows that precede each context, separated by an empty line."""
    fewshot_seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed that selects these rows, for each row by its content and not by its place in the file."""
    fewshot_path: Path | None = None
    """JSONL file of the rows to select from; unset: the other rows of `path`."""

    with_choices: ClassVar[bool]

    def questions(self) -> list[Question]:
        """Read the file. Raises FileNotFoundError or InputError with the line at fault."""
        rows = self._read(self.path, "path")
        examples = rows
        if self.num_fewshot and self.fewshot_path is not None:
            examples = self._read(self.fewshot_path, "fewshot_path")
        if self.num_fewshot:
            self._check_fewshot(rows, examples)
            solved = sorted({_solved(row) for row in examples})
        count = len(rows) if self.max_rows is None else min(self.max_rows, len(rows))
        selected = [rows[number * len(rows) // count] for number in range(count)]
        return [
            Question(self._with_examples(row, solved) if self.num_fewshot else row.requests, row.answer, row.source)
            for row in selected
        ]

    def _read(self, path: Path, key: str) -> list[Row]:
        return read_rows(path, with_choices=self.with_choices, delimiter=self.target_delimiter, key=key)

    def _check_fewshot(self, rows: Sequence[Row], examples: Sequence[Row]) -> None:
        if any(row.is_exported for row in [*rows, *examples]):
            raise InputError(
                "num_fewshot", "the contexts of lm-evaluation-harness contain their examples already; remove this key"
            )
        if (available := len({_solved(row) for row in examples}) - 1) < self.num_fewshot:
            raise InputError(
                "num_fewshot", f"{self.num_fewshot} is more than the {available} other rows to select from"
            )

    def _with_examples(self, row: Row, solved: Sequence[str]) -> list[Request]:
        """Return the requests of `row` after `num_fewshot` examples, which are not the row itself."""
        own = _solved(row)
        seed = hashlib.sha256(f"{self.fewshot_seed} {own}".encode("utf-8", "surrogatepass")).digest()
        drawn = Random(int.from_bytes(seed, "big")).sample(solved, self.num_fewshot + 1)
        examples = [example for example in drawn if example != own][: self.num_fewshot]
        before = "".join(example + EXAMPLE_SEPARATOR for example in examples)
        return [replace(request, context=before + request.context) for request in row.requests]


class MultipleChoice(_RowTask):
    """Choose the most probable of several continuations: acc, acc_norm, bits_per_byte."""

    with_choices = True


class Cloze(_RowTask):
    """Continue a text: acc (the continuation is the most probable text, token by token) and bits_per_byte."""

    with_choices = False


def _solved(row: Row) -> str:
    """Return the context with its right continuation."""
    right = row.requests[row.answer]
    return right.context + right.continuation
