"""A sharded checkpoint evaluated on any layout gives the results of one process and of its export."""

from __future__ import annotations

import json
import os
import sys

import pytest

from recipes import cli
from recipes.cli import ROOT
from tests.distributed.layouts import LAYOUTS, run_all
from tests.distributed.test_layouts import TASKS
from tests.end_to_end.test_evaluate import CONFIG
from tests.processes import run_process
from tools import export_hf


def test_two_processes_find_what_one_does_for_shards_of_two(tiny):
    # five sequences: in the last pass one rank has half a batch, the other none
    methods = {"packed": ["--evaluation.limit=5"], "documents": ["--evaluation.method=documents"]}
    methods["tasks"] = ["--evaluation.method=tasks", *TASKS]
    layouts = {name: more for name, (processes, more) in LAYOUTS.items() if processes == 2}
    common = [f"--evaluation.cache_dir={tiny.folder / 'cache'}", "--evaluation.device=cpu"]
    common += [
        "--evaluation.precision=float32",
        "--evaluation.micro_batch_size=2",
        "--data.use=components.data:TextFiles",
    ]
    common += [f"--data.path={tiny.folder / 'text' / 'held_out'}"]

    def command(source, name: str, method: str, *more: str) -> list[str]:
        output = f"--evaluation.output={tiny.folder / f'{name}-{method}.json'}"
        return [str(CONFIG), f"--evaluation.checkpoint={source}", output, *common, *methods[method], *more]

    train = [str(tiny.recipe), "--training.total_tokens=1100", "--lr_schedule.max_lr=5e-2", "--model.kv_heads=2"]
    commands = [train]
    commands += [command(tiny.directory, name, m, *more) for name, more in layouts.items() for m in methods]
    run_all(2, commands, tiny.folder)
    exported = tiny.folder / "exported"
    assert export_hf.main([str(tiny.directory), str(exported)]) == 0
    for method in methods:
        for name, source in (("one", tiny.directory), ("exported", exported)):
            assert cli.main([*command(source, name, method, "--evaluation.sequence_length=24")]) == 0
        results = {
            name: json.loads((tiny.folder / f"{name}-{method}.json").read_text())
            for name in ("one", "exported", *layouts)
        }
        expected = results["one"]
        if method == "tasks":
            for name, found in results.items():
                assert found["task_novel_acc_norm"] == expected["task_novel_acc_norm"], name
                bits = [each["task_novel_bits_per_byte"] for each in (found, expected)]
                assert bits[0] == pytest.approx(bits[1], rel=1e-6), name
            continue
        assert expected["tokens"] > 100
        for name, found in results.items():
            assert (found["tokens"], found["bytes"]) == (expected["tokens"], expected["bytes"]), name
            assert found["nats"] == pytest.approx(expected["nats"], rel=1e-6), name  # float32 in another order


def test_damage_in_the_shard_of_either_process_is_reported(tiny):
    assert cli.main([str(tiny.recipe), "--training.total_tokens=1100"]) == 0
    checkpoint = max((tiny.directory / "checkpoints").iterdir())
    names = sorted(json.loads((checkpoint / "manifest.json").read_text())["files"])
    command = [sys.executable, ROOT / "recipes", CONFIG, f"--evaluation.checkpoint={tiny.directory}"]
    for name in names[:2]:  # one process reads every second file, starting with the first
        file = checkpoint / name
        whole = file.read_bytes()
        file.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
        ended = run_process(
            [*command, "--evaluation.device=cpu"], env={**os.environ, "OMP_NUM_THREADS": "1", "NPROC": "2"}
        )
        assert ended.returncode == 2, ended.stderr
        assert f"{name} was altered: its SHA-256 differs" in ended.stdout + ended.stderr
        file.write_bytes(whole)
