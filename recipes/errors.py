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
def blame(config: Config, path: str, *, started: bool = False) -> Iterator[None]:
    """Turn a ValueError, OSError or ImportError of the block into a ConfigError at `path`.

    `started`: the run has begun. A message that begins with `key: ` is about that key of the table at `path`.
    """
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        message = str(error)
        match = _NAMES_A_KEY.match(message)
        if match and f"{path}.{match.group(1)}" in config.leaves:
            path, message = f"{path}.{match.group(1)}", message[match.end() :]
        raise ConfigError([config.problem(path, message)], started=started) from error


def out_of_memory(error: BaseException) -> str | None:
    """What to turn down, if `error` says that memory has run out; None for any other."""
    text = str(error)
    if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text or isinstance(error, MemoryError):
        where = "the GPU" if "CUDA" in text else "this machine"
        return (
            f"{where} has run out of memory; halve training.micro_batch_size (the batch stays as it is), set "
            'training.activation_checkpoint = "full", shorten training.sequence_length, or shard over more processes. '
            "--dry-run reckons what is needed. What was saved is not lost: --resume continues"
        )
    return None
