"""Figures of runs, of probes, and of what a recipe will do."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ET

import pytest

from recipes import cli
from recipes.config import Override, load
from tools.plot import heat_maps, main, read_run, running_mean, schedule_curves

pytestmark = pytest.mark.quick


def write_run(folder, rows, tail=""):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return folder


def step(number, loss):
    return {"step": number, "tokens": number * 100, "loss": loss, "lr": 0.1, "global_batch_size": 4, "grad_norm": None}


VALIDATION = {"step": 2, "tokens": 200, "val_loss": 2.0}


@pytest.mark.slow
def test_two_runs_in_one_figure_that_is_reproducible(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the [plot] extra")
    runs = [str(write_run(tmp_path / name, [step(1, 3.0), step(2, 2.5), VALIDATION])) for name in ("one", "two")]
    pictures = [tmp_path / "new" / "a.svg", tmp_path / "b.svg"]
    for picture in pictures:
        assert main(["runs", *runs, "--output", str(picture)]) == 0
    assert ET.parse(pictures[0]).getroot().tag.endswith("svg")
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    assert b"one, validation" in pictures[0].read_bytes()


def test_a_line_that_is_still_being_written_is_left_out(tmp_path):
    run = write_run(tmp_path / "run", [step(1, 3.0)], tail='{"step": 2, "tok')
    assert [row["step"] for row in read_run(run)] == [1]


def test_the_running_mean_is_that_of_the_last_values():
    assert running_mean([1.0, 2.0, 3.0, 4.0], 2) == [1.0, 1.5, 2.5, 3.5]


@pytest.mark.parametrize(
    ("rows", "tail", "message"),
    [
        ([], "", "no finished step"),
        ([VALIDATION], "", "no finished step"),
        ([step(1, 2.0)], "{\n", "jsonl:2 is not a row of metrics"),
    ],
)
def test_a_run_that_cannot_be_plotted_is_reported(tmp_path, capsys, rows, tail, message):
    run = write_run(tmp_path / "run", rows, tail)
    assert main(["runs", str(run), "--output", str(tmp_path / "x.svg")]) == 2
    assert message in capsys.readouterr().err


def test_a_directory_that_is_not_a_run(tmp_path, capsys):
    assert main(["runs", str(tmp_path), "--output", str(tmp_path / "x.svg")]) == 2
    assert "give a run directory" in capsys.readouterr().err


def test_an_unknown_file_type_is_reported_with_the_known_ones(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="needs the [plot] extra")
    run = write_run(tmp_path / "run", [step(1, 3.0)])
    assert main(["runs", str(run), "--output", str(tmp_path / "x.xyz")]) == 2
    assert "svg" in capsys.readouterr().err


def test_keys_of_a_recipe_are_not_for_runs(tmp_path, capsys):
    run = write_run(tmp_path / "run", [step(1, 3.0)])
    assert main(["runs", str(run), "--output", str(tmp_path / "x.svg"), "--run.seed=1"]) == 2
    assert "unknown option --run.seed=1" in capsys.readouterr().err


ADAPTIVE = [
    "--batch.use=components.batch:NormTest",
    "--batch.initial_size=4",
    "--batch.max_size=16",
    "--batch.eta=1",
]
POWER = ["--lr_schedule.use=components.lr_schedules:Power", "--lr_schedule.warmup_tokens=300"]


def config_of(tiny, *arguments):
    return load(tiny.recipe, [Override(*argument[2:].split("=", 1)) for argument in arguments])


def as_trained(rows):
    """Return (step, learning rate, batch) of every step."""
    return [(row["step"], row["lr"], row["global_batch_size"]) for row in rows if "loss" in row]


def as_drawn(steps):
    return [(step.number, step.lr, step.batch) for step in steps]


@pytest.mark.slow
def test_the_plotted_schedule_is_the_trained_one(tiny):
    """Across a change of the batch, with a learning rate that scales with it."""
    assert tiny.launch(*POWER) == 0
    config = config_of(tiny, *POWER)
    trained = as_trained(tiny.rows())
    assert {batch for _, _, batch in trained} == {8, 12}
    (planned,) = schedule_curves(config, 1).values()
    assert as_drawn(planned) == trained


def test_a_batch_that_follows_the_gradient_is_two_curves(tiny):
    config = config_of(tiny, *ADAPTIVE, *POWER)
    curves = schedule_curves(config, 1)
    assert list(curves) == ["batch at initial_size = 4", "batch at max_size = 16"]
    assert [{step.batch for step in steps} for steps in curves.values()] == [{4}, {16}]
    for steps in curves.values():
        for step in steps:
            assert step.lr == config.recipe.lr_schedule.lr(step.tokens, step.batch * 24, 3600)


def test_the_batch_is_rounded_for_the_number_of_processes(tiny):
    (steps,) = schedule_curves(config_of(tiny), 3).values()
    assert [step.batch for step in steps[:5]] == [12, 12, 12, 12, 12]  # 8 is not a multiple of 3 x 2


def test_the_figure_of_a_schedule_is_reproducible(tiny, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the [plot] extra")
    pictures = [tmp_path / "new" / "a.svg", tmp_path / "b.svg"]
    for picture in pictures:
        assert main(["schedule", str(tiny.recipe), *ADAPTIVE, "--output", str(picture)]) == 0
    assert ET.parse(pictures[0]).getroot().tag.endswith("svg")
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    assert b"batch at initial_size = 4" in pictures[0].read_bytes()
    assert b"batch at max_size = 16" in pictures[0].read_bytes()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--lr_schedule.max_lrr=1"], "did you mean max_lr?"),
        (["--ouput=x.svg"], "ouput"),
        (["--resume"], "options of ./run_train.sh"),
        (["--output", "x.xyz"], "svg"),
        (["--batch.use=components.batch:Seesaw", "--batch.initial_size=4", "--batch.max_size=8"], "Seesaw needs"),
        (["--parallel.dp_shard=3"], "processes of this run"),
    ],
)
def test_a_schedule_that_cannot_be_plotted_is_reported(tiny, capsys, monkeypatch, arguments, said):
    pytest.importorskip("matplotlib", reason="needs the [plot] extra")
    monkeypatch.chdir(tiny.folder)
    assert main(["schedule", str(tiny.recipe), "--output", "x.svg", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_recipe_of_many_runs_is_refused(capsys, tmp_path):
    recipe = cli.ROOT / "train_configs" / "critical_batch.toml"
    assert (
        main(["schedule", str(recipe), f"--branches.checkpoint={tmp_path}", "--output", str(tmp_path / "x.svg")]) == 2
    )
    assert "CriticalBatch trains many runs" in capsys.readouterr().err


def test_a_schedule_of_one_step_is_drawn(tiny, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the [plot] extra")
    arguments = ["--training.total_tokens=1", "--lr_schedule.warmup_tokens=0", "--output", str(tmp_path / "a.svg")]
    assert main(["schedule", str(tiny.recipe), *arguments]) == 0


def probed(number, **values):
    return step(number, 3.0) | {f"probe_n_{name}": value for name, value in values.items()}


def test_the_numbers_of_layers_become_heat_maps(tmp_path):
    rows = [probed(1, rms_layer_0=1.0, rms_layer_10=3.0, rms_layer_2=2.0, rms_output=9.0), step(2, 2.5)]
    rows += [probed(3, rms_layer_0=4.0, rms_layer_2=5.0, max_layer_0=-1.0)]
    first, second = heat_maps(write_run(tmp_path / "run", rows), None)
    assert (first.metric, first.layers, first.tokens) == ("probe_n_rms", ["0", "2", "10"], [100, 300])
    assert first.values[:2] == [[1.0, 4.0], [2.0, 5.0]]
    assert first.values[2][0] == 3.0 and math.isnan(first.values[2][1])
    assert (second.metric, second.tokens, second.values) == ("probe_n_max", [300], [[-1.0]])
    assert [each.metric for each in heat_maps(tmp_path / "run", ["probe_n_max"])] == ["probe_n_max"]


def test_heat_maps_are_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the [plot] extra")
    layers = {f"rms_layer_{number}": 10.0**number for number in range(30)}
    rows = [probed(number, max_layer_0=-1.0, mean_layer_0=0.5, **layers) for number in (1, 2, 3)]
    run, picture = write_run(tmp_path / "run", rows), tmp_path / "a.svg"
    assert main(["probe", str(run), "--output", str(picture)]) == 0
    assert b"n_mean" in picture.read_bytes()
    assert main(["probe", str(run), "--metric", "probe_n_rms", "--output", str(picture)]) == 0
    assert b"n_mean" not in picture.read_bytes()


def test_a_metric_that_no_probe_measured_is_reported(tmp_path, capsys):
    run = write_run(tmp_path / "run", [probed(1, rms_layer_0=1.0)])
    assert main(["probe", str(run), "--metric", "probe_n_max", "--output", str(tmp_path / "x.svg")]) == 2
    assert "has no probe_n_max; its metrics by layer: probe_n_rms" in capsys.readouterr().err
    plain = write_run(tmp_path / "plain", [step(1, 3.0)])
    assert main(["probe", str(plain), "--output", str(tmp_path / "x.svg")]) == 2
    assert "has no numbers of layers; add a probe" in capsys.readouterr().err
