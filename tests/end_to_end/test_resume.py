"""A resumed run and an uninterrupted one are bitwise the same: losses, metrics, parameters, optimizer."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from components.checkpoint import run_of
from components.run_directory import RunDirectory
from components.tokenizers.bytes import ByteEncoder
from tests.checkpoints import rewrite_manifest

TIMES = {"tokens_per_second", "step_seconds", "data_seconds", "mfu", "memory_bytes"}
AVERAGES = ["--average.ema.use=components.average:Exponential", "--average.ema.half_life_tokens=900"]
AVERAGES += ["--average.w.use=components.average:Window", "--average.w.window_tokens=1000"]
AVERAGES += ["--average.w.interval_tokens=300", "--average.w.blocks=3"]


def tensors(checkpoint):
    """Every tensor of a checkpoint, by name."""
    metadata = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if hasattr(entry, "size")
    }
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    return state


def timeless(rows):
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def assert_same_state(one, other):
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
    assert json.loads((one / "state.json").read_text()) == json.loads((other / "state.json").read_text())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_from_every_step_across_a_batch_change_and_the_end_of_an_epoch(tiny, tmp_path):
    assert tiny.launch(*AVERAGES) == 0
    rows = tiny.rows()
    steps = [row for row in rows if "loss" in row]
    assert len({row["global_batch_size"] for row in steps}) == 2, "the run must change its batch"
    assert steps[-1]["epoch"] > 2, "the run must pass the end of an epoch"
    last = steps[-1]["step"]
    whole = tmp_path / "whole"
    tiny.directory.rename(whole)

    for stopped_at in range(1, last):
        # what a run killed after this checkpoint leaves: it, those before it, and a metrics file that is ahead of it
        shutil.copytree(whole, tiny.directory)
        for later in range(stopped_at + 1, last + 1):
            shutil.rmtree(tiny.checkpoint(later))
        assert tiny.launch("--resume", "--checkpoint.interval_steps=none", *AVERAGES) == 0
        assert timeless(tiny.rows()) == timeless(rows), f"resumed at {stopped_at}"
        assert_same_state(tiny.checkpoint(last), whole / "checkpoints" / f"step-{last:08d}")
        shutil.rmtree(tiny.directory)


def test_more_tokens_continue_a_finished_run_and_nothing_is_repeated(tiny):
    assert tiny.launch() == 0
    before = tiny.rows()
    assert tiny.launch("--resume") == 0
    assert tiny.rows() == before, "a finished run has nothing to do"
    assert tiny.launch("--resume", "--training.total_tokens=5000") == 0
    after = [row for row in tiny.rows() if "loss" in row]
    assert [row["step"] for row in after] == list(range(1, len(after) + 1))
    assert after[-1]["tokens"] >= 5000 > after[-2]["tokens"]


def test_a_fork_of_another_runs_checkpoint_leaves_that_run_alone(tiny, tmp_path):
    assert tiny.launch() == 0
    before = sorted(path.name for path in (tiny.directory / "checkpoints").iterdir())
    fork = tmp_path / "fork"
    assert tiny.launch(f"--resume={tiny.checkpoint(5)}", f"--run.dir={fork}", "--optimizer.weight_decay=0.0") == 0
    assert sorted(path.name for path in (tiny.directory / "checkpoints").iterdir()) == before
    steps = [json.loads(line)["step"] for line in (fork / "metrics.jsonl").read_text().splitlines()]
    assert min(steps) == 6


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("--model.dim=32", "model.dim"),
        ("--model.layers=3", "model.layers"),
        ("--training.sequence_length=12", "training.sequence_length"),
        ("--optimizer.use=components.optimizers:Muon", "optimizer.use"),
    ],
)
def test_a_change_that_makes_it_another_run_is_refused(tiny, capsys, change, said):
    assert tiny.launch("--training.total_tokens=400") == 0
    assert tiny.launch("--resume", "--training.total_tokens=800", change) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "in the checkpoint" in error
    assert "Traceback" not in error


def test_a_change_of_what_muon_keeps_is_refused(tiny, capsys):
    muon = "--optimizer.use=components.optimizers:Muon"
    assert tiny.launch("--training.total_tokens=400", muon) == 0
    for key, value in (("variant", "normuon"), ("adamw_on", '["*.wo.weight"]'), ("muon_on", '["layers.0.*"]')):
        assert tiny.launch("--resume", "--training.total_tokens=800", muon, f"--optimizer.{key}={value}") == 2
        assert f"optimizer.{key}" in capsys.readouterr().err
    assert tiny.launch("--resume", "--training.total_tokens=800") == 2
    assert "optimizer.use" in capsys.readouterr().err, "AdamW does not continue Muon either"
    assert tiny.launch("--resume", "--training.total_tokens=800", muon, "--optimizer.lr_scale=spectral") == 0
    assert "optimizer.lr_scale was 'match_rms_adamw', is 'spectral'" in capsys.readouterr().out


def test_a_change_with_consequences_is_reported_and_one_without_is_applied(tiny, capsys):
    assert tiny.launch("--training.total_tokens=400") == 0
    status = tiny.launch("--resume", "--training.total_tokens=800", "--lr_schedule.max_lr=0.02")
    output = capsys.readouterr().out
    assert status == 0
    assert "lr_schedule.max_lr was 0.01, is 0.02" in output


def test_a_checkpoint_of_before_a_component_got_another_key_is_continued(tiny, capsys):
    assert tiny.launch("--training.total_tokens=400") == 0
    stored = max((tiny.directory / "checkpoints").glob("step-*")) / "config.toml"
    lines = stored.read_text().splitlines()
    older = [
        line for line in lines if not line.startswith(("deduplicate =", "validation_fraction =", "tied_embeddings ="))
    ]
    assert len(older) < len(lines) - 3
    stored.write_text("\n".join(older) + "\n")
    capsys.readouterr()
    assert tiny.launch("--resume", "--training.total_tokens=800") == 0
    assert "deduplicate" not in capsys.readouterr().out
    assert tiny.launch("--resume", "--training.total_tokens=900", "--data.deduplicate=true") == 0
    assert "data.deduplicate was False, is True" in capsys.readouterr().out


def test_resuming_needs_a_checkpoint(tiny, capsys):
    assert tiny.launch("--resume") == 2
    assert "no complete checkpoint" in capsys.readouterr().err
    assert tiny.launch(f"--resume={tiny.folder}") == 2
    assert "neither a checkpoint nor a run directory" in capsys.readouterr().err


def test_resuming_an_old_checkpoint_under_newer_ones_is_refused(tiny, capsys):
    assert tiny.launch("--training.total_tokens=800") == 0
    assert tiny.launch(f"--resume={tiny.checkpoint(2)}") == 2
    assert "is newer than step-00000002" in capsys.readouterr().err


@pytest.mark.parametrize("named", ["text/../run", "elsewhere/run", "elsewhere/run/checkpoints/step-00000003", "latest"])
def test_a_run_resumed_by_another_name_of_its_place_is_continued_and_not_replaced(tiny, tmp_path, capsys, named):
    assert tiny.launch("--training.total_tokens=400") == 0
    (tmp_path / "elsewhere").symlink_to(tmp_path)
    (tmp_path / "latest").symlink_to(tiny.checkpoint(3))
    before = tiny.rows()
    replace = ["--run.if_exists=replace", "--training.total_tokens=800"]
    assert tiny.launch(f"--resume={tmp_path / named}", *replace) == 0
    assert tiny.rows()[:2] == before[:2], "what was there is there still"
    assert all(tiny.checkpoint(step).is_dir() for step in range(1, 5))
    older = tmp_path / "elsewhere" / "run" / "checkpoints" / "step-00000002"
    assert tiny.launch(f"--resume={older}", *replace) == 2
    assert "is newer than step-00000002" in capsys.readouterr().err


def test_a_tokenizer_of_other_content_is_refused(tiny, capsys, monkeypatch):
    assert tiny.launch("--training.total_tokens=400") == 0
    monkeypatch.setattr(ByteEncoder, "fingerprint", "bytes-of-another-order")
    assert tiny.launch("--resume", "--training.total_tokens=600") == 2
    message = "trained with a different tokenizer of 257 ids: bytes-1, not bytes-of-another-order"
    assert message in capsys.readouterr().err


def test_a_checkpoint_of_an_older_format_is_refused_and_stays(tiny, capsys):
    assert tiny.launch("--training.total_tokens=400") == 0
    newest = max((tiny.directory / "checkpoints").iterdir())
    state = newest / "state.json"
    state.write_text(state.read_text().replace('"format": 3', '"format": 2'))
    rewrite_manifest(newest)
    assert tiny.launch("--resume", "--training.total_tokens=600") == 2
    assert "has format 2 and this version reads format 3" in capsys.readouterr().err
    assert newest.is_dir(), "it is not taken for a damaged one"


def test_a_second_run_in_the_same_directory_is_refused_or_replaces_it(tiny, capsys):
    assert tiny.launch("--training.total_tokens=400") == 0
    (tiny.directory / "notes.md").write_text("mine")
    assert tiny.launch("--training.total_tokens=400") == 2
    assert "already holds a run" in capsys.readouterr().err
    before, remote = RunDirectory(tiny.directory).run, f"--checkpoint.remote=file://{tiny.folder}/remote"
    assert tiny.launch("--training.total_tokens=350", "--run.if_exists=replace", remote) == 0
    assert max(row["step"] for row in tiny.rows()) == 2
    run = RunDirectory(tiny.directory).run
    assert before is not None and run is not None and run != before, "writers of metrics do not append to the old run"
    uploaded = list((tiny.folder / "remote").rglob("step-*"))
    assert uploaded and {run_of(path) for path in (*uploaded, *tiny.checkpoints())} == {run}
    assert (tiny.directory / "notes.md").read_text() == "mine"


@pytest.mark.parametrize("wrong", ["--data.path=nowhere/*.txt", "--training.sequence_length=100000"])
def test_a_run_that_cannot_start_replaces_nothing(tiny, capsys, wrong):
    assert tiny.launch("--training.total_tokens=400") == 0
    before = {
        path: path.read_bytes() for path in tiny.directory.rglob("*") if path.is_file() and path.name != "log.txt"
    }
    assert tiny.launch("--run.if_exists=replace", wrong) == 2
    assert {path: path.read_bytes() for path in before} == before
    assert tiny.launch("--run.if_exists=replace", "--training.total_tokens=350") == 0
    log = (tiny.directory / "log.txt").read_text()
    assert log.count("done:") == 1 and log.count("epochs of 67 sequences") == 1, "it is that of the new run"
    assert not tiny.checkpoint(3).exists()


def test_other_text_of_the_same_length_is_reported(tiny, capsys):
    assert tiny.launch("--training.total_tokens=400") == 0
    text = tiny.folder / "text" / "0.txt"
    text.write_text(text.read_text().replace("best", "rest"))
    assert tiny.launch("--resume", "--training.total_tokens=600") == 0
    assert "the data has changed: " in (tiny.directory / "log.txt").read_text()


def test_other_token_files_are_reported_and_moved_ones_are_not(tiny, capsys):
    for name, step in (("one", 1), ("moved", 1), ("other", 3)):
        np.arange(0, 800 * step, step, dtype=np.uint16).__mod__(251).tofile(tiny.folder / f"{name}.bin")

    def launch(name: str, tokens: int, *more: str) -> str:
        data = ["--data.use=components.data:Mixture", "--data.weights={ids=1}"]
        data += [
            "--data.sources.ids.use=components.data:TokenFiles",
            f"--data.sources.ids.path={tiny.folder / name}.bin",
        ]
        capsys.readouterr()
        assert tiny.launch(*data, f"--training.total_tokens={tokens}", "--validation=none", *more) == 0
        return capsys.readouterr().out

    launch("one", 400)
    assert "resuming with a change" not in (moved := launch("moved", 600, "--resume")) and "has changed" not in moved
    assert "the data has changed: " in launch("other", 800, "--resume")


UNKNOWN = """
from components.data import TextFiles

class Unknown(TextFiles):
    def build(self, **given):
        dataset = super().build(**given)
        dataset.fingerprint = None
        return dataset
"""


def test_another_place_of_data_without_fingerprint_is_reported(tiny, capsys, clean_imports):
    (tiny.folder / "mine_unknown.py").write_text(UNKNOWN)
    shutil.copytree(tiny.folder / "text", tiny.folder / "moved")
    use = [f'--import_paths=["{tiny.folder}"]', "--data.use=mine_unknown:Unknown"]

    def launch(folder: str, tokens: int, *more: str) -> str:
        path = f"--data.path={tiny.folder / folder}/*.txt"
        assert tiny.launch(*use, path, f"--training.total_tokens={tokens}", *more) == 0
        return capsys.readouterr().out

    launch("text", 400)
    assert "no fingerprint" not in launch("text", 600, "--resume")
    assert "moved/*.txt'; the data may be other data, because it has no fingerprint" in launch("moved", 800, "--resume")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_asynchronous_checkpoints_are_bitwise_the_synchronous_ones_and_continue_like_them(new_tiny):
    plain, background = new_tiny("plain"), new_tiny("background")
    asynchronous = "--checkpoint.async_save=true"
    assert plain.launch() == 0
    assert background.launch(asynchronous) == 0
    assert timeless(background.rows()) == timeless(plain.rows())
    last = plain.rows()[-1]["step"]
    for step in range(1, last + 1):
        assert_same_state(background.checkpoint(step), plain.checkpoint(step))
    for later in range(6, last + 1):
        shutil.rmtree(background.checkpoint(later))
    assert background.launch(asynchronous, "--resume") == 0
    assert_same_state(background.checkpoint(last), plain.checkpoint(last))


def test_a_job_that_is_queued_again_continues_and_another_job_is_refused(tiny, monkeypatch):
    monkeypatch.setenv("POWERTRAIN_LAUNCH", "job-1")
    assert tiny.launch("--training.total_tokens=400") == 0
    assert tiny.launch("--training.total_tokens=800") == 0
    steps = [row["step"] for row in tiny.rows() if "loss" in row]
    assert steps == list(range(1, steps[-1] + 1))
    assert steps[-1] > 2
    monkeypatch.setenv("POWERTRAIN_LAUNCH", "job-2")
    assert tiny.launch("--training.total_tokens=800") == 2
