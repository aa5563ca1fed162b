"""Which documents of a source are prepared: only new files, no duplicates, by split; with any number of processes."""

import hashlib
from copy import copy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.data import TextFiles
from components.data.document import SourceFile
from components.data.tokenize import Preparation, group_neighbors, tokenize_missing
from components.tokenizers import Bytes
from components.tokenizers.bytes import ByteEncoder
from tests.components.data.conftest import Given

LINES = [f"document {n % 17} of the corpus, with {'some ' * (n % 5)}text" for n in range(60)]


class Watched(ByteEncoder):
    """Bytes, and everything that was encoded."""

    def __init__(self):
        self.seen: list[str] = []

    def encode_batch(self, texts):
        self.seen += texts
        return super().encode_batch(texts)


def build(source, cache: Path, tokenizer=None):
    return source.build(
        tokenizer=tokenizer or Bytes().build(), sequence_length=4, cache_dir=cache, progress=lambda line: None
    )


def texts_of(samples) -> list[str]:
    """The documents of a data set, read back from its tokens."""
    tokens = samples.tokens(0, len(samples.reader))
    parts = np.split(tokens, np.flatnonzero(tokens == 256) + 1)[:-1]
    return [bytes(part[:-1].tolist()).decode() for part in parts]


def held(text: str, share: float) -> bool:
    """Independently: the first eight bytes of BLAKE2b-128, little-endian, as a number from 0 to 1."""
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little") / 2**64 < share


@pytest.mark.quick
def test_added_files_are_all_that_is_encoded_and_come_in_the_order_of_names(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for name in ("b", "d"):
        (folder / f"{name}.txt").write_text(f"file {name}")
    tokenizer = Watched()
    build(TextFiles(path=folder), tmp_path / "cache", tokenizer)
    assert tokenizer.seen == ["file b", "file d"]
    for name in ("a", "c", "e"):
        (folder / f"{name}.txt").write_text(f"file {name}")
    (folder / "f.txt").write_text("file b")  # the same content again needs no encoding
    grown = build(TextFiles(path=folder), tmp_path / "cache", tokenizer)
    assert tokenizer.seen[2:] == ["file a", "file c", "file e"]
    # The order of samples does not depend on how the cache was built.
    assert texts_of(grown) == [f"file {name}" for name in "abcde"] + ["file b"]
    fresh = build(TextFiles(path=folder), tmp_path / "fresh")
    assert texts_of(fresh) == texts_of(grown)
    (folder / "c.txt").unlink()
    (folder / "a.txt").rename(folder / "z.txt")
    assert texts_of(build(TextFiles(path=folder), tmp_path / "cache", tokenizer)) == [
        "file b", "file d", "file e", "file b", "file a"
    ]  # fmt: skip
    assert len(tokenizer.seen) == 5
    assert grown.locate(0) == "a.txt document 0 token 0"
    assert grown.locate(len("file a") + 3) == "b.txt document 0 token 2"
    assert grown.describe(2) == "b.txt document 0 token 1 to b.txt document 0 token 5"


@pytest.mark.slow
@pytest.mark.quick
@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(st.sampled_from(LINES[:20]) | st.just(" "), min_size=1, max_size=30),
    deduplicate=st.booleans(),
    validation_fraction=st.sampled_from([0.0, 0.1, 0.5]),
    in_validation=st.booleans(),
    shard_tokens=st.sampled_from([1, 100, 10**6]),
)
def test_the_documents_are_those_that_were_selected(
    tmp_path_factory, texts, deduplicate, validation_fraction, in_validation, shard_tokens
):
    expected = [text for text in texts if text.strip()]
    if deduplicate:
        expected = list(dict.fromkeys(expected))
    if validation_fraction:
        expected = [text for text in expected if held(text, validation_fraction) == in_validation]
    source = Given(
        text=tuple(texts),
        deduplicate=deduplicate,
        validation_fraction=validation_fraction,
        split="validation" if in_validation and validation_fraction > 0 else "train",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("components.data.cache.tokenize_missing", partial(tokenize_missing, shard_tokens=shard_tokens))
        if not expected:
            with pytest.raises(ValueError, match="holds no text: of"):
                build(source, tmp_path_factory.mktemp("cache"))
            return
        samples = build(source, tmp_path_factory.mktemp("cache"))
    assert texts_of(samples) == expected
    index = samples.index
    assert index.documents + sum(index.dropped.values()) == len(texts)
    assert index.text_bytes == sum(map(len, expected)) == index.tokens - len(expected)
    assert samples.document_lengths().tolist() == [[len(text) + 1, len(text)] for text in expected]


@pytest.mark.quick
def test_the_splits_are_disjoint_and_complete_and_share_shards(tmp_path):
    tokenizer = Watched()
    texts = tuple(f"{n} different documents" for n in range(400))
    train = texts_of(build(Given(text=texts, validation_fraction=0.2), tmp_path, tokenizer))
    in_validation = texts_of(build(Given(text=texts, validation_fraction=0.2, split="validation"), tmp_path, tokenizer))
    assert sorted(train + in_validation) == sorted(texts)
    assert len(tokenizer.seen) == 400
    assert 50 < len(in_validation) < 110  # 80 of 400, 8 is a standard deviation
    with pytest.raises(ValueError, match=r"^split: validation_fraction = 0"):
        build(Given(text=texts, split="validation"), tmp_path)


@pytest.mark.quick
def test_the_report_says_what_was_dropped_and_why(tmp_path):
    source = Given(text=("one", "two", "one", " ", "one", "three"), deduplicate=True)
    assert str(build(source, tmp_path).index) == (
        "3 documents, 11 bytes, 14 tokens, 0.79 bytes per token; dropped: 2 duplicate, 1 empty"
    )


def contents(cache: Path) -> dict[str, bytes]:
    return {str(path.relative_to(cache)): path.read_bytes() for path in sorted(cache.glob("encoded-*/shard-*/*"))}


def test_several_processes_write_the_same_shards(tmp_path, monkeypatch):
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(8):
        (folder / f"{number}.jsonl").write_text("".join(f'{{"text": "{line} {number}"}}\n' for line in LINES))
    settings = {"group_bytes": 8_000, "shard_tokens": 3_000}
    seen: list[Preparation] = []
    for processes in (1, 2):
        patched = partial(tokenize_missing, processes=processes, **settings)
        monkeypatch.setattr("components.data.cache.tokenize_missing", patched)
        TextFiles(path=folder).cache_entry(Bytes().build(), tmp_path / str(processes)).prepare(
            lambda state: seen.append(copy(state)), 0
        )
    one = contents(tmp_path / "1")
    assert len(one) >= 3 * 8
    assert one == contents(tmp_path / "2")
    assert seen[-1].done_bytes == seen[-1].total_bytes == sum(path.stat().st_size for path in folder.iterdir())
    # An error in a process is raised as with a single one.
    (folder / "5.jsonl").write_text("no json\n")
    with pytest.raises(ValueError, match=r"5\.jsonl:1: expected a JSON object"):
        build(TextFiles(path=folder), tmp_path / "2")


@pytest.mark.quick
@given(sizes=st.lists(st.integers(0, 50), max_size=30))
def test_groups_are_all_source_files_in_order_and_not_too_large(sizes):
    source_files = [SourceFile(str(n), str(n), size, iter) for n, size in enumerate(sizes)]
    groups = list(group_neighbors(source_files, 60))
    assert [source_file for group in groups for source_file in group] == source_files
    assert all(len(group) == 1 or sum(source_file.size_bytes for source_file in group) <= 60 for group in groups)
