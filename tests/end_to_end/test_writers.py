"""Runs with the writers of other programs: the real libraries, offline or with a local store."""

import json
import re
import signal
import sys
from pathlib import Path

import pytest

from components.metrics import MLflow, Trackio
from components.metrics.wandb_offline import read_records
from recipes.cli import ROOT
from tests.processes import run_process
from tests.run_info import WITH_TENSORBOARD, run_info
from tests.s3_server import s3_server

KILLER = """
import os, signal

class Killer:
    def __init__(self, *, at: int):
        self.at = at

    def on_step_end(self, context):
        if context.clock.step == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
"""


def wandb_curve(folder: Path) -> dict[int, float]:
    """Return step -> training loss in the offline files of W&B. Each step may be there once."""
    from wandb.proto.wandb_internal_pb2 import Record

    curve: dict[int, float] = {}
    for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        for data in read_records(file.read_bytes()):
            history = Record.FromString(data).history
            items = {item.key or "/".join(item.nested_key): item.value_json for item in history.item}
            if "train/loss" in items:
                assert history.step.num not in curve, "a step twice"
                curve[history.step.num] = json.loads(items["train/loss"])
    return curve


@pytest.fixture
def s3(tmp_path):
    with s3_server("models") as server:
        yield server


def test_killed_and_resumed_each_writer_has_one_clean_curve(tiny, new_tiny, s3):
    """With checkpoints in S3; the parameters are those of a run that was not killed."""
    pytest.importorskip("wandb", reason="needs pip install -e '.[wandb]'")
    mlflow = pytest.importorskip("mlflow", reason="needs pip install -e '.[mlflow]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tiny.folder / "mine_killer.py").write_text(KILLER)
    store = f"sqlite:///{tiny.folder}/mlflow.db"
    command = [
        sys.executable, ROOT / "recipes" / "__main__.py", tiny.recipe, "--training.total_tokens=2000",
        "--checkpoint.interval_steps=3", WITH_TENSORBOARD,
        "--metrics.writers.w.use=components.metrics:WandB", "--metrics.writers.w.project=p",
        "--metrics.writers.w.mode=offline", "--metrics.writers.m.use=components.metrics:MLflow",
        "--metrics.writers.m.experiment=e", f"--metrics.writers.m.tracking_uri={store}",
        "--checkpoint.remote=s3://models/runs",
    ]  # fmt: skip
    killed = run_process([*command, "--hooks.k.use=mine_killer:Killer", "--hooks.k.at=5"], cwd=tiny.folder)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = run_process([*command, "--resume"], cwd=tiny.folder)
    assert resumed.returncode == 0, resumed.stderr
    whole = new_tiny("whole")
    assert whole.launch("--training.total_tokens=2000", "--checkpoint.interval_steps=3") == 0
    last = whole.checkpoints()[-1]
    assert tiny.checkpoints()[-1].name == last.name
    s3fs = pytest.importorskip("s3fs")
    uploaded = s3fs.S3FileSystem().cat_file(f"models/runs/run/checkpoints/{last.name}/__0_0.distcp")
    assert uploaded == (last / "__0_0.distcp").read_bytes()
    assert "metrics.writers" not in resumed.stderr + resumed.stdout
    rows = [row for row in tiny.rows() if "loss" in row]
    losses = {row["step"]: row["loss"] for row in rows}
    assert list(losses) == list(range(1, len(rows) + 1))

    assert wandb_curve(tiny.directory) == losses
    client = mlflow.MlflowClient(tracking_uri=store)
    (run,) = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["model.dim"] == "16"
    nothing_left = MLflow(tracking_uri=store, experiment="e")
    nothing_left.open(run_info(tiny.directory, id=run.data.tags["powertrain.run"]))
    nothing_left.close()
    assert client.get_run(run.info.run_id).info.status == "FINISHED", "a run that is only opened again keeps its status"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(each.step, each.value) for each in history] == list(losses.items())
    validations = client.get_metric_history(run.info.run_id, "validation/val_loss")
    assert [each.step for each in validations] == [row["step"] for row in tiny.rows() if "val_loss" in row]
    events = EventAccumulator(str(tiny.directory / "tensorboard"))
    events.Reload()
    assert {e.step: e.value for e in events.Scalars("train/loss")} == pytest.approx(losses, rel=1e-6)
    environments = json.loads((tiny.directory / "environment.json").read_text())
    assert [each["after_step"] for each in environments] == [0, 3], "the command differs"
    assert {"git_commit", "git_dirty", "torch", "world_size"} <= environments[0].keys()


def test_trackio_continues_a_run(tmp_path, monkeypatch):
    pytest.importorskip("trackio", reason="needs pip install -e '.[trackio]', which installs a web server")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))  # read when it is imported
    from trackio.sqlite_storage import SQLiteStorage

    for after_step in (0, 3):
        writer = Trackio(project="p")
        writer.open(run_info(tmp_path, after_step=after_step))
        for step in range(after_step + 1, after_step + 4):
            writer.write({"step": step, "loss": float(step)})
        writer.close()
    logs = SQLiteStorage.get_logs("p", "test-0123456789abcdef")
    assert [(each["step"], each["train/loss"]) for each in logs] == [(step, float(step)) for step in range(1, 7)]


def test_a_library_that_is_missing_is_named_with_its_extra(tiny, capsys, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for extra, arguments in (
        ("wandb", ["--metrics.writers.w.use=components.metrics.wandb:WandB", "--metrics.writers.w.project=p"]),
        ("trackio", ["--metrics.writers.w.use=components.metrics.trackio:Trackio", "--metrics.writers.w.project=p"]),
    ):
        assert tiny.launch(*arguments) == 2
        assert f"pip install -e '.[{extra}]'" in capsys.readouterr().err


def test_a_store_that_cannot_be_written_is_reported_at_its_table(tiny, capsys):
    pytest.importorskip("mlflow", reason="needs pip install -e '.[mlflow]'")
    (tiny.folder / "file").write_text("")
    uri = f"sqlite:///{tiny.folder}/file/mlflow.db"
    arguments = ["--metrics.writers.m.use=components.metrics:MLflow", "--metrics.writers.m.experiment=e"]
    assert tiny.launch(*arguments, f"--metrics.writers.m.tracking_uri={uri}") == 2
    assert "metrics.writers.m" in capsys.readouterr().err


def test_the_example_of_the_documentation_runs(tiny, clean_imports):
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    blocks = dict(re.findall(r"```(toml|python)\n(.*?)```", page, re.DOTALL))
    (tiny.folder / "mine_writers.py").write_text(blocks["python"])
    tiny.recipe.write_text(tiny.recipe.read_text() + blocks["toml"].partition("]\n")[2].replace("my_", "mine_"))
    assert tiny.launch("--training.total_tokens=1200") == 0
    lines = (tiny.directory / "loss.csv").read_text().splitlines()
    assert [float(line.split(",")[1]) for line in lines] == [row["loss"] for row in tiny.rows() if "loss" in row]
