"""Log probabilities of requests, worked out independently in float64."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from components.errors import InputError
from components.tasks import Answer, Question, Request, Scorer, accuracy_metrics, encode_questions
from components.tokenizers import Bytes
from models.decoder import Decoder
from models.presets import LlamaShape

pytestmark = pytest.mark.quick

LENGTH, VOCABULARY, END = 32, 257, 256
QUESTIONS = [
    Question([Request("The sky is", choice) for choice in ("blue", "green", "a fish")], 0),
    Question([Request("Trailing spaces  ", choice, "") for choice in ("Ça", "鯨")], 1),
    Question([Request("", choice) for choice in ("yes", "no", "maybe")], 2),
    Question([Request("longer than the sequence length of the model, " * 2, choice) for choice in ("a", "b")], 0),
    Question([Request("Call me", "Ishmael")]),
    Question([Request(context, "fell") for context in ("The rain", "A stone", "The sun")], 1),
]


@dataclass(frozen=True)
class Rank:
    """A rank whose sums are only its own part."""

    rank: int = 0
    size: int = 1

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


@pytest.fixture(scope="module")
def model() -> Decoder:
    shape = LlamaShape(dim=16, layers=2, heads=2, kv_heads=1, head_dim=8, ffn_dim=32)
    model = Decoder(shape, VOCABULARY, init_std=0.3)
    model.init_weights(0)
    return model.double()


def expected(model: Decoder, start: int | None = None) -> list[list[float]]:
    """Return -log of the probability of each request, a token at a time."""
    found = []
    for question in QUESTIONS:
        found.append([])
        for request in question.requests:
            text, context = request.context + request.continuation, request.context.rstrip().encode()
            ids, first = list(text.encode()), len(context)
            before = [start] if start is not None else [] if context else [END]
            ids, first, nats = before + ids, len(before) + first, 0.0
            for target in range(first, len(ids)):
                inputs = ids[max(0, len(ids) - 1 - LENGTH) : target]
                with torch.no_grad():
                    nats -= float(model(torch.tensor([inputs]))[0, -1].log_softmax(-1)[ids[target]])
            found[-1].append(nats)
    return found


def scores(model: Decoder, ranks: int = 1, tokenizer=None, **settings) -> list[tuple[float, bool]]:
    encoded = encode_questions(QUESTIONS, tokenizer or Bytes().build(), LENGTH)
    requests = [request for question in encoded for request in question]
    settings = {"pass_tokens": 2 * LENGTH, "first_input": END, "min_length": 8, **settings}
    scorer = Scorer(sequence_length=LENGTH, vocab_size=VOCABULARY, **settings)
    parts = [scorer.score(requests, model, Rank(rank, ranks), nullcontext) for rank in range(ranks)]
    return [(sum(nats for nats, _ in part), all(greedy for _, greedy in part)) for part in zip(*parts, strict=True)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 40])
def test_scores_equal_brute_force(model, ranks):
    flat = [nats for question in expected(model) for nats in question]
    assert [nats for nats, _ in scores(model, ranks)] == pytest.approx(flat, rel=1e-6)


@pytest.mark.parametrize("settings", [{"pass_tokens": 1}, {"min_length": 64}, {"multiple": 8}, {"pass_tokens": 9999}])
def test_the_shapes_of_forward_passes_change_nothing(model, settings):
    assert [nats for nats, _ in scores(model, **settings)] == pytest.approx([nats for nats, _ in scores(model)])


def test_document_masking_changes_nothing(model):
    plain = scores(model)
    model.enable_document_masking(END)
    masked = scores(model)
    model.first_input = None
    assert [nats for nats, _ in masked] == pytest.approx([nats for nats, _ in plain], rel=1e-6)
    assert model.training


class WithStart:
    """Bytes with the id 0 before every document."""

    vocab_size, end_of_document, start_of_document = VOCABULARY, END, 0

    def encode_batch(self, texts):
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]


def test_a_start_token_begins_every_request(model):
    flat = [nats for question in expected(model, start=0) for nats in question]
    assert [nats for nats, _ in scores(model, tokenizer=WithStart(), first_input=0)] == pytest.approx(flat, rel=1e-6)


def test_greedy_is_the_most_probable_continuation(model):
    with torch.no_grad():
        text, context = [*b"Call me"], b"Call me"
        for _ in range(3):
            text.append(int(model(torch.tensor([text]))[0, -1, :128].argmax()))
            # an id above 127 is not text by itself
    likely = bytes(text[len(context) :]).decode()
    requests = [Request("Call me", choice, "") for choice in (likely, likely[:2] + "~", likely[:1])]
    encoded = encode_questions([Question(requests)], Bytes().build(), LENGTH)[0]

    class Ascii(torch.nn.Module):
        def forward(self, tokens):
            logits = model(tokens).clone()
            logits[..., 128:] = -math.inf
            return logits

    scorer = Scorer(sequence_length=LENGTH, pass_tokens=64, vocab_size=VOCABULARY, first_input=END)
    found = scorer.score(encoded, Ascii(), Rank(), nullcontext)
    assert [greedy for _, greedy in found] == [True, likely[2] == "~", True]


def test_lengths_are_few_and_hold_every_request():
    def lengths(length: int, **settings) -> list[int]:
        settings = {"pass_tokens": 8 * length, "vocab_size": 128_256, "first_input": 0, **settings}
        return Scorer(sequence_length=length, **settings).lengths

    assert lengths(4096) == [64, 256, 1024, 4096]
    assert lengths(2048, min_length=128) == [128, 512, 2048]
    assert lengths(256, min_length=128) == [128, 256]
    assert lengths(4096, multiple=64) == [64, 256, 1024, 4096]
    assert lengths(100) == [100]
    assert Scorer(sequence_length=4096, pass_tokens=32768, vocab_size=128_256, first_input=0).rows(4096) == 1


def test_metrics_are_those_of_the_definitions():
    def answer(nats: list[float], right: int, choices: list[str]) -> Answer:
        return Answer(Question([Request("x", choice) for choice in choices], right), nats, [False] * len(nats))

    answers = [
        answer([2.0, 3.0], 0, ["a", "bb"]),  # most probable, but not per character
        answer([4.0, 3.0], 0, ["ccc", "b"]),  # the reverse
        answer([math.nan, 1.0], 1, ["é", "b"]),  # a broken model is never right
    ]
    metrics = accuracy_metrics(answers)
    assert metrics == pytest.approx(
        {"acc": 1 / 3, "acc_norm": 1 / 3, "bits_per_byte": (2 + 4 / 3 + 1) / math.log(2) / 3}
    )
    single = Answer(Question([Request("x", "é")]), [2.0], [True])
    assert accuracy_metrics([single]) == pytest.approx({"acc": 1.0, "bits_per_byte": 1 / math.log(2)})


def test_a_continuation_without_tokens_is_refused():
    class Joins(WithStart):
        def encode_batch(self, texts):
            return [np.array([1]) for _ in texts]

    question = Question([Request("a", "b", "")], source="rows.jsonl:3")
    with pytest.raises(InputError, match=r"rows.jsonl:3: the tokenizer joins 'b' and its context"):
        encode_questions([question], Joins(), LENGTH)
    with pytest.raises(InputError, match="has 41 tokens, more than the sequence length of 32"):
        encode_questions([Question([Request("a", "b" * 40)])], Bytes().build(), LENGTH)
