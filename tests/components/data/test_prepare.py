import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from components.data import TextFiles
from components.data.atomic import written_aside
from components.data.content import FileHashes, hash_file
from components.data.document import Document, Piece, ReadingLog
from components.data.index import Index
from components.data.prepare import encode_missing
from components.data.shards import Shard, check_shard, read_record
from components.data.source import TextSource
from components.tokenizers import Bytes
from tests.components.data.conftest import Given

ROOT = Path(__file__).resolve().parents[3]
TEXT = ("It was the best of times, ", "it was the worst of times.")


def build(cache: Path, source=None, tokenizer=None, lines: list[str] | None = None):
    return (source or Given(text=TEXT)).build(
        tokenizer=tokenizer or Bytes().build(),
        sequence_length=8,
        cache_dir=cache,
        progress=print if lines is None else lines.append,
    )


class Shifted:
    """Bytes, but every id is one more: another tokenizer of the same shape."""

    vocab_size = 258
    end_of_document = 257
    fingerprint = "shifted"

    def __init__(self, shift: int = 1):
        self.shift = shift
        self.calls = 0

    def encode_batch(self, texts):
        self.calls += 1
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int64) + self.shift for text in texts]


@pytest.mark.quick
def test_the_second_build_only_opens(tmp_path):
    tokenizer = Shifted()
    lines: list[str] = []
    first = build(tmp_path, tokenizer=tokenizer, lines=lines)
    assert tokenizer.calls == 1
    assert "2 documents, 52 bytes, 54 tokens" in lines[-1]
    second = build(tmp_path, tokenizer=tokenizer, lines=lines)
    assert tokenizer.calls == 1
    assert len(lines) == 1
    assert second.directory == first.directory


@pytest.mark.quick
def test_other_text_or_another_tokenizer_is_other_data(tmp_path):
    directories = {
        build(tmp_path).directory,
        build(tmp_path, Given(text=TEXT[:1])).directory,
        build(tmp_path, tokenizer=Shifted()).directory,
    }
    assert len(directories) == 3


@pytest.mark.quick
def test_changed_files_are_prepared_anew(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one text of some length")
    before = build(tmp_path / "cache", TextFiles(path=path))
    path.write_text("two text of some length")
    after = build(tmp_path / "cache", TextFiles(path=path))
    assert bytes(before[0][:3].tolist()) == b"one"
    assert bytes(after[0][:3].tolist()) == b"two"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0\0")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)


def shards(cache: Path) -> list[Path]:
    return sorted(cache.glob("encoded-*/shard-*"))


def contents(cache: Path) -> dict[str, bytes]:
    """Every file of every shard."""
    return {str(path.relative_to(cache)): path.read_bytes() for path in sorted(cache.glob("encoded-*/shard-*/*"))}


@pytest.mark.quick
@pytest.mark.parametrize("file", ["tokens.bin", "documents.bin"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [(truncate, "is truncated"), (lengthen, "is altered"), (flip, "was altered"), (Path.unlink, "is missing")],
)
@pytest.mark.parametrize("remembered", [False, True])
def test_a_damaged_shard_is_refused_with_its_name_and_the_remedy(
    tmp_path, monkeypatch, file, damage, message, remembered
):
    if remembered:  # as if the files had been there for long, so that their hashes are known already
        monkeypatch.setattr("components.data.content._SETTLED_SECONDS", -1e9)
    build(tmp_path)
    build(tmp_path)
    (shard,) = shards(tmp_path)
    whole = contents(tmp_path)
    damage(shard / file)
    with pytest.raises(ValueError, match=rf"{file} {message}.* Delete the directory .*{shard.name}; it is prepared"):
        build(tmp_path)
    shutil.rmtree(shard)
    build(tmp_path)
    assert contents(tmp_path) == whole


@pytest.mark.quick
@pytest.mark.parametrize("damage", [truncate, lengthen, flip, Path.unlink])
def test_damaged_segments_are_refused(tmp_path, damage):
    directory = build(tmp_path).directory
    damage(directory / "segments.npy")
    with pytest.raises(ValueError, match=rf"segments\.npy .* Delete the directory .*{directory.name}"):
        build(tmp_path)
    shutil.rmtree(directory)
    build(tmp_path)


@pytest.mark.quick
def test_shards_of_another_tokenizer_are_refused(tmp_path):
    build(tmp_path)
    (shard,) = shards(tmp_path)
    with pytest.raises(
        ValueError, match=r"shard\.json was made with another tokenizer \(bytes-1, this run has shifted\)"
    ):
        check_shard(shard, tokenizer=Shifted(), hashes=FileHashes(tmp_path / "memory"))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("index.json", {"format": 1}),
        ("index.json", {"dtype": "object"}),
        ("index.json", {"shards": []}),
        ("index.json", {"shards": ["../../etc"]}),
        ("index.json", {"store": ".."}),
        ("index.json", {"vocab_size": -1}),
        ("index.json", {"vocab_size": "257"}),
        ("index.json", {"surprise": 1}),
        ("index.json", {"repairs": {"x": "y"}}),
        ("shard.json", {"format": 1}),
        ("shard.json", {"tokens": -1}),
        ("shard.json", {"pieces": []}),
    ],
    ids=str,
)
def test_a_record_that_is_not_ours_is_refused(tmp_path, file, change):
    build(tmp_path)
    path = next(tmp_path.rglob(file))
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=rf"{file} is damaged or of another version .*Delete the directory"):
        build(tmp_path)


@pytest.mark.quick
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=100) | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps))
@pytest.mark.parametrize("model", [Index, Shard])
def test_no_content_crashes_the_reader(tmp_path, content, model):
    (tmp_path / "record.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match="Delete the directory"):
        read_record(tmp_path / "record.json", model)


@pytest.mark.quick
def test_a_directory_without_index_is_refused(tmp_path):
    directory = build(tmp_path).directory
    (directory / "index.json").unlink()
    with pytest.raises(ValueError, match=r"index\.json is missing\. Delete the directory"):
        build(tmp_path)


@pytest.mark.quick
def test_no_text_at_all_is_an_error_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="holds no text: of 2 documents, 2 empty were dropped"):
        build(tmp_path, Given(text=("", " \n")))
    assert not list(tmp_path.glob("Given-*"))


@pytest.mark.quick
def test_a_tokenizer_that_gives_impossible_ids_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="its vocabulary is 258"):
        build(tmp_path, tokenizer=Shifted(shift=1000))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.quick
def test_lone_surrogates_become_text(tmp_path):
    samples = build(tmp_path, Given(text=("cut \ud83d in two",)))
    assert Bytes().build().decode(samples[0][:7]) == "cut \ufffd"
    assert samples.index.repairs == {"replaced characters": 1}


class Parts(Given):
    def documents(self, log: ReadingLog) -> Iterator[Document]:
        yield Document("one ", complete=False)
        yield Document(" ", complete=False)
        yield Document("document")
        yield Document("another, never ended", complete=False)


@pytest.mark.quick
def test_parts_make_one_document(tmp_path):
    samples = build(tmp_path, Parts(text=()))
    assert samples.document_lengths()[:, 1].tolist() == [len("one  document"), len("another, never ended")]


class Slow(Given):
    def documents(self, log: ReadingLog) -> Iterator[Document]:
        for i in range(10):
            log.source_bytes += 1_000_000
            yield Document(f"document {i} " * 400_000)

    def size_bytes(self) -> int:
        return 10_000_000


@pytest.mark.quick
def test_progress_tells_how_far_and_how_long(tmp_path):
    seen = []
    Slow(text=()).prepare(tokenizer=Bytes().build(), cache_dir=tmp_path, report=seen.append, report_seconds=0)
    assert [state.done_bytes for state in seen] == [n * 1_000_000 for n in [*range(1, 11), 10]]  # last: the end
    assert "3.0 of 10.0 MB (30%)" in str(seen[2])
    assert "s left" in str(seen[2])


def run(script: str, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


KILLED = """
import os, signal, sys
from functools import partial
from pathlib import Path
from components.data import source
from components.tokenizers import Bytes
from tests.components.data.test_prepare import Many

number = sys.argv[2]
source.encode_missing = partial(source.encode_missing, shard_tokens=1_200_000)
Many(kill_at=int(sys.argv[3]), by=getattr(signal, number) if number else 0).build(
    tokenizer=Bytes().build(), sequence_length=8, cache_dir=Path(sys.argv[1]), progress=print
)
"""


@dataclass(kw_only=True)
class Many(TextSource):
    """Two pieces, one of 20 documents of half a megabyte, one of five."""

    kill_at: int
    by: int

    def documents(self, log: ReadingLog) -> Iterator[Document]:
        for number in range(25):
            if number == self.kill_at and self.by:
                print("half way", flush=True)
                os.kill(os.getpid(), self.by)
            log.repairs["line ends"] += 1
            yield Document(f"{number} " * 200_000 if number % 7 else "  ", complete=number != 9)

    def fingerprint(self, hashes: FileHashes) -> str:
        return "many"

    def pieces(self, hashes: FileHashes) -> list[Piece]:
        def read(start: int | None, stop: int | None, log: ReadingLog) -> Iterator[Document]:
            return islice(self.documents(log), start, stop)

        return [Piece("a", "a", 0, partial(read, 0, 20)), Piece("b", "b", 0, partial(read, 20, None))]


@pytest.mark.parametrize("kill_at", [3, 15, 24])
def test_a_killed_preparation_goes_on_and_gives_the_same_shards_byte_by_byte(tmp_path, monkeypatch, kill_at):
    with run(KILLED, tmp_path / "killed", "SIGKILL", kill_at) as process:
        assert process.wait() == -signal.SIGKILL
    assert not list((tmp_path / "killed").glob("Many-*"))
    before = contents(tmp_path / "killed")
    # Who takes it up is not confused by what was left, and sweeps it away once it is old enough to be nobody's.
    monkeypatch.setattr("components.data.atomic._ABANDONED_SECONDS", -1.0)
    monkeypatch.setattr("components.data.source.encode_missing", partial(encode_missing, shard_tokens=1_200_000))
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


def test_the_leavings_of_the_dead_are_swept_and_not_those_of_the_living(tmp_path, monkeypatch):
    monkeypatch.setattr("components.data.atomic._ABANDONED_SECONDS", -1.0)
    with run(KILLED, tmp_path, "SIGSTOP", 24) as process, closing_by(process.kill):
        assert process.stdout is not None
        process.stdout.readline()
        (leftover,) = tmp_path.glob("encoded-*/.*.part")
        target = leftover.parent / leftover.name[1:].split(".")[0]
        with pytest.raises(InterruptedError), written_aside(target):
            assert leftover.exists()
            raise InterruptedError
        process.kill()
        process.wait()
        with written_aside(target) as aside:
            assert not leftover.exists()
            (aside / "file").write_text("whole")
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
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert all(output.endswith(f"{list(b'the s')}\n") for output in outputs)
    (directory,) = (tmp_path / "cache").glob("Racing-*")
    assert sorted(path.name for path in directory.iterdir()) == ["index.json", "pieces.json", "segments.npy"]
    (shard,) = shards(tmp_path / "cache")
    assert sorted(path.name for path in shard.iterdir()) == ["documents.bin", "shard.json", "tokens.bin"]


@pytest.mark.quick
def test_what_another_process_made_meanwhile_is_left_as_it_is(tmp_path):
    @dataclass(kw_only=True)
    class Overtaken(Given):
        before: Callable[[], object] = bool

        def documents(self, log: ReadingLog) -> Iterator[Document]:
            self.before()
            return super().documents(log)

    def build(before: Callable[[], object]) -> None:
        Overtaken(text=("the same text",), before=before).build(
            tokenizer=Bytes().build(), sequence_length=4, cache_dir=tmp_path, progress=print
        )

    def overtake() -> None:
        build(bool)
        (directory,) = tmp_path.glob("Overtaken-*")
        (directory / "mark").touch()

    build(overtake)
    (directory,) = tmp_path.glob("Overtaken-*")
    assert (directory / "mark").exists()


@pytest.mark.quick
def test_hashes_are_remembered_only_of_settled_files(tmp_path, monkeypatch):
    path, memory = tmp_path / "a", tmp_path / "memory"
    path.write_text("one")
    with FileHashes(memory) as hashes:
        assert hashes.sha256(path) == hash_file(path)
    assert not memory.exists()  # written a moment ago: it may change again within the clock's tick
    monkeypatch.setattr("components.data.content._SETTLED_SECONDS", -1e9)
    with FileHashes(memory) as hashes:
        hashes.sha256(path)
    monkeypatch.setattr("components.data.content.hash_file", lambda path: pytest.fail("read again"))
    assert FileHashes(memory).sha256(path)
    monkeypatch.undo()
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_text("two")
    os.utime(path, ns=times)  # even with its old size and modification time
    assert FileHashes(memory).sha256(path) == hash_file(path)


@pytest.mark.quick
@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": 1}', '{"a": [1, 2]}'])
def test_a_damaged_memory_is_no_memory(tmp_path, content):
    (tmp_path / "memory").write_text(content)
    (tmp_path / "a").write_text("one")
    assert FileHashes(tmp_path / "memory").sha256(tmp_path / "a") == hash_file(tmp_path / "a")
