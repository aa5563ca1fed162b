"""Training in emulated float8 on two layouts, and a run that turns it on and off."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import TinyRun
from tests.distributed.layouts import LAYOUTS, run_all

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
pytest.importorskip("torchao", reason="the extra float8 is not installed")

STEPS, SAVED_AT, SAMPLES, SEQUENCE = 6, 3, 8, 24
FLOAT8, TENSORWISE = "--training.float8=rowwise", "--training.float8=tensorwise"
RUNS: dict[str, tuple[str, list[str]]] = {
    "exact": ("one process", []),
    "two shards, tensorwise, recomputed": ("two shards", [TENSORWISE, "--training.activation_checkpoint=selective"]),
    "two TP ranks": ("two TP ranks", [FLOAT8]),
    "two TP ranks, tensorwise": ("two TP ranks", [TENSORWISE]),
}
MOVED = {"exact to float8": [FLOAT8], "exact to exact": []}
NEAR = 5e-3
"""Relative difference of losses that float8 may cause in these steps."""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    """Return the metrics of the steps of every run."""
    folder: Path = tmp_path_factory.mktemp("float8")
    tiny = TinyRun(folder)

    def directory(name: str) -> Path:
        return folder / "runs" / name.replace(" ", "-")

    def command(name: str, layout: str, *arguments: str) -> list[str]:
        return [
            str(tiny.recipe), f"--run.dir={directory(name)}", f"--data.path={folder / 'text' / '*.txt'}",
            "--batch.use=components.batch:Constant", f"--batch.initial_size={SAMPLES}", "--validation=none",
            f"--training.total_tokens={STEPS * SAMPLES * SEQUENCE}", f"--checkpoint.interval_steps={SAVED_AT}",
            "--model.dim=32", "--model.kv_heads=2", "--model.head_dim=16", "--training.grad_sync=once_per_step",
            *LAYOUTS[layout][1], *arguments,
        ]  # fmt: skip

    commands = {name: command(name, layout, *arguments) for name, (layout, arguments) in RUNS.items()}
    run_all(1, [commands.pop("exact")], folder)
    saved = directory("exact") / "checkpoints" / f"step-{SAVED_AT:08d}"
    moves = [command(name, "two shards", f"--resume={saved}", *arguments) for name, arguments in MOVED.items()]
    run_all(2, [*commands.values(), *moves], folder)
    return {
        name: [json.loads(line) for line in (directory(name) / "metrics.jsonl").read_text().splitlines()]
        for name in [*RUNS, *MOVED]
    }


@pytest.mark.parametrize("name", [name for name in RUNS if name != "exact"])
def test_losses_stay_near_those_without_it_on_every_layout(rows, name):
    found, exact = ([row["loss"] for row in each] for each in (rows[name], rows["exact"]))
    assert found == pytest.approx(exact, rel=NEAR)
    assert found != pytest.approx(exact, rel=1e-6), "a test that can fail"


def test_a_run_turns_it_on_when_it_resumes(rows):
    before = [row["loss"] for row in rows["exact"]][SAVED_AT:]
    on, off = ([row["loss"] for row in rows[name]] for name in ("exact to float8", "exact to exact"))
    assert on == pytest.approx(before, rel=NEAR)
    assert off == pytest.approx(before, rel=1e-5)
    assert on != pytest.approx(off, rel=1e-6)
