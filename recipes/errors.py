"""Errors a run can name: bad input, told where the recipe asked for it, and an end the run itself decided on."""

from __future__ import annotations

import errno
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from components.errors import InputError
from recipes.config import Config, ConfigError

if TYPE_CHECKING:
    from components.distributed.context import DistributedContext

T = TypeVar("T")

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class RunError(Exception):
    """The run had to end, and the message says why and how to go on. Exit status 1, no traceback."""


@contextmanager
def config_errors_at(config: Config, path: str, *, started: bool = False) -> Iterator[None]:
    """Turn a ValueError, OSError or ImportError of the block into a ConfigError at `path`.

    `started`: the run has begun. An error that a component raised is reported at that component, and one about the
    cache at its key. An InputError is about the key of the table that it names.
    """
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        message = str(error) or type(error).__name__
        path = failing_component(config, error) or path
        if (cache := _cache_at_fault(config, path, error)) is not None:
            path, message = cache, f"{message}; name a folder that can be written, and has room"
        elif isinstance(error, InputError) and config.holds(f"{path}.{error.key}"):
            path, message = f"{path}.{error.key}", error.message
        raise ConfigError([config.problem(path, message)], started=started) from error


@contextmanager
def raised_in(section: str) -> Iterator[None]:
    """Note on an exception of the block that what `section` built raised it, for `component_at_fault`."""
    try:
        yield
    except Exception as error:
        if not hasattr(error, "section"):
            error.section = section  # type: ignore[attr-defined]
        raise


def failing_component(config: Config, error: BaseException) -> str | None:
    """The key of the innermost component in a method of which `error` was raised; None where there is none."""
    known = {id(component): path for path, component in config.components()}
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    found = [path for frame in frames if (path := known.get(id(frame.f_locals.get("self"))))]
    return found[-1] if found else getattr(error, "section", None)


def _cache_at_fault(config: Config, path: str, error: Exception) -> str | None:
    """The key of the cache, where `error` is about a file in it, or about making it."""
    if not isinstance(error, OSError):
        return None
    for key, leaf in config.leaves.items():
        if key.endswith(".cache_dir") and isinstance(leaf.value, Path):
            if not isinstance(error.filename, str):  # the cache is all that data writes to
                return key if error.errno in _DISK_FULL and path.startswith(("data", "validation")) else None
            file = Path(error.filename)
            is_above = leaf.value.is_relative_to(file) and not os.path.lexists(file)
            return key if file.is_relative_to(leaf.value) or is_above else None
    return None


def call_on_all_ranks(evaluate: Callable[[], T], config: Config, path: str, world: DistributedContext) -> T:
    """Return what `evaluate()` gives. Every rank calls this.

    Raises ConfigError at `path`, on all ranks, if one of them could not read what it evaluates on. Any other error
    stays where it is raised: the other ranks are in the middle of a forward pass then.
    """
    from components.distributed.collectives import (
        raise_on_all_ranks,  # torch: a typo in a recipe is reported without it
    )
    from components.validation import UnreadableError

    result, failure = None, None
    try:
        result = evaluate()
    except UnreadableError as error:
        failure = error
    with config_errors_at(config, path, started=True):
        raise_on_all_ranks(failure, world.gather)
    return result  # type: ignore[return-value]


def is_out_of_memory(error: BaseException) -> str | None:
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
