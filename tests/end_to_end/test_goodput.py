"""A run grows its batch for a fixed cost of its steps, and only then. Times are those of a simulated clock."""

from __future__ import annotations

import pytest

from components.batch.step_times import StepCost
from components.checkpoint import CheckpointManager
from components.validation import Validator
from recipes import step_timer
from tests.delays import CLOCK

KEYS = [
    "--batch.use=components.batch:Goodput", "--batch.initial_size=4", "--batch.max_size=200", "--batch.multiple_of=2",
    "--batch.max_growth=2", "--batch.min_efficiency=0.05", "--hooks.slow.use=tests.delays:SlowUpdate",
    "--model.use=tests.delays:SlowLlama", "--model.pass_seconds=0.02", "--model.size=debug", "--model.dim=16",
    "--model.layers=2", "--model.heads=2", "--model.kv_heads=1", "--model.head_dim=8", "--model.ffn_dim=32",
]  # fmt: skip
UNSAVED = ["--checkpoint.interval_steps=none", "--validation=none"]
WITHOUT_FIXED_COST = "--hooks.slow.step_seconds=0"
WITH_FIXED_COST = "--hooks.slow.step_seconds=1"
COST = StepCost(1.0, 0.02, samples_per_micro_step=2)


@pytest.fixture
def simulated(tiny, monkeypatch):
    """Restore the clock of the steps, which the recipe replaces."""
    monkeypatch.setattr(step_timer, "time", step_timer.time)
    return tiny


def steps(tiny) -> list[dict]:
    return [row for row in tiny.rows() if "loss" in row]


@pytest.mark.parametrize("delay", [0, 1])
def test_the_batch_grows_to_the_size_that_the_fixed_cost_is_worth(simulated, monkeypatch, delay):
    monkeypatch.setattr("recipes.pretrain.metrics_delay", lambda *_: delay)
    assert simulated.launch(*KEYS, WITH_FIXED_COST, *UNSAVED, "--training.total_tokens=12000") == 0
    rows = steps(simulated)
    sizes, scale = [row["global_batch_size"] for row in rows], rows[-2]["noise_scale"]
    best = COST.best_batch(scale)
    assert sizes[0] == 4 < 8 < best, "the choice is between sizes that differ"
    assert COST.gain(best, sizes[-1], scale) < 0.06, "a gain of at least 0.05 grows the batch"
    assert rows[-1]["goodput_fixed_seconds"] == pytest.approx(1, rel=0.1)
    assert rows[-1]["goodput_micro_batch_seconds"] == pytest.approx(0.02, rel=0.3)
    assert rows[-1]["goodput_efficiency"] == pytest.approx(scale / (scale + sizes[-1]), rel=0.1)
    assert rows[-1]["goodput_wanted_size"] == pytest.approx(best, abs=4)


def test_without_a_fixed_cost_the_batch_stays_and_a_resumed_run_measures_no_second_size(simulated):
    assert simulated.launch(*KEYS, WITHOUT_FIXED_COST, "--training.total_tokens=5000") == 0
    sizes = [row["global_batch_size"] for row in steps(simulated)]
    assert set(sizes) == {4, 8} and sizes.count(8) <= 10 and sizes[-5:] == [4] * 5
    assert simulated.launch(*KEYS, WITHOUT_FIXED_COST, "--training.total_tokens=8000", "--resume") == 0
    rows = steps(simulated)[len(sizes) :]
    assert len(rows) > 20 and {row["global_batch_size"] for row in rows} == {4}
    assert rows[-1]["goodput_fixed_seconds"] == pytest.approx(0, abs=1e-4)
    assert rows[-1]["goodput_wanted_size"] == 4


def test_saves_and_validation_count_for_no_step(simulated, monkeypatch):
    for owner, name in ((CheckpointManager, "save"), (Validator, "evaluate")):
        monkeypatch.setattr(owner, name, slowly(getattr(owner, name), 50))
    often = ["--checkpoint.interval_steps=1", "--validation.interval_steps=1"]
    assert simulated.launch(*KEYS, WITH_FIXED_COST, *often, "--training.total_tokens=2000") == 0
    rows = steps(simulated)[1:]
    assert CLOCK.now > 2 * 50 * len(rows)
    for row in rows:
        assert row["step_seconds"] == pytest.approx(1 + 0.01 * row["global_batch_size"], abs=1e-3)


def slowly(function, seconds):
    """Return `function`, which now takes that many simulated seconds longer."""

    def slow(*args, **kwargs):
        CLOCK.sleep(seconds)
        return function(*args, **kwargs)

    return slow
