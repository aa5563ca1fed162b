import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.batch import BatchPolicy, BatchRounding, Constant, Ramp, Stage, complete_policy
from components.clock import TrainingClock

pytestmark = pytest.mark.quick


def at(tokens: int) -> TrainingClock:
    return TrainingClock(total_tokens=10**6, sequence_length=1, samples=tokens)


def test_constant_is_constant():
    assert {Constant(initial_size=24).next_batch_size(at(tokens)) for tokens in (0, 5, 10**6)} == {24}


def test_ramp_changes_at_its_stages():
    ramp = Ramp(initial_size=8, stages=[Stage(from_tokens=100, samples=16), Stage(from_tokens=500, samples=64)])
    assert [ramp.next_batch_size(at(tokens)) for tokens in (0, 99, 100, 499, 500, 10**6)] == [8, 8, 16, 16, 64, 64]


def test_ramp_refuses_stages_out_of_order():
    with pytest.raises(ValueError, match=r"^stages: .* 100 follows 100"):
        Ramp(initial_size=8, stages=[Stage(from_tokens=100, samples=16), Stage(from_tokens=100, samples=64)])


@given(requested=st.integers(1, 10**6), micro=st.integers(1, 64), ranks=st.integers(1, 64))
def test_a_batch_is_rounded_up_to_whole_micro_batches_on_every_rank(requested, micro, ranks):
    batch = BatchRounding(micro, ranks).round_up(requested)
    assert batch.requested == requested
    assert batch.samples == batch.micro_batches * micro * ranks
    assert requested <= batch.samples < requested + micro * ranks


def test_a_policy_that_requests_no_samples_is_reported():
    with pytest.raises(ValueError, match="asked for 0 samples"):
        BatchRounding(4, 2).round_up(0)


class Own:
    """A custom policy that derives from nothing."""

    def next_batch_size(self, progress):
        return 7


def test_a_custom_class_gets_defaults_for_missing_members():
    policy = complete_policy(Own())
    assert policy.next_batch_size(at(0)) == 7
    assert policy.measures_noise(at(0)) is True
    assert (policy.state_dict(), policy.is_adaptive, policy.max_size, policy.multiple_of) == ({}, False, None, 1)
    policy.observe(at(0), None)
    policy.load_state_dict({"samples": 3})


def test_a_custom_class_that_observes_is_adaptive_by_default():
    class Observing(Own):
        max_size = 64

        def __init__(self):
            self.observed = []

        def observe(self, progress, noise):
            self.observed.append(noise)

    class Logging(Observing):
        is_adaptive = False

    own = Observing()
    policy = complete_policy(own)
    policy.observe(at(0), None)
    assert own.observed == [None]
    assert (policy.is_adaptive, policy.max_size) == (True, 64)
    assert complete_policy(Logging()).is_adaptive is False


def test_a_batch_policy_is_unchanged_and_an_object_without_size_is_refused():
    constant: BatchPolicy = Constant(initial_size=3)
    assert complete_policy(constant) is constant
    with pytest.raises(ValueError, match=r"^use: its build\(\) returned a dict without next_batch_size"):
        complete_policy({})
