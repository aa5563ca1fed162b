import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.data import TextFiles
from components.data.dataset import TokenDataset
from components.data.document import ReadStats
from components.data.tokenize import tokenize_missing
from components.tokenizers import Bytes, TiktokenFile
from tests.components.data.conftest import Given

pytestmark = pytest.mark.quick

RANKS = Path(__file__).resolve().parents[3] / "assets" / "tokenizers" / "stdlib-4096.tiktoken"
TEXTS = [
    "Call me Ishmael.",
    "",
    "Some years ago — never mind how long precisely —",
    "  \n",
    "having little or no money",
]


def concatenated(texts: list[str]) -> list[int]:
    """Bytes of the documents that have text, 256 after each."""
    return [token for text in texts if text.strip() for token in [*text.encode(), 256]]


def open_in_shards(folder, texts, *, sequence_length, shard_tokens, monkeypatch):
    """Prepared with shards of about `shard_tokens`."""
    monkeypatch.setattr("components.data.cache.tokenize_missing", partial(tokenize_missing, shard_tokens=shard_tokens))
    return Given(text=tuple(texts)).build(
        tokenizer=Bytes().build(), sequence_length=sequence_length, cache_dir=folder, progress=print
    )


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text(max_size=30), min_size=1, max_size=12),
    sequence_length=st.integers(1, 40),
    shard_tokens=st.integers(1, 60),
)
def test_sequences_are_the_documents_end_to_end_across_shards(tmp_path_factory, texts, sequence_length, shard_tokens):
    with pytest.MonkeyPatch.context() as patch:
        check_sequences(tmp_path_factory.mktemp("p"), texts, sequence_length, shard_tokens, patch)


def check_sequences(folder, texts, sequence_length, shard_tokens, monkeypatch):
    tokens = concatenated(texts)
    if (length := (len(tokens) - 1) // sequence_length) < 1:
        return
    samples = open_in_shards(
        folder, texts, sequence_length=sequence_length, shard_tokens=shard_tokens, monkeypatch=monkeypatch
    )
    assert len(samples) == length
    whole = samples.__getitems__(range(length))
    assert whole.shape == (length, sequence_length + 1)
    assert whole.dtype == torch.int64
    for i, row in enumerate(whole.tolist()):
        assert row == tokens[i * sequence_length : i * sequence_length + sequence_length + 1]
        assert samples[i].tolist() == row
    backwards = samples.__getitems__(list(range(length))[::-1])
    assert torch.equal(backwards, whole.flip(0))


def test_documents_and_their_bytes_are_kept(tmp_path, monkeypatch):
    samples = open_in_shards(tmp_path, TEXTS, sequence_length=4, shard_tokens=20, monkeypatch=monkeypatch)
    kept = [text for text in TEXTS if text.strip()]
    assert samples.document_lengths().tolist() == [[len(t.encode()) + 1, len(t.encode())] for t in kept]
    assert samples.index.documents == 3
    assert len(samples.index.shards) > 1
    assert samples.index.dropped == {"empty": 2}


def test_the_end_token_stands_where_documents_end_and_nowhere_else(tmp_path):
    """Document masking relies on it; text that spells it is ordinary text."""
    tokenizer = TiktokenFile(path=RANKS, pattern="cl100k").build()
    text = ("one", "<|endoftext|>", "two <|endoftext|> three", "four")
    samples = Given(text=text).build(tokenizer=tokenizer, sequence_length=1, cache_dir=tmp_path, progress=print)
    lengths = samples.document_lengths()[:, 0]
    ids = samples.tokens(0, int(lengths.sum()))
    assert np.flatnonzero(ids == tokenizer.end_of_document).tolist() == (np.cumsum(lengths) - 1).tolist()
    assert len(lengths) == len(text)


def test_every_byte_but_the_first_is_a_label(packed):
    samples = packed(TEXTS, 1)
    labels = samples.__getitems__(range(len(samples)))[:, 1:]
    text_bytes = sum(len(text.encode()) for text in TEXTS if text.strip())
    assert Bytes().build().byte_lengths[labels.numpy()].sum() == text_bytes - 1 == samples.index.text_bytes - 1


def test_pickling_carries_no_tokens(packed):
    samples = packed(["word " * 10_000], 8)
    samples[0]
    data = pickle.dumps(samples)
    assert len(data) < 5000
    assert torch.equal(pickle.loads(data)[7], samples[7])


def test_outside_is_an_error(packed):
    samples = packed(["0123456789"], 5)
    assert len(samples) == 2
    for index in (2, -1):
        with pytest.raises(IndexError, match=f"index {index} is out of range for 2 sequences"):
            samples[index]


def test_too_little_text_is_an_error_with_numbers(packed):
    with pytest.raises(ValueError, match=r"holds 4 tokens; one sequence needs sequence_length \+ 1 = 101"):
        packed(["abc"], 100)
    with pytest.raises(ValueError, match="sequence_length = 0"):
        packed(["abc"], 0)


def test_ids_outside_the_vocabulary_never_reach_the_model(packed):
    samples = packed(["some text"], 4)
    with pytest.raises(ValueError, match=r"a test: token id \d+ is outside the vocabulary of 100"):
        TokenDataset(samples.reader, sequence_length=4, vocab_size=100, source="a test")[0]


def test_tinyshakespeare_has_the_reference_number_of_tokens(texts, tmp_path):
    ranks = texts.parent / "tokenizers/tiktoken/r50k_base.tiktoken"
    tokenizer = TiktokenFile(path=ranks, pattern="gpt2").build()
    samples = TextFiles(path=texts / "tinyshakespeare").build(
        tokenizer=tokenizer, sequence_length=128, cache_dir=tmp_path, progress=print
    )
    assert samples.index.tokens == 338_025 + 1
    assert samples.index.dtype == "uint16"
    assert len(samples) == 338_025 // 128


def test_a_vocabulary_above_65536_is_stored_in_uint32(texts, tmp_path):
    ranks = texts.parent / "tokenizers/tiktoken/cl100k_base.tiktoken"
    tokenizer = TiktokenFile(path=ranks, pattern="cl100k").build()
    samples = TextFiles(path=texts / "c4").build(
        tokenizer=tokenizer, sequence_length=16, cache_dir=tmp_path, progress=print
    )
    assert samples.index.dtype == "uint32"
    tokens = samples.__getitems__(range(len(samples)))[:, :-1].flatten().numpy()
    assert tokens.max() > 2**16
    first = tokens[: np.flatnonzero(tokens == tokenizer.end_of_document)[0]]
    assert tokenizer.decode(first) == next(iter(TextFiles(path=texts / "c4").documents(ReadStats()))).text
