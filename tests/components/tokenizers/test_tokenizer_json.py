"""A tokenizer.json encodes as the rank file it was made from, adds nothing and finds nothing special in text."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from components.tokenizers import TiktokenFile, TokenizerJson
from components.tokenizers.hf_conversion import save

pytest.importorskip("tokenizers", reason="needs tokenizers: pip install -e '.[hf]'")
pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parents[3]
END = "<|endoftext|>"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    ours = TiktokenFile(path=ROOT / "assets" / "tokenizers" / "stdlib-4096.tiktoken", pattern="cl100k").build()
    folder = tmp_path_factory.mktemp("json")
    save(ours, folder, max_length=64)
    return ours, TokenizerJson(path=folder / "tokenizer.json").build()


def test_it_is_the_tokenizer_it_was_made_from(pair):
    ours, theirs = pair
    assert (theirs.vocab_size, theirs.end_of_document) == (ours.vocab_size, ours.end_of_document)
    np.testing.assert_array_equal(theirs.byte_lengths, ours.byte_lengths)
    texts = [(ROOT / "README.md").read_text(encoding="utf-8"), f"Ça 鯨 🐋\r\n\t {END} x", ""]
    for text, expected, found in zip(texts, ours.encode_batch(texts), theirs.encode_batch(texts), strict=True):
        assert found.tolist() == expected.tolist()
        assert ours.end_of_document not in found
        assert theirs.decode(found.tolist()) == text
        assert theirs.byte_lengths[found].sum() == len(text.encode())
    assert theirs.decode([ours.end_of_document]) == END


def test_special_tokens_are_parsed_only_where_that_is_asked_for_also_after_pickling(pair, tmp_path):
    _, plain = pair
    plain.hugging_face().save(str(tmp_path / "tokenizer.json"))
    parsing = TokenizerJson(path=tmp_path / "tokenizer.json", parse_special=True).build()
    for encoder, count in ((plain, 0), (parsing, 1)):
        for each in (encoder, pickle.loads(pickle.dumps(encoder))):
            assert (each.encode_batch([f"x {END} y"])[0] == 4095).sum() == count
    assert plain.fingerprint != parsing.fingerprint


def test_a_tokenizer_of_sentence_pieces_counts_its_bytes(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"<unk>": 0, "\u2581": 1, "\u2581a": 2, "ü": 3, "<0x0A>": 4, "</s>": 5}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("\u2581", "a")][:0], unk_token="<unk>"))
    made.add_special_tokens(["<unk>", "</s>"])
    made.save(str(tmp_path / "tokenizer.json"))
    built = TokenizerJson(path=tmp_path / "tokenizer.json", end_of_document="</s>").build()
    assert built.byte_lengths.tolist() == [0, 1, 2, 2, 1, 0]
    with pytest.raises(ValueError, match="outside the vocabulary of 6"):
        built.decode([6])


def test_mistakes_name_the_file(tmp_path, pair):
    file = tmp_path / "tokenizer.json"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        TokenizerJson(path=file).build()
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        TokenizerJson(path=file).build()
    pair[1].hugging_face().save(str(file))
    with pytest.raises(ValueError, match="has no token '<eos>'"):
        TokenizerJson(path=file, end_of_document="<eos>").build()
