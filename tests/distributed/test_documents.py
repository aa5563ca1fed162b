"""Document masking is equal on one process, two FSDP shards, two TP ranks and two CP ranks, the last of them compiled
and with checkpointing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import TinyRun
from tests.distributed.layouts import LAYOUTS, run_all, short_documents

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

STEPS, SAVED_AT, SAMPLES, SEQUENCE = 5, 2, 8, 24
WITHIN = "--training.document_masking=true"
COMPILED, RECOMPUTED = "--training.compile=true", "--training.activation_checkpoint=selective"
EXPERTS = ["--model.experts=4", "--model.top_k=2"]
RUNS: dict[str, tuple[str, list[str]]] = {
    "one process": ("one process", [WITHIN, f"--checkpoint.interval_steps={SAVED_AT}"]),
    "one process, across documents": ("one process", []),
    "one process, experts": ("one process", [WITHIN, *EXPERTS]),
    "two shards": ("two shards", [WITHIN]),
    "two TP ranks": ("two TP ranks", [WITHIN]),
    "two CP ranks, compiled and recomputed": ("two CP ranks", [WITHIN, COMPILED, RECOMPUTED]),
    "two TP ranks, experts": ("two TP ranks", [WITHIN, *EXPERTS]),
}
"""Name -> layout, arguments."""
MOVED = "one process to two shards"
EQUAL = 1e-5
"""Relative tolerance: float32 sums in another order."""


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[str, list[dict]]:
    """Return the metrics of the steps of every run."""
    folder: Path = tmp_path_factory.mktemp("documents")
    tiny = TinyRun(folder)
    documents = short_documents(folder)

    def directory(name: str) -> Path:
        return folder / "runs" / name.replace(" ", "-")

    def command(name: str, layout: str, *arguments: str) -> list[str]:
        return [
            str(tiny.recipe), f"--data.path={documents}", f"--run.dir={directory(name)}",
            "--batch.use=components.batch:Constant", f"--batch.initial_size={SAMPLES}",
            f"--training.total_tokens={STEPS * SAMPLES * SEQUENCE}", "--checkpoint.interval_steps=none",
            "--validation=none", "--model.init_std=0.3", "--model.kv_heads=2", "--lr_schedule.max_lr=1e-3",
            *LAYOUTS[layout][1], *arguments,
        ]  # fmt: skip

    saved = directory("one process") / "checkpoints" / f"step-{SAVED_AT:08d}"
    commands = {name: command(name, layout, *arguments) for name, (layout, arguments) in RUNS.items()}
    commands[MOVED] = command(MOVED, "two shards", WITHIN, f"--resume={saved}")
    for processes in (1, 2):
        wanted = [name for name in commands if (LAYOUTS[RUNS.get(name, ("two shards",))[0]][0]) == processes]
        run_all(processes, [commands[name] for name in wanted], folder)
    return {
        name: [json.loads(line) for line in (directory(name) / "metrics.jsonl").read_text().splitlines()]
        for name in commands
    }


def column(rows: list[dict], key: str) -> list[float]:
    return [row[key] for row in rows]


@pytest.mark.parametrize("name", [name for name in RUNS if WITHIN in RUNS[name][1]])
def test_every_layout_takes_the_steps_of_one_process(rows, name):
    alone = rows["one process, experts" if "experts" in name else "one process"]
    assert len(alone) == STEPS
    for key in ("loss", "grad_norm", "grad_cov_trace"):
        assert column(rows[name], key) == pytest.approx(column(alone, key), rel=EQUAL), key
    across = column(rows["one process, across documents"], "loss")
    assert column(alone, "loss")[0] != pytest.approx(across[0], rel=1e-3), "a test that can fail"


def test_a_checkpoint_continues_on_another_layout(rows):
    for key in ("loss", "grad_norm"):
        assert column(rows[MOVED], key) == pytest.approx(column(rows["one process"], key)[SAVED_AT:], rel=EQUAL), key
