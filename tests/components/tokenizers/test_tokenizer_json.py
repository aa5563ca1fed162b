"""A tokenizer.json encodes as the rank file it was made from, adds nothing and finds nothing special in text."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from components.token_ids import fit_vocabulary
from components.tokenizers import TiktokenFile, TokenizerJson
from components.tokenizers.hf_conversion import byte_characters, save

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


IMAGE = "<image_soft_token>"


@pytest.mark.parametrize(
    ("special", "keys", "size"),
    [
        (True, {}, 4096),
        (False, {}, 4097),
        (True, {"parse_special": True}, 4097),
        (True, {"end_of_document": IMAGE}, 4097),
    ],
)
def test_only_a_special_token_that_is_never_encoded_may_lack_a_row(pair, tmp_path, special, keys, size):
    """As in the tokenizer.json of Gemma 3, whose last token has the id 262,144, the number of rows of its 1B model."""
    encoder = extended(pair, tmp_path / "tokenizer.json", special=special, **keys)
    before = encoder.fingerprint
    assert fit_vocabulary(encoder, 4096).vocab_size == len(encoder.byte_lengths) == size
    assert (encoder.fingerprint == before) == (size == 4097)
    if size == 4096:
        assert max(encoder.encode_batch([f"x {IMAGE} y"])[0]) < 4096
        with pytest.raises(ValueError, match="outside the vocabulary of 4096"):
            encoder.decode([4096])
        assert fit_vocabulary(encoder, 300).vocab_size == 4096


def extended(pair, path, *, special, **keys):
    """Return the tokenizer of `pair` with one more token, from the file `path`."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer.from_str(pair[1].hugging_face().to_str())
    made.add_tokens([tokenizers.AddedToken(IMAGE, special=special, normalized=False)])
    made.save(str(path))
    return TokenizerJson(path=path, **keys).build()


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


def write_byte_tokenizer(folder: Path, start_id: int = 257, **template: str) -> Path:
    """Write a tokenizer.json of bytes with </s> 256 and <s> 257, which adds tokens as `template` says."""
    tokenizers = pytest.importorskip("tokenizers")
    special = {"</s>": 256, "<s>": 257}
    vocabulary = {character: byte for byte, character in byte_characters().items()}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary | special, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(list(special))
    processors = [tokenizers.processors.ByteLevel(trim_offsets=False)]
    if template:
        ids = [("<s>", start_id), ("</s>", 256), ("a", 97)]
        processors.append(tokenizers.processors.TemplateProcessing(**template, special_tokens=ids))
    made.post_processor = tokenizers.processors.Sequence(processors)
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.mark.parametrize("single", ["<s> $A", "<s> $A </s>", "$A </s>", "$A", None])
def test_the_start_token_is_the_one_that_transformers_adds(tmp_path, single):
    transformers = pytest.importorskip("transformers")
    path = write_byte_tokenizer(tmp_path, **({} if single is None else {"single": single}))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
    ours = TokenizerJson(path=path, end_of_document="</s>", start_of_document="auto").build()
    for text in ("", "Ça 🐋", "x <s> y"):
        found = ours.encode_batch([text])[0].tolist()
        assert 257 not in found, "text that spells it is ordinary text"
        whole = [] if ours.start_of_document is None else [ours.start_of_document]
        whole += [*found, *([256] if "</s>" in (single or "") else [])]
        assert whole == theirs(text, add_special_tokens=True, split_special_tokens=True)["input_ids"]
    assert (ours.start_of_document == 257) == (single or "").startswith("<s>")
    assert ours.byte_lengths[256:].tolist() == [0, 0]


@pytest.mark.parametrize("bos", ["<s>", {"content": "<s>", "special": True}])
def test_add_bos_token_overrides_the_post_processor(tmp_path, bos):
    for single, add in (("$A", True), ("<s> $A", False), ("<s> $A", None)):
        path = write_byte_tokenizer(tmp_path, single=single)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": add, "bos_token": bos}))
        built = TokenizerJson(path=path, end_of_document="</s>", start_of_document="auto").build()
        assert built.start_of_document == (None if add is False else 257)


def test_the_start_token_is_part_of_the_fingerprint_and_of_the_export(tmp_path):
    path = write_byte_tokenizer(tmp_path, single="<s> $A")
    transformers = pytest.importorskip("transformers")
    prints = set()
    for start in (None, "<s>", "</s>"):
        built = TokenizerJson(path=path, end_of_document="</s>", start_of_document=start).build()
        prints.add(built.fingerprint)
        (folder := tmp_path / str(len(prints))).mkdir()
        save(built, folder, max_length=64)
        theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        prefix = [] if start is None else [built.start_of_document]
        assert theirs("ab")["input_ids"] == [*prefix, 97, 98]
        assert theirs.bos_token == (start or "</s>")
        again = TokenizerJson(path=folder / "tokenizer.json", end_of_document="</s>", start_of_document="auto").build()
        assert again.start_of_document == built.start_of_document
    assert len(prints) == 3


@pytest.mark.parametrize(
    ("template", "config", "said"),
    [
        ({"single": "<s> $A", "start_id": 999}, "{}", "adds '<s>' as id 999, which is not in the vocabulary"),
        ({"single": "<s> a $A"}, "{}", r"adds \['<s>', 'a'\] before .* expected at most one"),
        ({"single": "$A a"}, "{}", r"\['a'\] after every text; .* none or end_of_document = '</s>'"),
        ({}, '{"add_bos_token": true}', "sets add_bos_token, but no bos_token"),
        ({}, '{"add_bos_token": true, "bos_token": "<bos>"}', "has no token '<bos>'"),
        ({}, "[", "is not a JSON object"),
        ({}, "[]", "is not a JSON object"),
    ],
)
def test_a_start_token_that_cannot_be_added_is_one_message(tmp_path, template, config, said):
    path = write_byte_tokenizer(tmp_path, **template)
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(ValueError, match=said):
        TokenizerJson(path=path, end_of_document="</s>", start_of_document="auto").build()
    assert TokenizerJson(path=path, end_of_document="</s>").build().start_of_document is None


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
