"""Runs with data, tokenizer and checkpoints in S3: a server on loopback that speaks its protocol."""

import json
import re
import shutil
from pathlib import Path

import pytest

from components import retry
from components.checkpoint import uploader, verify
from recipes.cli import ROOT
from tests.conftest import refusal
from tests.s3_server import BreakingProxy, s3_server

s3fs = pytest.importorskip("s3fs", reason="needs pip install -e '.[s3]'")
TENSOR_BYTES = 200_000
"""Of a checkpoint of the tiny run, about."""
REMOTE = "--checkpoint.remote=s3://models/runs"


@pytest.fixture
def s3(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with s3_server("models") as server:
        yield server


def tensors(tiny, step):
    """Return the SHA-256 of the tensors of a checkpoint."""
    manifest = json.loads((tiny.checkpoint(step) / "manifest.json").read_text())
    return {name: file["sha256"] for name, file in manifest["files"].items() if name.endswith(".distcp")}


def remote_steps():
    return sorted(int(path.split("step-")[1].split("/")[0]) for path in find() if path.endswith("manifest.json"))


def find():
    s3fs.S3FileSystem().invalidate_cache()
    return s3fs.S3FileSystem().find("models")


def test_a_run_continues_on_another_machine(tiny, new_tiny, s3, capsys):
    """Its directory is gone: the parameters, the metrics and the identity of the run come from the remote."""
    options = ["--training.total_tokens=2000", "--checkpoint.interval_steps=2", "--checkpoint.keep_last=2"]
    whole = new_tiny("whole")
    assert whole.launch(*options) == 0
    steps = [row["step"] for row in whole.rows() if "loss" in row]
    assert tiny.launch(*options, REMOTE) == 0
    assert len(remote_steps()) == 2 and remote_steps()[-1] == steps[-1] == 9, "retention holds there"
    run = json.loads((tiny.directory / "run.json").read_text())["run"]
    newest = s3fs.S3FileSystem()
    newest.rm_file(f"models/runs/run/checkpoints/step-{steps[-1]:08d}/manifest.json")
    shutil.rmtree(tiny.directory)

    assert "holds checkpoints of another run" in refusal(tiny.launch, capsys, *options, REMOTE)
    assert tiny.launch(*options, REMOTE, "--resume") == 0
    assert tensors(tiny, steps[-1]) == tensors(whole, steps[-1])
    assert json.loads((tiny.directory / "run.json").read_text())["run"] == run
    assert [row["step"] for row in tiny.rows() if "loss" in row] == steps
    assert steps[-1] in remote_steps(), "the interrupted upload was replaced"


def test_an_outage_costs_a_warning(tiny, new_tiny, s3, capsys, monkeypatch):
    monkeypatch.setattr(uploader, "CLOSE_SECONDS", 1.0)
    assert tiny.launch("--training.total_tokens=600", "--checkpoint.interval_steps=2", REMOTE) == 0
    before = remote_steps()
    s3.stop()
    assert tiny.launch("--training.total_tokens=1200", "--checkpoint.interval_steps=2", REMOTE, "--resume") == 0
    said = (tiny.directory / "log.txt").read_text()
    assert said.count("training continues, and the upload is repeated") == 1
    assert "could not be uploaded" in said and "continuing from the newest local checkpoint" in said
    new = [f"--run.dir={tiny.folder}/new", REMOTE]
    assert "s3://models/runs/new/checkpoints cannot be listed" in refusal(tiny.launch, capsys, *new)
    s3.start()
    (tiny.folder / "file").write_text("")
    unwritable = f"--checkpoint.remote=file://{tiny.folder}/file"
    assert f"{tiny.folder}/file/new cannot be written" in refusal(tiny.launch, capsys, new[0], unwritable)
    assert tiny.launch("--training.total_tokens=1200", "--checkpoint.interval_steps=2", REMOTE, "--resume") == 0
    assert remote_steps()[-1] > before[-1], "--resume uploads the newest"


def test_connections_that_break_cost_repetitions(tiny, new_tiny, s3, monkeypatch):
    """Every connection is reset after up to twice the bytes of a checkpoint. What is complete there is intact."""
    monkeypatch.setattr(retry, "MAX_RETRY_SECONDS", 1.0)
    proxy = BreakingProxy(s3.get_host_and_port()[1], (10_000, 2 * TENSOR_BYTES))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    s3fs.S3FileSystem.clear_instance_cache()
    options = ["--training.total_tokens=2000", "--checkpoint.interval_steps=3", REMOTE]
    assert tiny.launch(*options) == 0
    shutil.rmtree(tiny.directory / "checkpoints")
    assert tiny.launch(*options, "--training.total_tokens=2400", "--resume") == 0
    assert proxy.resets > 3
    proxy.close()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3.get_host_and_port()[1]}")
    s3fs.S3FileSystem.clear_instance_cache()
    for step in remote_steps():
        copy = Path(tiny.folder, "copies", f"step-{step:08d}")
        s3fs.S3FileSystem().get(f"models/runs/run/checkpoints/{copy.name}/", f"{copy}/", recursive=True)
        verify(copy)
    assert remote_steps()[-1] == tiny.rows()[-1]["step"]


def test_data_and_tokenizer_are_read_from_s3(tiny, s3, capsys):
    storage = s3fs.S3FileSystem()
    storage.put(f"{tiny.folder}/text/", "models/text", recursive=True)
    assert tiny.launch("--training.total_tokens=600") == 0
    losses = [row["loss"] for row in tiny.rows() if "loss" in row]
    shutil.rmtree(tiny.directory)
    arguments = ["--training.total_tokens=600", "--data.path=s3://models/text/*.txt"]
    assert tiny.launch(*arguments) == 0
    assert [row["loss"] for row in tiny.rows() if "loss" in row] == losses
    assert 'path = "s3://models/text/*.txt"' in (tiny.directory / "config.toml").read_text()
    other = f"--run.dir={tiny.folder}/b"
    assert "there is no file at s3://models/txt" in refusal(tiny.launch, capsys, other, "--data.path=s3://models/txt")
    assert "is not an address" in refusal(tiny.launch, capsys, "--checkpoint.remote=models/runs")


def test_weights_are_read_from_s3(tiny, s3):
    assert tiny.launch("--training.total_tokens=300", REMOTE) == 0
    assert (
        tiny.launch(f"--run.dir={tiny.folder}/b", "--training.total_tokens=300", "--run.init_from=s3://models/runs/run")
        == 0
    )


def test_the_file_system_of_the_documentation_works(tiny, clean_imports):
    page = (ROOT / "docs" / "storage.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tiny.folder / "mine_storage.py").write_text(code.replace("/tmp/team", str(tiny.folder / "team")))
    use = ["--hooks.storage.use=mine_storage:UseTeam", "--checkpoint.remote=team://runs"]
    assert tiny.launch(*use, "--training.total_tokens=300") == 0
    name = tiny.checkpoints()[-1].name
    verify(tiny.folder / "team" / "runs" / "run" / "checkpoints" / name)
