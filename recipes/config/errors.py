"""The problems of a configuration: each with its place, key and value, all reported together."""

from __future__ import annotations

import difflib
import os
import re
import sysconfig
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from components.paths import expand_home
from components.storage.address import local_copy_of

PROJECT = Path(__file__).parents[2]
"""The directory that holds recipes, components and models."""

COMMAND_LINE = "command line"
DEFAULT = "default"


@dataclass(frozen=True)
class Origin:
    """Where a value was written."""

    source: str
    """`train_configs/mine.toml:14`, `command line` or `default`."""
    base_dir: Path
    """The directory that relative paths written there are relative to."""


@dataclass(frozen=True)
class Problem:
    """One mistake to correct."""

    source: str
    """`train_configs/mine.toml:14` or `command line`."""
    path: str
    """Dotted key, such as `training.total_tokens`; empty for a file as a whole."""
    message: str
    """What is wrong, what was expected, and what to do; may have several lines."""
    value: str | None = None
    """The value as TOML, where one was given."""

    def __str__(self) -> str:
        subject = self.path if self.value is None else f"{self.path} = {self.value}"
        head = f"{self.source}  {subject}".rstrip()
        return "\n".join([head, *(f"    {line}" for line in self.message.splitlines())])


class ConfigError(Exception):
    """The configuration cannot be used; `problems` holds everything that is wrong with it, in file order."""

    def __init__(self, problems: Iterable[Problem], *, started: bool = False) -> None:
        """`started`: the problem appeared only after training had started."""
        self.problems = sorted(problems, key=_reading_order)
        self.started = started
        super().__init__(self.problems)

    def fields(self) -> dict[str, Any]:
        """Return the fields of the error as JSON values, for other programs."""
        return {"started": self.started, "problems": [asdict(problem) for problem in self.problems]}

    def __str__(self) -> str:
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        outcome = "the run has ended" if self.started else "nothing was started"
        return "\n".join([*map(str, self.problems), f"{count}; {outcome}."])


def problem_message(error: BaseException) -> str:
    """Return the message of an error that stands for bad input, and `error_with_location(error)` for any other."""
    return (isinstance(error, (ValueError, TypeError)) and str(error)) or error_with_location(error)


def error_with_location(error: BaseException) -> str:
    """Return the type and message of an error, and the innermost line on its traceback that is not in a library."""
    libraries = tuple(sysconfig.get_paths()[key] for key in ("stdlib", "purelib", "platlib"))
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    frames = [frame for frame in frames if not Path(frame.filename).is_relative_to(Path(__file__).parent)]
    outside = [frame for frame in frames if not frame.filename.startswith(libraries)]
    innermost = next(iter([*reversed(outside), *reversed(frames)]), None)
    place, message = f"\n{innermost.filename}:{innermost.lineno}" if innermost else "", str(error)
    if isinstance(error, SyntaxError):  # it contains file and line
        place, message = f"\n{error.filename}:{error.lineno}", error.msg
    return f"{type(error).__name__}{message and ': '}{message}{place}"


def _reading_order(problem: Problem) -> tuple[bool, str, int]:
    """Return the sort key of a problem: files first, each from top to bottom, then the command line."""
    file, line = re.fullmatch(r"(.*?)((?::\d+)*)", problem.source, re.DOTALL).groups()  # type: ignore[union-attr]
    return file == COMMAND_LINE, file, int(line.split(":")[1]) if line else 0


def display_path(path: Path, cwd: Path) -> str:
    """Return `path` for display: relative to `cwd` if it is below it."""
    return str(path.relative_to(cwd) if path.is_relative_to(cwd) else path)


def absolute(path: str | Path, base_dir: Path) -> Path:
    """Return `path` seen from `base_dir`, with `~` expanded and `..` folded; of an address, its local copy.

    Raises ValueError for a home directory that does not exist, for a null character, and for a name that is not UTF-8,
    which no TOML file can hold.
    """
    if (copy := local_copy_of(Path(path))) is not None:
        return copy
    found = Path(os.path.abspath(base_dir / expand_home(path)))  # noqa: PTH100 (resolve() would follow links)
    if "\0" in str(found):
        raise ValueError(f"{str(found)!r} contains a null character, which no path can")
    if not is_utf8(str(found)):
        raise ValueError(f"{found}: the name is not UTF-8, so a recipe cannot contain it; rename the directory or file")
    return found


def is_utf8(text: str) -> bool:
    """Return whether `text` can be encoded as UTF-8, which not all file names and arguments can."""
    return text.encode(errors="ignore").decode() == text


def did_you_mean(name: str, candidates: Iterable[str], cutoff: float = 0.75) -> str | None:
    """Return the candidate most similar to `name`, ignoring case and hyphens, or None."""
    by_plain = {candidate.lower().replace("-", "_"): candidate for candidate in candidates}
    match = difflib.get_close_matches(name.lower().replace("-", "_"), by_plain, n=1, cutoff=cutoff)
    return by_plain[match[0]] if match else None


def join_limited(names: Sequence[str], limit: int = 12) -> str:
    """Return `a, b, c`, cut after `limit` names."""
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
