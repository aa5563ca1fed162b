"""What the processes of a run tell one another: texts, and the error of one, which all raise.

A process that failed alone would leave the others waiting for it in a collective.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from components.errors import InputError, message_of

T = TypeVar("T")

BAD_INPUT_ERRORS = (ValueError, OSError, ImportError)
"""Errors whose message is for whoever wrote the recipe or the data; of any other the traceback says where it was."""


def all_gather_str(text: str, group: dist.ProcessGroup | None = None) -> list[str]:
    """`text` of every process of a `group`, or of the default one, by rank."""
    texts = [""] * dist.get_world_size(group)
    dist.all_gather_object(texts, text, group=group)
    return texts


def try_call(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """What `work()` gives, or how it failed."""
    try:
        return work(), None
    except Exception as error:
        return None, error


def describe_error(error: Exception) -> str:
    """The message of bad input as it is, that of any other error behind the name of its type."""
    return str(error) if isinstance(error, BAD_INPUT_ERRORS) else f"{type(error).__name__}: {error}"


def run_on_main(work: Callable[[], T]) -> T:
    """What `work()` gives on the first process of the default group, on all. An error there is raised on all.

    The result travels by pickle.
    """
    results: list[T | None] = [None]
    failure: Exception | None = None
    if dist.get_rank() == 0:
        results[0], failure = try_call(work)
    raise_on_all_ranks(failure, all_gather_str)
    dist.broadcast_object_list(results, src=0)
    return results[0]  # type: ignore[return-value]


def raise_on_all_ranks(failure: Exception | None, gather: Callable[[str], list[str]]) -> None:
    """Raise this process's `failure`, or else say what the first other process that has one found; if none has, return.

    Every process calls it. `gather` brings a text of each, by rank: the process that speaks may be another than the one
    that knows. Bad input (ValueError, OSError) is an InputError there, at the same key, anything else a RuntimeError.
    """
    report = ""
    if failure is not None:
        is_input = isinstance(failure, (ValueError, OSError))
        message = message_of(failure) if is_input else repr(failure)
        report = json.dumps([is_input, getattr(failure, "key", ""), message])
    reports = gather(report)
    if failure is not None:
        raise failure
    for rank, report in enumerate(reports):
        if report:
            is_input, key, message = json.loads(report)
            message = f"{message} (rank {rank})"
            raise InputError(key, message) if is_input else RuntimeError(message)


def run_on_all_ranks(work: Callable[[], None], gather: Callable[[str], list[str]]) -> None:
    """Call `work` on every rank and return once all ranks have ended it. An error on one rank is raised on all."""
    _, failure = try_call(work)
    raise_on_all_ranks(failure, gather)
