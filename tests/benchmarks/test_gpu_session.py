"""benchmarks/gpu_session.py: parts that fail, hang or find no time left do not stop the others."""

from __future__ import annotations

import json
import time
from pathlib import Path
from subprocess import Popen

import pytest

from benchmarks import gpu_session
from benchmarks.gpu_session import Part, main, parts
from benchmarks.shared import ROOT

pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True)
def no_handler(monkeypatch):
    monkeypatch.setattr(gpu_session.signal, "signal", lambda *_: None)


def run_session(monkeypatch, tmp_path, session: list[Part], *arguments: str) -> tuple[int, list[dict]]:
    monkeypatch.setattr(gpu_session, "parts", lambda directory, smoke: session)
    status = main(["--smoke", "--output", str(tmp_path / "out" / "session.json"), *arguments])
    return status, json.loads((tmp_path / "out" / "session.json").read_text())["parts"]


def test_every_part_is_reported_whatever_the_others_do(monkeypatch, tmp_path, capsys):
    results = tmp_path / "results.json"
    session = [
        Part("hangs", ["-c", "import time; print('begun', flush=True); time.sleep(600)"], 1.0),
        Part("fails", ["-c", "raise SystemExit('a reason')"], 60),
        Part("works", ["-c", f"open({str(results)!r}, 'w').write('[1, 2]'); print('a table')"], 60, results=results),
    ]
    status, (hangs, fails, works) = run_session(monkeypatch, tmp_path, session)
    assert status == 1
    assert (hangs["status"], hangs["output"]) == (None, "begun\n")
    assert (fails["status"], fails["output"]) == (1, "a reason\n")
    assert (works["status"], works["output"], works["measured"]) == (0, "a table\n", [1, 2])
    out = capsys.readouterr().out
    assert "hangs: stopped after" in out and "works: status 0" in out


def test_without_time_nothing_starts(monkeypatch, tmp_path, capsys):
    session = [Part("late", ["-c", "print('started')"], 60)]
    status, (late,) = run_session(monkeypatch, tmp_path, session, "--minutes=0")
    assert (status, late["status"], late["output"]) == (1, None, "")
    assert "late: no time left" in capsys.readouterr().out


@pytest.mark.parametrize("smoke", [False, True])
def test_the_parts_fit_in_nine_minutes_and_name_what_exists(tmp_path, smoke):
    session = parts(tmp_path, smoke=smoke)
    assert sum(part.limit for part in session) <= 9 * 60
    for part in session:
        module = ROOT / f"{part.command[1].replace('.', '/')}"
        assert part.command[1] == "pytest" or module.with_suffix(".py").exists() or (module / "__main__.py").exists()
        for option in part.command:
            assert not option.startswith(("tests/", "train_configs/")) or Path(ROOT, option).exists()


def test_a_machine_without_a_gpu_is_told_so(monkeypatch, capsys):
    monkeypatch.setattr(gpu_session.torch.cuda, "is_available", lambda: False)
    assert main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_an_interrupted_session_keeps_the_parts_before_and_the_output_so_far(monkeypatch, tmp_path):
    wait = Popen.wait

    def interrupted(process: Popen, timeout: float | None = None) -> int:
        if "interrupted" in process.args[-1] and timeout is not None:
            time.sleep(1)
            raise KeyboardInterrupt
        return wait(process, timeout)

    monkeypatch.setattr(Popen, "wait", interrupted)
    session = [
        Part("first", ["-c", "print('done')"], 60),
        Part("second", ["-c", "import time; print('begun', flush=True); time.sleep(600)  # interrupted"], 60),
        Part("third", ["-c", "print('started')"], 60),
    ]
    status, (first, second, third) = run_session(monkeypatch, tmp_path, session)
    assert status == 130
    assert (first["status"], second["status"], second["output"], third["output"]) == (0, None, "begun\n", "")
