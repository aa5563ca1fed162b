"""What was wrong with a configuration, and where: told all at once, in the words of whoever wrote the file."""

from __future__ import annotations

import difflib
import os
import re
import sysconfig
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from components.units import expand_home

PROJECT = Path(__file__).parents[2]
"""The directory that holds recipes, components and models."""

HAS_ENDED = "the run has ended"
"""What the message of an error says that showed only when the run had begun."""


@dataclass(frozen=True)
class Origin:
    """Where a value was written."""

    where: str
    """`train_configs/mine.toml:14`, `command line` or `default`."""
    folder: Path
    """What a relative path written there is relative to."""


@dataclass(frozen=True)
class Problem:
    """One thing to correct."""

    where: str
    """`train_configs/mine.toml:14` or `command line`."""
    path: str
    """Dotted key, such as `training.total_tokens`; empty for a file as a whole."""
    message: str
    """What is wrong, what was expected, and what to do; may have several lines."""
    value: str | None = None
    """The value as TOML, where one was given."""

    def __str__(self) -> str:
        subject = self.path if self.value is None else f"{self.path} = {self.value}"
        head = f"{self.where}  {subject}".rstrip()
        return "\n".join([head, *(f"    {line}" for line in self.message.splitlines())])


class ConfigError(Exception):
    """The configuration cannot be used; `problems` holds everything that is wrong with it, in file order."""

    def __init__(self, problems: Iterable[Problem], *, started: bool = False) -> None:
        """`started`: it showed only when the run had begun."""
        self.problems = sorted(problems, key=_reading_order)
        self.started = started
        super().__init__(self.problems)

    def __str__(self) -> str:
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        outcome = HAS_ENDED if self.started else "nothing was started"
        return "\n".join([*map(str, self.problems), f"{count}; {outcome}."])


def error_message(error: BaseException) -> str:
    """The text of an error that stands for bad input, and of any other what `describe_error` says."""
    return (isinstance(error, (ValueError, TypeError)) and str(error)) or describe_error(error)


def describe_error(error: BaseException) -> str:
    """The type and message of an error, and the innermost line of code it came through that is not a library's."""
    libraries = tuple(sysconfig.get_paths()[key] for key in ("stdlib", "purelib", "platlib"))
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    frames = [frame for frame in frames if not Path(frame.filename).is_relative_to(Path(__file__).parent)]
    own = [frame for frame in frames if not frame.filename.startswith(libraries)]
    innermost = next(iter([*reversed(own), *reversed(frames)]), None)
    place, message = f"\n{innermost.filename}:{innermost.lineno}" if innermost else "", str(error)
    if isinstance(error, SyntaxError):  # names its own place
        place, message = f"\n{error.filename}:{error.lineno}", error.msg
    return f"{type(error).__name__}{message and ': '}{message}{place}"


def _reading_order(problem: Problem) -> tuple[bool, str, int]:
    """Files first, each from top to bottom, then the command line; equal places keep their order."""
    file, line = re.fullmatch(r"(.*?)((?::\d+)*)", problem.where, re.DOTALL).groups()  # type: ignore[union-attr]
    return file == "command line", file, int(line.split(":")[1]) if line else 0


def shown(path: Path, cwd: Path) -> str:
    """`path` as the user would type it: relative where it lies under `cwd`."""
    try:
        return str(path.relative_to(cwd))
    except ValueError:
        return str(path)


def absolute(path: str | Path, folder: Path) -> Path:
    """`path` seen from `folder`, `~` expanded and `..` folded.

    Raises ValueError for a home that does not exist, and for a name that is not UTF-8, which no TOML file can hold.
    """
    found = Path(os.path.abspath(folder / expand_home(path)))  # noqa: PTH100 (resolve() would follow links)
    if not is_utf8(str(found)):
        raise ValueError(f"{found}: this name is not UTF-8, as a recipe has to be; rename the folder or the file")
    return found


def is_utf8(text: str) -> bool:
    """Whether UTF-8 can hold `text`; what it cannot hold are bytes of a file name or of the command line."""
    return text.encode(errors="ignore").decode() == text


def closest(name: str, candidates: Iterable[str], cutoff: float = 0.75) -> str | None:
    """The candidate that `name` was probably meant to be; case and hyphens do not count."""
    by_plain = {_plain(candidate): candidate for candidate in candidates}
    match = difflib.get_close_matches(_plain(name), by_plain, n=1, cutoff=cutoff)
    return by_plain[match[0]] if match else None


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")


def listed(names: Sequence[str], limit: int = 12) -> str:
    """`a, b, c`, cut short when there are many."""
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
