"""What crosses processes in a step: counted on every layout, in both modes, with and without measuring the noise."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from components.parallel.layout import Sizes
from tests.conftest import TinyRun
from tests.distributed.layouts import LAYOUTS, run_all

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.timeout(600),
]

MICRO_BATCHES, MICRO_BATCH, SEQUENCE, STEPS, LAYERS = 3, 2, 24, 3, 2
DIM, VOCABULARY = 16, 257
SMALL = 1024
"""Bytes: what is smaller is no gradient, but a few numbers that all processes agree on."""
MESHES = {
    "two replicas": Sizes(2, 1, 1),
    "two shards": Sizes(1, 2, 1),
    "two slices": Sizes(1, 1, 2),
    "two replicas of two shards": Sizes(2, 2, 1),
    "two shards of two slices": Sizes(1, 2, 2),
}
MODES = ("reduce", "local")
SIX = ["--model.layers=6"]
CASES: dict[str, tuple[str, str, list[str]]] = {
    f"{layout}, {mode}": (layout, mode, []) for layout in MESHES for mode in MODES
}
CASES |= {f"tied, {mode}": ("two shards", mode, ["--model.tied_embeddings=true"]) for mode in MODES}
CASES |= {f"six layers, {mode}": ("two shards", mode, SIX) for mode in MODES}
CASES |= {f"plain FSDP2, {mode}": ("two shards", mode, [*SIX, "--optimizer.plain=true"]) for mode in MODES}
"""Name -> (layout, mode, arguments)."""


class Runs:
    """Three steps of every case; the noise is measured in the first and the third."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tiny = TinyRun(folder)
        for processes in (2, 4):
            names = [name for name, (layout, _, _) in CASES.items() if LAYOUTS[layout][0] == processes]
            run_all(processes, [self.command(name) for name in names], folder)

    def directory(self, name: str) -> Path:
        return self.folder / "runs" / name.replace(" ", "-")

    def command(self, name: str) -> list[str]:
        layout, mode, arguments = CASES[name]
        samples = MICRO_BATCHES * MICRO_BATCH * data_parallel(MESHES[layout])
        return [
            str(self.tiny.recipe), "--model.kv_heads=2", "--validation=none", "--checkpoint.interval_steps=none",
            "--batch.use=components.batch.constant:Constant", f"--batch.initial={samples}",
            f"--training.total_tokens={STEPS * samples * SEQUENCE}", "--gradient_moments.interval_steps=2",
            "--optimizer.use=tests.distributed.collectives:CountingAdamW",
            f"--optimizer.notes={self.directory(name)}.json", f"--training.accumulation={mode}",
            f"--run.dir={self.directory(name)}", f"--data.path={self.folder / 'text' / '*.txt'}",
            *LAYOUTS[layout][1], *arguments,
        ]  # fmt: skip

    def steps(self, name: str) -> list[list[tuple[str, int, int]]]:
        """(kind, processes, bytes) of the collectives of the second step, which is not measured, and of the third."""
        lines = Path(f"{self.directory(name)}.json").read_text().splitlines()
        return [[(kind, ranks, size) for kind, ranks, size in json.loads(line)] for line in lines]

    def count(self, name: str) -> list[dict[str, int]]:
        """Of both steps: kind -> collectives, those of a few numbers apart."""
        kinds = [
            [f"small {kind}" if size < SMALL and kind == "reduce" else kind for kind, _, size in step]
            for step in self.steps(name)
        ]
        return [dict(Counter(step)) for step in kinds]

    def rows(self, name: str) -> list[dict]:
        return [json.loads(line) for line in (self.directory(name) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("collectives"))


def data_parallel(sizes: Sizes) -> int:
    return sizes.dp_replicate * sizes.dp_shard


@pytest.mark.parametrize("name", CASES)
def test_print(runs, name):
    print(name, runs.count(name))
