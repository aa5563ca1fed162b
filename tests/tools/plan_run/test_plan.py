"""The plan from pilot runs whose laws are known, and once from real runs."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import pytest

from recipes.config import load
from tests.tools.sweep.outcomes import pretend
from tools.plan_run import ladder as ladders
from tools.plan_run.__main__ import main
from tools.plan_run.family import Family
from tools.plan_run.ladder import Ladder, Pilots
from tools.sweep.runner import Results, Runner

pytest.importorskip("scipy", reason="needs the [plot] extra")

LENGTH = 24
PILOTS = ["--pilot-sizes=20K,60K,150K", "--pilot-tokens=400K", "--pilot-batch=8", "--lrs=0.004,0.008"]
TARGET = ["--parameters=600K", "--tokens=2M"]


def best_lr(tokens: float) -> float:
    return 0.01 * (tokens / 100_000) ** -0.3


def noise(tokens: int) -> float:
    return 40 * (tokens / 100_000) ** 0.5


def lowest(multiplied: float, tokens: float) -> float:
    return 1.5 + 30 / multiplied**0.35 + 50 / tokens**0.3


@pytest.fixture
def launched(tiny, monkeypatch) -> list[dict]:
    """Runs that follow these laws; the keys that every one was started with."""
    monkeypatch.setattr("tools.plan_run.laws.BOOTSTRAP_FITS", 10)  # of the interval, which test_laws.py tests
    config = load(tiny.recipe)
    counted = cache(Family(config, config.recipe.tokenizer.build().vocab_size)._counted)

    def loss(settings) -> float:
        keys = ("dim", "layers", "heads", "kv_heads", "ffn_dim")
        size = counted(*(int(settings[f"model.{key}"]) for key in keys))
        tokens = int(settings["training.total_tokens"])
        off = math.log(float(settings["lr_schedule.max_lr"]) / best_lr(tokens))
        return lowest(size.multiplied, tokens) + 0.05 * off**2

    return pretend(monkeypatch, loss, noise=noise, length=LENGTH, lr=lambda keys: float(keys["lr_schedule.max_lr"]))


def arguments(tiny, tmp_path: Path, *more: str) -> list[str]:
    return [str(tiny.recipe), *PILOTS, f"--results={tmp_path / 'pilots.jsonl'}", *more]


@pytest.mark.quick
def test_the_plan_follows_the_laws_of_its_pilot_runs(tiny, tmp_path, launched, capsys):
    output = tmp_path / "plans" / "big.toml"
    assert main(arguments(tiny, tmp_path, *TARGET, f"--output={output}")) == 0
    said = capsys.readouterr().out
    assert output.with_suffix(".md").read_text() in said
    recipe = load(output).recipe
    size = Family(load(output), 257).base
    assert size.parameters == pytest.approx(600_000, rel=0.2)
    assert recipe.run.directory.parts[-2:] == ("runs", "big") and recipe.training.total_tokens == 2_000_000
    value = next(line for line in said.splitlines() if line.startswith("| validation loss |")).split("|")[2].split()[0]
    assert float(value) == pytest.approx(lowest(size.multiplied, 2e6), rel=5e-3)
    assert recipe.lr_schedule.max_lr == pytest.approx(best_lr(2e6), rel=0.02)
    assert (recipe.lr_schedule.batch_scaling, recipe.lr_schedule.reference_batch_tokens) == ("sqrt", 8 * LENGTH)
    assert recipe.batch.max_size == pytest.approx(noise(2_000_000) / 2, abs=2)  # rounded up to a micro-batch of 2
    assert recipe.batch.coefficient == 0.5 and recipe.optimizer.reference_batch_tokens == 8 * LENGTH
    wanted = [math.ceil(noise(at + 1000) / 2 / 2) * 2 for at in range(0, 2_000_000, 2000)]  # in micro-batches of 2
    batches = [max(recipe.batch.initial_size, batch) for batch in wanted]
    steps = sum(2_000 / LENGTH / batch for batch in batches)
    stated = next(line for line in said.splitlines() if line.startswith("| steps |")).split("|")[2]
    assert float(stated.replace(",", "")) == pytest.approx(steps, rel=0.02)
    # Power Lines: B / (lr lambda D) = 1.084 (D / N)^-0.527, in tokens
    mean = 2e6 / steps
    lr = recipe.lr_schedule.max_lr * math.sqrt(mean / (8 * LENGTH))
    fraction = mean / (lr * recipe.optimizer.weight_decay * 2e6)
    assert fraction == pytest.approx(1.084 * (2e6 / size.multiplied) ** -0.527, rel=0.02)


@pytest.mark.quick
def test_pilot_runs_share_stable_phases_and_are_not_run_twice(tiny, tmp_path, launched, capsys):
    assert main(arguments(tiny, tmp_path, *TARGET)) == 0
    stable = [keys for keys in launched if keys["lr_schedule.decay_tokens"] == "0"]
    lrs = sorted({float(keys["lr_schedule.max_lr"]) for keys in launched})
    assert lrs[-1] > 0.008, "the best learning rate was at an end"
    by_size = {keys["model.dim"] + "x" + keys["model.layers"] for keys in launched}
    assert len(by_size) == 3
    assert len(launched) == len(stable) * (1 + len(ladders.HORIZONS))
    assert {keys["checkpoint.keep_last"] for keys in stable} == {"none"}
    before = len(launched)
    assert main(arguments(tiny, tmp_path, "--parameters=300K", "--tokens=1M")) == 0
    assert len(launched) == before
    capsys.readouterr()
    assert main(arguments(tiny, tmp_path, *TARGET, "--seeds=2", "--report")) == 1
    assert "pilot runs are missing" in capsys.readouterr().out


@pytest.mark.quick
def test_a_pilot_batch_is_one_that_the_runs_can_have(tiny, tmp_path, launched, capsys):
    """Checkpoints are counted in steps: a batch that the run rounds up would put them elsewhere."""
    output = tmp_path / "plan.toml"
    assert main(arguments(tiny, tmp_path, *TARGET, "--pilot-batch=5", f"--output={output}")) == 0
    assert {keys["batch.initial_size"] for keys in launched} == {"6"}  # micro-batches of 2
    assert load(output).recipe.lr_schedule.reference_batch_tokens == 6 * LENGTH
    assert "6 samples a step" in capsys.readouterr().out


@pytest.mark.quick
def test_keys_of_the_policy_of_the_recipe_do_not_reach_the_plan(tiny, tmp_path, launched):
    output = tmp_path / "plan.toml"
    own = {"use": "components.batch:NoiseScale", "initial_size": "64", "max_size": "128", "min_size": "64",
           "shrink": "true", "hysteresis": "0.3"}  # fmt: skip
    keys = [f"--batch.{key}={value}" for key, value in own.items()]
    assert main(arguments(tiny, tmp_path, *TARGET, *keys, f"--output={output}")) == 0
    batch = load(output).recipe.batch
    assert (batch.min_size, batch.shrink, batch.hysteresis) == (None, False, 0.0) and batch.max_size < 100


@pytest.mark.quick
def test_failed_pilot_runs_are_said_and_run_again_on_request(tiny, tmp_path, launched, monkeypatch, capsys):
    healthy = Runner._launch

    def launch(runner, job, settings):
        status, said, error = healthy(runner, job, settings)
        fails = settings["model.dim"] == "16" and settings["lr_schedule.max_lr"] == "0.004"
        return (1, "No space left on device", None) if fails else (status, said, error)

    monkeypatch.setattr(Runner, "_launch", launch)
    assert main(arguments(tiny, tmp_path, *TARGET)) == 0
    said = capsys.readouterr().out
    assert "3 pilot runs failed" in said and "No space left on device" in said
    monkeypatch.setattr(Runner, "_launch", healthy)
    before = len(launched)
    assert main(arguments(tiny, tmp_path, *TARGET, "--retry")) == 0
    assert len(launched) == before + 3 and "pilot runs failed" not in capsys.readouterr().out


@pytest.mark.quick
def test_a_batch_above_what_the_noise_allows_is_warned_of(tiny, tmp_path, launched, capsys):
    output = tmp_path / "plan.toml"
    assert main(arguments(tiny, tmp_path, *TARGET, "--devices=64", f"--output={output}")) == 0
    batch = load(output).recipe.batch
    assert (batch.initial_size, batch.max_size) == (128, 128)  # one micro-batch on each of 64 ranks
    assert "the first batch of the plan, 128 samples, is" in capsys.readouterr().out


@pytest.mark.quick
def test_without_validation_the_law_is_of_the_training_loss(tiny, tmp_path, launched, capsys):
    text = tiny.recipe.read_text()
    start = text.index("[validation]")
    tiny.recipe.write_text(text[:start] + text[text.index("[training]", start) :])
    assert main(arguments(tiny, tmp_path, *TARGET)) == 0
    assert "| training loss |" in capsys.readouterr().out
    assert not any("validation" in key for key in launched[0])


def test_hours_give_the_tokens_and_the_size_with_the_lowest_loss(tiny, tmp_path, launched, capsys):
    def plan(*target: str) -> tuple[float, int, float]:
        output = tmp_path / "plan.toml"
        assert main(arguments(tiny, tmp_path, *target, f"--output={output}")) == 0
        said = capsys.readouterr().out
        recipe = load(output).recipe
        cells = {line.split("|")[1].strip(): line.split("|")[2].strip() for line in said.splitlines() if "|" in line}
        return float(cells["validation loss"].split()[0]), recipe.training.total_tokens, float(cells["hours"])

    device = ["--devices=4", "--device=H100@1%"]
    hours = "--hours=0.00002"
    loss, tokens, stated = plan(hours, *device)
    assert stated == pytest.approx(0.00002, rel=0.01)
    for parameters in ("60K", "150K", "2M"):
        other, _, stated = plan(hours, f"--parameters={parameters}", *device)
        assert stated == pytest.approx(0.00002, rel=0.01)
        assert loss <= other + 1e-3
    twice = plan("--hours=0.00004", *device)
    assert twice[0] < loss and twice[1] > tokens


@pytest.mark.quick
def test_a_target_far_away_is_warned_of(tiny, tmp_path, launched, capsys):
    assert main(arguments(tiny, tmp_path, "--parameters=20M", "--tokens=40M")) == 0
    said = capsys.readouterr().out
    assert "times the parameters of the largest pilot run" in said and "times the tokens of the" in said


@pytest.mark.quick
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--tokens=1M"], "--tokens needs --parameters"),
        (["--parameters=1M"], "--parameters with --tokens or --hours"),
        (["--parameters=1M", "--hours=1"], "--hours needs --device"),
        (["--hours=1", "--device=H10"], "H10 is not a known device"),
        ([*TARGET, "--devices=0"], "--devices 0: expected a number above 0"),
        ([*TARGET, "--pilot-batch=0"], "--pilot-batch 0: expected a number above 0"),
        ([*TARGET, "--pilot-batch=2"], "the noise needs two micro-batches a step; use 4"),
        (["--parameters=500", "--tokens=1M"], "no model of 500 parameters"),
        ([*TARGET, "--parallel.tp=2", "--model.kv_heads=2"], "tp: cp x tp = 2 does not divide the 1 processes"),
        ([*TARGET, "--output=plan.md"], "expected the name of a recipe"),
        ([*TARGET, "--lr_schedule.decay_fraction=1.0"], "a plan needs a stable phase"),
        ([*TARGET, "--pilot-sizes=20K"], "two sizes or more"),
        ([*TARGET, "--pilot-sizes=20K,20_100"], "the same model"),
        ([*TARGET, "--lrs=0.01"], "two learning rates or more"),
        (
            [*TARGET, "--lr_schedule.use=components.lr_schedules:Cosine", "--lr_schedule.max_lr=1e-3"],
            "a plan needs WSD or Power",
        ),
        ([*TARGET, "--model.dimm=3"], "did you mean dim?"),
    ],
)
def test_bad_input_starts_nothing(tiny, tmp_path, launched, capsys, given, message):
    assert main(arguments(tiny, tmp_path, *given)) == 2
    assert message in capsys.readouterr().err
    assert not launched


@pytest.mark.quick
def test_the_recipe_is_not_overwritten_by_its_plan(tiny, tmp_path, launched, capsys):
    tiny.recipe.with_suffix(".md").write_text("notes")
    before = tiny.recipe.read_text()
    assert main(arguments(tiny, tmp_path, *TARGET, f"--output={tiny.recipe}")) == 2
    assert "is the recipe to plan for" in capsys.readouterr().err
    assert not launched and tiny.recipe.read_text() == before


@pytest.mark.quick
@pytest.mark.parametrize("given", ["--tokens=1Q", "--pilot-sizes=20K,x", "--lrs=0.01,?"])
def test_what_is_not_a_number_is_named(tiny, tmp_path, launched, capsys, given):
    with pytest.raises(SystemExit):
        main(arguments(tiny, tmp_path, *TARGET, given))
    assert f"{given.partition('=')[2]} is not a" in capsys.readouterr().err


@pytest.mark.quick
def test_power_has_one_amplitude(tiny, tmp_path, monkeypatch, capsys):
    def loss(settings) -> float:
        tokens = int(settings["training.total_tokens"])
        off = math.log(float(settings["lr_schedule.a"]) / 2.5)
        return 3 + 50 / tokens**0.3 + int(settings["model.dim"]) ** -0.5 + off**2

    pretend(monkeypatch, loss, noise=noise, length=LENGTH, lr=lambda settings: 0.01)
    output = tmp_path / "plan.toml"
    power = ["--lr_schedule.use=components.lr_schedules:Power", "--lrs=1,2,4"]
    assert main(arguments(tiny, tmp_path, *TARGET, *power, f"--output={output}")) == 0
    schedule = load(output).recipe.lr_schedule
    assert type(schedule).__name__ == "Power" and schedule.a == 2.0
    assert "one value for 9 groups" in capsys.readouterr().out


def test_a_decay_that_branches_off_has_the_result_of_the_whole_run(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(ladders, "HORIZONS", (1, 2))
    monkeypatch.setattr(ladders, "MAX_EXTENSIONS", 0)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    config = load(tiny.recipe)
    size = Family(config, 257).base
    pilots = Pilots(tiny.recipe, {}, config, [size], batch=4, tokens=1600, lrs=[0.01])
    results = Results(tmp_path / "branched.jsonl")
    runs = Ladder(pilots, results)
    assert runs.run(tmp_path / "stable", at_a_time=2) == 0
    _, jobs = pilots.jobs(size, 0.01)
    assert len(jobs) == 2 and not list((tmp_path / "stable").iterdir())
    whole = Results(tmp_path / "whole.jsonl")
    assert Runner(whole, at_a_time=2).run(jobs) == 0
    for job in jobs:
        branched, alone = results.get(job), whole.get(job)
        assert branched.failure is None
        assert (branched.val_loss, branched.tokens, branched.steps) == (alone.val_loss, alone.tokens, alone.steps)
        assert branched.seconds < alone.seconds
    (_, outcome), *rest = runs.stable(size)
    assert outcome.noise and not rest
