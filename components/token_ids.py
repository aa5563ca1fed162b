"""Token ids and labels: their validation, and the ids with which documents begin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from components.interfaces import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor  # not imported at run time, because training a tokenizer needs no torch

IGNORE_INDEX = -100
"""Label of a position that is excluded from the loss."""


def check_token_ids(ids: Tensor, vocab_size: int) -> None:
    """Raise ValueError unless `ids`, on the CPU and of any shape, are integers from 0 to `vocab_size` - 1.

    On a GPU an id out of range kills the process without a message.
    """
    if ids.is_floating_point():
        raise ValueError(f"the dataset returns {ids.dtype}; token ids must be integers")
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"token id {low if low < 0 else high} is outside the vocabulary of {vocab_size}")


def fit_vocabulary(tokenizer: Tokenizer, rows: int | None) -> Tokenizer:
    """Return `tokenizer`, without special tokens for which an embedding of `rows` has no row, if it can be without.

    The tokenizer of Gemma 3 has a token for images, with an id after the last row of its text model.
    """
    if rows is not None and tokenizer.vocab_size > rows and hasattr(tokenizer, "leave_out_special"):
        tokenizer.leave_out_special(rows)
    return tokenizer


def start_of_document(tokenizer: Tokenizer) -> int | None:
    """Return the id that begins every document and every prompt; None if the tokenizer adds none."""
    return getattr(tokenizer, "start_of_document", None)


def prepended_id(tokenizer: Tokenizer) -> int | None:
    """Return the id to write before every document; None also if that is the end token, which precedes each already."""
    start = start_of_document(tokenizer)
    return None if start is None or start == tokenizer.end_of_document else start


def first_input(tokenizer: Tokenizer) -> int:
    """Return the first input of a document: its start token, or else the end token of the document before."""
    start = start_of_document(tokenizer)
    return tokenizer.end_of_document if start is None else start


def describe_start(tokenizer: Tokenizer) -> str | None:
    """Return the start token and its id for display; None if the tokenizer adds none."""
    start = start_of_document(tokenizer)
    return None if start is None else f"{tokenizer.decode([start])!r} (id {start})"
