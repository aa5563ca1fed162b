"""What a run, its remote copies and an exported model contain: no secrets, and files with the modes of the umask."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import TinyRun, refusal
from tests.run_info import WITH_TENSORBOARD
from tools import average, export_hf, import_hf, train_tokenizer

SECRET = "sentinel-secret"
VARIABLES = ("WANDB_API_KEY", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD")
HOST, USER = "sentinel-host", "sentinel-user"
KINDS = ("cache", "run", "remote", "exported", "imported", "averaged")
"""Folders that were written."""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyRun]:
    """The folder of a run with uploads, and of what the tools make of it, under umask 027."""
    home = tmp_path_factory.mktemp("home") / USER
    home.mkdir()
    before = os.umask(0o027)
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name in VARIABLES:
                patch.setenv(name, SECRET)
            for name, value in {"HOME": str(home), "USER": USER, "LOGNAME": USER}.items():
                patch.setenv(name, value)
            patch.setattr(socket, "gethostname", lambda: HOST)
            tiny = TinyRun(home)
            options = [f"--checkpoint.remote=file://{home}/remote", WITH_TENSORBOARD, "--profile.steps=1"]
            assert tiny.launch("--training.total_tokens=700", "--checkpoint.interval_steps=2", *options) == 0
            assert tiny.launch("--training.total_tokens=1000", "--resume", *options) == 0
            exported, imported = str(home / "exported"), str(home / "imported")
            assert export_hf.main([str(tiny.directory), exported, "--max-shard-size=20KB"]) == 0
            assert import_hf.main([exported, imported]) == 0
            assert average.main([f"file://{home}/remote/run", "--output", str(home / "averaged")]) == 0
            assert train_tokenizer.main(["--path", f"{home}/text", "--vocab-size=270", "--output", f"{home}/own"]) == 0
            yield tiny
    finally:
        os.umask(before)


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]


def test_files_and_folders_have_the_modes_of_the_umask(written: TinyRun) -> None:
    for kind in KINDS:
        assert files(written.folder / kind), kind
    wrong = {
        str(path.relative_to(written.folder)): oct(mode)
        for path in written.folder.rglob("*")
        if (mode := stat.S_IMODE(path.stat().st_mode)) & 0o777 not in ({0o750} if path.is_dir() else {0o640, 0o750})
    }
    assert wrong == {}


def test_no_file_contains_a_secret_of_the_environment(written: TinyRun) -> None:
    found = files(written.folder)
    assert {"run.json", "environment.json", "config.toml", "log.txt", "metrics.jsonl"} <= {path.name for path in found}
    assert [str(path) for path in found if SECRET.encode() in path.read_bytes()] == []


@pytest.mark.parametrize("kind", ["exported", "imported"])
def test_a_model_does_not_say_where_it_was_made(written: TinyRun, kind: str) -> None:
    traces = [trace.encode() for trace in (str(written.folder), USER, HOST)]
    assert any(traces[0] in path.read_bytes() for path in files(written.directory)), "the run says it"
    for path in files(written.folder / kind):
        assert [trace for trace in traces if trace in path.read_bytes()] == [], path.name


@pytest.mark.parametrize(
    "argument",
    [
        f"--data.path=https://user:{SECRET}@localhost/a.txt",
        f"--validation.data.path=s3://key:{SECRET}/+x@bucket/a.txt",
        f"--checkpoint.remote=s3://key:{SECRET}@bucket/runs",
        f"--run.init_from=ftp://user:{SECRET}@localhost:21/model",
        f"--resume=s3://key:{SECRET}@bucket/runs/mine",
    ],
)
def test_an_address_with_a_password_is_refused_and_not_repeated(
    tiny: TinyRun, capsys: pytest.CaptureFixture[str], argument: str
) -> None:
    said = refusal(tiny.launch, capsys, argument)
    assert ":// address contains a password" in said
    assert SECRET not in said.replace(argument, "")
    assert not tiny.directory.exists()


def test_the_address_of_a_tracker_has_no_password() -> None:
    pytest.importorskip("mlflow", reason="needs the [mlflow] extra")
    from components.metrics import MLflow

    with pytest.raises(ValueError, match="set MLFLOW_TRACKING_USERNAME"):
        MLflow(tracking_uri=f"https://user:{SECRET}@localhost/", experiment="mine")
