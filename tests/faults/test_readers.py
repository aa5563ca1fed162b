"""A file or folder that cannot be read is an error that names it, and not skipped: all readers, all folders."""

from __future__ import annotations

import base64
import gzip
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from components.checkpoint import list_checkpoints
from components.data import HuggingFaceDataset, StandardLibrary, TextFiles, TokenFiles
from components.data.document import ReadStats
from components.data.file_hash_cache import FileHashCache
from components.data.shards import list_encoded
from components.errors import InputError
from components.metrics.jsonl import read_rows
from components.safetensors import PickledWeights, Weights
from components.tokenizers.tiktoken_file import read_ranks
from tests.run_info import open_jsonl
from tools.generate import read_prompts
from tools.sweep.runner import Results

pytestmark = pytest.mark.quick

RANKS = [b"%s %d\n" % (base64.b64encode(bytes([byte])), byte) for byte in range(256)]
ENTRY = b'{"digest": "%d", "varied": {}, "outcome": {}}\n'


def texts(path: Path) -> list[str]:
    return [document.text for document in TextFiles(path=path).documents(ReadStats())]


def write_parquet(path: Path, values: list[bytes | None]) -> None:
    """A column of strings with unchecked bytes, as other writers make it."""
    pa = pytest.importorskip("pyarrow", reason="needs the [data] extra")
    parquet = pytest.importorskip("pyarrow.parquet")
    raw = pa.array(values, pa.binary())
    parquet.write_table(pa.table({"text": pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())}), path)


def hub(path: Path) -> list[str]:
    datasets = pytest.importorskip("datasets", reason="needs the [data] extra")
    datasets.disable_progress_bars()
    source = HuggingFaceDataset(path=f"hf://{path.parent}/default/train")
    return [document.text for document in source.documents(ReadStats())]


def token_ids(path: Path) -> Any:
    tokenizer = SimpleNamespace(vocab_size=300, end_of_document=0)
    return TokenFiles(path=path).build(tokenizer=tokenizer, sequence_length=2, cache_dir=path, progress=pytest.fail)


BAD_ROWS: dict[str, tuple[Callable[[Path], Any], str, bytes | Callable[[Path], None], str]] = {
    "JSON lines": (texts, "a.jsonl", b'{"text": "1"}\n{"text": 2}\n{"text": "3"}\n', r"a\.jsonl:2"),
    "a JSON line of null": (texts, "a.jsonl", b'{"text": "1"}\n{"text": null}\n{"text": "3"}\n', r"a\.jsonl:2"),
    "JSON array": (texts, "a.json", b'[{"text": "1"}, [], {"text": "3"}]', r"a\.json item 1"),
    "CSV": (texts, "a.csv", b"text,id\none,1\ntwo\nthree,3\n", r"a\.csv:3: 1 fields"),
    "Parquet": (texts, "a.parquet", lambda path: write_parquet(path, [b"1", None, b"3"]), r"a\.parquet row 1"),
    "the Hub": (hub, "train.jsonl", b'{"text": "1"}\n{"text": null}\n{"text": "3"}\n', r"row 1: no text"),
    "Parquet of the Hub": (
        hub,
        "train.parquet",
        lambda path: write_parquet(path, [b"1", b"\xe9", b"3"]),
        "row 1: Unicode",
    ),
    "prompts": (read_prompts, "a.txt", b"one\nt\xe9o\nthree\n", r"a\.txt:2 is not UTF-8"),
    "JSON prompts": (read_prompts, "a.jsonl", b'{"prompt": "1"}\n{}\n{"prompt": "3"}\n', r"a\.jsonl:2"),
    "metrics": (read_rows, "metrics.jsonl", b'{"step": 1}\n{"st\n{"step": 3}\n', r"metrics\.jsonl:2 is not a row"),
    "results of a sweep": (Results, "results.jsonl", ENTRY % 1 + b"\n" + ENTRY % 3, r"results\.jsonl:2"),
    "ranks": (read_ranks, "a.tiktoken", b"".join([*RANKS[:9], b"x\n", *RANKS[9:]]), r"a\.tiktoken:10"),
    "token ids": (token_ids, "a.bin", np.array([*range(9), 300, *range(9)], "<u2").tobytes(), r"a\.bin: token id 300"),
    "weights": (
        lambda path: Weights(path.parent),
        "model.safetensors.index.json",
        b'{"weight_map": {"a": "a.safetensors", "b": 2, "c": "a.safetensors"}}',
        "the file of b is 2",
    ),
}


@pytest.mark.parametrize("what", BAD_ROWS)
def test_one_bad_row_in_the_middle_is_an_error_that_names_it(tmp_path, monkeypatch, what):
    read, name, content, message = BAD_ROWS[what]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = tmp_path / "data" / name
    path.parent.mkdir()
    content(path) if callable(content) else path.write_bytes(content)
    with pytest.raises((ValueError, OSError), match=message):
        read(path)


def test_bytes_that_are_not_utf_8_are_replaced_and_counted_in_every_format_of_text(tmp_path):
    write_parquet(tmp_path / "a.parquet", [b"fine", b"caf\xe9", b"fine too"])
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "caf\xe9"}\n{"text": "fine too"}\n')
    (tmp_path / "c.csv").write_bytes(b"text\nfine\ncaf\xe9\nfine too\n")
    (tmp_path / "d.json").write_bytes(b'[{"text": "fine"}, {"text": "caf\xe9"}, {"text": "fine too"}]')
    log = ReadStats()
    documents = [document.text for document in TextFiles(path=tmp_path).documents(log)]
    assert documents == 4 * ["fine", "caf\ufffd", "fine too"]
    assert log.fixups == {"replaced characters": 4}


def test_a_bad_row_of_metrics_keeps_the_rows_after_it(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    rows = [json.dumps({"step": step}) + "\n" for step in range(1, 9)]
    path.write_text("".join([*rows[:2], "\0\0\n", *rows[3:], '{"step": 9']))
    open_jsonl(path, after_step=6).close()
    assert path.read_text() == "".join([*rows[:2], "\0\0\n", *rows[3:6]])
    assert "metrics.jsonl:3 is not a row" in caplog.text


def test_a_foreign_last_line_is_not_taken_for_an_incomplete_result(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("what I did today")
    with pytest.raises(ValueError, match=r"notes\.txt:1 is not a result of a sweep"):
        Results(path)
    assert path.read_text() == "what I did today"


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that other users may enter, with a folder `shut` that cannot be listed."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    (path / "open").mkdir()
    (path / "shut").mkdir()
    for name in ("open/a.txt", "shut/b.txt"):
        (path / name).write_text("some text")
    (path / "shut").chmod(0o000)
    yield path
    (path / "shut").chmod(0o700)
    shutil.rmtree(path)


@contextmanager
def to_whom_permissions_apply() -> Iterator[None]:
    """Root may list everything."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def fingerprint(path: Path) -> str:
    return HuggingFaceDataset(path=f"hf://{path}/default/train").fingerprint(FileHashCache(path / "none"))


def library(path: Path) -> object:
    return StandardLibrary().files()


FOLDERS: dict[str, Callable[[Path], object]] = {
    "a folder of text": texts,
    "a pattern": lambda path: texts(path / "**" / "*.txt"),
    "a pattern of folders": lambda path: texts(path / "*" / "*.txt"),
    "a data set of the Hub": fingerprint,
    "the standard library": library,
}


@pytest.mark.parametrize("what", FOLDERS)
def test_a_folder_that_may_not_be_listed_is_an_error_that_names_it(folder, monkeypatch, what):
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(folder)})
    with (
        to_whom_permissions_apply(),
        pytest.raises((InputError, PermissionError), match="shut cannot be listed: Permission denied"),
    ):
        FOLDERS[what](folder)


def test_other_folders_that_may_not_be_listed_are_not_taken_as_empty(folder):
    with to_whom_permissions_apply():
        for read in (list_encoded, list_checkpoints):
            with pytest.raises(PermissionError, match="shut"):
                read(folder / "shut")


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("a.parquet", lambda path: texts(path)),
        ("model.safetensors", lambda path: Weights(path.parent)),
        ("pytorch_model.bin", lambda path: PickledWeights(path.parent)),
    ],
)
def test_a_file_that_may_not_be_read_is_not_called_damaged(folder, name, read):
    pytest.importorskip("pyarrow.parquet", reason="needs the [data] extra")
    (folder / name).write_bytes(b"PAR1")
    (folder / name).chmod(0o000)
    with (
        to_whom_permissions_apply(),
        pytest.raises(PermissionError, match=name),
    ):
        read(folder / name)


LINKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a text in a folder": (texts, "b.txt"),
    "a folder in a folder": (texts, "more"),
    "a file of a pattern": (lambda path: texts(path / "*.txt"), "b.txt"),
    "a file that is named": (lambda path: texts(path / "b.txt"), "b.txt"),
    "a data set of the Hub": (fingerprint, "b.txt"),
    "token ids": (lambda path: token_ids(path / "t.bin"), "t.bin"),
    "the index of token ids": (lambda path: token_ids(path / "i.bin"), "i.idx"),
    "weights": (Weights, "model.safetensors"),
    "an index of weights": (Weights, "model.safetensors.index.json"),
    "pickled weights": (PickledWeights, "pytorch_model.bin"),
    "metrics": (lambda path: read_rows(path / "metrics.jsonl"), "metrics.jsonl"),
    "metrics of a resumed run": (lambda path: open_jsonl(path / "metrics.jsonl"), "metrics.jsonl"),
    "results of a sweep": (lambda path: Results(path / "results.jsonl"), "results.jsonl"),
    "checkpoints": (lambda path: list_checkpoints(path / "checkpoints"), "checkpoints"),
}


@pytest.mark.parametrize("what", LINKS)
def test_a_link_to_nothing_is_an_error_that_names_it(tmp_path, what):
    read, name = LINKS[what]
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "i.bin").write_bytes(bytes(100))
    (tmp_path / name).symlink_to(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=rf"{name} is a link to .*gone, which does not exist"):
        read(tmp_path)


def test_hidden_and_system_files_are_left_out_of_folders_and_patterns_alike(tmp_path):
    for name in ("a.txt", ".hidden.txt", ".git/b.txt", "__MACOSX/c.txt", "lost+found/d.txt", "below/._e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / ".#a.txt").symlink_to("somebody@host.1:2")  # an editor has it open
    assert texts(tmp_path) == ["a.txt"]
    assert texts(tmp_path / ".git") == [".git/b.txt"]
    assert texts(tmp_path / "*.txt") == ["a.txt"]
    assert texts(tmp_path / "**" / "*.txt") == ["a.txt"]
    assert texts(tmp_path / "lost+found" / "*.txt") == ["lost+found/d.txt"]


def test_a_file_that_is_also_there_compressed_is_reported(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"text"))
    assert texts(tmp_path) == ["text", "text"]
    assert "1 files are read compressed and uncompressed, such as" in caplog.text


def test_files_of_other_formats_in_a_folder_are_reported_once(tmp_path, caplog):
    for name in ("a.txt", "b.txt.bz2", "c.bz2", "d.md"):
        (tmp_path / name).write_text(name)
    for _ in range(2):
        assert texts(tmp_path) == ["a.txt"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: 3 of 4 files have other formats and are not read: 2 .bz2, 1 .md"
    ]
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(ValueError, match=r"pipe\.txt is not a regular file"):
        texts(tmp_path)


OTHER_FORMATS = {
    "gzip": b"\x1f\x8b\x08\x00" + bytes(range(1, 60)),
    "Zstandard": b"\x28\xb5\x2f\xfd" + bytes(range(1, 60)),
    "zip": b"PK\x03\x04" + bytes(range(1, 60)),
    "Parquet": b"PAR1\x15\x04",
    "PDF": b"%PDF-1.7\n",
    "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
    "Megatron-LM index": b"MMIDIDX\x00\x00" + bytes(60),
}


@pytest.mark.parametrize("kind", OTHER_FORMATS)
def test_a_file_of_another_format_is_refused_whatever_its_name_says(tmp_path, kind):
    for name, read in (("a.txt", texts), ("a.bin", token_ids)):
        (tmp_path / name).write_bytes(OTHER_FORMATS[kind])
        with pytest.raises(ValueError, match=rf"{name} is (a|not text but a) {kind} file"):
            read(tmp_path / name)


def test_bytes_without_a_text_in_them_are_refused(tmp_path):
    (tmp_path / "wide.txt").write_bytes(("some text " * 100).encode("utf-16-le"))
    with pytest.raises(ValueError, match=r"wide\.txt is not text: 256 of its first 512 bytes are 0"):
        texts(tmp_path)


def llmc(count: int, ids: bytes, magic: int = 20240520, version: int = 1) -> bytes:
    return struct.pack("<3i", magic, version, count) + bytes(1012) + ids


def saved(array: np.ndarray) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with path.open("wb") as file:
            np.save(file, array)

    return write


IDS = np.random.default_rng(0).integers(0, 300, 5000)
WIDE = {"magic": 20240801, "version": 7}
TOKENS: dict[str, tuple[bytes | Callable[[Path], None], str | None]] = {
    "nanoGPT": (IDS.astype("<u2").tobytes(), None),
    "llm.c": (llmc(5000, IDS.astype("<u2").tobytes()), None),
    "llm.c of Llama 3": (llmc(5000, IDS.astype("<u4").tobytes(), **WIDE), None),
    "NumPy": (saved(IDS.astype("<u2")), None),
    "NumPy, big-endian": (saved(IDS.astype(">u4")), None),
    "llm.c, cut": (llmc(5000, IDS.astype("<u2").tobytes()[:-2]), "is damaged: 11,022 bytes, expected 11,024"),
    "NumPy, cut": (lambda path: path.write_bytes(b"\x93NUMPY\x01\x00"), "is damaged, or is not a NumPy file"),
    "NumPy in rows": (saved(IDS.reshape(50, 100)), r"holds int64 of shape \(50, 100\)"),
    "NumPy of objects": (saved(np.array([{}], dtype=object)), "is damaged, or is not a NumPy file of numbers"),
    "uint32": (
        IDS.astype("<u4").tobytes(),
        r"a\.bin: every other id is 0, .* its ids are not little-endian uint16: set dtype",
    ),
    "int64": (IDS.astype("<i8").tobytes(), r"a\.bin: every other id is 0, .*: set dtype"),
    "big-endian": (IDS.astype(">u2").tobytes(), r"a\.bin: token id .* its ids are not little-endian uint16: set dtype"),
    "of another vocabulary": ((IDS + 1).astype("<u2").tobytes(), "token id 300 is outside the vocabulary of 300"),
}


@pytest.mark.parametrize("what", TOKENS)
def test_token_files_are_what_their_bytes_say(tmp_path, what):
    content, message = TOKENS[what]
    path = tmp_path / "a.bin"
    content(path) if callable(content) else path.write_bytes(content)
    if message is None:
        assert token_ids(path).tokens(0, 5000).tolist() == IDS.tolist()
    else:
        with pytest.raises(ValueError, match=message):
            token_ids(path)
