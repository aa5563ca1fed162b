"""How the GPUs of a machine are shared by the runs of a sweep."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from tools.sweep.devices import VISIBLE, processes_of_a_run, shares, visible
from tools.sweep.runs import Results, Runner

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
def test_each_run_has_equally_many_and_its_own(devices, runs, wanted):
    assert [share.get(VISIBLE) for share in shares(devices.split(), runs)] == wanted


@pytest.mark.parametrize(
    ("named", "nproc", "runs", "count"),
    [("0,1,2,3", None, 1, 4), ("0,1,2,3", None, 2, 2), ("0,1,2,3", "1", 2, 1), ("", None, 2, 1), ("0", "3", 2, 3)],
)
def test_a_run_has_a_process_for_each_of_its_devices_unless_it_is_told(monkeypatch, named, nproc, runs, count):
    monkeypatch.setenv(VISIBLE, named)
    for name in ("NPROC", "NGPU", "NNODES"):
        monkeypatch.delenv(name, raising=False)
    if nproc is not None:
        monkeypatch.setenv("NPROC", nproc)
    assert visible() == [device for device in named.split(",") if device]
    assert processes_of_a_run(runs, None) == count
    on_cpu = SimpleNamespace(device="cpu")
    assert processes_of_a_run(runs, on_cpu) == int(nproc or 1)


def test_a_run_finds_its_share_in_its_environment_and_leaves_it_to_the_next(tmp_path, monkeypatch):
    monkeypatch.setenv(VISIBLE, "0,1,2,3")
    root = tmp_path / "root"
    root.mkdir()
    (root / "recipes").write_text(f"import os; print(os.environ[{VISIBLE!r}])")
    monkeypatch.setattr("tools.sweep.runs.ROOT", root)
    runner = Runner(Results(tmp_path / "results.jsonl"), at_a_time=2)
    said = ["0,1\n", "2,3\n", "0,1\n"]
    assert [runner._launch(tmp_path, {}) for _ in range(3)] == [(0, each, None) for each in said]
    assert os.environ[VISIBLE] == "0,1,2,3"
