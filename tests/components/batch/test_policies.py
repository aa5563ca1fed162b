import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.batch.constant import Constant
from components.batch.layout import BatchLayout
from components.batch.ramp import Ramp, Stage
from components.clock import Clock

pytestmark = pytest.mark.quick


def at(tokens: int) -> Clock:
    return Clock(total_tokens=10**6, sequence_length=1, samples=tokens)


def test_constant_is_constant():
    assert {Constant(initial=24).samples(at(tokens)) for tokens in (0, 5, 10**6)} == {24}


def test_ramp_changes_at_its_stages():
    ramp = Ramp(initial=8, stages=[Stage(from_tokens=100, samples=16), Stage(from_tokens=500, samples=64)])
    assert [ramp.samples(at(tokens)) for tokens in (0, 99, 100, 499, 500, 10**6)] == [8, 8, 16, 16, 64, 64]


def test_ramp_refuses_stages_out_of_order():
    with pytest.raises(ValueError, match=r"^stages: .* 100 follows 100"):
        Ramp(initial=8, stages=[Stage(from_tokens=100, samples=16), Stage(from_tokens=100, samples=64)])


@given(requested=st.integers(1, 10**6), micro=st.integers(1, 64), ranks=st.integers(1, 64))
def test_a_batch_is_rounded_up_to_whole_micro_batches_on_every_rank(requested, micro, ranks):
    batch = BatchLayout(micro, ranks).fit(requested)
    assert batch.requested == requested
    assert batch.samples == batch.micro_batches * micro * ranks
    assert requested <= batch.samples < requested + micro * ranks


def test_a_policy_that_asks_for_nothing_is_told():
    with pytest.raises(ValueError, match="asked for 0 samples"):
        BatchLayout(4, 2).fit(0)
