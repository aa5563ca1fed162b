"""A run that is given more tokens, and one stable phase that is decayed more than once."""

from __future__ import annotations

import pytest

from tests.end_to_end.test_resume import assert_same_state, timeless

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

CONSTANT = ["--batch.use=components.batch:Constant", "--batch.initial_size=8"]
DECAY = ["--lr_schedule.decay_tokens=800", "--lr_schedule.decay=1-sqrt"]
SCHEDULES = {
    "wsd": [*CONSTANT, *DECAY],
    # leaves its cap of 0.01 at 1,300 tokens: both parts of the law are in the stable phase
    "power": [*CONSTANT, *DECAY, "--lr_schedule.use=components.lr_schedules:Power", "--lr_schedule.a=8",
              "--lr_schedule.max_lr=1e-2", "--lr_schedule.warmup_tokens=300"],
}  # fmt: skip
SHORT, LONG = "--training.total_tokens=2400", "--training.total_tokens=3600"
DECAYS_AT = 9
"""The first step of the short run that is in the decay: steps of 192 tokens, the decay from 1,600 on."""


def learning_rates(tiny):
    return [row["lr"] for row in tiny.rows() if "loss" in row]


@pytest.mark.parametrize("name", SCHEDULES)
def test_extended_before_its_decay_a_run_is_bitwise_the_one_that_was_that_long_from_the_start(new_tiny, capsys, name):
    schedule = SCHEDULES[name]
    short, extended, long = new_tiny("short"), new_tiny("extended"), new_tiny("long")
    assert short.launch(*schedule, SHORT) == 0
    assert long.launch(*schedule, LONG) == 0
    assert learning_rates(short)[: DECAYS_AT + 1] != learning_rates(long)[: DECAYS_AT + 1], (
        "the short run must have decayed"
    )
    assert learning_rates(short)[:DECAYS_AT] == learning_rates(long)[:DECAYS_AT]
    capsys.readouterr()
    assert extended.launch(*schedule, LONG, f"--resume={short.checkpoint(DECAYS_AT)}") == 0
    assert "different learning rate" not in capsys.readouterr().out
    last = long.rows()[-1]["step"]
    assert_same_state(extended.checkpoint(last), long.checkpoint(last))
    after = [row for row in timeless(long.rows()) if row["step"] > DECAYS_AT]
    assert timeless(extended.rows()) == after


def test_extended_from_within_its_decay_a_run_is_warned_with_the_checkpoint_to_resume_from(new_tiny, capsys):
    short = new_tiny("short")
    assert short.launch(*SCHEDULES["wsd"], SHORT) == 0
    before, after = learning_rates(short)[-1], 0.01
    capsys.readouterr()
    assert short.launch(*SCHEDULES["wsd"], LONG, "--resume") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "the steps after 1.728K tokens used a different learning rate than this schedule" in said
    assert f"it jumps from {before:.3g} to {after:.3g} here" in said
    assert f"resume from {short.checkpoint(DECAYS_AT)} or earlier" in said
    assert learning_rates(short)[13] == after


def test_a_cosine_that_is_extended_had_another_learning_rate_from_its_warm_up_on(new_tiny, capsys):
    cosine = [*CONSTANT, "--lr_schedule.use=components.lr_schedules:Cosine", "--lr_schedule.max_lr=1e-2"]
    short = new_tiny("short")
    assert short.launch(*cosine, SHORT) == 0
    capsys.readouterr()
    assert short.launch(*cosine, LONG, "--resume") == 0
    assert "the steps after 192 tokens used a different learning rate" in " ".join(capsys.readouterr().out.split())


def test_one_stable_phase_is_decayed_at_three_lengths_and_trained_once(new_tiny, tmp_path, capsys):
    """Each branch is bitwise the whole run with that decay, and begins with the first step of its decay."""
    stable = new_tiny("stable")
    assert stable.launch(*SCHEDULES["wsd"], "--training.total_tokens=2000", "--lr_schedule.decay_tokens=0") == 0
    assert set(learning_rates(stable)[2:]) == {0.01}
    capsys.readouterr()
    for length in (200, 600, 1200):
        end = [f"--training.total_tokens={1728 + length}", f"--lr_schedule.decay_tokens={length}"]
        branch, whole = new_tiny(f"branch-{length}"), new_tiny(f"whole-{length}")
        branch.recipe = stable.directory / "config.toml"  # what a run left is a recipe
        branch.directory = tmp_path / f"branch-{length}" / "run"
        places = [f"--run.dir={branch.directory}", f"--run.name=decay-{length}"]
        assert branch.launch(*end, *places, f"--resume={stable.checkpoint(DECAYS_AT)}") == 0
        assert "different learning rate" not in capsys.readouterr().out
        assert min(row["step"] for row in branch.rows()) == DECAYS_AT + 1
        assert whole.launch(*SCHEDULES["wsd"], *end) == 0
        last = whole.rows()[-1]["step"]
        assert_same_state(branch.checkpoint(last), whole.checkpoint(last))
