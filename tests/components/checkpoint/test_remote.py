"""Checkpoints at an address are complete or do not exist, whenever the network or the process fails."""

import json
import logging
import shutil
import threading
from pathlib import Path

import pytest

from components import retry
from components.checkpoint import DamagedError, uploader
from components.checkpoint.manifest import MANIFEST, write_manifest
from components.checkpoint.remote import RemoteCheckpoints, restore_run
from components.checkpoint.uploader import CheckpointUploader, upload_order
from components.storage.address import RemoteDirectory, StorageError

pytestmark = pytest.mark.quick
RUN = "0123456789abcdef"


class Remote(RemoteDirectory):
    """A directory whose writes fail after `writes_left` files, and while `is_down`."""

    is_down, writes_left = False, 1_000_000

    def child(self, name):
        return Remote(f"{self.address}/{name}")

    def list_files(self, pattern=""):
        self._check()
        return super().list_files(pattern)

    def upload(self, files):
        for name, path in files.items():
            self._check()
            if Remote.writes_left == 0:
                raise StorageError("the connection was reset")
            Remote.writes_left -= 1
            super().upload({name: path})

    def _check(self):
        if Remote.is_down:
            raise StorageError("no route")


@pytest.fixture
def remote(tmp_path, monkeypatch):
    monkeypatch.setattr(retry, "FIRST_RETRY_SECONDS", 0.01)
    monkeypatch.setattr(retry, "MAX_RETRY_SECONDS", 0.02)
    monkeypatch.setattr(uploader, "CLOSE_SECONDS", 0.2)
    monkeypatch.setattr(Remote, "is_down", False)
    monkeypatch.setattr(Remote, "writes_left", 1_000_000)
    return RemoteCheckpoints(Remote(f"file://{tmp_path}/remote/run"))


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    (folder / "writers").mkdir(parents=True)
    for name in ("run.json", "metrics.jsonl", "writers/w.json", "private.txt"):
        (folder / name).write_text(name)
    return folder


def saved(run: Path, step: int, content: str = "") -> Path:
    checkpoint = run / "checkpoints" / f"step-{step:08d}"
    checkpoint.mkdir(parents=True, exist_ok=True)
    for path in checkpoint.iterdir():
        path.unlink()
    for name in ("__0_0.distcp", ".metadata", "state.json", "config.toml"):
        (checkpoint / name).write_text(content or f"{step} {name}")
    write_manifest(checkpoint, 0, RUN)
    return checkpoint


def place(remote: RemoteCheckpoints, name: str) -> Path:
    return Path(remote.directory.address.removeprefix("file://")) / "checkpoints" / name


def upload_to(remote, **changes):
    return CheckpointUploader(remote, **{"run": RUN, "keep_last": 2, "keep_every": None, "newest": None} | changes)


def files(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_what_is_downloaded_is_what_was_uploaded(remote, run, tmp_path):
    remote.upload(saved(run, 3))
    remote.upload(saved(run, 12))
    assert remote.list_complete() == ["step-00000003", "step-00000012"]
    assert remote.newest_run() == RUN
    other = tmp_path / "other" / "run"
    restore_run(remote, other, None)
    expected = {name: text for name, text in files(run).items() if name != "private.txt" and "0003" not in name}
    assert files(other) == expected
    restore_run(remote, other, RUN)  # nothing newer


def test_a_damaged_checkpoint_is_replaced_by_its_copy_once_that_is_complete(remote, run, monkeypatch, caplog):
    def fail(self, files):
        raise StorageError("the connection was reset")

    remote.upload(damaged := saved(run, 3))
    (damaged / ".metadata").write_text("damaged")
    with monkeypatch.context() as patch:
        patch.setattr(Remote, "download", fail)
        restore_run(remote, run, RUN, damaged=[damaged])
    assert (damaged / ".metadata").read_text() == "damaged" and "the connection was reset" in caplog.text
    restore_run(remote, run, RUN, damaged=[damaged])
    assert (damaged / ".metadata").read_text() == "3 .metadata"
    assert (damaged.with_name("damaged-step-00000003") / ".metadata").read_text() == "damaged"


def test_a_directory_is_not_continued_with_the_checkpoint_of_another_run(remote, run):
    remote.upload(saved(run, 3))
    (run / "checkpoints" / "step-00000003").rename(run / "moved")
    with pytest.raises(ValueError, match="of another run"):
        restore_run(remote, run, "fedcba9876543210")
    assert not (run / "checkpoints" / "step-00000003").exists()


@pytest.mark.parametrize("written", range(8))
def test_an_interrupted_upload_is_not_a_checkpoint(remote, run, written):
    remote.upload(saved(run, 3))
    Remote.writes_left = written
    with pytest.raises(StorageError):
        remote.upload(saved(run, 5))
    assert remote.list_complete() == ["step-00000003"]
    Remote.writes_left = 1_000_000
    remote.upload(saved(run, 7))
    remote.remove_old(RUN, keep_last=None, keep_every=None)
    assert not [name for name in remote.directory.list_files() if "0005" in name], "the rest is removed"


@pytest.mark.parametrize("written", range(8))
def test_a_file_that_is_cut_off_during_an_upload_leaves_the_earlier_one(remote, run, tmp_path, monkeypatch, written):
    remote.upload(saved(run, 3))
    (run / "metrics.jsonl").write_text("more metrics")
    copy, copied = shutil.copyfile, []

    def cut_off(source, target, **options):
        copied.append(source)
        if len(copied) > written:
            Path(target).write_text(Path(source).read_text()[:3])
            raise OSError("killed")
        return copy(source, target, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", cut_off)
        with pytest.raises(StorageError, match="killed"):
            remote.upload(saved(run, 5))
    other = tmp_path / "other" / "run"
    restore_run(remote, other, None)
    assert [path.name for path in (other / "checkpoints").iterdir()] == ["step-00000003"]
    assert (other / "metrics.jsonl").read_text() in ("metrics.jsonl", "more metrics")
    remote.upload(saved(run, 7))
    remote.remove_old(RUN, keep_last=None, keep_every=None)
    assert not [name for name in remote.directory.list_files() if "0005" in name], "the rest is removed"


@pytest.mark.parametrize("written", range(8))
def test_a_repeated_upload_continues_where_it_ended(remote, run, written):
    Remote.writes_left = written
    checkpoint = saved(run, 5)
    with pytest.raises(StorageError):
        remote.upload(checkpoint)
    of_run, of_checkpoint = 3, 4
    Remote.writes_left = of_run + of_checkpoint - max(0, written - of_run) + 1
    remote.upload(checkpoint)
    assert Remote.writes_left == 0 and files(place(remote, checkpoint.name)) == files(checkpoint)
    remote.remove(checkpoint.name)
    Remote.writes_left = 1_000_000
    remote.upload(checkpoint)
    assert files(place(remote, checkpoint.name)) == files(checkpoint), "all of it, once it was complete"


def test_a_checkpoint_that_is_written_again_is_not_complete_meanwhile(remote, run):
    remote.upload(saved(run, 3))
    Remote.writes_left = 5
    with pytest.raises(StorageError):
        remote.upload(saved(run, 3, "again"))
    assert remote.list_complete() == []


def test_a_checkpoint_that_is_replaced_during_its_upload_is_not_completed(remote, run, monkeypatch):
    checkpoint = saved(run, 3)
    upload = Remote.upload

    def replace(self, copied):
        upload(self, copied)
        saved(run, 3, "replaced")

    monkeypatch.setattr(Remote, "upload", replace)
    with pytest.raises(StorageError, match="replaced while"):
        remote.upload(checkpoint)
    assert remote.list_complete() == []


@pytest.mark.parametrize("raises", [True, False])
def test_files_of_the_run_are_copied_completely_or_not(remote, run, tmp_path, monkeypatch, raises):
    remote.upload(saved(run, 3))

    def break_off(self, wanted):
        for path in wanted.values():
            path.write_text("run")
        if raises:
            raise StorageError("the connection was reset")

    other = tmp_path / "other" / "run"
    with monkeypatch.context() as patch:
        patch.setattr(RemoteDirectory, "download", break_off)
        with pytest.raises(StorageError):
            restore_run(remote, other, None)
    restore_run(remote, other, None)
    assert (other / "metrics.jsonl").read_text() == "metrics.jsonl"


def test_the_run_in_a_manifest_is_no_path(remote, run, tmp_path):
    checkpoint = saved(run, 3)
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    (checkpoint / MANIFEST).write_text(json.dumps({**manifest, "run": "a/../../../b"}))
    remote.upload(checkpoint)
    with pytest.raises(DamagedError, match="names no run"):
        restore_run(remote, tmp_path / "other" / "run", None)
    assert not (tmp_path / "b-step-00000003").exists()


def test_a_removal_that_was_interrupted_is_completed_by_a_resumed_run_without_uploads(remote, run):
    newest = [saved(run, step) for step in (1, 2, 3)]
    for checkpoint in newest:
        remote.upload(checkpoint)
    (place(remote, "step-00000001") / MANIFEST).unlink()
    upload_to(remote, newest=newest[-1]).close()
    assert sorted(path.name for path in place(remote, "").iterdir()) == ["step-00000002", "step-00000003"]


def test_only_checkpoints_of_the_run_are_removed_when_it_is_replaced(remote, run):
    remote.upload(saved(run, 3))
    remote.remove_all("fedcba9876543210")
    assert remote.list_complete() == ["step-00000003"]
    remote.remove_all(RUN)
    assert remote.list_complete() == []


def test_retention_and_checkpoints_of_other_runs(remote, run):
    for step in range(1, 7):
        remote.upload(saved(run, step))
    foreign = place(remote, "step-00000001") / MANIFEST
    foreign.write_text(json.dumps({**json.loads(foreign.read_text()), "run": "another"}))
    (foreign.parent.parent / "step-00000003" / "notes.txt").write_text("mine")
    remote.remove_old(RUN, keep_last=2, keep_every=4)
    assert remote.list_complete() == [f"step-{step:08d}" for step in (1, 4, 5, 6)]
    assert files(foreign.parent.parent / "step-00000003") == {"notes.txt": "mine"}


def test_a_copy_of_a_checkpoint_under_another_name_is_no_checkpoint_and_stays(remote, run):
    for step in (1, 2, 3):
        remote.upload(saved(run, step))
    copy = place(remote, "step-00000001-kept")
    shutil.copytree(place(remote, "step-00000001"), copy)
    remote.remove_old(RUN, keep_last=1, keep_every=None)
    assert remote.list_complete() == ["step-00000003"]
    assert files(copy).keys() > {MANIFEST, ".metadata"}


def test_an_outage_delays_uploads_and_is_told_once(remote, run, caplog):
    caplog.set_level(logging.INFO)
    Remote.is_down = True
    uploads = upload_to(remote)
    checkpoints = [saved(run, step) for step in (1, 2, 3)]
    for checkpoint in checkpoints:
        uploads.submit(checkpoint)
    assert uploads.is_needed(checkpoints[2])
    threading.Event().wait(0.1)
    Remote.is_down = False
    uploads.close()
    assert "step-00000003" in remote.list_complete() and "step-00000002" not in remote.list_complete()
    assert not any(map(uploads.is_needed, checkpoints))
    assert caplog.text.count("training continues") == 1 and "the newest checkpoint is there" in caplog.text


def test_old_checkpoints_stay_where_nothing_may_be_deleted(remote, run, caplog, monkeypatch):
    def refuse(self, names):
        raise StorageError("403: s3:DeleteObject")

    monkeypatch.setattr(Remote, "remove", refuse)
    copied = []
    upload = RemoteCheckpoints.upload
    monkeypatch.setattr(
        RemoteCheckpoints, "upload", lambda self, path: (copied.append(path.name), upload(self, path))[1]
    )
    for step in (1, 2, 3):
        uploads = upload_to(remote, keep_last=1)
        uploads.submit(saved(run, step))
        uploads.close()
    assert copied == remote.list_complete() == [f"step-{step:08d}" for step in (1, 2, 3)], "each is uploaded once"
    assert "403: s3:DeleteObject; old checkpoints stay there" in caplog.text


def test_what_is_not_uploaded_at_the_end_is_named_and_uploaded_by_the_next_run(remote, run, caplog):
    Remote.is_down = True
    uploads = upload_to(remote)
    uploads.submit(saved(run, 4))
    uploads.submit(newest := saved(run, 6))
    uploads.close()
    assert "step-00000006 could not be uploaded" in caplog.text
    assert "again" not in caplog.text, "step 4, which is dropped, is no success"
    Remote.is_down = False
    upload_to(remote, newest=newest).close()
    assert remote.list_complete() == ["step-00000006"]


def test_only_the_newest_waits_and_those_that_are_kept_forever():
    first, second, third = (Path(f"step-{step:08d}") for step in (4, 6, 7))
    assert upload_order([first, second], third, keep_every=4) == [first, third]
    assert upload_order([first, second], third, keep_every=None) == [third]


def test_a_local_checkpoint_serves_while_the_storage_cannot_be_reached(remote, run, tmp_path, caplog):
    saved(run, 2)
    Remote.is_down = True
    restore_run(remote, run, RUN)
    assert "continuing from the newest local checkpoint" in caplog.text
    with pytest.raises(StorageError):
        restore_run(remote, tmp_path / "nothing", None)
