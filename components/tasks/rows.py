"""Rows of a task in a JSONL file: the format of docs/tasks.md, or the samples that lm-evaluation-harness writes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.errors import InputError
from components.storage.local_copy import fetch_file
from components.tasks.question import Request


@dataclass(frozen=True)
class Row:
    """One row of a file."""

    requests: Sequence[Request]
    answer: int
    """Index of the right request."""
    source: str
    """`file:line`"""
    is_exported: bool
    """Whether lm-evaluation-harness wrote it. Its contexts then contain the few-shot examples already."""


def read_rows(path: Path, *, with_choices: bool, delimiter: str, key: str = "path") -> list[Row]:
    """Return the rows of `path`: questions `with_choices`, or texts with a single right continuation.

    Raises MissingFileError, or InputError with file and line, both at `key`.
    """
    fetch_file(path, key)
    rows: list[Row] = []
    first_filter: Any = None
    for where, values in _objects(path, key):
        is_exported = "arguments" in values
        if is_exported:  # a task with several filters repeats its rows for each
            first_filter = values.get("filter") if first_filter is None else first_filter
            if values.get("filter") != first_filter:
                continue
        parse = _exported_row if is_exported else _choice_row if with_choices else _cloze_row
        try:
            requests, answer = parse(values, delimiter)
            if with_choices and len(requests) < 2:
                raise ValueError("only one choice; use components.tasks:Cloze for rows without choices")
            if not with_choices and len(requests) > 1:
                raise ValueError("several choices; use components.tasks:MultipleChoice for rows with choices")
        except ValueError as error:
            raise InputError(key, f"{where}: {error}") from None
        rows.append(Row(requests, answer, where, is_exported))
    if not rows:
        raise InputError(key, f"{path} has no rows")
    return rows


def _objects(path: Path, key: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (`file:line`, object) of each line that is not empty."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(key, f"{path}:{number}: not JSON: {str(error)[:100]}") from None
            if not isinstance(values, dict):
                raise InputError(key, f"{path}:{number}: expected a JSON object, found {line[:60]!r}")
            yield f"{path}:{number}", values


def _choice_row(values: Mapping[str, Any], delimiter: str) -> tuple[list[Request], int]:
    """Read `{"context": ..., "choices": [...], "answer": ...}`."""
    _, context = _find(values, "context", "query")
    choices = values.get("choices")
    if not isinstance(choices, list) or not choices:
        raise ValueError(f"expected `choices`, a list of texts, found {_brief(choices)}")
    name, answer = _find(values, "answer", "gold")
    context = _text("context", context, may_be_empty=True)
    requests = [Request(context, _text("choices", choice), delimiter) for choice in choices]
    return requests, _index(name, answer, choices)


def _cloze_row(values: Mapping[str, Any], delimiter: str) -> tuple[list[Request], int]:
    """Read `{"context": ..., "answer": ...}`."""
    if "choices" in values:
        raise ValueError("it has choices; use components.tasks:MultipleChoice")
    _, context = _find(values, "context", "query")
    name, answer = _find(values, "answer", "gold")
    return [Request(_text("context", context, may_be_empty=True), _text(name, answer), delimiter)], 0


def _exported_row(values: Mapping[str, Any], delimiter: str) -> tuple[list[Request], int]:
    """Read a line of `samples_TASK.jsonl`: context and continuation of each request are in `arguments`."""
    arguments = values["arguments"]
    pairs = list(arguments.values()) if isinstance(arguments, dict) else arguments
    requests = []
    for pair in pairs if isinstance(pairs, list) else [None]:
        parts = list(pair.values()) if isinstance(pair, dict) else pair
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
            raise ValueError("`arguments` are not those of a multiple_choice or loglikelihood task")
        context, continuation = parts
        choice = continuation.removeprefix(delimiter)
        choice, before = (choice, delimiter) if choice and choice != continuation else (continuation, "")
        requests.append(Request(context, _text("arguments", choice), before))
    if len(requests) < 2:
        return requests, 0
    target = values.get("target")
    if isinstance(target, str) and target.isdecimal():  # it writes an index as text
        target = int(target)
    return requests, _index("target", target, [each.choice for each in requests])


def _find(values: Mapping[str, Any], *names: str) -> tuple[str, Any]:
    """Return the first of the keys `names` that the row has, and its value."""
    for name in names:
        if name in values:
            return name, values[name]
    raise ValueError(f"it has no key `{names[0]}`; its keys: {', '.join(map(str, values)) or 'none'}")


def _text(name: str, value: Any, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected text in `{name}`, found {_brief(value)}")
    if not value and not may_be_empty:
        raise ValueError(f"`{name}` has an empty text, which cannot be predicted")
    return value


def _index(name: str, answer: Any, choices: Sequence[str]) -> int:
    """Return the index of the right choice, which is given as index or as text."""
    if isinstance(answer, str) and answer in choices:
        return list(choices).index(answer)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    raise ValueError(
        f"`{name}` is {_brief(answer)}; expected one of its choices, or an index from 0 to {len(choices) - 1}"
    )


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
