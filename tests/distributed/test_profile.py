"""Profiles of runs on two processes: sharded, and tensor-parallel."""

from __future__ import annotations

import pytest

from components.profiler import break_down, read_trace
from components.profiler import kernel_kinds as kinds
from tests.distributed.layouts import run_all


def test_all_processes_are_profiled_on_request(tiny, tmp_path):
    common = [str(tiny.recipe), "--profile.steps=2", "--profile.start_step=2", "--training.total_tokens=800"]
    common += ["--checkpoint.interval_steps=none", "--validation.interval_steps=none"]
    shards, tp_ranks = tmp_path / "shards", tmp_path / "tp-ranks"
    run_all(
        2,
        [
            [*common, f"--run.dir={shards}", "--profile.all_ranks=true"],
            [*common, f"--run.dir={tp_ranks}", "--parallel.tp=2", "--model.kv_heads=2"],
        ],
        tmp_path,
    )
    for directory, ranks in ((shards, (0, 1)), (tp_ranks, (0,))):
        traces = sorted((directory / "profile").glob("*.trace.json.gz"))
        assert [trace.name for trace in traces] == [f"steps-2-to-3-rank-{rank}.trace.json.gz" for rank in ranks]
        for trace in traces:
            found = break_down(read_trace(trace))
            assert found.steps == 2
            assert sum(found.times.values()) == pytest.approx(found.window, rel=1e-9)
            assert {kinds.COMMUNICATION, kinds.PRODUCTS, kinds.LOSS, kinds.GRADIENT_NOISE} <= set(found.times)
            assert found.communication >= found.times[kinds.COMMUNICATION] > 0
