"""The preparation tool does what a run would do, before the run."""

import json
import re
import signal

import pytest

from tools.prepare_data import main

pytestmark = pytest.mark.quick


def prepared(tiny):
    return {path.name: path.stat().st_mtime_ns for path in (tiny.folder / "cache").glob("TextFiles-*")}


def test_both_sections_are_prepared_and_the_run_prepares_nothing_more(tiny, capsys):
    assert main([str(tiny.recipe)]) == 0
    out = capsys.readouterr().out
    assert "[data]" in out
    assert "[validation.data]" in out
    before = prepared(tiny)
    assert len(before) == 2
    assert tiny.launch("--training.total_tokens=384") == 0
    assert prepared(tiny) == before
    assert "prepared" not in (tiny.directory / "log.txt").read_text()


def test_a_second_time_there_is_nothing_to_do(tiny):
    assert main([str(tiny.recipe)]) == 0
    before = prepared(tiny)
    assert main([str(tiny.recipe)]) == 0
    assert prepared(tiny) == before


def test_the_counts_are_those_of_the_text(tiny, capsys):
    assert main([str(tiny.recipe), "--validation=none"]) == 0
    texts = [path.read_bytes() for path in (tiny.folder / "text").glob("*.txt")]
    (name,) = prepared(tiny)
    index = json.loads((tiny.folder / "cache" / name / "index.json").read_text())
    assert index["text_bytes"] == sum(map(len, texts))
    assert index["tokens"] == sum(map(len, texts)) + len(texts)
    assert f"{sum(map(len, texts)):,} bytes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--data.path=nowhere/*.txt", "nowhere"),
        ("--data.pathh=text", "did you mean path"),
        ("--nonsense", "unknown option --nonsense"),
        ("--dry-run", "options of ./run_train.sh only"),
    ],
)
def test_bad_input_is_reported_without_a_traceback(tiny, capsys, argument, message):
    assert main([str(tiny.recipe), argument]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


MIXTURE = """
[data]
use = "components.data:Mixture"
weights = { old = 3, new = 1 }
  [data.sources.old]
  use = "components.data:TextFiles"
  path = "text/*.txt"
  [data.sources.new]
  use = "components.data:TextFiles"
  path = "text/held_out/*.txt"
  deduplicate = true
"""


def test_a_mixture_is_prepared_and_trained_on_with_the_epochs_of_its_sources(tiny, capsys):
    old = '[data]\nuse = "components.data:TextFiles"\npath = "text/*.txt"\n'
    assert old in tiny.recipe.read_text()
    tiny.recipe.write_text(tiny.recipe.read_text().replace(old, MIXTURE))
    assert main([str(tiny.recipe), "--validation=none"]) == 0
    out = capsys.readouterr().out
    assert "[old] 4 documents" in out
    assert "[new] 1 documents" in out
    assert tiny.launch("--training.total_tokens=768", "--validation=none") == 0
    last = tiny.rows()[-1]
    assert last["samples"] == 32
    sequences = [int(text) for text in re.findall(r"(\d+) sequences", out)]
    assert last["source_epochs"] == {"old": 24 / sequences[0], "new": 8 / sequences[1]}


@pytest.mark.usefixtures("terminal_signals")
def test_an_interruption_prints_no_traceback(tiny, capsys, monkeypatch):
    monkeypatch.setattr("tools.prepare_data.prepare_recipe", lambda config: signal.raise_signal(signal.SIGINT))
    assert main([str(tiny.recipe)]) == 130
    assert "the same command continues" in capsys.readouterr().err
