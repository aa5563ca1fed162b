"""Expected failures: an invalid command line, bad input, reported at its recipe line, and a run that stops itself."""

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


class UsageError(Exception):
    """The command line is invalid."""


class RunError(Exception):
    """The run stopped itself; the message says why and how to continue. Exit status 1, no traceback."""


class NonFiniteError(RunError):
    """The loss or the gradient norm of a step is not finite."""


class NonFiniteStateError(NonFiniteError):
    """The parameters or the optimizer state are not finite, so they are not saved."""


@contextmanager
def config_errors_at(config: Config, path: str, *, started: bool = False) -> Iterator[None]:
    """Turn a ValueError, OSError or ImportError raised in the block into a ConfigError at `path`.

    An error raised by a component is reported at that component, one about the cache at `cache_dir`, and an InputError
    at the key that it names. `started` means that training had already started.
    """
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        message = str(error) or type(error).__name__
        path = failing_component(config, error) or path
        if (cache := _cache_at_fault(config, path, error)) is not None:
            path, message = cache, f"{message}; use a writable directory with free space"
        elif isinstance(error, InputError) and config.holds(f"{path}.{error.key}"):
            path, message = f"{path}.{error.key}", error.message
        raise ConfigError([config.problem(path, message)], started=started) from error


@contextmanager
def raised_in(section: str) -> Iterator[None]:
    """Mark an exception raised in the block as raised by what `section` built, for `failing_component`."""
    try:
        yield
    except Exception as error:
        if not hasattr(error, "config_section"):
            error.config_section = section  # type: ignore[attr-defined]
        raise


def failing_component(config: Config, error: BaseException) -> str | None:
    """Return the path of the innermost component with a method on the traceback of `error`.

    Without one, return the section that `raised_in` marked; None if there is no mark either.
    """
    known = {id(component): path for path, component in config.components()}
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    found = [path for frame in frames if (path := known.get(id(frame.f_locals.get("self"))))]
    return found[-1] if found else getattr(error, "config_section", None)


def _cache_at_fault(config: Config, path: str, error: Exception) -> str | None:
    """Return the key of the cache directory if `error` is about a file in it or about creating it, else None."""
    if not isinstance(error, OSError):
        return None
    for key, leaf in config.leaves.items():
        if key.endswith(".cache_dir") and isinstance(leaf.value, Path):
            if not isinstance(error.filename, str):  # data writes only to the cache
                return key if error.errno in _DISK_FULL and path.startswith(("data", "validation")) else None
            file = Path(error.filename)
            is_above = leaf.value.is_relative_to(file) and not os.path.lexists(file)
            return key if file.is_relative_to(leaf.value) or is_above else None
    return None


def call_on_all_ranks(evaluate: Callable[[], T], config: Config, path: str, world: DistributedContext) -> T:
    """Return the result of `evaluate()`. Call on every rank.

    Raises ConfigError at `path` on all ranks if one of them could not read its data. Any other error is raised only on
    its rank, because the other ranks are then inside a forward pass.
    """
    from components.distributed.collectives import (
        raise_on_all_ranks,  # not at the top: it imports torch, which a typo in a recipe should not wait for
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


def out_of_memory_remedy(error: BaseException) -> str | None:
    """Return how to lower the memory use if `error` means that memory ran out, else None."""
    text = str(error)
    if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text or isinstance(error, MemoryError):
        where = "the GPU" if "CUDA" in text else "this machine"
        return (
            f"{where} ran out of memory; halve training.micro_batch_size (the batch size does not change), set "
            'training.activation_checkpoint = "full", shorten training.sequence_length, or shard over more processes. '
            "--dry-run estimates memory. Checkpoints are intact; continue with --resume"
        )
    return None
