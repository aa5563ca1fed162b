import os
import pickle
import resource

import numpy as np
import psutil
import pytest

from components.data import token_reader
from components.data.dataset import TokenDataset
from components.data.loader import MicroBatchLoader
from components.data.token_reader import TokenReader

pytestmark = pytest.mark.quick


def build_reader(folder, files: int, ids: int = 10) -> TokenReader:
    """File n holds n * ids ... n * ids + ids - 1."""
    paths = [folder / str(number) for number in range(files)]
    for number, path in enumerate(paths):
        np.arange(number * ids, (number + 1) * ids, dtype="<u4").tofile(path)
    return TokenReader(paths, np.dtype("<u4"), np.array([[number, 0, ids] for number in range(files)]))


def read(tokens: TokenReader, start: int, count: int) -> list[int]:
    out = np.empty(count, dtype=np.int64)
    tokens.read(start, out)
    return out.tolist()


@pytest.fixture
def files(monkeypatch):
    """Sets how many more files this process may open, with none open for data yet."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setattr("components.data.token_reader._files", token_reader._OpenFiles())

    def allow(more: int) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (psutil.Process().num_fds() + more, hard))

    yield allow
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_limit_of_open_files_is_that_of_the_process_and_not_of_each_source(tmp_path, files):
    files(60)
    sources = []
    for name in "abc":
        (tmp_path / name).mkdir()
        sources.append(build_reader(tmp_path / name, 40))
    for tokens in sources:
        assert read(tokens, 0, 400) == list(range(400))
        assert read(tokens, 25, 40) == list(range(25, 65))
    copy = pickle.loads(pickle.dumps(sources[0]))
    assert read(copy, 85, 5) == list(range(85, 90))
    taken = []
    with pytest.raises(OSError, match="Too many open files"):
        while True:  # the rest of the process uses all descriptors
            taken.append(os.open(os.devnull, os.O_RDONLY))
    for tokens in sources:
        assert read(tokens, 0, 400) == list(range(400))
    for descriptor in taken:
        os.close(descriptor)
    before = psutil.Process().num_fds()
    del sources, tokens, copy
    assert psutil.Process().num_fds() < before


def test_a_limit_of_open_files_that_is_too_low_is_reported_when_data_is_opened(tmp_path, files):
    files(10)
    with pytest.raises(OSError, match=r"this process may open \d+ files .* ulimit -n"):
        build_reader(tmp_path, 3)


def test_reads_interrupted_by_signals_are_completed(tmp_path, monkeypatch):
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, count, offset: pread(file, min(count, 7), offset))
    assert read(build_reader(tmp_path, 2), 3, 14) == list(range(3, 17))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_truncated_while_in_use_is_an_error(tmp_path, workers):
    tokens = build_reader(tmp_path, 3, ids=100)
    samples = TokenDataset(tokens, sequence_length=10, vocab_size=1000, source="a test")
    os.truncate(tmp_path / "1", 44)
    with (
        MicroBatchLoader(samples, seed=0, micro_batch_size=4, num_workers=workers) as loader,
        pytest.raises(OSError, match=r"1 was truncated while it was in use: it has 44 bytes"),
    ):
        list(loader.next_step(20))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_disk_that_fails_is_an_error_with_the_name_of_the_file(tmp_path, monkeypatch, workers):
    def fails(file, count, offset):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", fails)
    samples = TokenDataset(build_reader(tmp_path, 3), sequence_length=5, vocab_size=1000, source="a test")
    with (
        MicroBatchLoader(samples, seed=0, micro_batch_size=4, num_workers=workers) as loader,
        pytest.raises(OSError, match=r"cannot read the data \(Input/output error\): '.*/\d'"),
    ):
        list(loader.next_step(1))


@pytest.mark.quick
def test_thousands_of_memory_mapped_spans_are_read_as_those_in_memory(tmp_path):
    chance = np.random.default_rng(0)
    ids = np.arange(20_000, dtype="<u4")
    (tmp_path / "ids").write_bytes(ids.tobytes())
    counts = chance.integers(1, 9, 1_500)
    firsts = chance.integers(0, 19_000, 1_500)
    rows = np.stack([np.zeros_like(counts), firsts, counts, counts, counts], axis=1)
    np.save(tmp_path / "spans.npy", rows)
    mapped = np.load(tmp_path / "spans.npy", mmap_mode="r")
    expected = np.concatenate([ids[first : first + count] for first, count in zip(firsts, counts, strict=True)])
    stored = TokenReader([tmp_path / "ids"], np.dtype("<u4"), mapped)
    sent = pickle.dumps(stored)
    assert len(sent) < 8_000, "a worker maps the table itself"
    for reader in (stored, TokenReader([tmp_path / "ids"], np.dtype("<u4"), rows), pickle.loads(sent)):
        assert isinstance(reader.spans, np.memmap) == (reader.spans is not rows)
        assert len(reader) == len(expected)
        for start in [0, 1, len(expected) - 1, len(expected) - 300, *chance.integers(0, len(expected), 200).tolist()]:
            out = np.empty(min(300, len(expected) - start), dtype=np.int64)
            reader.read(start, out)
            assert np.array_equal(out, expected[start : start + len(out)]), start
            span, within = reader.span_at(start)
            assert counts[:span].sum() + within == start and within < counts[span]
