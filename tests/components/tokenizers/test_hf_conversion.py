"""The converted tokenizer.json encodes identically, for any vocabulary: gaps, special tokens, bytes."""

import base64
from pathlib import Path

import pytest

from components.tokenizers import Bytes, TiktokenFile
from components.tokenizers.hf_conversion import save

tokenizers = pytest.importorskip("tokenizers", reason="needs the [hf] extra")

ROOT = Path(__file__).resolve().parents[3]
OWN = ROOT / "assets" / "tokenizers" / "stdlib-4096.tiktoken"
TEXT = (ROOT / "README.md").read_text(encoding="utf-8") + "Ça, 鯨 🐋 — 1234567890\r\n\t x"


def written(encoder, folder):
    assert save(encoder, folder, max_length=2048) == ["tokenizer.json", "tokenizer_config.json"]
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def same(encoder, theirs, text=TEXT):
    ids = encoder.encode_batch([text])[0].tolist()
    assert theirs.encode(text).ids == ids
    assert theirs.decode(ids) == text


def holes(tmp_path: Path) -> Path:
    """A rank file with a gap in the middle and one before the end."""
    file = tmp_path / "holes.tiktoken"
    tokens = [bytes((byte,)) for byte in range(256)] + [b"th", b"the", b"he"]
    ranks = [*range(256), 300, 301, 400]
    file.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % r for t, r in zip(tokens, ranks, strict=True)))
    return file


@pytest.mark.parametrize("pattern", ["gpt2", "cl100k", "llama3"])
def test_a_rank_file(tmp_path, pattern):
    encoder = TiktokenFile(path=OWN, pattern=pattern).build()
    theirs = written(encoder, tmp_path)
    same(encoder, theirs)
    assert theirs.token_to_id("<|endoftext|>") == encoder.end_of_document
    assert theirs.get_vocab_size() == encoder.vocab_size


def test_special_tokens_keep_their_ids_over_holes(tmp_path):
    special = ["<a>", "<|endoftext|>", "<b>"]
    encoder = TiktokenFile(path=holes(tmp_path), pattern="cl100k", special_tokens=special).build()
    theirs = written(encoder, tmp_path)
    same(encoder, theirs, "the then he")
    assert [theirs.token_to_id(token) for token in special] == [401, 402, 403]
    assert theirs.encode("the<b>").ids == [301, 403]


def test_bytes(tmp_path):
    encoder = Bytes().build()
    theirs = written(encoder, tmp_path)
    same(encoder, theirs)
    assert theirs.encode("a<|endoftext|>").ids == [97, 256]


def test_a_pattern_that_the_library_reads_otherwise_is_refused_before_writing(tmp_path):
    pattern = r"\p{L}{1,3}+|\p{N}{1,3}+|\s|[^\s\p{L}\p{N}]"  # {1,3}+ is possessive in one, a repetition in the other
    encoder = TiktokenFile(path=OWN, pattern=pattern).build()
    with pytest.raises(ValueError, match="library encodes"):
        save(encoder, tmp_path, max_length=1)
    assert list(tmp_path.iterdir()) == []


def test_a_special_token_that_text_could_give_is_refused(tmp_path):
    encoder = TiktokenFile(path=OWN, pattern="gpt2", special_tokens=["<|endoftext|>", "def"]).build()
    with pytest.raises(ValueError, match="'def' is also an ordinary token"):
        save(encoder, tmp_path, max_length=1)


@pytest.mark.parametrize(("name", "pattern"), [("r50k_base", "gpt2"), ("cl100k_base", "cl100k")])
def test_published_vocabularies(tmp_path, reference, name, pattern):
    encoder = TiktokenFile(path=reference("tokenizers/tiktoken") / f"{name}.tiktoken", pattern=pattern).build()
    theirs = written(encoder, tmp_path)
    same(encoder, theirs)
    assert theirs.token_to_id("<|endoftext|>") == encoder.end_of_document
