"""Token files of other tools are read as their writers wrote them."""

import itertools
import struct
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.data import TokenFiles
from components.data.sources import token_files
from components.tokenizers import Bytes

pytestmark = pytest.mark.quick

# Written by IndexedDatasetBuilder of Megatron-LM (megatron-core 0.16.1): documents [5 6 7 256], [1 2][3 256] in two
# sequences, and [300 301 256], as uint16 and as int32.
MEGATRON = {
    "uint16": (
        "050006000700000101000200030000012c012d010001",
        "4d4d494449445800000100000000000000080400000000000000040000000000000004000000020000000200000003000000"
        "000000000000000008000000000000000c0000000000000010000000000000000000000000000000010000000000000003000000"
        "000000000400000000000000",
    ),
    "int32": (
        "05000000060000000700000000010000010000000200000003000000000100002c0100002d01000000010000",
        "4d4d494449445800000100000000000000040400000000000000040000000000000004000000020000000200000003000000"
        "000000000000000010000000000000001800000000000000200000000000000000000000000000000100000000000000030000000"
        "00000000400000000000000",
    ),
}
IDS = [5, 6, 7, 256, 1, 2, 3, 256, 300, 301, 256]


class Wide:
    vocab_size = 400
    end_of_document = 256


def build(path, tokenizer=None, sequence_length=2, progress=None, **settings):
    cache_dir = (path[0] if isinstance(path, list) else path).parent / "cache"
    return TokenFiles(path=path, **settings).build(
        tokenizer=tokenizer or Wide(),
        sequence_length=sequence_length,
        cache_dir=cache_dir,
        progress=progress or pytest.fail,
    )


def all_tokens(samples) -> list[int]:
    return samples.tokens(0, len(samples.reader)).tolist()


@pytest.mark.parametrize("dtype", MEGATRON)
def test_megatron_files_as_its_own_writer_wrote_them(tmp_path, dtype):
    for suffix, content in zip((".bin", ".idx"), MEGATRON[dtype], strict=True):
        (tmp_path / f"corpus_text_document{suffix}").write_bytes(bytes.fromhex(content))
    samples = build(tmp_path / "corpus_text_document.bin")
    assert all_tokens(samples) == IDS
    assert samples[1].tolist() == IDS[2:5]
    assert len(samples) == 5


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_nanogpt_files_as_its_prepare_scripts_write_them(tmp_path, dtype):
    ids = np.random.default_rng(0).integers(0, 257, 1000)
    written = np.memmap(tmp_path / "train.bin", dtype=np.dtype(dtype), mode="w+", shape=(1000,))
    written[:] = ids
    written.flush()
    samples = build(tmp_path / "train.bin", Bytes().build(), sequence_length=99, dtype=dtype)
    assert len(samples) == 10
    assert samples.__getitems__([9, 0]).tolist() == [ids[891:991].tolist(), ids[:100].tolist()]
    assert all_tokens(build([tmp_path / "train.bin"] * 2, Bytes().build(), dtype=dtype)) == [*ids, *ids]


def write_index(path, code, lengths, pointers, starts):
    """Write a file in the published layout."""
    header = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code)
    counts = struct.pack("<QQ", len(lengths), len(starts))
    arrays = (
        np.array(lengths, "<i4").tobytes() + np.array(pointers, "<i8").tobytes() + np.array(starts, "<i8").tobytes()
    )
    path.write_bytes(header + counts + arrays)


@settings(max_examples=60, deadline=None)
@given(
    sequences=st.lists(st.lists(st.integers(0, 399), max_size=5), min_size=1, max_size=8),
    code=st.sampled_from([(3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2")]),
    order=st.randoms(use_true_random=False),
)
def test_sequences_are_read_in_the_order_of_the_index(tmp_path_factory, sequences, code, order):
    folder = tmp_path_factory.getbasetemp()
    places = list(range(len(sequences)))
    order.shuffle(places)  # in the file they may lie in any order
    size = np.dtype(code[1]).itemsize
    starts = dict(
        zip(places, itertools.accumulate((len(sequences[i]) * size for i in places), initial=0), strict=False)
    )
    (folder / "m.bin").write_bytes(b"".join(np.array(sequences[i], code[1]).tobytes() for i in places))
    write_index(
        folder / "m.idx", code[0], [len(s) for s in sequences], [starts[i] for i in range(len(sequences))],
        range(len(sequences) + 1),
    )  # fmt: skip
    expected = [token for sequence in sequences for token in sequence]
    if len(expected) < 3:
        return
    assert all_tokens(build(folder / "m.bin", progress=lambda line: None)) == expected


def test_documents_without_end_tokens_are_reported(tmp_path):
    lines: list[str] = []
    (tmp_path / "m.bin").write_bytes(np.array([1, 2, 3, 4, 5, 6], "<u2").tobytes())
    write_index(tmp_path / "m.idx", 8, [3, 3], [0, 6], [0, 1, 2])
    build(tmp_path / "m.bin", progress=lines.append)
    assert "do not end with id 256" in lines[0]
    assert "--append-eod" in lines[0]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"MMIDIDX", "is not an index of Megatron-LM"),
        (b"TNTIDX\x00\x00" + bytes(40), "is not an index of Megatron-LM"),
        (b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 6, 1, 1), "version 1, type code 6"),
        (b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 2**60, 1), "is truncated"),
    ],
)
def test_invalid_indexes_are_refused(tmp_path, index, message):
    (tmp_path / "m.bin").write_bytes(bytes(100))
    (tmp_path / "m.idx").write_bytes(index)
    with pytest.raises(ValueError, match=rf"m\.idx.* {message}|m\.idx: {message}"):
        build(tmp_path / "m.bin")


@pytest.mark.parametrize(
    ("lengths", "pointers", "starts", "message"),
    [
        ([3], [1], [0, 1], "does not start at an id"),
        ([-3], [0], [0, 1], "does not start at an id"),
        ([60], [0], [0, 1], r"m\.bin is truncated"),
        ([30], [0], [0, 1], r"m\.idx is the index of another file: it covers 60 of 100 bytes"),
        ([50], [0], [1, 0], "not in order"),
        ([50], [0], [0, 2], "not in order"),
    ],
)
def test_inconsistent_indexes_are_refused(tmp_path, lengths, pointers, starts, message):
    (tmp_path / "m.bin").write_bytes(bytes(100))
    write_index(tmp_path / "m.idx", 8, lengths, pointers, starts)
    with pytest.raises(ValueError, match=message):
        build(tmp_path / "m.bin")


def test_other_mistakes_are_reported(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^path: .*nowhere\.bin does not exist"):
        build(tmp_path / "nowhere.bin")
    (tmp_path / "odd.bin").write_bytes(bytes(101))
    with pytest.raises(ValueError, match=r"odd\.bin has 101 bytes, not a multiple of the size of uint16"):
        build(tmp_path / "odd.bin")
    np.full(100, 300, "<u2").tofile(tmp_path / "large.bin")
    with pytest.raises(ValueError, match=r"large\.bin: token id 300 is outside the vocabulary of 257"):
        build(tmp_path / "large.bin", Bytes().build())[0]
    np.zeros(100, "<u4").tofile(tmp_path / "wide.bin")
    large = SimpleNamespace(vocab_size=2**16 + 1, end_of_document=0)
    with pytest.raises(ValueError, match=r"^dtype: uint16 cannot hold the 65,537 ids of the tokenizer; .*wide\.bin"):
        build(tmp_path / "wide.bin", large)
    assert len(build(tmp_path / "wide.bin", large, dtype="uint32")) == 49
    np.zeros(100, "<u2").tofile(tmp_path / "a.bin")
    write_index(tmp_path / "b.idx", 4, [25], [0], [0, 1])
    (tmp_path / "b.bin").write_bytes(bytes(100))
    with pytest.raises(ValueError, match=r"path: all files must have the same dtype: .*a\.bin uint16"):
        build([tmp_path / "a.bin", tmp_path / "b.bin"])


def test_the_fingerprint_follows_the_ids_and_not_their_place(tmp_path):
    folders = [tmp_path / name for name in ("one", "moved", "other")]
    for folder, last in zip(folders, (7, 7, 8), strict=True):
        folder.mkdir()
        np.array([1, 2, 3, 4, 5, 6, last], dtype=np.uint16).tofile(folder / "ids.bin")
    one, moved, other = (build(folder / "ids.bin").fingerprint for folder in folders)
    assert one is not None and one == moved != other


def test_of_a_large_file_size_and_blocks_are_hashed(tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "_HASHED_WHOLE", 1000)
    monkeypatch.setattr(token_files, "_HASHED_BLOCKS", 3)
    monkeypatch.setattr(token_files, "_BLOCK_BYTES", 10)

    def fingerprint(name: str, size: int, changed: int | None = None) -> str | None:
        ids = np.arange(size, dtype=np.uint16) % 100
        if changed is not None:
            ids[changed] = 101
        ids.tofile(tmp_path / name)
        return build(tmp_path / name).fingerprint

    first = fingerprint("first.bin", 600)
    assert first == fingerprint("equal.bin", 600)
    assert first == fingerprint("between.bin", 600, changed=100), "between two blocks, which is not read"
    others = [fingerprint("end.bin", 600, 599), fingerprint("middle.bin", 600, 299), fingerprint("start.bin", 600, 0)]
    assert len({first, *others, fingerprint("longer.bin", 700)}) == 5
