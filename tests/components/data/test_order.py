import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.data.order import SampleOrder

pytestmark = pytest.mark.quick

GOLDEN_10 = [7, 0, 1, 9, 8, 4, 6, 5, 3, 2]
GOLDEN_MILLION = [369831, 337763, 109153, 751763, 689954]


def epoch_of(length: int, *, seed: int, epoch: int = 0) -> np.ndarray:
    epochs, indices = SampleOrder(length, seed=seed)(np.arange(length) + epoch * length)
    assert (epochs == epoch).all()
    return indices


@given(length=st.integers(1, 3000), seed=st.integers(), epoch=st.integers(0, 2**40))
def test_every_epoch_is_a_permutation(length, seed, epoch):
    assert sorted(epoch_of(length, seed=seed, epoch=epoch)) == list(range(length))


@given(length=st.integers(1, 2**40), seed=st.integers(0, 2**32), samples=st.lists(st.integers(0, 2**50), max_size=50))
def test_a_sample_is_the_same_alone_and_with_others(length, seed, samples):
    order = SampleOrder(length, seed=seed)
    epochs, indices = order(np.array(samples, dtype=np.int64))
    assert indices.min(initial=0) >= 0 and indices.max(initial=0) < length
    for sample, epoch, index in zip(samples, epochs, indices, strict=True):
        assert epoch == sample // length
        assert order(np.array([sample]))[1] == index


def test_the_order_is_this_one_on_every_machine():
    # Do not change: resumed runs rely on it.
    assert epoch_of(10, seed=0).tolist() == GOLDEN_10
    assert epoch_of(10**6, seed=7, epoch=3)[:5].tolist() == GOLDEN_MILLION


@pytest.mark.parametrize("length", [100, 4096, 5003])
def test_epochs_and_seeds_are_independent(length):
    orders = [epoch_of(length, seed=seed, epoch=epoch) for seed in range(4) for epoch in range(4)]
    correlation = np.corrcoef(np.array([np.arange(length), *orders]))[np.triu_indices(17, 1)]
    assert np.abs(correlation).max() < 5 / length**0.5  # independent ones stay below 4.5 sigma in 136 pairs
    matches = [(a == b).sum() for i, a in enumerate(orders) for b in orders[:i]]
    assert np.mean(matches) == pytest.approx(1, abs=0.4)  # fixed points of independent permutations: one on average
    neighbours = np.mean([(np.diff(order) == 1).sum() for order in orders])
    assert neighbours == pytest.approx(1, abs=1.2)


@pytest.mark.parametrize("length", [2, 3, 5, 8, 13, 30])
def test_every_place_is_equally_likely(length):
    epochs = 20_000
    _, indices = SampleOrder(length, seed=11)(np.arange(length * epochs))
    for place in indices.reshape(epochs, length).T:
        chi_square = ((np.bincount(place, minlength=length) - epochs / length) ** 2 / (epochs / length)).sum()
        assert chi_square < length - 1 + 6 * (2 * length) ** 0.5  # mean and six standard deviations


def test_small_orders_take_every_permutation():
    _, indices = SampleOrder(4, seed=0)(np.arange(4 * 2000))
    assert len(np.unique(indices.reshape(-1, 4), axis=0)) == 24


def test_an_empty_dataset_is_refused():
    with pytest.raises(ValueError, match="needs at least 1"):
        SampleOrder(0, seed=0)
