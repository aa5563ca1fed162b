"""An adaptive batch, up and down, is equal on every layout, and after a resume on another layout."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from tests.conftest import TinyRun
from tests.distributed.layouts import LAYOUTS, run_all

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

RECIPE = [
    "--batch.use=components.batch:NormTest", "--batch.initial_size=8", "--batch.max_size=24", "--batch.eta=0.7",
    "--batch.shrink=true", "--batch.multiple_of=8", "--gradient_noise.smoothing_samples=20",
    "--lr_schedule.max_lr=3e-2", "--training.total_tokens=8K", "--data.use=tests.distributed.layouts:RecordedText",
    "--model.kv_heads=2", "--validation=none", "--training.grad_sync=once_per_step",
]  # fmt: skip
"""A multiple of 8 samples is whole micro-batches of two, also on four ranks."""
UNSAVED = "--checkpoint.interval_steps=none"
SAVED = "--checkpoint.interval_steps=2"
SOURCES = ("one process", "two shards")
WHOLE = (*SOURCES, "four shards")
RESUMED = {  # the first change is in step 19, and eight steps change the batch, three of them after step 28
    "two shards": 20, "four shards": 24, "two replicas of two shards": 18, "one process": 10,
    "two TP ranks": 26, "two shards of two TP ranks": 28,
}  # fmt: skip
"""Layout -> the saved step after which it continues the run of another layout."""


class Runs:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tiny = TinyRun(folder)
        self.launch({name: (name, [SAVED if name in SOURCES else UNSAVED]) for name in WHOLE})
        self.launch(
            {
                self.name(layout): (layout, [f"--resume={self.checkpoint(source, step)}", UNSAVED])
                for layout, step in RESUMED.items()
                for source in [SOURCES[layout == "one process"]]
            }
        )

    def name(self, layout: str) -> str:
        return f"{layout}, resumed"

    def checkpoint(self, name: str, step: int) -> Path:
        return self.folder / "runs" / name.replace(" ", "-") / "checkpoints" / f"step-{step:08d}"

    def launch(self, runs: dict[str, tuple[str, list[str]]]) -> None:
        for processes in (1, 2, 4):
            commands = [
                [str(self.tiny.recipe), *RECIPE, *LAYOUTS[layout][1], *arguments,
                 f"--run.dir={self.folder / 'runs' / name.replace(' ', '-')}",
                 f"--data.notes={self.folder / 'reads' / name.replace(' ', '-')}",
                 f"--data.path={self.folder / 'text' / '*.txt'}"]
                for name, (layout, arguments) in runs.items()
                if LAYOUTS[layout][0] == processes
            ]  # fmt: skip
            run_all(processes, commands, self.folder)

    def batches(self, name: str) -> list[int]:
        lines = (self.folder / "runs" / name.replace(" ", "-") / "metrics.jsonl").read_text().splitlines()
        return [row["global_batch_size"] for row in map(json.loads, lines) if "loss" in row]

    def samples(self, name: str, layout: str) -> list[int]:
        """Return the ids in the order of the global batches: by micro-batch, then by rank."""
        processes, arguments = LAYOUTS[layout]
        tp = 2 if "--parallel.tp=2" in arguments else 1
        folder = self.folder / "reads" / name.replace(" ", "-")
        ranks = [
            [json.loads(line) for line in (folder / f"rank-{rank}").read_text().splitlines()]
            for rank in range(0, processes, tp)
        ]
        return [sample for micro_batches in zip(*ranks, strict=True) for each in micro_batches for sample in each]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("adaptive"))


def test_the_batch_changes_often_enough(runs):
    batches = runs.batches("one process")
    assert len(batches) >= 30
    changes = [later - earlier for earlier, later in pairwise(batches)]
    assert sum(change > 0 for change in changes) >= 3
    assert sum(change < 0 for change in changes) >= 3


@pytest.mark.parametrize("layout", [name for name in WHOLE if name != "one process"])
def test_every_layout_takes_the_same_batches_of_the_same_samples(runs, layout):
    batches = runs.batches("one process")
    assert runs.batches(layout) == batches
    expected = runs.samples("one process", "one process")[: sum(batches)]
    assert runs.samples(layout, layout)[: sum(batches)] == expected


@pytest.mark.parametrize("layout, step", RESUMED.items())
def test_another_layout_continues_at_any_step(runs, layout, step):
    name = runs.name(layout)
    batches = runs.batches("one process")
    assert runs.batches(name) == batches[step:]
    first, last = sum(batches[:step]), sum(batches)
    assert runs.samples(name, layout)[: last - first] == runs.samples("one process", "one process")[first:last]
