"""Token ids of requests, divided into context and continuation as lm-evaluation-harness does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from components.errors import InputError
from components.interfaces import Tokenizer
from components.tasks.question import Question, Request
from components.token_ids import first_input, start_of_document


@dataclass(frozen=True)
class EncodedRequest:
    """The inputs of a forward pass, whose last `len(targets)` positions predict `targets`."""

    inputs: np.ndarray
    """(n,) int64"""
    targets: np.ndarray
    """(k,) int64, 1 <= k <= n"""


def encode_questions(
    questions: Sequence[Question], tokenizer: Tokenizer, sequence_length: int
) -> list[list[EncodedRequest]]:
    """Return the ids of the requests of each question, truncated on the left to `sequence_length` inputs.

    Spaces at the end of a context belong to the continuation. The ids of the continuation are those of the whole text
    after the first len(encode(context)) ids, also if the tokenizer joins the end of the context to the continuation.
    A start token begins every request. Without one an empty context is the end token, after which documents begin.

    Raises InputError for a continuation that has no token of its own, or more than `sequence_length`.
    """
    pairs = {request: _split(request) for question in questions for request in question.requests}
    texts = list(dict.fromkeys(text for pair in pairs.values() for text in (pair[0], "".join(pair))))
    ids = dict(zip(texts, tokenizer.encode_batch(texts), strict=True)) if texts else {}
    start = start_of_document(tokenizer)
    prefix = [] if start is None else [start]
    encoded: dict[Request, EncodedRequest] = {}
    for question in questions:
        for request in question.requests:
            if request in encoded:
                continue
            context, continuation = pairs[request]
            context_ids = ids[context].astype(np.int64)
            targets = ids[context + continuation][len(context_ids) :].astype(np.int64)
            _check_length(len(targets), sequence_length, request, question.source)
            before = np.array(prefix or ([] if len(context_ids) else [first_input(tokenizer)]), np.int64)
            kept = np.concatenate([before, context_ids, targets])[-(sequence_length + 1) :]
            encoded[request] = EncodedRequest(kept[:-1], targets)
    return [[encoded[request] for request in question.requests] for question in questions]


def _split(request: Request) -> tuple[str, str]:
    """Return context and continuation, with the spaces between them in the continuation."""
    context = request.context.rstrip()
    return context, request.context[len(context) :] + request.continuation


def _check_length(num_targets: int, sequence_length: int, request: Request, source: str) -> None:
    where = f"{source}: " if source else ""
    if num_targets < 1:
        raise InputError(
            "", f"{where}the tokenizer joins {request.choice!r} and its context to one token; put a delimiter between"
        )
    if num_targets > sequence_length:
        raise InputError(
            "",
            f"{where}{request.choice[:40]!r} has {num_targets} tokens, more than the sequence length of "
            f"{sequence_length}; remove this row",
        )
