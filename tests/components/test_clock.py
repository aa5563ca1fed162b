import pytest

from components.clock import TrainingClock

pytestmark = pytest.mark.quick


def test_tokens_follow_samples_whatever_the_batches_were():
    clock = TrainingClock(total_tokens=1000, sequence_length=10)
    for samples in (1, 7, 32):
        clock.advance(samples)
    assert (clock.step, clock.samples, clock.tokens) == (3, 40, 400)
    assert not clock.done
    clock.advance(60)
    assert clock.done


def test_state_round_trips():
    clock = TrainingClock(1000, 10)
    clock.advance(4)
    other = TrainingClock(2000, 10)
    other.load_state_dict(clock.state_dict())
    assert (other.step, other.samples, other.tokens, other.total_tokens) == (1, 4, 40, 2000)


def test_a_checkpoint_of_another_sequence_length_is_refused():
    clock = TrainingClock(1000, 10)
    clock.advance(4)
    with pytest.raises(ValueError, match="40 tokens in 4 samples"):
        TrainingClock(1000, 20).load_state_dict(clock.state_dict())
