import multiprocessing
import os
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.data.loader import MicroBatchLoader, build_order
from components.data.loader_workers import check_workers
from components.data.mixing_schedule import StagedMixingSchedule
from components.data.mixture import MixedOrder
from components.data.order import SampleOrder

ROOT = Path(__file__).resolve().parents[3]

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


class Numbers:
    """Sequence i is i*T ... i*T + T, so that a micro-batch shows which sequences it holds."""

    def __init__(self, length: int = 23, sequence_length: int = 4):
        self.length = length
        self.sequence_length = sequence_length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        start = index * self.sequence_length
        return torch.arange(start, start + self.sequence_length + 1)


class Failing(Numbers):
    def __getitem__(self, index: int) -> torch.Tensor:
        raise ValueError(f"shard of sequence {index} cannot be read")


class FailsAt(Numbers):
    def __init__(self, index: int, error: Exception):
        super().__init__(100)
        self.index, self.error = index, error

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == self.index:
            raise self.error
        return super().__getitem__(index)


def global_stream(steps, *, ranks=1, micro_batch_size=1, start=0, workers=0, samples=None):
    """Per step, the (sample id, sequence) pairs of all ranks together, in global order."""
    loaders = [
        MicroBatchLoader(
            samples or Numbers(),
            seed=5,
            micro_batch_size=micro_batch_size,
            dp_rank=rank,
            dp_size=ranks,
            start=start,
            num_workers=workers,
        )
        for rank in range(ranks)
    ]
    stream = []
    try:
        for micro_batches in steps:
            step = []
            for micro in zip(*(loader.next_step(micro_batches) for loader in loaders), strict=True):
                for rank_micro in micro:
                    step += zip(rank_micro.sample_ids.tolist(), rank_micro.tokens[:, 0].tolist(), strict=True)
            stream.append(step)
        return stream, start + sum(map(len, stream))
    finally:
        for loader in loaders:
            loader.close()


def expected(start: int, stop: int) -> list[tuple[int, int]]:
    """The same, from the order alone."""
    samples = Numbers()
    _, indices = SampleOrder(len(samples), seed=5)(np.arange(start, stop))
    return [(s, int(i) * samples.sequence_length) for s, i in zip(range(start, stop), indices, strict=True)]


layouts = {"ranks": st.integers(1, 4), "micro_batch_size": st.integers(1, 5), "start": st.integers(0, 200)}


@pytest.mark.slow
@pytest.mark.quick
@settings(max_examples=150, deadline=None)
@given(steps=st.lists(st.integers(1, 4), min_size=1, max_size=5), **layouts)
def test_the_global_order_is_that_of_the_samples_whatever_the_layout(steps, ranks, micro_batch_size, start):
    stream, cursor = global_stream(steps, ranks=ranks, micro_batch_size=micro_batch_size, start=start)
    assert [len(step) for step in stream] == [k * ranks * micro_batch_size for k in steps]
    assert list(chain.from_iterable(stream)) == expected(start, cursor)
    assert cursor == start + sum(steps) * ranks * micro_batch_size


@pytest.mark.quick
@settings(max_examples=50, deadline=None)
@given(
    before=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    after=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    first=st.fixed_dictionaries(layouts),
    second=st.fixed_dictionaries(layouts),
)
def test_a_run_resumes_with_the_next_sample_on_any_layout(before, after, first, second):
    stream, cursor = global_stream(before, **first)
    resumed, end = global_stream(after, **(second | {"start": cursor}))
    assert list(chain.from_iterable(stream + resumed)) == expected(first["start"], end)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(("ranks", "micro_batch_size", "start"), [(1, 3, 0), (2, 2, 17), (3, 1, 5)])
def test_workers_change_nothing(workers, ranks, micro_batch_size, start):
    steps = [1, 4, 2, 1]
    layout = {"ranks": ranks, "micro_batch_size": micro_batch_size, "start": start}
    assert global_stream(steps, **layout, workers=workers) == global_stream(steps, **layout)


def test_workers_read_packed_tokens_alike(packed):
    samples = packed(["Call me Ishmael. " * 20, "Some years ago, never mind how long precisely"], 16)
    assert global_stream([3, 2], samples=samples, micro_batch_size=4, workers=2) == global_stream(
        [3, 2], samples=samples, micro_batch_size=4
    )


@pytest.mark.quick
@pytest.mark.parametrize(("ranks", "ordered"), [(2047, [4096]), (2048, [2, 2])])
def test_samples_of_other_ranks_are_ordered_only_if_the_next_micro_batch_is_near(ranks, ordered):
    class Counted(Numbers):
        def order(self, *, seed):
            order = SampleOrder(len(self), seed=seed)
            return lambda ids: (computed.append(len(ids)), order(ids))[1]

    computed: list[int] = []
    loader = MicroBatchLoader(Counted(), seed=5, micro_batch_size=2, dp_rank=3, dp_size=ranks)
    list(loader.next_step(2))
    assert computed == ordered


def test_shapes_and_shift():
    with MicroBatchLoader(Numbers(), seed=0, micro_batch_size=3) as loader:
        (micro,) = loader.next_step(1)
    assert micro.tokens.shape == micro.labels.shape == (3, 4)
    assert micro.tokens.dtype == micro.labels.dtype == micro.sample_ids.dtype == torch.int64
    assert micro.tokens.is_contiguous() and micro.labels.is_contiguous()
    assert torch.equal(micro.labels, micro.tokens + 1)
    assert micro.sample_ids.tolist() == [0, 1, 2]


@pytest.mark.quick
def test_micro_batches_are_read_when_asked_for_and_a_step_may_be_left():
    loader = MicroBatchLoader(Numbers(), seed=0, micro_batch_size=2)
    step = loader.next_step(5)
    assert next(step).sample_ids.tolist() == [0, 1]
    assert next(loader.next_step(1)).sample_ids.tolist() == [2, 3]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_closed_loader_continues_where_it_stopped(workers):
    loader = MicroBatchLoader(Numbers(), seed=0, micro_batch_size=2, num_workers=workers)
    list(loader.next_step(3))
    loader.close()
    assert next(loader.next_step(1)).sample_ids.tolist() == [6, 7]
    loader.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_reading_arrives_as_it_was_raised(workers):
    samples = Failing()
    with (
        MicroBatchLoader(samples, seed=0, micro_batch_size=1, num_workers=workers) as loader,
        pytest.raises(ValueError, match=r"^shard of sequence \d+ cannot be read$"),
    ):
        next(loader.next_step(1))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyError("text")])
def test_after_a_sample_that_cannot_be_read_it_continues_with_the_next(workers, error):
    samples = Numbers(100)
    good = MicroBatchLoader(samples, seed=0, micro_batch_size=2, dp_size=2, dp_rank=1)
    expected = [micro.tokens[:, 0].tolist() for micro in good.next_step(6)]
    samples = FailsAt(expected[2][1] // samples.sequence_length, error)
    with MicroBatchLoader(samples, seed=0, micro_batch_size=2, dp_size=2, dp_rank=1, num_workers=workers) as loader:
        step, seen = loader.next_step(4), []
        for number in range(4):
            try:
                seen.append(next(step).tokens[:, 0].tolist())
            except type(error):
                assert number == 2
                assert loader.last_samples == range(10, 12)
        assert seen == [*expected[:2], expected[3]]
        assert [micro.tokens[:, 0].tolist() for micro in loader.next_step(2)] == expected[4:]


class Stuck(Numbers):
    def __getitem__(self, index: int) -> torch.Tensor:
        time.sleep(60)
        raise AssertionError


def test_a_disk_that_does_not_answer_is_an_error_and_not_a_hang(monkeypatch):
    monkeypatch.setattr("components.data.loader._TIMEOUT_SECONDS", 0.5)
    loader = MicroBatchLoader(Stuck(), seed=0, micro_batch_size=1, num_workers=1)
    with loader, pytest.raises(OSError, match=r"no micro-batch in 0\.5 s: the disk .* does not respond"):
        next(loader.next_step(1))


def test_a_killed_worker_raises_only_while_a_micro_batch_is_awaited(monkeypatch):
    monkeypatch.setattr("components.data.loader._PREFETCH_FACTOR", 1)
    with MicroBatchLoader(Numbers(), seed=0, micro_batch_size=1, num_workers=1) as loader:
        next(loader.next_step(1))
        (worker,) = loader._iterator._workers
        worker.kill()
        os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
        sum(range(1000))  # where torch's handler would raise
        with pytest.raises(OSError, match=r"a loader worker died: .* killed by signal: Killed"):
            list(loader.next_step(20))


def test_sockets_that_cannot_be_opened_are_reported_before_the_start_and_by_a_worker(tmp_path, monkeypatch, capfd):
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    # where TMPDIR leads to; processes that have asked for it remember it
    monkeypatch.setitem(multiprocessing.process.current_process()._config, "tempdir", str(folder))
    with pytest.raises(OSError, match=r"^worker processes .* \(AF_UNIX path too long\); set TMPDIR to a shorter path"):
        check_workers(1)
    check_workers(0)
    with (
        MicroBatchLoader(Numbers(), seed=0, micro_batch_size=1, num_workers=1) as loader,
        pytest.raises(OSError, match=r"^a loader worker failed: OSError: AF_UNIX path too long$"),
    ):
        next(loader.next_step(1))
    assert "Traceback" not in capfd.readouterr().err


WORKERS = st.sampled_from([0, 1, 3])


class Mixed(Numbers):
    """Two of them, in a custom order."""

    def order(self, *, seed: int) -> MixedOrder:
        schedule = StagedMixingSchedule([(0, [2, 1]), (40, [1, 3])])
        return MixedOrder(schedule, [10, 13], seed=seed)


@settings(max_examples=12, deadline=None)
@given(
    parts=st.lists(
        st.tuples(
            st.lists(st.integers(1, 3), min_size=1, max_size=3),
            st.fixed_dictionaries(
                {
                    "ranks": st.integers(1, 4),
                    "micro_batch_size": st.integers(1, 4),
                    "workers": st.sampled_from([0, 1, 3]),
                }
            ),
        ),
        min_size=1,
        max_size=2,
    ),
    start=st.integers(0, 100),
    samples=st.sampled_from([Numbers(), Mixed()]),
)
def test_any_sequence_of_layouts_and_batches_gives_one_order(parts, start, samples):
    seen, cursor = [], start
    for steps, layout in parts:  # each continues where the last one stopped
        stream, cursor = global_stream(steps, **layout, start=cursor, samples=samples)
        seen += chain.from_iterable(stream)
    _, indices = build_order(samples, seed=5)(np.arange(start, cursor))
    first_tokens = (indices * samples.sequence_length).tolist()
    assert seen == list(zip(range(start, cursor), first_tokens, strict=True))


def test_workers_live_through_signals_and_end_with_the_loader():
    with MicroBatchLoader(Numbers(), seed=0, micro_batch_size=1, num_workers=2) as loader:
        list(loader.next_step(2))
        workers = list(loader._iterator._workers)
        for worker in workers:
            os.kill(worker.pid, signal.SIGINT)
            os.kill(worker.pid, signal.SIGTERM)
        micros = list(loader.next_step(8))
        assert [micro.sample_ids.item() for micro in micros] == list(range(2, 10))
    assert not any(worker.is_alive() for worker in workers)


@pytest.mark.parametrize("ending", ["", "raise RuntimeError('lost')"])
def test_a_process_that_forgets_to_close_still_ends(ending):
    """Its workers end before multiprocessing waits for them at interpreter exit, which it would do forever."""
    script = f"""
import atexit, multiprocessing.util, os
import tests.components.data.test_loader as t
# runs after what the loader registers later, and before what multiprocessing has registered
atexit.register(lambda: multiprocessing.active_children() and (print("still alive", flush=True), os._exit(3)))
loader = t.MicroBatchLoader(t.Numbers(), seed=0, micro_batch_size=1, num_workers=2)
print(next(loader.next_step(1)).sample_ids)
{ending}
"""
    process = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == bool(ending), process.stdout
    assert "set_vital" not in process.stderr


@pytest.mark.quick
def test_the_global_random_state_of_torch_is_unchanged():
    before = torch.random.get_rng_state()
    list(MicroBatchLoader(Numbers(), seed=0, micro_batch_size=1).next_step(3))
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.quick
@pytest.mark.parametrize(
    "wrong", [{"micro_batch_size": 0}, {"start": -1}, {"dp_rank": 2, "dp_size": 2}, {"num_workers": -1}]
)
def test_impossible_layouts_are_refused(wrong):
    with pytest.raises(ValueError, match=str(next(iter(wrong)))):
        MicroBatchLoader(Numbers(), **({"seed": 0, "micro_batch_size": 1} | wrong))


@pytest.mark.quick
def test_a_resize_discards_nothing_that_was_read(monkeypatch):
    read = []
    original = Numbers.__getitem__
    monkeypatch.setattr(Numbers, "__getitem__", lambda self, index: read.append(index) or original(self, index))
    loader = MicroBatchLoader(Numbers(), seed=0, micro_batch_size=2)
    for micro_batches in (1, 4, 2, 7):
        list(loader.next_step(micro_batches))
    assert len(read) == 2 * 14
