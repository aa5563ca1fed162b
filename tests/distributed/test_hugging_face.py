"""An export from any sharding, and a start on it, have the same bits as on one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.distributed.layouts import LAYOUTS, run_all
from tools.export_hf import main

STANDSTILL = ["--lr_schedule.max_lr=1e-30", "--lr_schedule.warmup_tokens=0", "--training.total_tokens=100"]
"""Arguments of one step that changes no weight."""


# 34 rows do not divide by 4, nor do 3 experts, each a tensor of its own in the files of Qwen 3
SHAPES = {
    2: ["--model.kv_heads=2", "--model.layers=3", "--model.ffn_dim=34"],
    4: [
        "--model.kv_heads=2", "--model.layers=2", "--model.ffn_dim=34", "--model.qk_norm=per_head",
        "--model.experts=3", "--model.top_k=2",
    ],
}  # fmt: skip
"""Processes -> a model."""


@pytest.fixture
def exported(tiny, processes: int) -> Path:
    assert tiny.launch(*SHAPES[processes], "--training.total_tokens=1100", "--lr_schedule.max_lr=5e-2") == 0
    assert main([str(tiny.directory), str(tiny.folder / "exported")]) == 0
    return tiny.folder / "exported"


def first_loss(directory: Path) -> float:
    return json.loads((directory / "metrics.jsonl").read_text().splitlines()[0])["loss"]


@pytest.mark.parametrize("processes", [2, 4])
def test_every_layout_starts_from_the_same_bits_and_exports_them(tiny, exported, processes):
    layouts = {name: more for name, (number, more) in LAYOUTS.items() if number == processes}
    start = [str(tiny.recipe), *SHAPES[processes], f"--run.init_from={exported}", *STANDSTILL]
    alone = tiny.folder / "alone"
    run_all(1, [[*start, f"--run.dir={alone}"]], tiny.folder)
    places = {name: tiny.folder / name.replace(" ", "-") for name in layouts}
    run_all(processes, [[*start, f"--run.dir={places[name]}", *more] for name, more in layouts.items()], tiny.folder)
    expected = load_file(exported / "model.safetensors")
    for name, place in places.items():
        assert first_loss(place) == pytest.approx(first_loss(alone), rel=1e-6), name
        assert main([str(place), str(place / "exported")]) == 0
        found = load_file(place / "exported" / "model.safetensors")
        assert found.keys() == expected.keys()
        assert all(found[key].equal(tensor) for key, tensor in expected.items()), name
