"""Validation against a plain computation: same sequences, one at a time, in float64."""

import math
from contextlib import nullcontext, suppress
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from components.interfaces import DataConfig
from components.validation import UnreadableError, ValidationConfig
from recipes.config.imports import protocol_error

pytestmark = pytest.mark.quick

VOCAB, LENGTH, COUNT = 11, 6, 7


class Bigram(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0)))

    def forward(self, tokens, labels):
        return nn.functional.cross_entropy(self.table[tokens].flatten(0, 1), labels.flatten(), reduction="sum")


class Alone:
    rank, size, device = 0, 1, torch.device("cpu")

    def all_reduce_sum(self, tensor):
        return tensor


class Text:
    byte_lengths = np.arange(VOCAB)  # id i stands for i bytes; 0 is special


class Source:
    def build(self, *, tokenizer, sequence_length, cache_dir, progress):
        generator = torch.Generator().manual_seed(1)
        return [torch.randint(VOCAB, (LENGTH + 1,), generator=generator) for _ in range(COUNT)]


def build(**keys):
    return open_validator(ValidationConfig(data=Source(), **keys), Text())


def open_validator(config, tokenizer):
    dataset = config.data.build(tokenizer=tokenizer, sequence_length=LENGTH, cache_dir=None, progress=print)
    return config.build(dataset, tokenizer=tokenizer, sequence_length=LENGTH)


def by_hand(samples):
    table = Bigram().table.detach().double().log_softmax(-1)
    nats = sum(-table[a, b].item() for s in samples for a, b in pairwise(s))
    return nats, sum(int(b) for s in samples for b in s[1:]), len(samples) * LENGTH


@pytest.mark.parametrize("micro", [1, 3, 8])
@pytest.mark.parametrize("limit", [None, 4, 100])
def test_loss_perplexity_and_bits_per_byte(micro, limit):
    validation = build(micro_batch_size=micro, max_sequences=limit)
    numbers = validation.evaluate(Bigram(), Alone(), nullcontext)
    nats, byte_count, tokens = by_hand(
        [validation.dataset[index] for index in ([0, 1, 3, 5] if limit == 4 else range(COUNT))]
    )
    # float32 sums of some forty terms
    assert numbers["val_loss"] == pytest.approx(nats / tokens, rel=1e-6)
    assert numbers["val_perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-6)
    assert numbers["val_bits_per_byte"] == pytest.approx(nats / math.log(2) / byte_count, rel=1e-6)


@pytest.mark.parametrize("start", [0, 10])
def test_the_start_of_a_document_is_not_counted(start):
    class Starts(Text):
        start_of_document, end_of_document = start, 10

    samples = (validation := open_validator(ValidationConfig(data=Source()), Starts())).dataset
    table = Bigram().table.detach().double().log_softmax(-1)
    pairs = [(a, b) for s in samples for a, b in pairwise(s.tolist()) if b != start or start == 10]
    totals = validation.totals(Bigram(), Alone(), nullcontext)
    assert (totals.tokens, totals.bytes) == (len(pairs), sum(b for _, b in pairs))
    assert totals.nats == pytest.approx(sum(-table[a, b].item() for a, b in pairs), rel=1e-6)
    assert (len(pairs) < COUNT * LENGTH) == (start == 0), "a test that can fail"


def test_the_model_returns_to_its_mode_after_an_error():
    class Failing(Bigram):
        def forward(self, tokens, labels):
            assert not self.training
            raise RuntimeError("out of memory")

    model = Failing()
    with pytest.raises(RuntimeError, match="out of memory"):
        build().evaluate(model, Alone(), nullcontext)
    assert model.training


def test_bytes_are_counted_beyond_what_float32_holds():
    class Long(Text):
        byte_lengths = np.arange(VOCAB) * (2**22 + 1)

    held_out = ValidationConfig(data=Source(), micro_batch_size=COUNT)
    validation = open_validator(held_out, Long())
    _, byte_count, _ = by_hand(validation.dataset)
    assert validation.totals(Bigram(), Alone(), nullcontext).bytes == byte_count * (2**22 + 1)


def test_ranks_share_the_sequences_and_each_counts_once():
    class OneOfThree(Alone):
        def __init__(self, rank):
            self.rank, self.size = rank, 3
            self.seen = None

        def all_reduce_sum(self, tensor):
            self.seen = tensor.clone()
            return tensor

    validation = build(micro_batch_size=2)
    worlds = [OneOfThree(rank) for rank in range(3)]
    for world in worlds:
        with suppress(ZeroDivisionError):  # a rank may have no sequences; the real sum is not empty
            validation.evaluate(Bigram(), world, nullcontext)
    nats, byte_count, tokens = by_hand(validation.dataset)
    total = sum(world.seen for world in worlds)
    assert total.tolist() == pytest.approx([nats, tokens, byte_count], rel=1e-6)


def test_the_model_trains_on_afterwards():
    model = Bigram()
    build().evaluate(model, Alone(), nullcontext)
    assert model.training


@pytest.mark.parametrize(("count", "limit"), [(7, 1), (1000, 3), (1001, 1000), (5, 5), (12_345, 512)])
def test_a_part_is_spread_over_all_of_the_text(count, limit):
    class Long(Source):
        def build(self, **how):
            return range(count)

    held_out = ValidationConfig(data=Long(), max_sequences=limit)
    indices = open_validator(held_out, Text()).indices
    assert len(set(indices)) == limit
    assert all(abs(index - number * count / limit) < 1 for number, index in enumerate(indices))


def test_a_part_of_a_mixture_has_its_weights_and_all_of_it_counts_once():
    class Mixed(list):
        def order(self, *, seed):
            return lambda numbers: (0 * numbers, np.where(numbers % 3 == 2, 4 + numbers // 3, numbers - numbers // 3))

    class Sources(Source):
        def build(self, **how):
            return Mixed(super().build(**how))

    def measured(limit):
        held_out = ValidationConfig(data=Sources(), max_sequences=limit)
        validator = open_validator(held_out, Text())
        return validator.totals(Bigram(), Alone(), nullcontext).nats, validator.dataset

    nats, samples = measured(3)
    assert nats == pytest.approx(by_hand([samples[0], samples[1], samples[4]])[0], rel=1e-6)
    nats, samples = measured(None)
    assert nats == pytest.approx(by_hand(samples)[0], rel=1e-6)


@pytest.mark.parametrize("what", ["raises", "high", "negative", "short"])
def test_an_invalid_sequence_is_reported_after_the_last_forward_pass(what):
    class Bad(Source):
        def build(self, **how):
            samples = super().build(**how)
            if what == "raises":
                return Raising(samples)
            samples[2] = samples[2][:-1] if what == "short" else torch.full((LENGTH + 1,), 11 if what == "high" else -1)
            return samples

    class Raising(list):
        def __getitem__(self, index):
            if index == 2:
                raise OSError(5, "Input/output error")
            return super().__getitem__(index)

    class Counting(Bigram):
        calls = 0

        def forward(self, tokens, labels):
            self.calls += 1
            return super().forward(tokens, labels)

    validation = open_validator(ValidationConfig(data=Bad(), micro_batch_size=2), Text())
    model = Counting()
    expected = {"raises": "Input/output", "high": "id 11 is outside", "negative": "id -1 is", "short": "6 token ids"}
    with pytest.raises(UnreadableError, match=expected[what]):
        validation.evaluate(model, Alone(), nullcontext)
    assert model.calls == 4, "other ranks take part in each"


def test_a_validation_section_is_not_accepted_as_data():
    assert protocol_error(Source, DataConfig) is None
    assert protocol_error(ValidationConfig, DataConfig) is not None
