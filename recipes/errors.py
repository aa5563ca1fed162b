"""Errors a run can name: bad input, told where the recipe asked for it, and an end the run itself decided on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from recipes.config import Config, ConfigError

_NAMES_A_KEY = re.compile(r"([A-Za-z_][\w.]*): ")


class RunError(Exception):
    """The run had to end, and the message says why and how to go on. Exit status 1, no traceback."""


@contextmanager
def blame(config: Config, path: str) -> Iterator[None]:
    """Turn a ValueError, OSError or ImportError of the block into a ConfigError at `path`.

    A message that begins with `key: ` is about that key of the table at `path`.
    """
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        message = str(error)
        match = _NAMES_A_KEY.match(message)
        if match and f"{path}.{match.group(1)}" in config.leaves:
            path, message = f"{path}.{match.group(1)}", message[match.end() :]
        raise ConfigError([config.problem(path, message)]) from error
