"""How the launch scripts find or make the Python environment, and what installing the project installs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from recipes.cli import ROOT
from tools.check_requirements import missing_requirements

pytestmark = pytest.mark.quick

STUB = """#!/bin/sh
# A Python that has none of the requirements until "pip" has installed them into .venv, and a uv.
case "$*" in
  -m\\ pip*|pip*) echo "$@" >> calls; sleep 0.3; [ ! -e broken ] && touch .venv/done;;
  -m\\ venv*|venv*) mkdir -p .venv/bin; cp "$0" .venv/bin/python;;
  *requirements.py*) [ "$0" = "$PWD/.venv/bin/python" ] && [ -e .venv/done ];;
  *) exec REAL "$@";;
esac
"""
COMMANDS = ("bash", "sh", "dirname", "readlink", "mkdir", "cp", "touch", "sleep", "flock", "env", "cat")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with what sets up its environment, and a Python without libraries as the only one on the path."""
    (tmp_path / "tools").mkdir()
    (tmp_path / "programs").mkdir()
    for name in ("tools/environment.sh", "tools/check_requirements.py", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    stub = tmp_path / "programs" / "python3"
    stub.write_text(STUB.replace("REAL", sys.executable))
    stub.chmod(0o755)
    for command in COMMANDS:
        if (found := shutil.which(command)) is not None:
            (tmp_path / "programs" / command).symlink_to(found)
    return tmp_path


def set_up(checkout: Path, extra: str = "", **environment: str) -> subprocess.Popen[str]:
    """Start what both scripts begin with; it prints the interpreter that it found."""
    script = f'set -euo pipefail; source tools/environment.sh; use_environment "$PWD" {extra}; echo "$PYTHON"'
    return subprocess.Popen(
        ["bash", "-c", script],
        cwd=checkout,
        env={"PATH": str(checkout / "programs"), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_an_environment_that_has_everything_is_used_as_it_is(checkout: Path) -> None:
    assert set_up(checkout, PYTHON=sys.executable).communicate() == (f"{sys.executable}\n", "")
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize("installer", ["pip", "uv"])
def test_an_environment_is_made_once_with_the_pinned_versions(checkout: Path, installer: str) -> None:
    """Two launches start at once; a third finds the work done."""
    if installer == "uv":
        shutil.copy(checkout / "programs" / "python3", checkout / "programs" / "uv")
    started = [set_up(checkout, "dev") for _ in range(2 if shutil.which("flock") else 1)]
    for process in started:
        out, said = process.communicate()
        assert (process.returncode, out) == (0, f"{checkout}/.venv/bin/python\n"), said
        assert said == f"Setting up Powertrain (with dev) in {checkout}/.venv; this happens once.\n"
    (call,) = (checkout / "calls").read_text().splitlines()
    assert f"-c {checkout}/constraints.txt -e {checkout}[dev]" in call
    assert call.startswith("pip install --python" if installer == "uv" else "-m pip install")
    assert set_up(checkout, "dev").communicate() == (f"{checkout}/.venv/bin/python\n", "")


def test_a_failed_set_up_is_reported_and_continued(checkout: Path) -> None:
    (checkout / "broken").touch()
    process = set_up(checkout)
    assert "Run the same command again to continue" in process.communicate()[1]
    assert process.returncode == 2
    (checkout / "broken").unlink()
    (checkout / ".venv" / "kept").touch()
    assert set_up(checkout).communicate()[0] == f"{checkout}/.venv/bin/python\n"
    assert (checkout / ".venv" / "kept").exists()


def test_a_missing_supported_python_is_reported(checkout: Path) -> None:
    process = set_up(checkout, PYTHON="/nowhere/python")
    assert "needs Python 3.10 to 3.13; not found as: /nowhere/python" in process.communicate()[1]
    assert process.returncode == 2


def test_missing_and_old_requirements_are_named() -> None:
    project = {
        "name": "ours",
        "optional-dependencies": {"more": ["absent-one", "pytest>=3", "ours[most]"], "most": ["b"]},
    }
    assert list(missing_requirements(project, ["torch>=99", "torch>=1", "ours[more]"])) == [
        "torch>=99",
        "absent-one",
        "b",
    ]


@pytest.mark.parametrize(("versions", "printed"), [(">=3.10,<3.14", "\n"), (">=3.99", "python>=3.99\n")])
def test_the_version_of_python_is_a_requirement_too(checkout: Path, versions: str, printed: str) -> None:
    project = checkout / "pyproject.toml"
    project.write_text(
        project.read_text().replace('requires-python = ">=3.10,<3.14"', f'requires-python = "{versions}"')
    )
    command = [sys.executable, checkout / "tools" / "check_requirements.py"]
    checked = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    assert (checked.returncode, checked.stdout) == (int(printed != "\n"), printed)


def test_installing_the_project_installs_no_package_of_a_common_name(tmp_path: Path) -> None:
    """Packages named models or tools would shadow or overwrite those of other projects."""
    pytest.importorskip("setuptools", minversion="77")
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    for package in ("recipes", "components", "models", "tools"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    code = "import sys; from setuptools import build_meta; build_meta.build_wheel('out')"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, env=dict(os.environ))
    (wheel,) = (tmp_path / "out").glob("*.whl")
    assert all(".dist-info/" in name for name in zipfile.ZipFile(wheel).namelist())
