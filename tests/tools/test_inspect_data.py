"""The inspection tool shows what the loader yields, at any step, rank and micro-batch."""

import re

import pytest

from components.data.loader import MicroBatchLoader
from components.tokenizers import Bytes
from recipes.config import load
from tools.inspect_data import format_token, main

pytestmark = pytest.mark.quick


def output(tiny, capsys, *arguments, status=0):
    assert main([str(tiny.recipe), *arguments]) == status
    captured = capsys.readouterr()
    return captured.err if status else captured.out


def shown_ids(text):
    return [int(number) for number in re.findall(r"^sample (\d+)", text, re.MULTILINE)]


@pytest.fixture
def samples(tiny):
    recipe = load(tiny.recipe, []).recipe
    return recipe.data.build(
        tokenizer=Bytes().build(), sequence_length=24, cache_dir=tiny.folder / "cache", progress=print
    )


def test_the_text_is_that_of_the_loader_token_by_token(tiny, samples, capsys):
    text = output(tiny, capsys, "--step", "5", "--rank", "1", "--ranks", "2", "--micro-batch", "1")
    # The ramp: 4 steps of 8 samples, then 12; the second of two ranks, micro-batches of 2.
    loader = MicroBatchLoader(samples, seed=0, micro_batch_size=2, dp_rank=1, dp_size=2, start=32)
    _, micro = loader.next_step(2)
    assert shown_ids(text) == micro.sample_ids.tolist() == [38, 39]
    assert "step 5, micro-batch 1 of 3, rank 1 of 2" in text
    for tokens, labels in zip(micro.tokens.tolist(), micro.labels.tolist(), strict=True):
        row = (
            "│" + "│".join(format_token(tokens, Bytes().build())) + "│>" + format_token(labels[-1:], Bytes().build())[0]
        )
        assert f"\n{row}\n" in text


def test_a_step_that_was_done_is_looked_up(tiny, capsys):
    assert tiny.launch("--training.total_tokens=384", "--batch.initial_size=4") == 0
    # 4 samples a step as it ran, though the recipe says 8
    assert shown_ids(output(tiny, capsys, "--step", "3")) == [8, 9]
    assert "cannot have taken" in output(tiny, capsys, "--step", "3", "--ranks", "3", status=2)


def test_samples_and_ids_can_be_asked_for(tiny, samples, capsys):
    text = output(tiny, capsys, "--sample", "7", "--count", "3", "--ids")
    assert shown_ids(text) == [7, 8, 9]
    with MicroBatchLoader(samples, seed=0, micro_batch_size=1, start=7) as loader:
        (micro,) = loader.next_step(1)
    ids = text[text.index("\n[") :].split(">")[0]
    assert [int(number) for number in re.findall(r"\d+", ids)] == micro.tokens[0].tolist()


def test_a_double_bar_stands_where_attention_begins(tiny, samples, capsys):
    """Before the first token of a sequence and before every end token: as the model has it."""
    with MicroBatchLoader(samples, seed=0, micro_batch_size=len(samples)) as loader:
        (micro,) = loader.next_step(1)
    row = int((micro.tokens[:, 1:] == 256).any(1).nonzero()[0])
    text = output(tiny, capsys, "--sample", str(row), "--count", "1", "--training.document_masking=true")
    shown = text.splitlines()[-1]
    assert shown.startswith("║") and shown.count("║") == 2
    assert "║<|endoftext|>│" in shown
    plain = output(tiny, capsys, "--sample", str(row), "--count", "1")
    assert shown.replace("║", "│") == plain.splitlines()[-1]


def test_a_token_that_is_not_a_character_shows_its_id():
    assert format_token([*"é".encode(), ord("a"), 256], Bytes().build()) == ["<195>", "<169>", "a", "<|endoftext|>"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", "0"], "steps count from 1"),
        (["--step", "99"], "--step 99: the run ends with step 14"),
        (["--step", "1", "--micro-batch", "4"], "--micro-batch 4: step 1 has 4, counted from 0"),
        (["--rank", "2", "--ranks", "2"], "--rank 2: expected 0 to 1, because --ranks is 2"),
        (["--print-config"], "options of ./run_train.sh only"),
        (["--data.pathh=x"], "did you mean path"),
        (["--stepp", "1"], "unknown option --stepp"),
    ],
)
def test_bad_input_is_one_message(tiny, capsys, arguments, message):
    error = output(tiny, capsys, *arguments, status=2)
    assert message in error
    assert "Traceback" not in error
