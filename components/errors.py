"""The error for bad input, with the key that it concerns. This module imports nothing of the project."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """A value in the recipe or the data is invalid.

    Components raise it in their constructor, in `build` and later. The recipe reports it at the line of the key.
    """

    def __init__(self, key: str, message: str) -> None:
        super().__init__(key, message)
        self.key = key
        """Dotted path within the table of the component, such as `stages`; empty for the whole table."""
        self.message = message
        """The value, the limit and the remedy."""

    def __str__(self) -> str:
        return f"{self.key}: {self.message}" if self.key else self.message

    @staticmethod
    def below(key: str, error: Exception) -> InputError:
        """Return `error` as an InputError about `key`, or about the key below it that `error` names."""
        kind = MissingFileError if isinstance(error, FileNotFoundError) else InputError
        inner = getattr(error, "key", "")
        return kind(f"{key}.{inner}" if inner else key, message_of(error))


class MissingFileError(InputError, FileNotFoundError):
    """A file or directory that a key names is not on this machine."""


def invalid_names(names: Iterable[str]) -> Iterator[str]:
    """Yield a message for each name of a table that cannot be part of the name of a metric or file."""
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            yield f"{name!r}: the name must consist of letters, digits, _ and -"


@contextmanager
def extra_required(what: str, library: str, extra: str) -> Iterator[None]:
    """Raise ValueError if an import in the block finds that `library`, of an extra of the project, is missing."""
    try:
        yield
    except ModuleNotFoundError:
        raise ValueError(f"{what} needs the `{library}` library: pip install -e '.[{extra}]'") from None


def first_line(error: Exception) -> str:
    """Return the first line of the message of a torch error, up to 200 characters, or its type if it is empty."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def message_of(error: Exception) -> str:
    """Return the text of an error without its key."""
    return error.message if isinstance(error, InputError) else str(error)
