import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.data import TextFiles
from components.data.document import ReadStats
from components.data.file_hash_cache import FileHashCache
from components.data.sources.text_io import known_format, read_blocks

pytestmark = pytest.mark.quick


def read(source: TextFiles) -> tuple[list[str], Counter[str]]:
    """Return the documents, joined from their parts, and the fixups."""
    log, documents, parts = ReadStats(), [], []
    for document in source.documents(log):
        parts.append(document.text)
        if document.complete:
            documents.append("".join(parts))
            parts = []
    assert not parts
    assert log.source_bytes == source.size_bytes()
    return documents, log.fixups


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def lines(*values: object) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def test_every_kind_of_file_in_the_order_of_names(tmp_path):
    write(tmp_path / "b.txt", "two")
    write(tmp_path / "a.txt.gz", "one")
    write(tmp_path / "sub/c.jsonl", lines({"text": "three"}, {"text": "four", "id": 7}))
    write(tmp_path / "sub/d.jsonl.gz", lines({"text": "five"}))
    write(tmp_path / "sub/e.json.gz", "\n" + lines({"text": "six"}) + "\n")
    write(tmp_path / "sub/f.json", lines({"text": "seven"}))
    write(tmp_path / "read.me", "not a text file")
    expected = ["one", "two", "three", "four", "five", "six", "seven"]
    assert read(TextFiles(path=tmp_path))[0] == expected
    assert read(TextFiles(path=tmp_path / "**/*"))[0] == expected
    assert read(TextFiles(path=[tmp_path / "sub", tmp_path / "b.txt", tmp_path / "*.gz"]))[0] == expected
    assert read(TextFiles(path=[tmp_path, tmp_path / "b.txt"]))[0] == expected  # a file named twice is read once


def test_links_keep_their_names(tmp_path):
    """As the cache of the Hub has them: names that lead to files without any."""
    write(tmp_path / "blobs/0f", lines({"text": "second"}))
    write(tmp_path / "blobs/a0", "first")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot/b.jsonl").symlink_to("../blobs/0f")
    (tmp_path / "snapshot/a.txt").symlink_to("../blobs/a0")
    assert read(TextFiles(path=tmp_path / "snapshot"))[0] == ["first", "second"]


def test_folders_that_are_links_are_followed_and_none_is_read_twice(tmp_path):
    write(tmp_path / "books/a.txt", "first")
    write(tmp_path / "other disk/web/b.TXT", "second")
    write(tmp_path / "other disk/web/c.Json.GZ", gzip.compress(lines({"text": "third"}).encode()))
    write(tmp_path / "books/.txt", "a hidden file without a kind")
    (tmp_path / "books/web").symlink_to(tmp_path / "other disk/web")
    (tmp_path / "books/once more").symlink_to(tmp_path / "other disk/web")
    (tmp_path / "other disk/web/back").symlink_to(tmp_path / "books")
    assert read(TextFiles(path=tmp_path / "books"))[0] == ["first", "second", "third"]


def test_marks_line_ends_and_bad_bytes_are_fixed_and_counted(tmp_path):
    write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    write(tmp_path / "b.txt", b"bad \xff\xfe, cut \xe4\xbd, kept \xef\xbf\xbd")
    write(tmp_path / "c.jsonl", b'\xef\xbb\xbf{"text": "x\\r\\ny \xff"}\r\n')
    documents, fixups = read(TextFiles(path=tmp_path))
    assert documents == ["one\ntwo\nthree\n", "bad \ufffd\ufffd, cut \ufffd, kept \ufffd", "x\ny \ufffd"]
    assert fixups == {"byte-order marks": 2, "line ends": 3, "replaced characters": 4}


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    data=st.lists(st.binary(max_size=6) | st.text(max_size=4).map(str.encode) | st.just(b"\r\n"))
    .map(b"".join)
    .filter(lambda data: known_format(data) is None)
)
@pytest.mark.parametrize("block_bytes", [1, 2, 3, 5])
def test_blocks_split_no_character_and_no_line_end(tmp_path_factory, data, block_bytes):
    path = tmp_path_factory.getbasetemp() / "blocks.txt"
    path.write_bytes(data)
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        with pytest.raises(ValueError, match="UTF-16"):
            list(read_blocks(path, ReadStats(), block_bytes))
        return
    log = ReadStats()
    text = "".join(read_blocks(path, log, block_bytes))
    whole = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", errors="replace")
    assert text == whole.replace("\r\n", "\n").replace("\r", "\n")
    genuine = data.removeprefix(b"\xef\xbb\xbf").count("\ufffd".encode())
    assert log.fixups["replaced characters"] == whole.count("\ufffd") - genuine


def test_a_separator_cuts_a_file_into_documents(tmp_path):
    path = write(tmp_path / "a.txt", "one<|end|>\ntwo\n\n<|end|>\nthree<|end|>\n")
    assert read(TextFiles(path=path, document_separator="<|end|>\n"))[0] == ["one", "two\n\n", "three"]
    assert read(TextFiles(path=path))[0] == [path.read_text()]


@pytest.mark.parametrize("separator", [None, "<|end|>", "\n--\n"])
def test_long_documents_come_in_parts_and_lose_nothing(tmp_path, monkeypatch, separator):
    monkeypatch.setattr("components.data.sources.formats._PART_CHARACTERS", 50)
    monkeypatch.setattr("components.data.sources.formats.read_blocks", lambda path, log: read_blocks(path, log, 17))
    text = "".join(f"line {i} of it\n" if i % 7 else "x" * 3 * i for i in range(60))
    stories = [text[:300], text[300:420], text[420:]]
    path = write(tmp_path / "a.txt", (separator or "").join(stories))
    source = TextFiles(path=path, document_separator=separator)
    assert read(source)[0] == (stories if separator else [text])
    assert sum(not document.complete for document in source.documents(ReadStats())) > 5


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut off', r"a\.jsonl:2: expected a JSON object on each line"),
        ('["text"]', r"a\.jsonl:2: expected a JSON object, found"),
        ('{"body": "x", "id": 1}', r"a\.jsonl:2: no text under text_key = 'text'; the object has body, id"),
        ('{"text": null}', r"a\.jsonl:2: expected text under text_key = 'text', found null$"),
        ("[" * 100_000, r"a\.jsonl:2: expected a JSON object"),
    ],
)
def test_a_bad_line_stops_with_file_and_line(tmp_path, line, message):
    path = write(tmp_path / "a.jsonl", lines({"text": "fine"}) + line + "\n")
    with pytest.raises(ValueError, match=message):
        read(TextFiles(path=path))


@pytest.mark.parametrize("between", [b"", b"\0" * 70_000])
def test_bytes_after_the_end_of_a_gz_are_left_out_and_counted(tmp_path, between):
    """The text is longer than a block, and its last part is read, too. Zeros, which tapes write, do not count."""
    text = "some words " * 500_000
    members = gzip.compress(text[:99].encode()) + between + gzip.compress(text[99:].encode(), 1)
    for rest, counted in ((b"", 0), (b"\0" * 600, 0), (b"\x1f", 1), (b"<html>" * 30_000, 180_000)):
        path = write(tmp_path / "a.txt.packed", members + rest).rename(tmp_path / "a.txt.gz")
        documents, fixups = read(TextFiles(path=path))
        assert documents == [text]
        assert fixups == Counter({"bytes after the end of a .gz": counted} if counted else {})


def test_damaged_and_foreign_files_are_named(tmp_path):
    whole = gzip.compress(b"some text " * 1000)
    for name, content in {
        "cut.txt.gz": whole[:-20],
        "no.txt.gz": b"plain text",
        "flip.txt.gz": whole[:30] + b"\0" * 9,
    }.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} is damaged, or is not a \.gz file"):
            read(TextFiles(path=path))
    with pytest.raises(ValueError, match="is UTF-16; convert it"):
        read(TextFiles(path=write(tmp_path / "wide.txt", "text".encode("utf-16"))))


def test_paths_that_lead_nowhere_name_their_key(tmp_path):
    write(tmp_path / "a.doc", "")
    with pytest.raises(FileNotFoundError, match=r"^path: .*nowhere does not exist$"):
        TextFiles(path=tmp_path / "nowhere").files()
    with pytest.raises(FileNotFoundError, match=r"^path: .*nowhere\* matches no file that ends in \.txt"):
        TextFiles(path=tmp_path / "nowhere*").files()
    with pytest.raises(ValueError, match=r"^path: .* matches 1 files, but none ends in \.txt"):
        TextFiles(path=tmp_path).files()
    with pytest.raises(ValueError, match=r"a\.doc does not end in \.txt"):
        TextFiles(path=tmp_path / "a.doc").files()
    with pytest.raises(ValueError, match="matches 1 files, but none ends"):
        TextFiles(path=tmp_path / "*").files()
    with pytest.raises(ValueError, match=r"^document_separator: "):
        TextFiles(path=tmp_path, document_separator="")
    with pytest.raises(ValueError, match=r"^document_separator: '\\r\\n' can never match"):
        TextFiles(path=tmp_path, document_separator="\r\n")


def test_the_fingerprint_is_of_content_order_and_settings_and_not_of_the_place(tmp_path):
    def fingerprint(folder: str, **settings) -> str:
        return TextFiles(path=tmp_path / folder, **settings).fingerprint(FileHashCache(tmp_path / "memory"))

    for folder in ("here", "there"):
        write(tmp_path / folder / "a.txt", "one")
        write(tmp_path / folder / "b.txt", "two")
    original = fingerprint("here")
    assert fingerprint("there") == original
    assert fingerprint("here", document_separator="\n") != original
    assert fingerprint("here", text_key="body") == original  # plain text has no keys
    write(tmp_path / "lines/a.jsonl", lines({"text": "one", "body": "two"}))
    assert fingerprint("lines", text_key="body") != fingerprint("lines")
    write(tmp_path / "there/b.txt", "twO")
    assert fingerprint("there") != original
    (tmp_path / "here/b.txt").rename(tmp_path / "here/c.txt")
    assert fingerprint("here") == original
    (tmp_path / "here/c.txt").rename(tmp_path / "here/Z.txt")  # now before a.txt
    assert fingerprint("here") != original


def test_the_messy_file_is_read_as_its_clean_text(texts):
    (document,), fixups = read(TextFiles(path=texts / "messy"))
    verbatim = next((texts / "messy").iterdir()).read_bytes()
    assert document == verbatim.decode("utf-8-sig").replace("\r\n", "\n")
    assert fixups == {"byte-order marks": 1, "line ends": verbatim.count(b"\r\n")}


def test_c4_and_peps_are_read_as_json_lines(texts):
    documents, fixups = read(TextFiles(path=texts / "c4"))
    assert len(documents) == 20
    assert not fixups
    valid = [
        json.loads(line)["text"] for line in gzip.decompress((texts / "peps/valid.jsonl.gz").read_bytes()).splitlines()
    ]
    assert read(TextFiles(path=texts / "peps/valid.jsonl.gz"))[0] == valid


def test_tinystories_has_five_documents(texts):
    stories, _ = read(TextFiles(path=texts / "tinystories", document_separator="<|endoftext|>"))
    assert len([story for story in stories if story.strip()]) == 5


def test_an_existing_folder_is_not_a_pattern(tmp_path):
    """Relative paths are prefixed with the folder of the recipe, which may have any name."""
    folder = tmp_path / "run[1]" / "a*"
    folder.mkdir(parents=True)
    (folder / "b.txt").write_text("It was the best of times.")
    (tmp_path / "run1" / "a").mkdir(parents=True)
    (tmp_path / "run1" / "a" / "c.txt").write_text("It was the worst of times.")
    for pattern in ("run[1]/a*/*.txt", "run[1]/a*/[b].txt", "run[1]/**/*.txt", "run[1]/a*", "run[1]/a*/b.txt"):
        assert list(TextFiles(path=tmp_path / pattern).files().values()) == [folder / "b.txt"], pattern
    assert len(TextFiles(path=tmp_path / "run*" / "*" / "*.txt").files()) == 2
