"""The fuzzer finds what its targets do wrong; tests/faults/test_fuzz.py runs the targets."""

from __future__ import annotations

import ctypes
from pathlib import Path
from random import Random

import pytest

from benchmarks.fuzz import targets
from benchmarks.fuzz.__main__ import Fuzzer, Tally
from benchmarks.fuzz.mutator import mutate


def crash(folder: Path, file: Path) -> None:
    ctypes.string_at(0)


def spin(folder: Path, file: Path) -> None:
    while True:
        pass


def allocate(folder: Path, file: Path) -> None:
    bytearray(2 * 10**9)


def raise_other(folder: Path, file: Path) -> None:
    raise LookupError("of the reader")


def refuse_without_place(folder: Path, file: Path) -> None:
    raise ValueError("something is wrong")


def refuse(folder: Path, file: Path) -> None:
    raise ValueError(f"{file} is damaged")


FINDINGS = {
    crash: "SIGSEGV",
    spin: "SIGPROF",
    allocate: "MemoryError at no line",
    raise_other: "LookupError at no line",
    refuse_without_place: "a refusal that names no file at no line",
}


@pytest.fixture
def fuzzer(tmp_path: Path) -> Fuzzer:
    (tmp_path / "corpus" / "mine").mkdir(parents=True)
    (tmp_path / "corpus" / "mine" / "a.json").write_text('{"a": [1, 2]}')
    return Fuzzer(tmp_path / "corpus", tmp_path / "work", tmp_path, timeout=0.2, memory=1.0)


@pytest.mark.parametrize("read", FINDINGS, ids=lambda read: read.__name__)
def test_a_reader_that_fails_is_a_finding(fuzzer: Fuzzer, tmp_path: Path, monkeypatch, read) -> None:
    monkeypatch.setitem(targets.TARGETS, "mine", targets.Target(read, "mine"))
    tally = Tally()
    fuzzer.run_slice("mine", 7, 1, tally)
    assert (tally.executed, tally.accepted, dict(tally.findings)) == (1, 0, {FINDINGS[read]: 1})
    assert (tmp_path / "mine-7" / "a.json").read_bytes() == mutate(b'{"a": [1, 2]}', _random(7))
    assert FINDINGS[read] in (tmp_path / "mine-7" / "finding.txt").read_text()


def test_a_clean_refusal_is_not_a_finding(fuzzer: Fuzzer, monkeypatch) -> None:
    monkeypatch.setitem(targets.TARGETS, "mine", targets.Target(refuse, "mine"))
    tally = Tally()
    fuzzer.run_slice("mine", 0, 3, tally)
    assert (tally.executed, tally.accepted, dict(tally.findings)) == (3, 0, {})


def _random(number: int) -> Random:
    """Return the random numbers of an execution, after the choice of one of one file."""
    random = Random(f"mine {number}")
    random.choice(["a.json"])
    return random
