"""Files of every kind are read as independent readers read them."""

import csv
import gzip
import io
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.data import TextFiles
from components.data.document import ReadStats
from components.data.sources.text_io import read_blocks
from tests.components.data.sources.test_text_files import read, write

pytestmark = pytest.mark.quick

ROWS = [{"text": f'row {n}\nof é 鯨 "quoted", {"x" * n}', "id": n} for n in range(40)]
TEXTS = [row["text"] for row in ROWS]


def as_csv(rows: list[dict]) -> str:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, ["id", "text"])
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


CONTENT = {
    ".jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
    ".json": json.dumps(ROWS),
    ".csv": as_csv(ROWS),
    ".txt": "<|end|>".join(TEXTS),
}


def packed(content: str, packing: str) -> bytes:
    if packing == ".gz":
        return gzip.compress(content.encode())
    if packing == ".zst":
        zstandard = pytest.importorskip("zstandard", reason="needs the [data] extra")
        return zstandard.ZstdCompressor().compress(content.encode())
    return content.encode()


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", CONTENT)
def test_every_format_in_every_compression(tmp_path, kind, packing):
    path = tmp_path / f"a{kind}{packing}"
    path.write_bytes(packed(CONTENT[kind], packing))
    assert read(TextFiles(path=path, document_separator="<|end|>")) == (TEXTS, {})


def test_parquet_as_pyarrow_wrote_it(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="needs the [data] extra")
    pytest.importorskip("pyarrow.parquet")  # pyarrow does not import it by itself

    for name, kind in (("a", pa.string()), ("b", pa.large_string()), ("c", pa.dictionary(pa.int32(), pa.string()))):
        table = pa.table({"id": list(range(40)), "text": pa.array(TEXTS).cast(kind)})
        pa.parquet.write_table(table, tmp_path / f"{name}.parquet", row_group_size=7)
    assert read(TextFiles(path=tmp_path))[0] == TEXTS * 3
    with pytest.raises(ValueError, match=r"c\.parquet row 0: expected text under text_key = 'id', found 0"):
        read(TextFiles(path=tmp_path / "c.parquet", text_key="id"))
    with pytest.raises(ValueError, match=r"no text under text_key = 'body'; the file has id, text"):
        read(TextFiles(path=tmp_path / "c.parquet", text_key="body"))
    (tmp_path / "d.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"d\.parquet is damaged, or is not a Parquet file"):
        read(TextFiles(path=tmp_path / "d.parquet"))


def test_a_zstandard_file_of_several_frames_is_whole_and_a_cut_one_is_damaged(tmp_path):
    zstandard = pytest.importorskip("zstandard", reason="needs the [data] extra")
    text = "".join(random.Random(0).choices("abcdef \n", k=400_000))
    frames = [
        zstandard.ZstdCompressor().compress(text[start : start + 50_000].encode())
        for start in range(0, 400_000, 50_000)
    ]
    path = tmp_path / "a.txt.zst"
    path.write_bytes(b"".join(frames))
    assert read(TextFiles(path=path))[0] == [text]
    for content in (b"".join(frames)[:-5], frames[0] + b"plain text", b"plain text"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.txt\.zst is damaged, or is not a \.zst file"):
            read(TextFiles(path=path))


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.fixed_dictionaries({"text": st.text(max_size=20), "n": st.integers() | st.none()}), max_size=6),
    indent=st.sampled_from([None, 2]),
    block_bytes=st.integers(1, 40),
)
def test_an_array_is_read_whatever_the_blocks(tmp_path_factory, rows, indent, block_bytes):
    path = tmp_path_factory.getbasetemp() / "array.json"
    path.write_text("\n " + json.dumps(rows, indent=indent) + " \n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "components.data.sources.formats.read_blocks", lambda path, log: read_blocks(path, log, block_bytes)
        )
        documents = [document.text for document in TextFiles(path=path).documents(ReadStats())]
    assert documents == [row["text"].replace("\r\n", "\n").replace("\r", "\n") for row in rows]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"text": "x"}, {"text": ', r"a\.json item 1: expected a JSON object, found"),
        ("a.json", '[{"text": "x"} {"text": "y"}]', r"a\.json item 1: expected ',', found"),
        ("a.json", '[{"text": "x"}, 7]', r"a\.json item 1: expected a JSON object, found 7"),
        (
            "a.json",
            '[{"text": "x"}]\n[{"text": "y"}]',
            r"a\.json: expected the end after an array of 1 items, found '\[\{",
        ),
        ("a.json", '[]\n{"text": "y"}', r"a\.json: expected the end after an array of 0 items"),
        ("a.jsonl.zst", "", r"a\.jsonl\.zst is damaged, or is not a \.zst file: it is empty"),
        ("a.json", '[{"body": "x"}]', r"a\.json item 0: no text under text_key = 'text'; the object has body"),
        ("a.csv", "id,body\n1,x\n", r"a\.csv:1: no text under text_key = 'text'; the header has body, id"),
        ("a.csv", "id,text\n1,x\n2\n", r"a\.csv:3: 1 fields, but the header has 2"),
        ("a.csv", 'id,text\n1,"x\n', r"a\.csv:\d: unexpected end of data"),
        ("a.csv", 'id,text\n1,"x"y\n', r"a\.csv:2: "),
    ],
)
def test_an_error_names_its_place(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        read(TextFiles(path=write(tmp_path / name, content)))


def test_a_line_above_the_limit_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("components.data.sources.text_io.MAX_LINE_BYTES", 100)
    path = write(tmp_path / "a.jsonl", '{"text": "short"}\n{"text": "' + "long" * 50 + '"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:2: a line has more than 100 bytes"):
        read(TextFiles(path=path))


def test_long_values_come_in_parts_and_lose_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("components.data.sources.formats._PART_CHARACTERS", 50)
    texts = ["".join(f"line {i} of it\n" if i % 7 else "x" * 3 * i for i in range(60)), "short", "y" * 1000]
    source = TextFiles(path=write(tmp_path / "a.jsonl", "".join(json.dumps({"text": t}) + "\n" for t in texts)))
    assert read(source)[0] == texts
    assert max(len(document.text) for document in source.documents(ReadStats())) <= 50
