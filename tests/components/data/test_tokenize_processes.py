"""Preparing in several processes at once, and in one that is killed."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import pytest

from components.atomic_files import atomic_directory
from components.data import tokenize_workers
from components.data.document import Document, ReadStats, SourceFile
from components.data.file_hash_cache import FileHashCache
from components.data.sources.base import TextSource
from components.data.tokenize import tokenize_missing
from components.tokenizers import Bytes
from tests.components.data.conftest import Given
from tests.components.data.test_tokenize import TEXT, build, contents, shards
from tests.processes import start_process

ROOT = Path(__file__).resolve().parents[3]


def run(script: str, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return start_process(command, cwd=ROOT, stdout=subprocess.PIPE)


KILLED = """
import os, signal, sys
from functools import partial
from pathlib import Path
from components.data import cache
from components.tokenizers import Bytes
from tests.components.data.test_tokenize_processes import Many

number = sys.argv[2]
cache.tokenize_missing = partial(cache.tokenize_missing, shard_tokens=1_200_000)
Many(kill_at=int(sys.argv[3]), by=getattr(signal, number) if number else 0).build(
    tokenizer=Bytes().build(), sequence_length=8, cache_dir=Path(sys.argv[1]), progress=print
)
"""


@dataclass(kw_only=True)
class Many(TextSource):
    """Two source files, one of 20 documents of half a megabyte, one of five."""

    kill_at: int
    by: int

    def documents(self, log: ReadStats) -> Iterator[Document]:
        for number in range(25):
            if number == self.kill_at and self.by:
                print("half way", flush=True)
                os.kill(os.getpid(), self.by)
            log.fixups["line ends"] += 1
            yield Document(f"{number} " * 200_000 if number % 7 else "  ", complete=number != 9)

    def fingerprint(self, hashes: FileHashCache) -> str:
        return "many"

    def source_files(self, hashes: FileHashCache) -> list[SourceFile]:
        def read(start: int | None, stop: int | None, log: ReadStats) -> Iterator[Document]:
            return islice(self.documents(log), start, stop)

        return [SourceFile("a", "a", 0, partial(read, 0, 20)), SourceFile("b", "b", 0, partial(read, 20, None))]


@pytest.mark.parametrize("kill_at", [3, 15, 24])
def test_a_killed_preparation_continues_and_gives_identical_shards(tmp_path, monkeypatch, kill_at):
    with run(KILLED, tmp_path / "killed", "SIGKILL", kill_at) as process:
        assert process.wait() == -signal.SIGKILL
    assert not list((tmp_path / "killed").glob("Many-*"))
    before = contents(tmp_path / "killed")
    # The next process ignores the leftovers, and removes them once they are old enough to be abandoned.
    monkeypatch.setattr("components.atomic_files._ABANDONED_SECONDS", -1.0)
    monkeypatch.setattr("components.data.cache.tokenize_missing", partial(tokenize_missing, shard_tokens=1_200_000))
    resumed = build(tmp_path / "killed", Many(kill_at=0, by=0))
    whole = build(tmp_path / "whole", Many(kill_at=0, by=0))
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert before.items() <= contents(tmp_path / "whole").items()
    assert len(before) // 3 >= {3: 0, 15: 1, 24: 4}[kill_at]
    assert resumed.index == whole.index
    assert whole.index.documents == 20 and whole.index.dropped == {"empty": 4}
    assert len(shards(tmp_path / "killed")) > 5
    assert not list((tmp_path / "killed").glob("encoded-*/.*"))


@contextmanager
def closing_by(end: Callable[[], None]) -> Iterator[None]:
    try:
        yield
    finally:
        end()


def test_leftovers_of_dead_processes_are_removed_and_not_those_of_living_ones(tmp_path, monkeypatch):
    monkeypatch.setattr("components.atomic_files._ABANDONED_SECONDS", -1.0)
    with run(KILLED, tmp_path, "SIGSTOP", 24) as process, closing_by(process.kill):
        assert process.stdout is not None
        process.stdout.readline()
        (leftover,) = tmp_path.glob("encoded-*/.*.part")
        target = leftover.parent / leftover.name[1:].split(".")[0]
        with pytest.raises(InterruptedError), atomic_directory(target):
            assert leftover.exists()
            raise InterruptedError
        process.kill()
        process.wait()
        with atomic_directory(target) as temporary:
            assert not leftover.exists()
            (temporary / "file").write_text("whole")
    assert target.name in {path.name for path in leftover.parent.iterdir()}


RACING = """
import sys, time
from pathlib import Path
from components.data.document import Document
from components.tokenizers import Bytes
from tests.components.data.conftest import Given

class Racing(Given):
    def documents(self, log):
        Path(sys.argv[2]).touch()
        while len(list(Path(sys.argv[2]).parent.iterdir())) < 3:
            time.sleep(0.01)
        yield from super().documents(log)

cache = Path(sys.argv[1])
samples = Racing(text=("the same text",)).build(
    tokenizer=Bytes().build(), sequence_length=4, cache_dir=cache, progress=print
)
print(samples[0].tolist())
"""


def test_processes_that_prepare_the_same_thing_at_once_all_succeed(tmp_path):
    (tmp_path / "started").mkdir()
    processes = [run(RACING, tmp_path / "cache", tmp_path / "started" / str(i)) for i in range(3)]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert all(output.endswith(f"{list(b'the s')}\n") for output in outputs)
    (directory,) = (tmp_path / "cache").glob("Racing-*")
    assert sorted(path.name for path in directory.iterdir()) == ["index.json", "source_files.json", "spans.npy"]
    (shard,) = shards(tmp_path / "cache")
    assert sorted(path.name for path in shard.iterdir()) == ["documents.bin", "shard.json", "tokens.bin"]


@pytest.mark.quick
def test_shards_that_another_process_finished_are_not_replaced(tmp_path):
    @dataclass(kw_only=True)
    class Overtaken(Given):
        before: Callable[[], object] = bool

        def documents(self, log: ReadStats) -> Iterator[Document]:
            self.before()
            return super().documents(log)

    def overtake() -> None:
        build(tmp_path, Overtaken(text=TEXT))
        (directory,) = tmp_path.glob("Overtaken-*")
        (directory / "mark").touch()

    build(tmp_path, Overtaken(text=TEXT, before=overtake))
    (directory,) = tmp_path.glob("Overtaken-*")
    assert (directory / "mark").exists()


def report_twice(group, *, tokenizer, encode, on_progress):
    on_progress(len(group), 1)
    on_progress(0, 2)


def test_the_progress_of_all_processes_is_reported():
    seen = []
    groups = [["a", "b"], ["c"]]
    tokenize_workers.run_in_processes(report_twice, groups, Bytes().build(), 2, lambda *each: seen.append(each))
    assert [sum(each) for each in zip(*seen, strict=True)] == [3, 6]
