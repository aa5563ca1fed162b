"""Pictures of runs."""

import json
import xml.etree.ElementTree as ET

import pytest

from tools.plot_runs import main, read_run, running_mean

pytestmark = pytest.mark.quick


def write_run(folder, rows, tail=""):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return folder


def step(number, loss):
    return {"step": number, "tokens": number * 100, "loss": loss, "lr": 0.1, "global_batch_size": 4, "grad_norm": None}


VALIDATION = {"step": 2, "tokens": 200, "val_loss": 2.0}


def test_two_runs_in_one_picture_and_the_same_picture_again(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the [plot] extra")
    runs = [str(write_run(tmp_path / name, [step(1, 3.0), step(2, 2.5), VALIDATION])) for name in ("one", "two")]
    pictures = [tmp_path / "new" / "a.svg", tmp_path / "b.svg"]
    for picture in pictures:
        assert main([*runs, "--output", str(picture)]) == 0
    assert ET.parse(pictures[0]).getroot().tag.endswith("svg")
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    assert b"one, validation" in pictures[0].read_bytes()


def test_a_line_that_is_still_being_written_is_left_out(tmp_path):
    run = write_run(tmp_path / "run", [step(1, 3.0)], tail='{"step": 2, "tok')
    assert [row["step"] for row in read_run(run)] == [1]


def test_the_running_mean_is_that_of_the_last_values():
    assert running_mean([1.0, 2.0, 3.0, 4.0], 2) == [1.0, 1.5, 2.5, 3.5]


@pytest.mark.parametrize(
    ("rows", "tail", "message"),
    [
        ([], "", "no finished step"),
        ([VALIDATION], "", "no finished step"),
        ([step(1, 2.0)], "{\n", "jsonl:2 is not a row of metrics"),
    ],
)
def test_what_cannot_be_drawn_is_told(tmp_path, capsys, rows, tail, message):
    run = write_run(tmp_path / "run", rows, tail)
    assert main([str(run), "--output", str(tmp_path / "x.svg")]) == 2
    assert message in capsys.readouterr().err


def test_a_directory_that_is_no_run(tmp_path, capsys):
    assert main([str(tmp_path), "--output", str(tmp_path / "x.svg")]) == 2
    assert "name a run directory" in capsys.readouterr().err


def test_an_unknown_kind_of_picture_names_those_there_are(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="needs the [plot] extra")
    run = write_run(tmp_path / "run", [step(1, 3.0)])
    assert main([str(run), "--output", str(tmp_path / "x.xyz")]) == 2
    assert "svg" in capsys.readouterr().err
