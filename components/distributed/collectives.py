"""Exchange small objects between processes, and raise the error of one process on all of them.

If only the failing process raised its error, the others would wait for it in their next collective.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from components.errors import InputError, message_of

T = TypeVar("T")

BAD_INPUT_ERRORS = (ValueError, OSError, ImportError)
"""Errors caused by the recipe or the data, whose message suffices. For other errors the traceback is needed."""

NODE = "POWERTRAIN_NODE"
"""Environment variable of the workers of a run on several nodes: the name of this node."""


def all_gather_object(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Return the `value` of every process of `group` (default: all), in order of rank. It is sent by pickle."""
    values = [value] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def broadcast_object(value: T | None, source: int, group: dist.ProcessGroup | None = None) -> T:
    """Return the `value` of the process `source` on every process of `group` (default: all). It is sent by pickle."""
    values = [value]
    dist.broadcast_object_list(values, src=source, group=group)
    return values[0]  # type: ignore[return-value]


def try_call(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """Call `work` and return (result, None), or (None, error) if it raised."""
    try:
        return work(), None
    except Exception as error:
        return None, error


def describe_error(error: Exception) -> str:
    """Return the message of `error`; for an error not caused by bad input, the type precedes the message."""
    return str(error) if isinstance(error, BAD_INPUT_ERRORS) else f"{type(error).__name__}: {error}"


def run_on_main(work: Callable[[], T]) -> T:
    """Call `work` on rank 0 of the default group and return its result on all ranks.

    The result is sent by pickle. An error on rank 0 is raised on all ranks.
    """
    result, failure = try_call(work) if dist.get_rank() == 0 else (None, None)
    raise_on_all_ranks(failure, all_gather_object)
    return broadcast_object(result, source=0)


def raise_on_all_ranks(failure: Exception | None, gather: Callable[[Any], list[Any]]) -> None:
    """Raise this rank's `failure`, or else the failure of the lowest rank that has one; return if no rank has.

    All ranks must call it. `gather` returns an object of each, in order of rank. On the other ranks bad input
    (ValueError, OSError) is raised as an InputError with the same key, and any other error as a RuntimeError.
    """
    report = None
    if failure is not None:
        is_input = isinstance(failure, (ValueError, OSError))
        message = message_of(failure) if is_input else repr(failure)
        report = is_input, getattr(failure, "key", ""), message, os.environ.get(NODE, "")
    reports = gather(report)
    if failure is not None:
        raise failure
    for rank, report in enumerate(reports):
        if report:
            is_input, key, message, node = report
            message = f"{message} (rank {rank} on {node})" if node else f"{message} (rank {rank})"
            raise InputError(key, message) if is_input else RuntimeError(message)


def run_on_all_ranks(work: Callable[[], None], gather: Callable[[Any], list[Any]]) -> None:
    """Call `work` on every rank and return when all ranks have finished it. An error on one rank is raised on all."""
    _, failure = try_call(work)
    raise_on_all_ranks(failure, gather)
