"""Local copies of addresses, with the file system of `file://`."""

import os
import sys
from pathlib import Path

import pytest

from components.data import TokenFiles
from components.errors import InputError, MissingFileError
from components.storage import local_copy
from components.storage.address import RemoteDirectory, StorageError, address_of, display, is_address, local_copy_of
from components.storage.local_copy import fetch, fetch_file
from components.tokenizers import TiktokenFile
from recipes.config.errors import absolute

pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    local_copy._fetch_once.cache_clear()
    yield
    local_copy._fetch_once.cache_clear()


def fetched(path: Path) -> Path:
    """Return the local copy of a path, fetched as in a new process."""
    local_copy._fetch_once.cache_clear()
    copy = absolute(f"file://{path}", Path("/"))
    fetch(copy)
    return copy


def contents(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "address", ["s3://bucket/a/b.txt", "file:///a/b", "gs://b/c/**/*.json.gz", "hf://datasets/o/n/x"]
)
def test_an_address_is_kept_through_a_path(address):
    copy = absolute(Path(address), Path("/somewhere"))
    assert copy.is_absolute() and display(copy) == address_of(copy) == address
    assert is_address(address)


def test_paths_are_no_addresses():
    for path in ("a/b", "/a", "./s3:", "C:x"):
        assert local_copy_of(Path(path)) is None and not is_address(path)
    assert display(Path("/a/b")) == "/a/b"
    with pytest.raises(ValueError, match=r"`\.\.`"):
        absolute("s3://bucket/../x", Path("/"))


def test_a_broken_link_is_an_error_at_the_key(tmp_path):
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match="is a link to") as caught:
        TiktokenFile(path=link, pattern="gpt2").build()
    assert caught.value.key == "path"


def test_a_file_that_is_missing_at_its_address_is_an_error_at_the_key(tmp_path):
    with pytest.raises(MissingFileError, match="there is no file at") as missing:
        fetch_file(absolute(f"file://{tmp_path}/gone.jsonl", Path("/")), "path")
    assert missing.value.key == "path"


def test_only_changed_files_are_read_again_and_removed_ones_are_removed(tmp_path, monkeypatch):
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    for name in ("a", "b", "deep/c"):
        (source / name).write_text(name)
    copy = fetched(source)
    assert contents(copy) == {"a": "a", "b": "b", "deep/c": "deep/c"}
    read = []
    download = RemoteDirectory.download
    monkeypatch.setattr(RemoteDirectory, "download", lambda self, files: (read.extend(files), download(self, files))[1])
    (source / "a").unlink()
    (source / "b").write_text("B")
    os.utime(source / "b", (1, 1))
    (copy / "deep/c").write_text("damaged")
    assert contents(fetched(source)) == {"b": "B", "deep/c": "deep/c"}
    assert sorted(read) == ["b", "deep/c"]


def test_a_file_and_a_pattern(tmp_path):
    for name in ("a.txt", "b.txt", "c.json"):
        (tmp_path / name).write_text(name)
    assert fetched(tmp_path / "a.txt").read_text() == "a.txt"
    pattern = fetched(tmp_path / "*.txt")
    assert contents(pattern.parent) == {"a.txt": "a.txt", "b.txt": "b.txt"}
    with pytest.raises(FileNotFoundError, match="there is no file at file:///"):
        fetched(tmp_path / "d.txt")
    fetch(absolute(f"file://{tmp_path}/e", Path("/")), missing_ok=True)


def test_an_earlier_copy_serves_while_the_storage_cannot_be_reached(tmp_path, monkeypatch, caplog):
    (tmp_path / "a.txt").write_text("a")
    fetched(tmp_path / "a.txt")

    def fail(self, *_):
        raise StorageError(f"{self.address} cannot be read: no route")

    monkeypatch.setattr(RemoteDirectory, "is_file", fail)
    assert fetched(tmp_path / "a.txt").read_text() == "a"
    assert "no route; using the copy" in caplog.text
    with pytest.raises(StorageError, match="no route"):
        fetched(tmp_path / "b.txt")


@pytest.mark.parametrize(("address", "said"), [("gs://b/x", r"pip install -e '\.\[gcs\]'"), ("s4://b/x", "s4")])
def test_a_missing_library_and_an_unknown_protocol(address, said, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ValueError, match=said):
        fetch(absolute(address, Path("/")))


def test_tokenizers_and_token_files(tmp_path):
    import base64

    ranks = tmp_path / "bytes.tiktoken"
    ranks.write_bytes(b"\n".join(base64.b64encode(bytes([n])) + b" %d" % n for n in range(256)))
    tokenizer = TiktokenFile(path=absolute(f"file://{ranks}", Path("/")), pattern="gpt2").build()
    (tmp_path / "ids.bin").write_bytes(bytes(range(64)) * 2)
    data = TokenFiles(path=absolute(f"file://{tmp_path}/ids.bin", Path("/")), dtype="uint16")
    with pytest.raises(ValueError, match="outside the vocabulary"):
        data.build(tokenizer=tokenizer, sequence_length=4, cache_dir=tmp_path, progress=print)
    (tmp_path / "ids.bin").write_bytes(bytes(n if n % 2 == 0 else 0 for n in range(256)))
    local_copy._fetch_once.cache_clear()
    samples = data.build(tokenizer=tokenizer, sequence_length=4, cache_dir=tmp_path, progress=print)
    assert samples[0].tolist() == [0, 2, 4, 6, 8] and samples.source == f"file://{tmp_path}/ids.bin"
