"""A command whose output is closed, full, unread or in another encoding ends with at most one message."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys
from components.standard_streams import run_command
{prepare}
def main():
    try:
        {body}
    except (ValueError, OSError) as error:  # as every command catches what is wrong with its input
        print(error, file=sys.stderr)
        return 2
    return 0
sys.exit(run_command(main))
"""
PRINT = r"print('gr\xf6\xdfe', '\udcfc'); print('x' * 100_000)"


def run(body: str = PRINT, prepare: str = "", **options) -> tuple[int, str]:
    """(exit status, standard error) of a command."""
    environment = {"PYTHONPATH": str(ROOT), **options.pop("env", {})}
    script = SCRIPT.format(body=body, prepare=prepare)
    options = {"stderr": subprocess.PIPE, "cwd": ROOT, "env": environment, "text": True, **options}
    ended = subprocess.run([sys.executable, "-c", script], **options)
    return ended.returncode, ended.stderr or ""


def closed(*descriptors: int):
    return lambda: [os.close(descriptor) for descriptor in descriptors]


@pytest.mark.parametrize("body", [PRINT, "print('one line')"])
def test_the_reader_closes_the_pipe(body):
    """As in `| head`: also where all of it is still in the buffer when the command ends."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        assert run(body, stdout=writing) == (0, "")
    finally:
        os.close(writing)


@pytest.mark.parametrize("body", [PRINT, "print('one line')"])
def test_the_disk_of_the_output_is_full(body):
    with Path("/dev/full").open("w") as full:
        assert run(body, stdout=full) == (1, "standard output cannot be written: No space left on device\n")
        assert run("raise ValueError('input')", stderr=full) == (2, "")


def test_closed_streams_are_not_an_error_and_their_descriptors_stay_reserved(tmp_path):
    """Descriptor 1 of a file of the run would get what a library prints."""
    body = (
        "assert sys.stdin.read() == ''; "
        f"file = open({str(tmp_path / 'metrics')!r}, 'w'); print('out'); print('err', file=sys.stderr); "
        "__import__('os').system('echo from a child; echo and here >&2'); file.write('a row')"
    )
    assert run(body, preexec_fn=closed(0, 1, 2), stderr=None) == (0, "")
    assert (tmp_path / "metrics").read_text() == "a row"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"PYTHONIOENCODING": "ascii"}, rb"gr\xf6\xdfe \udcfc"),
        ({"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, rb"gr\xf6\xdfe \udcfc"),
        ({"PYTHONUTF8": "1"}, "größe ".encode() + rb"\udcfc"),
    ],
)
def test_a_character_that_the_encoding_lacks_is_escaped(tmp_path, environment, expected):
    with (tmp_path / "out").open("wb") as out:
        assert run(env=environment, stdout=out) == (0, "")
    assert (tmp_path / "out").read_bytes().splitlines()[0] == expected


def test_a_working_directory_that_is_gone_is_named(tmp_path):
    folder = str(tmp_path / "gone")
    status, said = run(prepare=f"import os; os.mkdir({folder!r}); os.chdir({folder!r}); os.rmdir({folder!r})")
    assert (status, said.splitlines()) == (
        2,
        ["the current directory cannot be used: No such file or directory; change to another one"],
    )


def test_ctrl_c_is_a_status():
    assert run("raise KeyboardInterrupt") == (130, "")


@pytest.mark.quick
def test_every_command_uses_it():
    commands = [path for folder in ("recipes", "tools") for path in (ROOT / folder).rglob("*.py")]
    commands = [path for path in commands if "if __name__ ==" in path.read_text(encoding="utf-8")]
    without = [path.name for path in commands if "run_command(" not in path.read_text(encoding="utf-8")]
    assert len(commands) > 12
    assert without == ["requirements.py"], "which runs before anything is installed"
