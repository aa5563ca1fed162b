"""The tokenizer tool writes a rank file that two independent encoders read alike."""

from pathlib import Path

import numpy as np
import pytest

from components.data.document import ReadStats
from components.data.sources.text_files import TextFiles
from components.tokenizers.patterns import PATTERNS
from components.tokenizers.tiktoken_file import TiktokenFile
from tools.train_tokenizer import main, text_sources, train_ranks

tokenizers = pytest.importorskip("tokenizers", reason="training needs the [hf] extra")
pytestmark = pytest.mark.quick

# Repetition gives merges; accents, CJK and an emoji give bytes that are not whole characters.
TEXT = (
    "The whale swam. The whale's été: 鯨 🐋 1851, 1851!\n" * 3 + "I had written; they'd laughed.\n\n  indented\ttext\n"
)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.txt").write_text(TEXT, encoding="utf-8")
    (folder / "b.txt").write_text(TEXT[::-1], encoding="utf-8")
    return folder


def test_the_file_holds_every_byte_and_the_ids_asked_for(corpus, tmp_path, capsys):
    output = tmp_path / "new" / "my.tiktoken"
    assert main(["--vocab-size", "300", "--output", str(output), "--path", str(corpus)]) == 0
    tokenizer = TiktokenFile(path=output, pattern="cl100k").build()
    assert tokenizer.vocab_size == 300  # 299 ranks and the end of a document
    every_byte = bytes(range(256)).decode("latin-1")
    assert tokenizer.decode(tokenizer.encode_batch([every_byte])[0]) == every_byte
    assert len(tokenizer.encode_batch([TEXT])[0]) < len(TEXT.encode()) / 1.5  # it did learn merges
    assert "agree" in capsys.readouterr().out
    assert sorted(path.name for path in output.parent.iterdir()) == ["my.tiktoken", "my.tokenizer.json"]


def test_only_the_suffix_of_a_rank_file_is_replaced(corpus, tmp_path):
    for name, written in {"tok-v1.5": "tok-v1.5.tokenizer.json", "a.b.tiktoken": "a.b.tokenizer.json"}.items():
        assert main(["--vocab-size", "260", "--output", str(tmp_path / name), "--path", str(corpus)]) == 0
        assert (tmp_path / written).exists()


def test_training_twice_gives_the_same_ranks(corpus):
    source = TextFiles(path=corpus)
    assert train_ranks([source], vocab_size=290, pattern=PATTERNS["gpt2"]) == train_ranks(
        [source], vocab_size=290, pattern=PATTERNS["gpt2"]
    )


@pytest.mark.parametrize("pattern", sorted(PATTERNS))
def test_two_encoders_give_the_same_ids_on_text_neither_was_trained_on(pattern, corpus, tmp_path):
    output = tmp_path / "my.tiktoken"
    assert main(["--vocab-size", "310", "--output", str(output), "--pattern", pattern, "--path", str(corpus)]) == 0
    unseen = ["Swam the whales 鯨鯨 in 18511851?", "\r\n\t \u2028x", "ÉTÉ été", ""]
    ours = TiktokenFile(path=output, pattern=pattern).build().encode_batch(unseen)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "my.tokenizer.json"))
    for text, ids in zip(unseen, ours, strict=True):
        np.testing.assert_array_equal(ids, theirs.encode(text).ids)
    assert theirs.token_to_id("<|endoftext|>") == theirs.get_vocab_size() - 1 == 309


def test_a_lone_surrogate_is_replaced_as_in_preparation(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "the whale \\ud83d the whale the whale"}\n')
    output = tmp_path / "my.tiktoken"
    assert main(["--vocab-size", "260", "--output", str(output), "--path", str(tmp_path / "a.jsonl")]) == 0
    assert output.exists()


def test_json_lines_are_read_by_their_key(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "the whale the whale the whale"}\n')
    source = TextFiles(path=tmp_path / "a.jsonl", text_key="body")
    assert [document.text for document in source.documents(ReadStats())] == ["the whale the whale the whale"]
    output = tmp_path / "my.tiktoken"
    arguments = ["--vocab-size", "260", "--output", str(output), "--path", str(tmp_path / "a.jsonl")]
    assert main([*arguments, "--text-key", "body"]) == 0
    assert output.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--vocab-size": "256"}, "--vocab-size 256: expected at least 257"),
        ({"--vocab-size": "100000"}, "gives only"),
        ({"--pattern": "("}, "pattern"),
        ({"--path": "nowhere"}, "nowhere"),
        ({"--path": "nowhere", "--output": "."}, ". is a directory; give the name of a file"),
    ],
)
def test_bad_input_is_one_message_and_writes_no_file(change, message, corpus, tmp_path, capsys):
    options = {"--vocab-size": "300", "--output": str(tmp_path / "my.tiktoken"), "--path": str(corpus)} | change
    assert main([part for option in options.items() for part in option]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "my.tiktoken").exists()


def test_a_recipe_gives_its_data_and_every_source_of_a_mixture(tiny, tmp_path):
    assert [str(source) for source in text_sources(None, tiny.recipe, "text")] == [str(tiny.folder / "text/*.txt")]
    mixture = tmp_path / "mixture.toml"
    mixture.write_text(
        'extends = ["tiny.toml"]\n[data]\nuse = "components.data:Mixture"\nweights = { a = 1, b = 1 }\n'
        'sources.a = { use = "components.data:TextFiles", path = "text/held_out" }\n'
        'sources.b = { use = "components.data:StandardLibrary" }\n'
    )
    assert [type(source).__name__ for source in text_sources(None, mixture, "text")] == ["TextFiles", "StandardLibrary"]
    output = tmp_path / "my.tiktoken"
    assert main(["--vocab-size", "262", "--output", str(output), "--recipe", str(tiny.recipe)]) == 0


def test_paths_may_name_a_data_set_of_the_hub():
    found = list(text_sources(["hf://me/tales/default/train", "a.txt", "b"], None, "body"))
    assert [str(source) for source in found] == ["hf://me/tales/default/train", "a.txt, b"]
    assert {source.text_key for source in found} == {"body"}
