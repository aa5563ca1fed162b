"""What sampling chooses has the distribution that the definition gives, worked out by hand in float64."""

from __future__ import annotations

import math

import pytest
import torch

from components.generation import Sampling, uniform_numbers

pytestmark = pytest.mark.quick

LOGITS = [2.0, -1.0, 0.5, 2.0, 3.5, -4.0, 1.0, -math.inf, 0.0]
SETTINGS = {
    "plain": {},
    "cold": {"temperature": 0.5},
    "hot": {"temperature": 2.0},
    "top_k": {"top_k": 3},
    "top_k of all": {"top_k": 99},
    "top_p": {"top_p": 0.8},
    "top_p of one": {"top_p": 0.01},
    "top_p of all": {"top_p": 1.0},
    "all": {"temperature": 1.7, "top_k": 5, "top_p": 0.9},
}
POINTS = 40_000


def by_hand(temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None) -> list[float]:
    weights = [math.exp(logit / temperature) for logit in LOGITS]
    order = sorted(range(len(LOGITS)), key=lambda id: -weights[id])  # stable: of equals, the first
    kept = order[:top_k]
    if top_p is not None:
        total, mass, several = sum(weights[id] for id in kept), 0.0, []
        for id in kept:
            several.append(id)
            mass += weights[id] / total
            if mass >= top_p:
                break
        kept = several
    total = sum(weights[id] for id in kept)
    return [weights[id] / total if id in kept else 0.0 for id in range(len(LOGITS))]


def shares(sampling: Sampling) -> list[float]:
    """Of evenly spaced points: exact to one point for each end of an interval."""
    points = (torch.arange(POINTS, dtype=torch.float64) + 0.5) / POINTS
    chosen = sampling.choose(torch.tensor(LOGITS).expand(POINTS, -1), points)
    return (torch.bincount(chosen, minlength=len(LOGITS)) / POINTS).tolist()


@pytest.mark.parametrize("keys", SETTINGS.values(), ids=SETTINGS)
def test_every_token_has_the_probability_of_the_definition(keys):
    expected = by_hand(**keys)
    found = shares(Sampling(**keys))
    assert found == pytest.approx(expected, abs=2 / POINTS)
    assert not any(share for share, probability in zip(found, expected, strict=True) if not probability)


@pytest.mark.parametrize("keys", SETTINGS.values(), ids=SETTINGS)
def test_the_same_distribution_as_transformers(keys):
    processors = pytest.importorskip("transformers").generation.logits_process
    logits = torch.tensor([LOGITS])
    steps = {"temperature": "TemperatureLogitsWarper", "top_k": "TopKLogitsWarper", "top_p": "TopPLogitsWarper"}
    for key, name in steps.items():
        if keys.get(key, 1.0) != 1.0:
            logits = getattr(processors, name)(keys[key])(None, logits)
    assert by_hand(**keys) == pytest.approx(logits.softmax(-1)[0].tolist(), abs=1e-6)


def test_greedy_takes_the_largest_and_uses_no_random_numbers():
    logits = torch.tensor([LOGITS, LOGITS[::-1]])
    nothing = torch.full((2,), math.nan, dtype=torch.float64)
    assert Sampling(temperature=0.0).choose(logits, nothing).tolist() == [4, 4]
    assert Sampling(temperature=0.0).is_greedy and not Sampling().is_greedy


@pytest.mark.parametrize("keys", SETTINGS.values(), ids=SETTINGS)
def test_the_ends_of_the_interval_are_tokens_too(keys):
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    chosen = Sampling(**keys).choose(torch.tensor([LOGITS, LOGITS]), ends)
    assert all(by_hand(**keys)[id] > 0 for id in chosen.tolist())


@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 5e-324])
def test_a_tiny_temperature_is_greedy(temperature):
    points = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert Sampling(temperature=temperature).choose(torch.tensor([LOGITS] * 3), points).tolist() == [4, 4, 4]


def test_a_row_does_not_depend_on_the_others():
    generator = torch.Generator().manual_seed(0)
    logits, points = torch.randn(5, 50, generator=generator), torch.rand(5, generator=generator, dtype=torch.float64)
    sampling = Sampling(top_k=20, top_p=0.9)
    together = sampling.choose(logits, points).tolist()
    assert together == [int(sampling.choose(logits[i : i + 1], points[i : i + 1])) for i in range(5)]


def test_numbers_are_those_of_the_seed_and_uniform():
    first = uniform_numbers(7, 10_000)
    assert torch.equal(first, uniform_numbers(7, 10_000)) and torch.equal(first[:9], uniform_numbers(7, 9))
    assert not torch.equal(first, uniform_numbers(8, 10_000))
    counts = torch.histc(first.float(), 10, 0, 1)
    assert ((counts - 1000) ** 2 / 1000).sum() < 27.9  # chi-square, 9 degrees of freedom: one seed in a thousand


@pytest.mark.parametrize(
    ("keys", "message"),
    [({"temperature": -1.0}, "temperature"), ({"temperature": math.nan}, "temperature"), ({"top_k": 0}, "top_k"),
     ({"top_p": 0.0}, "top_p"), ({"top_p": 1.5}, "top_p")],
)  # fmt: skip
def test_invalid_settings_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**keys)
