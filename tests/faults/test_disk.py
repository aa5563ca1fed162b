"""A full, read-only or broken disk: training continues, the error is logged at once and at the end, nothing is lost."""

from __future__ import annotations

import builtins
import errno
import io
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from components.checkpoint import list_checkpoints, verify
from components.metrics.append_only_file import AppendOnlyFile
from tests.run_info import WITH_TENSORBOARD

RUN = [
    "--training.total_tokens=300",
    "--validation.interval_steps=none",
    WITH_TENSORBOARD,
]
"""Two steps, each with a checkpoint."""


class FailingDisk:
    """Counts what is done to the disk below `folder`; the `at`-th operation fails, and so do the `more` after it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, at: int | None = None, more: int = 0) -> None:
        self.folder, self.at, self.more = str(folder), at, more
        self.done: list[str] = []
        self.failed: list[str] = []
        opened = builtins.open

        def open_file(file, mode="r", *args, **kwargs):
            written = not isinstance(file, int) and set(mode) & set("wax+") and str(file).startswith(self.folder)
            if written and self._fails(f"open {file}"):
                return opened("/dev/full", mode.replace("x", "w"), *args, **kwargs)  # which takes nothing
            return opened(file, mode, *args, **kwargs)

        monkeypatch.setattr(builtins, "open", open_file)
        monkeypatch.setattr(io, "open", open_file)
        for name in ("rename", "replace", "mkdir"):
            self._wrap(monkeypatch, name, lambda path, *rest: str(path))
        self._wrap(monkeypatch, "fsync", lambda handle: str(Path(f"/proc/self/fd/{handle}").readlink()))

    def _wrap(self, monkeypatch, name: str, target) -> None:
        call = getattr(os, name)

        def attempt(*args, **kwargs):
            if target(*args).startswith(self.folder) and self._fails(f"{name} {target(*args)}"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), target(*args))
            return call(*args, **kwargs)

        monkeypatch.setattr(os, name, attempt)

    def _fails(self, what: str) -> bool:
        self.done.append(what)
        fails = self.at is not None and self.at <= len(self.done) - 1 <= self.at + self.more
        if fails:
            self.failed.append(what)
        return fails


def sound(directory: Path) -> None:
    """Every checkpoint in it is complete, and there is nothing else."""
    for checkpoint in list_checkpoints(directory / "checkpoints"):
        verify(checkpoint)
    if (directory / "checkpoints").is_dir():
        assert not list((directory / "checkpoints").glob(".writing*"))


def test_every_write_may_fail_once(new_tiny, capsys, monkeypatch) -> None:
    """Each of the operations that a run does on its directory, one run for each."""
    counted = new_tiny("counted")
    with monkeypatch.context() as patch:
        disk = FailingDisk(patch, counted.directory)
        assert counted.launch(*RUN) == 0
    operations = disk.done
    assert len(operations) > 30
    tiny = new_tiny("tiny")
    assert tiny.launch(*RUN) == 0  # prepares the text
    failures = 0
    for at in range(len(operations)):
        capsys.readouterr()
        with monkeypatch.context() as patch:
            disk = FailingDisk(patch, tiny.directory, at)
            status = tiny.launch(*RUN, "--run.if_exists=replace")
        output = capsys.readouterr()
        said, what = output.out + output.err, disk.failed[0] if disk.failed else "nothing"
        assert "Traceback" not in said, f"{what}: {said}"
        assert status in (0, 1, 2), what
        sound(tiny.directory)
        if status == 0 and "could not be saved" in said:
            assert said.count("could not be saved") >= 2, f"{what}: at once and at the end: {said}"
            failures += 1
        if status == 1:
            assert "which is not saved; the newest checkpoint is" in said, what
        if status == 2:
            assert "nothing was started" in said, what
        if status == 0:
            assert "done:" in said, what
            assert [row["step"] for row in tiny.rows() if "loss" in row] == [1, 2], what
    assert failures > 5


@pytest.fixture
def limit() -> Iterator[None]:
    """No file may grow beyond a quarter of a megabyte: the kernel refuses, as it does where a quota is used up."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_quota_stops_no_training(tiny, capsys, limit, asynchronous: str) -> None:
    large = (
        "--model.ffn_dim=4096"  # a tensor that is beyond the quota by itself: torch's writer then fails over it, too
    )
    assert tiny.launch(*RUN, large, f"--checkpoint.async_save={asynchronous}") == 1, "the last step is not saved"
    said = capsys.readouterr().out
    assert said.count("could not be saved") >= 4, "twice when it happened, twice at the end"
    assert said.count("File too large") >= 2 and "enforce fail" not in said, "the reason, in the words of the system"
    assert "the run ended at step 2, which is not saved; the newest checkpoint is none" in said
    assert "Traceback" not in said
    assert [row["step"] for row in tiny.rows() if "loss" in row] == [1, 2]
    sound(tiny.directory)


@pytest.mark.quick
def test_records_are_kept_until_there_is_space_and_none_is_incomplete_or_lost(tmp_path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    file = AppendOnlyFile(tmp_path / "f")
    file.append(b"x" * 99 + b"\n")
    resource.setrlimit(resource.RLIMIT_FSIZE, (250, before[1]))
    try:
        file.append(b"y" * 99 + b"\n")
        for letter in (b"z", b"w"):
            with pytest.raises(OSError):
                file.append(letter * 99 + b"\n")
            assert (tmp_path / "f").stat().st_size == 200, "half a record is none"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    file.append(b"v" * 99 + b"\n")
    file.close()
    assert [line[:1] for line in (tmp_path / "f").read_bytes().splitlines()] == [b"x", b"y", b"z", b"w", b"v"]


def test_the_reader_of_the_output_may_exit(tiny, monkeypatch) -> None:
    """`./run_train.sh | head -1`"""

    class Gone(io.StringIO):
        lines = 0

        def write(self, text: str) -> int:
            self.lines += text.count("\n")
            if self.lines > 1:
                raise BrokenPipeError(errno.EPIPE, "Broken pipe")
            return len(text)

        def fileno(self) -> int:
            return os.open(os.devnull, os.O_WRONLY)

    monkeypatch.setattr("sys.stdout", Gone())
    assert tiny.launch(*RUN) == 0
    assert "done:" in (tiny.directory / "log.txt").read_text()
