"""Context parallelism trains as one process does: losses, noise, batches and samples, with and without documents."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import TinyRun
from tests.distributed.layouts import run_all, short_documents

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

STEPS, SAMPLES, SEQUENCE = 20, 4, 24
EQUAL = 1e-5
"""Relative tolerance: float32 sums in another order."""
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one process": (1, []),
    "cp 2": (2, ["--parallel.cp=2"]),
    "cp 4": (4, ["--parallel.cp=4"]),
    "cp 2 x fsdp 2": (4, ["--parallel.cp=2"]),
    "cp 2 x two replicas": (4, ["--parallel.cp=2", "--parallel.dp_replicate=2"]),
    "cp 2 x tp 2": (4, ["--parallel.cp=2", "--parallel.tp=2"]),
}
DOCUMENTS = {"whole sequences": [], "documents": ["--training.document_masking=true", "--model.sliding_window=7"]}
EXPERTS = ["--model.experts=4", "--model.top_k=2"]
MORE = {
    "cp 2 x fsdp 2, reduced every time": ("cp 2 x fsdp 2", ["--training.grad_sync=every_micro_batch"]),
    "one process, experts": ("one process", EXPERTS),
    "cp 2, experts": ("cp 2", EXPERTS),
}
RUNS = MORE | {
    f"{layout}, {what}": (layout, keys)
    for layout in LAYOUTS
    for what, keys in DOCUMENTS.items()
    # the slowest; whole sequences are those of test_layouts.py
    if (layout, what) not in (("cp 2 x tp 2", "whole sequences"), ("cp 2 x two replicas", "whole sequences"))
}
"""Name -> layout, arguments."""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    """Return the metrics of the steps of every run."""
    folder: Path = tmp_path_factory.mktemp("cp")
    tiny = TinyRun(folder)
    documents = short_documents(folder)

    def directory(name: str) -> Path:
        return folder / "runs" / name.replace(" ", "-")

    def command(name: str) -> list[str]:
        layout, arguments = RUNS[name]
        return [
            str(tiny.recipe), f"--data.path={documents}", f"--run.dir={directory(name)}",
            "--batch.use=components.batch:Constant", f"--batch.initial_size={SAMPLES}",
            f"--training.total_tokens={STEPS * SAMPLES * SEQUENCE}", "--checkpoint.interval_steps=none",
            "--validation=none", "--model.init_std=0.3", "--model.kv_heads=2", "--lr_schedule.max_lr=1e-3",
            "--training.grad_sync=once_per_step", *LAYOUTS[layout][1], *arguments,
        ]  # fmt: skip

    for processes in (1, 2, 4):
        commands = [command(name) for name, (layout, _) in RUNS.items() if LAYOUTS[layout][0] == processes]
        run_all(processes, commands, folder)
    return {
        name: [json.loads(line) for line in (directory(name) / "metrics.jsonl").read_text().splitlines()]
        for name in RUNS
    }


@pytest.mark.parametrize("name", [name for name in RUNS if not name.startswith("one process")])
def test_twenty_steps_are_those_of_one_process(rows, name):
    what = name.rpartition(", ")[2]
    alone = rows[f"one process, {what if what in ('documents', 'experts') else 'whole sequences'}"]
    assert len(alone) == len(rows[name]) == STEPS
    for key in ("loss", "grad_norm", "grad_cov_trace", "noise_scale", *(["load_balancing_loss"] * (what == "experts"))):
        found, expected = ([row[key] for row in each] for each in (rows[name], alone))
        assert found == pytest.approx(expected, rel=EQUAL), key
    assert [row["samples"] for row in rows[name]] == [row["samples"] for row in alone]


def test_the_runs_differ_where_they_should(rows):
    fifth = [steps[4]["loss"] for name, steps in rows.items() if name.startswith("one process")]
    assert len(set(fifth)) == len(fifth) == 3
