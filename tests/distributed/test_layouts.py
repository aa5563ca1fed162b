"""One recipe on every layout: the same samples, the same losses, and checkpoints that move from each to each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import TinyRun
from tests.distributed.layouts import LAYOUTS, run_all
from tests.end_to_end.test_resume import tensors, timeless

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.timeout(600),
]

STEPS, SAVED_AT, SAMPLES, SEQUENCE = 20, 12, 8, 24
RECIPE = [
    "--batch.use=components.batch.constant:Constant",
    f"--batch.initial={SAMPLES}",
    f"--training.total_tokens={STEPS * SAMPLES * SEQUENCE}",
    "--data.use=tests.distributed.layouts:RecordedText",
    "--model.kv_heads=2",
    "--checkpoint.interval_steps=4",
]
EQUAL = 1e-5
"""Relative: float32 sums taken in another order differ by 2e-7 here after 20 steps of Adam."""


class Runs:
    """The run of every layout, made once: a directory and the sequences it read for each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tiny = TinyRun(folder)

    def directory(self, name: str) -> Path:
        return self.folder / "runs" / name.replace(" ", "-")

    def reads(self, name: str) -> Path:
        return self.folder / "reads" / name.replace(" ", "-")

    def launch(self, runs: dict[str, tuple[str, list[str]]]) -> None:
        """Run name -> (layout, arguments), with as few starts of processes as there are numbers of processes."""
        for processes in sorted({LAYOUTS[layout][0] for layout, _ in runs.values()}):
            commands = [
                [str(self.tiny.recipe), *RECIPE, *LAYOUTS[layout][1], *arguments,
                 f"--run.dir={self.directory(name)}", f"--data.notes={self.reads(name)}",
                 f"--data.path={self.folder / 'text' / '*.txt'}"]
                for name, (layout, arguments) in runs.items()
                if LAYOUTS[layout][0] == processes
            ]  # fmt: skip
            run_all(processes, commands, self.folder)

    def rows(self, name: str) -> list[dict]:
        return [json.loads(line) for line in (self.directory(name) / "metrics.jsonl").read_text().splitlines()]

    def losses(self, name: str) -> list[float]:
        return [row["loss"] for row in self.rows(name) if "loss" in row]

    def checkpoint(self, name: str, step: int) -> Path:
        return self.directory(name) / "checkpoints" / f"step-{step:08d}"

    def read(self, name: str) -> dict[str, list[list[int]]]:
        """Process -> the sequences of each micro-batch."""
        return {
            path.name: [json.loads(line) for line in path.read_text().splitlines()]
            for path in self.reads(name).iterdir()
        }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    made = Runs(tmp_path_factory.mktemp("layouts"))
    made.launch({layout: (layout, []) for layout in LAYOUTS})
    return made


OTHERS = [layout for layout in LAYOUTS if layout != "one process"]


@pytest.mark.parametrize("layout", OTHERS)
def test_every_step_and_every_parameter_is_that_of_one_process(runs, layout):
    for key in ("loss", "grad_norm", "val_loss", "val_bits_per_byte"):
        expected, found = ([row[key] for row in runs.rows(name) if key in row] for name in ("one process", layout))
        assert found == pytest.approx(expected, rel=EQUAL), key
    assert len(runs.losses(layout)) == STEPS
    alone, together = (tensors(runs.checkpoint(name, STEPS)) for name in ("one process", layout))
    assert {name for name in alone if not name.startswith("random")} == {
        name for name in together if not name.startswith("random")
    }
    for name, tensor in alone.items():
        if name.startswith("model."):
            assert (tensor - together[name]).abs().max() < 1e-4, name


@pytest.mark.parametrize("layout", OTHERS)
def test_every_step_reads_the_same_samples(runs, layout):
    processes, arguments = LAYOUTS[layout]
    tp = 2 if "--parallel.tp=2" in arguments else 1
    (alone,) = runs.read("one process").values()
    read = runs.read(layout)
    assert len(read) == processes
    micro_batches = len(alone) // (processes // tp) // STEPS
    for step in range(STEPS):
        expected = [sample for micro_batch in alone[step * 4 : step * 4 + 4] for sample in micro_batch]
        found: list[int] = []
        for micro_batch in range(step * micro_batches, (step + 1) * micro_batches):
            for rank in range(0, processes, tp):
                found += read[f"rank-{rank}"][micro_batch]
                assert all(
                    read[f"rank-{rank + i}"][micro_batch] == read[f"rank-{rank}"][micro_batch] for i in range(tp)
                )
        assert found == expected, f"step {step + 1}"


def test_a_checkpoint_of_each_layout_continues_on_each(runs):
    moves = {f"{source} to {target}": (source, target) for source in LAYOUTS for target in LAYOUTS}
    commands = {
        name: (target, [f"--resume={runs.checkpoint(source, SAVED_AT)}", "--checkpoint.interval_steps=none"])
        for name, (source, target) in moves.items()
    }
    runs.launch(commands)
    for name, (source, target) in moves.items():
        assert runs.losses(name) == pytest.approx(runs.losses("one process")[SAVED_AT:], rel=EQUAL), name
        if source == target:
            whole = [row for row in timeless(runs.rows(source)) if row["step"] > SAVED_AT]
            assert timeless(runs.rows(name)) == whole, f"{name}: not bitwise"
        shutil.rmtree(runs.directory(name))


VARIANTS = {
    "local accumulation": ["--training.accumulation=local"],
    "reduction of every micro-batch": ["--training.accumulation=reduce"],
    "all blocks recomputed": ["--training.activation_checkpoint=full"],
    "every second block recomputed": ["--training.activation_checkpoint=2"],
    "cheap operations recomputed": ["--training.activation_checkpoint=selective"],
}


def test_how_gradients_are_gathered_and_activations_kept_changes_nothing(runs):
    layouts = ("two shards", "two slices", "two replicas of two shards", "two shards of two slices")
    cases = {f"{what} on {layout}": (layout, VARIANTS[what]) for what in VARIANTS for layout in layouts}
    runs.launch({name: (layout, [*how, "--checkpoint.interval_steps=none"]) for name, (layout, how) in cases.items()})
    for name, (layout, _) in cases.items():
        assert runs.losses(name) == pytest.approx(runs.losses(layout), rel=1e-6), name
