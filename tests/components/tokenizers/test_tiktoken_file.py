import base64
import gzip
import pickle
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from components.tokenizers import TiktokenEncoding, TiktokenFile
from components.tokenizers.patterns import PATTERNS
from components.tokenizers.tiktoken_file import split_long_runs

pytestmark = pytest.mark.quick

SHIPPED = Path(__file__).resolve().parents[3] / "assets" / "tokenizers" / "stdlib-4096.tiktoken"

# As tiktoken has them for r50k_base, cl100k_base and o200k_base, and Meta for Llama 3.
OFFICIAL = {
    "o200k": "|".join(
        [
            r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
            r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
            r"""\p{N}{1,3}""",
            r""" ?[^\s\p{L}\p{N}]+[\r\n/]*""",
            r"""\s*[\r\n]+""",
            r"""\s+(?!\S)""",
            r"""\s+""",
        ]
    ),
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "cl100k": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"
        r"|\s*[\r\n]|\s+(?!\S)|\s"
    ),
    "llama3": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}


def line(token: bytes, rank: int) -> bytes:
    return base64.b64encode(token) + b" %d\n" % rank


def rank_file(path: Path, extra: dict[bytes, int]) -> Path:
    """The 256 bytes as ranks 0..255 and what is in `extra`."""
    ranks = {bytes((byte,)): byte for byte in range(256)} | extra
    path.write_bytes(b"".join(line(token, rank) for token, rank in ranks.items()))
    return path


def ranks_of(path: Path) -> dict[bytes, int]:
    return {base64.b64decode(a): int(b) for a, b in (entry.split() for entry in path.read_bytes().splitlines())}


TRICKY = st.text(
    st.sampled_from(" \n\r\t\u3000'sStTlLreREé中1239!?.-_()=\u00a0\u2028\x1c🙂") | st.characters(), max_size=60
)


@pytest.mark.parametrize("name", PATTERNS)
def test_named_patterns_give_the_ids_of_the_official_ones(name):
    ranks = ranks_of(SHIPPED)
    official = tiktoken.Encoding("official", pat_str=OFFICIAL[name], mergeable_ranks=ranks, special_tokens={})
    ours = TiktokenFile(path=SHIPPED, pattern=name).build()

    @settings(max_examples=300, deadline=None)
    @given(TRICKY)
    def agree(text):
        assert ours.encode_batch([text])[0].tolist() == official.encode_ordinary(text)

    agree()


def test_shipped_file_has_a_vocabulary_of_4096():
    encoder = TiktokenFile(path=SHIPPED, pattern="cl100k").build()
    assert encoder.vocab_size == 4096
    assert encoder.end_of_document == 4095
    code = "def f(self):\n        return self.x\n"
    (ids,) = encoder.encode_batch([code])
    assert encoder.decode(ids) == code
    assert ids.dtype == np.uint16
    assert len(ids) <= 12  # indentation is one token


@pytest.mark.slow
@settings(deadline=None)
@given(st.lists(st.text(), max_size=5))
def test_text_comes_back_and_byte_lengths_add_up(texts):
    encoder = TiktokenFile(path=SHIPPED, pattern="cl100k").build()
    for text, ids in zip(texts, encoder.encode_batch(texts), strict=True):
        assert encoder.decode(ids) == text
        assert encoder.byte_lengths[ids].sum() == len(text.encode())


def test_special_tokens_in_a_text_are_ordinary_text():
    encoder = TiktokenFile(path=SHIPPED, pattern="cl100k", special_tokens=["<|a|>", "<|endoftext|>"]).build()
    (ids,) = encoder.encode_batch(["x<|endoftext|>y<|a|>"])
    assert ids.max() < 4095
    assert encoder.decode([*ids, 4095, 4096]) == "x<|endoftext|>y<|a|><|a|><|endoftext|>"
    assert encoder.byte_lengths[4095:].tolist() == [0, 0]


def test_gaps_between_ranks_are_not_ids(tmp_path):
    encoder = TiktokenFile(path=rank_file(tmp_path / "holes", {b"ab": 300}), pattern="gpt2").build()
    assert encoder.vocab_size == 302
    assert encoder.end_of_document == 301
    assert encoder.encode_batch(["ab"])[0].tolist() == [300]
    assert encoder.byte_lengths[[256, 299, 300, 301]].tolist() == [0, 0, 2, 0]
    for impossible in (270, 302, -1, 2**40):
        with pytest.raises(ValueError, match="vocabulary of 302"):
            encoder.decode([impossible])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "256 of the 256 single bytes"),
        (b"not a rank file\n", ":1: expected `base64 rank`"),
        (line(b"a", 0) + b"YWI=\n", ":2: expected `base64 rank`"),
        (line(b"a", 0) + b"YW%I= 3\n", ":2: expected `base64 rank`"),
        (line(b"a", 0) + line(b"b", -1), ":2: expected a token and a rank from 0"),
        (line(b"a", 0) + line(b"b", 10**15), ":2: expected a token and a rank from 0"),
        (line(b"a", 0) + line(b"b", 1) + line(b"a", 2), ":3: .* is already on line 1"),
        (line(b"a", 0) + line(b"b", 1) + line(b"c", 1), ":3: .* is already on line 2"),
        (b"\x00\xff\xfe garbage", ":1: expected `base64 rank`"),
    ],
)
def test_damaged_files_are_refused_with_file_and_line(tmp_path, content, message):
    path = tmp_path / "ranks"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        TiktokenFile(path=path, pattern="gpt2").build()
    assert str(path) in str(error.value)


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=200))
def test_no_bytes_crash_the_reader(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzzed"
    path.write_bytes(content)
    with pytest.raises(ValueError):
        TiktokenFile(path=path, pattern="gpt2").build()


def test_bad_settings_name_their_key():
    with pytest.raises(FileNotFoundError, match=r"path: .*nowhere"):
        TiktokenFile(path=Path("nowhere"), pattern="gpt2").build()
    with pytest.raises(ValueError, match="pattern: 'gpt3' is not one of gpt2"):
        TiktokenFile(path=SHIPPED, pattern="gpt3").build()
    with pytest.raises(ValueError, match=r"pattern: .* not a regular expression"):
        TiktokenFile(path=SHIPPED, pattern="(((").build()
    with pytest.raises(ValueError, match="end_of_document: '<eos>' is not among"):
        TiktokenFile(path=SHIPPED, pattern="gpt2", end_of_document="<eos>").build()
    with pytest.raises(ValueError, match=r"special_tokens: .* twice"):
        TiktokenFile(path=SHIPPED, pattern="gpt2", special_tokens=["<|endoftext|>", "<|endoftext|>"]).build()


def test_the_fingerprint_follows_everything_that_changes_ids(tmp_path):
    plain = rank_file(tmp_path / "a", {b"ab": 256})
    moved = rank_file(tmp_path / "b", {b"ab": 256})
    other = rank_file(tmp_path / "c", {b"ac": 256})
    prints = [
        TiktokenFile(path=plain, pattern="gpt2"),
        TiktokenFile(path=other, pattern="gpt2"),
        TiktokenFile(path=plain, pattern="cl100k"),
        TiktokenFile(path=plain, pattern="gpt2", special_tokens=["<s>", "<|endoftext|>"]),
        TiktokenFile(path=plain, pattern="gpt2", special_tokens=["<|endoftext|>", "<s>"], end_of_document="<s>"),
    ]
    assert len({tokenizer.build().fingerprint for tokenizer in prints}) == len(prints)
    assert TiktokenFile(path=moved, pattern="gpt2").build().fingerprint == prints[0].build().fingerprint


def test_a_pickled_encoder_encodes_alike():
    encoder = TiktokenFile(path=SHIPPED, pattern="cl100k").build()
    copy = pickle.loads(pickle.dumps(encoder))
    assert copy.fingerprint == encoder.fingerprint
    assert copy.encode_batch(["def f(): pass"])[0].tolist() == encoder.encode_batch(["def f(): pass"])[0].tolist()


@pytest.mark.parametrize(
    "text", [" " * 1_000_000 + "x", "a" * 1_000_000, "\n" * 300_000, "中" * 200_000, "-" * 300_000]
)
def test_pathological_documents_encode_and_come_back(text):
    encoder = TiktokenFile(path=SHIPPED, pattern="cl100k").build()
    assert encoder.decode(encoder.encode_batch([text])[0]) == text


@given(st.lists(st.tuples(st.sampled_from([" ", "a", "\n", "b c "]), st.integers(1, 40)), max_size=12))
def test_cuts_leave_no_long_run_and_touch_no_other_text(runs):
    text = "".join(piece * count for piece, count in runs)
    parts = list(split_long_runs(text, longest=8))
    assert "".join(parts) == text

    def longest_run(part: str) -> int:
        best = run = 0
        previous = None
        for character in part:
            run = run + 1 if character.isspace() == previous else 1
            previous, best = character.isspace(), max(best, run)
        return best

    assert all(longest_run(part) <= 3 * 8 for part in parts)
    if longest_run(text) < 8:
        assert parts == [text]


def test_r50k_encodes_tinyshakespeare_to_the_reference_number(rank_files):
    text = gzip.decompress((rank_files.parents[1] / "text/tinyshakespeare/input.txt.gz").read_bytes()).decode()
    encoder = TiktokenFile(path=rank_files / "r50k_base.tiktoken", pattern="gpt2").build()
    assert encoder.vocab_size == 50_257
    assert encoder.end_of_document == 50_256
    (ids,) = encoder.encode_batch([text])
    assert len(ids) == 338_025
    assert encoder.byte_lengths[ids].sum() == len(text.encode())


@pytest.mark.slow
@pytest.mark.parametrize(("file", "pattern"), [("r50k_base", "gpt2"), ("cl100k_base", "cl100k")])
def test_ids_equal_those_of_tiktokens_own_encodings(rank_files, file, pattern):
    ranks = ranks_of(rank_files / f"{file}.tiktoken")
    theirs = tiktoken.Encoding("theirs", pat_str=OFFICIAL[pattern], mergeable_ranks=ranks, special_tokens={})
    ours = TiktokenFile(path=rank_files / f"{file}.tiktoken", pattern=pattern).build()

    @settings(max_examples=500, deadline=None)
    @given(TRICKY)
    def agree(text):
        assert ours.encode_batch([text])[0].tolist() == theirs.encode_ordinary(text)

    agree()


def test_llama3_has_its_special_tokens_where_meta_has_them(tmp_path):
    encoder = TiktokenFile(
        path=rank_file(tmp_path / "tokenizer.model", {b"ab": 127_999}),
        pattern="llama3",
        special_tokens="llama3",
        end_of_document="<|end_of_text|>",
    ).build()
    assert encoder.vocab_size == 128_256
    assert encoder.end_of_document == 128_001
    known = {"<|begin_of_text|>": 128_000, "<|start_header_id|>": 128_006, "<|end_header_id|>": 128_007}
    known |= {"<|eot_id|>": 128_009, "<|reserved_special_token_250|>": 128_255, "<|reserved_special_token_4|>": 128_008}
    assert {token: encoder.decode([number]) for token, number in known.items()} == {token: token for token in known}
    with pytest.raises(ValueError, match=r"end_of_document: .* for Llama 3, set it to '<\|end_of_text\|>'"):
        TiktokenFile(path=tmp_path / "tokenizer.model", pattern="llama3", special_tokens="llama3").build()


def test_special_tokens_are_parsed_only_where_that_is_asked_for():
    plain, parsing = (TiktokenFile(path=SHIPPED, pattern="cl100k", parse_special=parse).build() for parse in (0, 1))
    text = "x<|endoftext|>y"
    assert parsing.encode_batch([text])[0].tolist() == [
        *plain.encode_batch(["x"])[0], 4095, *plain.encode_batch(["y"])[0]
    ]  # fmt: skip
    assert 4095 not in plain.encode_batch([text])[0]
    assert plain.fingerprint != parsing.fingerprint


def test_a_lone_surrogate_becomes_the_replacement_character():
    encoder = TiktokenFile(path=SHIPPED, pattern="cl100k").build()
    assert encoder.decode(encoder.encode_batch(["a\ud800b"])[0]) == "a\ufffdb"


def test_encodings_of_tiktoken_by_name(rank_files, tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    monkeypatch.setattr("tiktoken.load.read_file", lambda url: (rank_files / url.rpartition("/")[2]).read_bytes())
    encoder = TiktokenEncoding(name="cl100k_base").build()
    theirs = tiktoken.get_encoding("cl100k_base")
    assert encoder.vocab_size == theirs.n_vocab == 100_277
    assert encoder.end_of_document == theirs.eot_token == 100_257
    text = "def f(x):\r\n    return 'It\u2019s 12345' <|endoftext|>"
    assert encoder.encode_batch([text])[0].tolist() == theirs.encode_ordinary(text)
    assert encoder.byte_lengths[[100_256, 100_257, 100_270]].tolist() == [0, 0, 0]  # holes and special tokens
    with pytest.raises(ValueError, match="name: 'gpt7' is not one of gpt2"):
        TiktokenEncoding(name="gpt7").build()
    with pytest.raises(ValueError, match="end_of_document: '</s>' is not among"):
        TiktokenEncoding(name="cl100k_base", end_of_document="</s>").build()
