import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.data import Mixture
from components.data.loader import MicroBatchLoader, build_order, epochs
from components.data.mixture import Stage
from components.errors import MissingFileError
from components.tokenizers import Bytes
from tests.components.data.conftest import Given

pytestmark = pytest.mark.quick


class Numbers:
    """[data] and its samples at once: sequence i holds first + i, T + 1 times."""

    def __init__(self, first: int, length: int):
        self.first, self.length = first, length

    def build(self, *, tokenizer, sequence_length, cache_dir, progress):
        self.width = sequence_length + 1
        return self

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return torch.full((self.width,), self.first + index)


class Broken(Numbers):
    def build(self, **settings):
        raise MissingFileError("path", "nowhere matches no file")


def mixed(lengths, weights, stages=(), sequence_length=10):
    sources = {name: Numbers(1000 * i, length) for i, (name, length) in enumerate(lengths.items())}
    mixture = Mixture(
        sources=sources, weights=weights, stages=[Stage(from_tokens=start, weights=w) for start, w in stages]
    )
    return mixture.build(tokenizer=None, sequence_length=sequence_length, cache_dir=None, progress=print)


def stream(samples, stop, *, start=0, **layout):
    """The first token of global samples start to stop, from the loaders of all ranks."""
    size, ranks = layout.get("micro_batch_size", 1), layout.get("dp_size", 1)
    loaders = [
        MicroBatchLoader(samples, seed=3, start=start, dp_rank=rank, dp_size=ranks, micro_batch_size=size)
        for rank in range(ranks)
    ]
    seen = []
    while start + len(seen) < stop:
        for loader in loaders:
            (micro,) = loader.next_step(1)
            seen += micro.tokens[:, 0].tolist()
    return seen[: stop - start]


def test_a_mixture_of_one_is_the_source_itself():
    alone = stream(Numbers(0, 7).build(tokenizer=None, sequence_length=4, cache_dir=None, progress=print), 30)
    assert stream(mixed({"a": 7}, {"a": 0.3}), 30) == alone


def test_each_source_has_a_separate_order_and_epochs():
    samples = mixed({"a": 7, "b": 3, "c": 11}, {"a": 5, "b": 2, "c": 3}, [(500, {"a": 1, "c": 1})])
    seen = stream(samples, 200)
    for first, length in ((0, 7), (1000, 3), (2000, 11)):
        own = [number for number in seen if first <= number < first + 1000]
        _, indices = build_order(Numbers(0, length), seed=3)(np.arange(len(own)))
        assert own == (first + indices).tolist()
    # Stage one is 50 samples of 10 tokens: 25, 10 and 15; then 75 of a and c each.
    expected = {"a": (25 + 75) / 7, "b": 10 / 3, "c": (15 + 75) / 11}
    assert samples.source_epochs(200) == pytest.approx(expected, rel=1e-12)
    assert epochs(samples, 200) == {"epoch": 200 / 21, "source_epochs": samples.source_epochs(200)}


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    ranks=st.integers(1, 4),
    micro_batch_size=st.integers(1, 5),
    start=st.integers(0, 90),
    from_tokens=st.integers(1, 600),
)
def test_the_order_is_the_same_on_any_layout_and_from_any_sample(ranks, micro_batch_size, start, from_tokens):
    samples = mixed({"a": 7, "b": 5}, {"a": 0.7, "b": 0.3}, [(from_tokens, {"a": 0.25, "b": 0.75})])
    uninterrupted = stream(samples, 120)
    assert stream(samples, 120, start=start, micro_batch_size=micro_batch_size, dp_size=ranks) == uninterrupted[start:]


def test_a_stage_begins_with_the_first_sample_that_starts_in_it():
    for from_tokens, first_b in ((1, 1), (10, 1), (11, 2), (30, 3)):
        samples = mixed({"a": 99, "b": 99}, {"a": 1}, [(from_tokens, {"b": 1})])
        seen = stream(samples, 6)
        assert [number >= 1000 for number in seen] == [n >= first_b for n in range(6)]
    # Of two stages that start within one sample the later one is used.
    seen = stream(mixed({"a": 9, "b": 9, "c": 9}, {"a": 1}, [(11, {"b": 1}), (12, {"c": 1})]), 4)
    assert [number // 1000 for number in seen] == [0, 0, 2, 2]


def test_sequences_of_all_sources_can_be_read_in_any_order(tmp_path):
    text = {"a": "one two three four", "b": "the quick brown fox jumps"}
    build = {"tokenizer": Bytes().build(), "sequence_length": 4, "cache_dir": tmp_path, "progress": print}
    mixture = Mixture(sources={name: Given(text=(t,)) for name, t in text.items()}, weights={"a": 1, "b": 1})
    samples = mixture.build(**build)
    parts = [Given(text=(t,)).build(**build) for t in text.values()]
    whole = torch.cat([part.__getitems__(range(len(part))) for part in parts])
    assert len(samples) == len(whole)
    backwards = list(range(len(whole)))[::-1]
    assert torch.equal(samples.__getitems__(backwards), whole.flip(0))
    assert torch.equal(samples[3], whole[3])
    assert samples.describe(0).startswith("a: ")
    assert samples.describe(len(samples) - 1).startswith("b: ")
    for outside in (-1, len(whole)):
        with pytest.raises(IndexError, match=f"index {outside} is out of range for {len(whole)} sequences"):
            samples[outside]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": {"a": 1, "x": 1}}, "^weights: x is not a source; expected a, b"),
        ({"weights": {"a": 1}}, "^weights: b has weight 0 in all stages"),
        ({"weights": {"a": 0, "b": 0}}, "^weights: no weight is above 0"),
        ({"stages": [Stage(from_tokens=0, weights={"a": 1})]}, "^stages: .* expected increasing"),
        ({"stages": [Stage(from_tokens=9, weights={"a": 1}), Stage(from_tokens=9, weights={"b": 1})]}, "^stages: "),
        ({"stages": [Stage(from_tokens=9, weights={"y": 1})]}, "y is not a source"),
        (
            {"sources": {"a": Mixture(sources={"c": Numbers(0, 1)}, weights={"c": 1}), "b": Numbers(0, 1)}},
            r"^sources\.a: a mixture cannot contain a mixture",
        ),
    ],
)
def test_mistakes_name_their_key(settings, message):
    with pytest.raises(ValueError, match=message):
        Mixture(**({"sources": {"a": Numbers(0, 1), "b": Numbers(0, 1)}, "weights": {"a": 1, "b": 1}} | settings))


def test_an_error_of_a_source_has_its_name():
    mixture = Mixture(sources={"a": Broken(0, 1)}, weights={"a": 1})
    with pytest.raises(ValueError, match=r"^sources\.a\.path: nowhere matches no file"):
        mixture.build(tokenizer=None, sequence_length=1, cache_dir=None, progress=print)
