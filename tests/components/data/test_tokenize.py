import json
import os
import shutil
from collections.abc import Iterator
from copy import copy
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from components.data import TextFiles
from components.data.document import Document, ReadStats
from components.data.document_index import Index
from components.data.file_hash_cache import FileHashCache, hash_file
from components.data.shards import Shard, check_shard, read_record
from components.tokenizers import Bytes
from tests.components.data.conftest import Given

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
def test_changed_files_are_prepared_again(tmp_path):
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
        monkeypatch.setattr("components.data.file_hash_cache._SETTLED_NANOSECONDS", -(10**18))
    build(tmp_path)
    build(tmp_path)
    (shard,) = shards(tmp_path)
    whole = contents(tmp_path)
    damage(shard / file)
    with pytest.raises(
        ValueError, match=rf"{file} {message}.* Delete the directory .*{shard.name}; the next start prepares it"
    ):
        build(tmp_path)
    shutil.rmtree(shard)
    build(tmp_path)
    assert contents(tmp_path) == whole


@pytest.mark.quick
@pytest.mark.parametrize("damage", [truncate, lengthen, flip, Path.unlink])
def test_damaged_spans_are_refused(tmp_path, damage):
    directory = build(tmp_path).directory
    damage(directory / "spans.npy")
    with pytest.raises(ValueError, match=rf"spans\.npy .* Delete the directory .*{directory.name}"):
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
        check_shard(shard, tokenizer=Shifted(), hashes=FileHashCache(tmp_path / "memory"))


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
        ("index.json", {"fixups": {"x": "y"}}),
        ("shard.json", {"format": 1}),
        ("shard.json", {"tokens": -1}),
        ("shard.json", {"source_files": []}),
    ],
    ids=str,
)
def test_a_record_that_is_not_ours_is_refused(tmp_path, file, change):
    build(tmp_path)
    path = next(tmp_path.rglob(file))
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=rf"{file} is damaged or of another version .*Delete the directory"):
        build(tmp_path)


@pytest.mark.slow
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
    with pytest.raises(ValueError, match="its vocab_size is 258"):
        build(tmp_path, tokenizer=Shifted(shift=1000))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.quick
def test_a_file_that_changes_while_it_is_read_is_an_error_and_not_stored_under_its_old_hash(tmp_path):
    file, cache = tmp_path / "a.txt", tmp_path / "cache"
    file.write_text("what was hashed, long enough")

    class Meanwhile(TextFiles):
        def read(self, path, log):
            path.write_text("what was encoded, of another length")
            yield from super().read(path, log)

    how = {"tokenizer": Bytes().build(), "sequence_length": 8, "cache_dir": cache, "progress": print}
    with pytest.raises(OSError, match=r"a\.txt changed while it was prepared"):
        Meanwhile(path=file).build(**how)
    file.write_text("what was hashed, long enough")
    samples = TextFiles(path=file).build(**how)
    assert bytes(samples.tokens(0, 15).tolist()) == b"what was hashed"


@pytest.mark.quick
def test_a_file_name_that_is_not_utf_8_can_be_displayed(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / os.fsdecode(b"caf\xe9.txt")).write_text("enough text for one sequence")
    samples = TextFiles(path=folder).build(
        tokenizer=Bytes().build(), sequence_length=8, cache_dir=tmp_path / "cache", progress=print
    )
    assert samples.describe(0).startswith(r"caf\xe9.txt document 0")


@pytest.mark.quick
def test_lone_surrogates_become_text(tmp_path):
    samples = build(tmp_path, Given(text=("cut \ud83d in two",)))
    assert Bytes().build().decode(samples[0][:7]) == "cut \ufffd"
    assert samples.index.fixups == {"replaced characters": 1}


class Parts(Given):
    def documents(self, log: ReadStats) -> Iterator[Document]:
        yield Document("one ", complete=False)
        yield Document(" ", complete=False)
        yield Document("document")
        yield Document("another, never ended", complete=False)


@pytest.mark.quick
def test_parts_make_one_document(tmp_path):
    samples = build(tmp_path, Parts(text=()))
    assert samples.document_lengths()[:, 1].tolist() == [len("one  document"), len("another, never ended")]


class Slow(Given):
    def documents(self, log: ReadStats) -> Iterator[Document]:
        for i in range(10):
            log.source_bytes += 1_000_000
            yield Document(f"document {i} " * 400_000)

    def size_bytes(self) -> int:
        return 10_000_000


@pytest.mark.quick
def test_progress_has_bytes_tokens_and_eta(tmp_path):
    seen = []
    Slow(text=()).cache_entry(Bytes().build(), tmp_path).prepare(lambda state: seen.append(copy(state)), 0)
    assert [state.done_bytes for state in seen] == [n * 1_000_000 for n in [*range(1, 11), 10]]  # last: the end
    assert "3.0 of 10.0 MB (30%)" in str(seen[2])
    assert "eta " in str(seen[2])


@pytest.mark.quick
def test_only_hashes_of_settled_files_are_cached(tmp_path, monkeypatch):
    path, memory = tmp_path / "a", tmp_path / "memory"
    path.write_text("one")
    with FileHashCache(memory) as hashes:
        assert hashes.sha256(path) == hash_file(path)
    assert not memory.exists()  # written a moment ago: it may change again within the clock's tick
    monkeypatch.setattr("components.data.file_hash_cache._SETTLED_NANOSECONDS", -(10**18))
    with FileHashCache(memory) as hashes:
        hashes.sha256(path)
    monkeypatch.setattr("components.data.file_hash_cache.hash_file", lambda path: pytest.fail("read again"))
    assert FileHashCache(memory).sha256(path)
    monkeypatch.undo()
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_text("two")
    os.utime(path, ns=times)  # even with its old size and modification time
    assert FileHashCache(memory).sha256(path) == hash_file(path)


@pytest.mark.quick
@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": 1}', '{"a": [1, 2]}'])
def test_a_damaged_hash_cache_is_ignored(tmp_path, content):
    (tmp_path / "memory").write_text(content)
    (tmp_path / "a").write_text("one")
    assert FileHashCache(tmp_path / "memory").sha256(tmp_path / "a") == hash_file(tmp_path / "a")
