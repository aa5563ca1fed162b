"""Which steps are bad, and that their numbers never enter the statistics."""

from __future__ import annotations

import json
import math
import random

import pytest

from components.guard import GuardConfig

pytestmark = pytest.mark.quick


def test_numbers_that_are_not_finite() -> None:
    guard = GuardConfig(on_nonfinite="skip").build()
    for loss, norm in ((math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, -math.inf)):
        bad = guard.check(loss, norm)
        assert bad is not None and bad.action == "skip" and not bad.finite
        assert f"loss {loss:.6g}" in bad.why
    assert guard.check(1.0, 1.0) is None


def test_a_spike_is_a_loss_far_above_the_previous_mean() -> None:
    """Compared to a tenth with mean and deviation over the whole window, because those of the guard are exponential."""
    chance = random.Random(0)
    guard = GuardConfig(on_spike="roll_back", spike_window_steps=50, spike_std=5).build()
    losses = [chance.gauss(3.0, 0.1) for _ in range(400)]
    assert [guard.check(loss, 1.0) for loss in losses] == [None] * 400
    mean = sum(losses[-100:]) / 100
    deviation = math.sqrt(sum((loss - mean) ** 2 for loss in losses[-100:]) / 100)
    assert guard.check(mean - 20 * deviation, 1.0) is None, "a falling loss is not a spike"
    guard = GuardConfig(on_spike="roll_back", spike_window_steps=50, spike_std=5).build()
    for loss in losses:
        guard.check(loss, 1.0)
    assert guard.check(mean + 4 * deviation, 1.0) is None
    bad = guard.check(mean + 7 * deviation, 1.0)
    assert bad is not None and bad.action == "roll_back" and bad.finite


def test_no_spike_is_detected_in_few_steps_or_without_a_rule() -> None:
    early, off = GuardConfig(on_spike="skip", spike_window_steps=10).build(), GuardConfig().build()
    for _ in range(9):
        assert early.check(1.0, 1.0) is None
        assert off.check(1.0, 1.0) is None
    assert early.check(1e9, 1.0) is None
    assert off.check(1e9, 1.0) is None


def test_bad_numbers_do_not_enter_the_statistics() -> None:
    clean, dirty = (GuardConfig(on_spike="skip", on_nonfinite="skip", spike_window_steps=5).build() for _ in range(2))
    for step in range(40):
        loss = 2 + 0.01 * (step % 3)
        assert clean.check(loss, 1.0) is None
        assert dirty.check(loss, 1.0) is None
        if step > 5:
            assert dirty.check(math.nan, 1.0) is not None
            assert dirty.check(1e6, 1.0) is not None
    assert {**dirty.state_dict(), "consecutive": 0} == clean.state_dict()


def test_too_many_in_a_row_end_the_run() -> None:
    guard = GuardConfig(on_nonfinite="skip", max_bad_steps=3).build()
    actions = [guard.check(loss, 1.0) for loss in (math.nan, math.nan, 1.0, math.nan, math.nan, math.nan)]
    assert [bad.action if bad else None for bad in actions] == ["skip", "skip", None, "skip", "skip", "stop"]
    assert "consecutive bad steps: 3" in actions[-1].why


def test_the_state_continues_as_if_there_had_been_no_restart() -> None:
    whole, first = (GuardConfig(on_spike="skip", spike_window_steps=5).build() for _ in range(2))
    losses = [3 + math.sin(step) / 10 for step in range(30)]
    for loss in losses[:15]:
        whole.check(loss, 1.0)
        first.check(loss, 1.0)
    second = GuardConfig(on_spike="skip", spike_window_steps=5).build()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for loss in [*losses[15:], 50.0]:
        assert second.check(loss, 1.0) == whole.check(loss, 1.0)
    assert second.state_dict() == whole.state_dict()


def test_bad_samples_are_bad_steps_of_the_same_limit() -> None:
    guard = GuardConfig(on_bad_sample="skip", on_nonfinite="skip", max_bad_steps=3).build()
    assert guard.count_bad_sample("samples 8 to 9: no").action == "skip"
    assert guard.check(math.nan, 1.0).action == "skip"
    stop = guard.count_bad_sample("samples 24 to 25: no")
    assert stop.action == "stop" and stop.why == (
        "samples 24 to 25: no; consecutive bad steps: 3, which is guard.max_bad_steps"
    )
    assert guard.consecutive == 2, "the state that is saved is the one before the step that stops the run"
    assert guard.check(1.0, 1.0) is None and guard.consecutive == 0
    assert GuardConfig().build().count_bad_sample("no").action == "stop"
