"""The assignment of the GPUs of a machine to the runs of a sweep."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from tools.sweep.grid import Job
from tools.sweep.runner import VISIBLE_GPUS, Results, Runner, gpu_assignments, processes_per_run, visible_gpus

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("devices", "runs", "wanted"),
    [
        ("", 2, [None, None]),
        ("0", 2, [None, None]),
        ("0 1 2 3", 1, [None]),
        ("0 1 2 3", 2, ["0,1", "2,3"]),
        ("0 1 2 3", 3, ["0", "1", "2"]),
        ("4 6", 3, ["4", "6", "4"]),
    ],
)
def test_each_run_has_equally_many_separate_gpus(devices, runs, wanted):
    assert [assigned.get(VISIBLE_GPUS) for assigned in gpu_assignments(devices.split(), runs)] == wanted


@pytest.mark.parametrize(
    ("named", "nproc", "runs", "count"),
    [("0,1,2,3", None, 1, 4), ("0,1,2,3", None, 2, 2), ("0,1,2,3", "1", 2, 1), ("", None, 2, 1), ("0", "3", 2, 3)],
)
def test_a_run_has_a_process_for_each_of_its_devices_unless_nproc_is_set(monkeypatch, named, nproc, runs, count):
    monkeypatch.setenv(VISIBLE_GPUS, named)
    for name in ("NPROC", "NGPU", "NNODES"):
        monkeypatch.delenv(name, raising=False)
    if nproc is not None:
        monkeypatch.setenv("NPROC", nproc)
    assert visible_gpus() == [device for device in named.split(",") if device]
    assert processes_per_run(runs, None) == count
    on_cpu = SimpleNamespace(device="cpu")
    assert processes_per_run(runs, on_cpu) == int(nproc or 1)


def test_a_run_gets_its_gpus_by_environment_and_releases_them(tmp_path, monkeypatch):
    monkeypatch.setenv(VISIBLE_GPUS, "0,1,2,3")
    root = tmp_path / "root"
    root.mkdir()
    (root / "recipes").write_text(f"import os; print(os.environ[{VISIBLE_GPUS!r}])")
    monkeypatch.setattr("tools.sweep.runner.ROOT", root)
    runner = Runner(Results(tmp_path / "results.jsonl"), at_a_time=2)
    said = ["0,1\n", "2,3\n", "0,1\n"]
    job = Job(tmp_path, {}, {}, "digest")
    assert [runner._launch(job, {}) for _ in range(3)] == [(0, each, None) for each in said]
    assert os.environ[VISIBLE_GPUS] == "0,1,2,3"
