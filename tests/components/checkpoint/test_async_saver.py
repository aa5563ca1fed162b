"""A save in the background contains the state at its call, and is never incomplete."""

import signal
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from components.checkpoint import (
    CheckpointConfig,
    CheckpointManager,
    StateTensors,
    list_checkpoints,
    remove_partial_saves,
)
from components.checkpoint.metadata_unpickler import read_index
from tests.components.checkpoint.test_manager import Alone, step, training
from tests.end_to_end.test_resume import assert_same_state
from tests.processes import run_process

ROOT = Path(__file__).resolve().parents[3]


class HeldBack:
    """Replaces `dcp.save`; it starts to write when `go` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.started, self._write = threading.Event(), threading.Event(), dcp.save
        monkeypatch.setattr(dcp, "save", self)

    def __call__(self, *args, **kwargs):
        self.started.set()
        assert self.go.wait(30)
        return self._write(*args, **kwargs)


@pytest.fixture
def store(tmp_path):
    store = CheckpointManager(tmp_path / "async", Alone(), async_save=True)
    yield store
    store.close()


@pytest.mark.quick
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_saved_state_is_bitwise_that_of_the_call(tmp_path, store, monkeypatch):
    model, optimizer = training(0)
    tensors = StateTensors(model, optimizer, Alone())
    plain = CheckpointManager(tmp_path / "sync", Alone())
    for number in range(1, 4):  # from the second save on the buffers of the first are used again
        step(model, optimizer, number)
        plain.save(number, tensors.collect(), {"step": number, "counted": [number]}, "a = 1\n")
        expected, saved = plain.path(number), store.path(number)
        with monkeypatch.context() as patch:
            held = HeldBack(patch)
            counted = [number]
            assert store.save(number, tensors.collect(), {"step": number, "counted": counted}, "a = 1\n") is None
            step(model, optimizer, 99)  # changes parameters and moments in place, before anything was written
            counted[0] += 1
            torch.rand(3)
            assert not saved.exists()
            held.go.set()
            store.wait()
        assert_same_state(saved, expected)
        assert read_index(saved).entries.keys() == read_index(expected).entries.keys()
        assert (saved / "config.toml").read_text() == "a = 1\n"


@pytest.mark.quick
def test_writing_a_copy_takes_no_stream_of_a_gpu(store, monkeypatch):
    """A thread uses GPU 0, also on other ranks, and each of them would allocate memory there."""
    held = HeldBack(monkeypatch)
    store.save(1, {"x": torch.ones(3)}, {}, "")
    assert held.started.wait(30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *device: pytest.fail("a stream was taken"))
    held.go.set()
    store.wait()
    assert store.saved_step == 1


@pytest.mark.quick
def test_an_unfinished_save_is_waited_for_before_the_next_and_before_it_is_named(store, monkeypatch):
    held = HeldBack(monkeypatch)
    store.save(1, {"x": torch.ones(3)}, {}, "")
    assert held.started.wait(30)
    later = threading.Timer(0.2, held.go.set)
    later.start()
    store.save(2, {"x": torch.ones(3)}, {}, "")
    assert store.path(1).is_dir()
    assert store.latest() == store.path(2)


@pytest.mark.quick
def test_pruning_follows_a_complete_save(tmp_path):
    store = CheckpointConfig(keep_last=2, async_save=True).build(tmp_path, Alone())
    for number in (1, 2, 3):
        store.save(number, {"x": torch.ones(1)}, {}, "")
        assert len(store.list_checkpoints()) >= min(number - 1, 2), (
            "the last good ones stay until the new one is complete"
        )
    store.close()
    assert [path.name for path in store.list_checkpoints()] == ["step-00000002", "step-00000003"]


@pytest.mark.quick
def test_an_error_in_the_background_is_logged_and_recorded(store, monkeypatch, caplog):
    store.save(1, {"x": torch.ones(3)}, {}, "")
    store.wait()

    def die(*args, **kwargs):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(dcp, "save", die)
        assert store.save(2, {"x": torch.ones(3)}, {}, "") is None
        store.wait()
    assert f"{store.path(2)} could not be saved: No space left" in caplog.text
    assert (store.saved_step, store.failed_steps) == (1, [2])
    assert [path.name for path in store.directory.iterdir()] == ["step-00000001"]
    store.save(3, {"x": torch.ones(3)}, {}, "")
    assert store.latest() == store.path(3)
    assert store.saved_step == 3


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
import torch.distributed.checkpoint as dcp
from components.checkpoint import CheckpointManager
from tests.components.checkpoint.test_manager import Alone

store = CheckpointManager(Path(sys.argv[1]), Alone(), async_save=True)
store.save(1, {"x": torch.ones(3)}, {}, "")
store.wait()
write = dcp.save
def killed_after_its_files_are_written(*args, **kwargs):
    write(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGKILL)
dcp.save = killed_after_its_files_are_written
store.save(2, {"x": torch.ones(3)}, {}, "")
store.wait()
"""


def test_kill_9_while_it_is_written_leaves_nothing_that_looks_complete(tmp_path):
    done = run_process([sys.executable, "-c", KILLED, tmp_path], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000001"]
    assert [path.name for path in tmp_path.glob(".*")] == [".writing--step-00000002"]
    remove_partial_saves(tmp_path, "")
    assert not list(tmp_path.glob(".*"))
