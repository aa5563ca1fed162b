import sysconfig
from pathlib import Path

import pytest

from components.data import StandardLibrary
from components.data.document import ReadStats
from components.python_library import split_of

pytestmark = pytest.mark.quick

GOLDEN = {
    "json/decoder.py": "train",
    "argparse.py": "train",
    "asyncio/base_events.py": "train",
    "abc.py": "train",
    "ast.py": "validation",
    "_compression.py": "test",
    "cProfile.py": "test",
    "locale.py": "validation",
}


def names(split: str) -> set[str]:
    return set(StandardLibrary(split=split).files())


def test_the_splits_are_disjoint_and_have_their_fractions():
    train, validation, test = names("train"), names("validation"), names("test")
    assert not train & validation and not train & test and not validation & test
    total = len(train | validation | test)
    assert 300 < total < 600
    assert 0.85 < len(train) / total < 0.95


def test_the_split_of_a_file_is_fixed():
    # By int(sha256(path)[:8], 16) % 100, worked out elsewhere.
    assert {name: split_of(name) for name in GOLDEN} == GOLDEN


def test_other_files_of_the_library_are_skipped():
    everything = names("train") | names("validation") | names("test")
    parts = {part for name in everything for part in name.split("/")}
    assert not parts & {"site-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "__pycache__", "tkinter"}
    assert {"json", "asyncio", "argparse.py"} <= parts


def test_documents_are_the_files_with_line_feeds():
    source = StandardLibrary(split="validation")
    log = ReadStats()
    documents = [document.text for document in source.documents(log)]
    assert log.source_bytes == source.size_bytes() > 100_000
    assert all("\r" not in text for text in documents)
    by_name = dict(zip(source.files(), documents, strict=True))
    assert list(by_name) == sorted(by_name)
    name, text = next((name, text) for name, text in by_name.items() if text.isascii() and text)
    assert text == Path(sysconfig.get_paths()["stdlib"], name).read_text()


def test_a_stripped_library_is_refused_with_a_remedy(tmp_path, monkeypatch):
    (tmp_path / "os.py").write_text("pass\n")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(ValueError, match=r"only 5 bytes of Python source .*zipped or stripped.*TextFiles"):
        list(StandardLibrary().documents(ReadStats()))


def test_files_are_decoded_as_their_coding_comment_says(tmp_path, monkeypatch):
    monkeypatch.setattr("components.python_library._LEAST_BYTES", 0)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    monkeypatch.setattr("components.python_library.split_of", lambda name: "train")
    (tmp_path / "a.py").write_bytes("# -*- coding: latin-1 -*-\r\ns = 'é'\r\n".encode("latin-1"))
    (tmp_path / "b.py").write_bytes(b"s = '\xff'\n")
    log = ReadStats()
    texts = [document.text for document in StandardLibrary().documents(log)]
    assert texts == ["# -*- coding: latin-1 -*-\ns = 'é'\n", "s = '\ufffd'\n"]
    assert log.fixups == {"line ends": 2, "replaced characters": 1}
