"""A run started as a daemon starts one: no home, no standard streams, an ASCII locale; and the launch scripts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from recipes.cli import ROOT
from recipes.errors import UsageError
from recipes.launch import WorldShape, launch_workers
from tests.conftest import TinyRun


def test_a_run_needs_nothing_of_its_environment(tiny: TinyRun) -> None:
    tiny.recipe.write_text(tiny.recipe.read_text().replace('name = "tiny"', 'name = "größe"'), encoding="utf-8")
    (tiny.folder / "text" / "größe.txt").write_text("größer und größer " * 20, encoding="utf-8")
    environment = {"HOME": "/dev/null", "TMPDIR": "/nowhere", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    ended = subprocess.run(
        [sys.executable, ROOT / "recipes", tiny.recipe, "--training.total_tokens=400"],
        env={**environment, "PYTHONUTF8": "0", "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: [os.close(descriptor) for descriptor in (0, 1, 2)],
        cwd=tiny.folder,
    )
    log = tiny.directory / "log.txt"
    assert ended.returncode == 0, log.read_text(encoding="utf-8") if log.exists() else "no log"
    assert "größe: " in log.read_text(encoding="utf-8")
    for line in (tiny.directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        json.loads(line)


@pytest.mark.skipif(shutil.which("dash") is None, reason="needs dash, the sh of Debian")
def test_the_launcher_works_through_a_link_and_under_a_plain_shell(tmp_path: Path) -> None:
    link = tmp_path / "train"
    link.symlink_to(ROOT / "run_train.sh")
    ended = subprocess.run(
        ["dash", link, "--run.seed=-1"],
        env={**os.environ, "PYTHON": sys.executable},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2, ended.stderr
    assert "expected a whole number >= 0" in ended.stderr


@pytest.mark.quick
@pytest.mark.parametrize("script", ["run_train.sh", "run_tests.sh"])
def test_both_scripts_start_alike(script: str) -> None:
    lines = (ROOT / script).read_text(encoding="utf-8").splitlines()
    assert any(line.startswith('[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"') for line in lines)
    assert any(line.startswith("root=") and "readlink -f" in line for line in lines)


@pytest.mark.quick
def test_processes_without_a_folder_for_temporary_files_are_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    with pytest.raises(UsageError, match=r"cannot start the worker processes: .*No such file or directory: '/nowhere"):
        launch_workers(WorldShape(2, 1), {}, [])
