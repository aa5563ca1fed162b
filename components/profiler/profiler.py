"""Record a window of steps with torch.profiler, and write the trace and a table of its time by kind."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from components.errors import InputError
from components.profiler.breakdown import END_OF_WINDOW, STEP, break_down, read_trace
from components.units import Count, PositiveCount

log = logging.getLogger("powertrain")

_ALLOCATIONS = 1_000_000
"""Largest number of allocations in a memory snapshot, about 1 kB each in the file."""


@dataclass(frozen=True, kw_only=True)
class ProfilerConfig:
    """[profile]: record some steps with torch.profiler. Disabled unless `steps` is set.

    Writes a Chrome trace and a table of the time by kind to `profile/` in the run directory. See docs/performance.md.
    """

    steps: Count = 0
    """Steps to record; 0: none. Use few steps of few micro-batches: a million events take half a minute to process."""
    start_step: PositiveCount = 10
    """Number of the first step to record; late enough for compilation and warm-up to be finished."""
    all_ranks: bool = False
    """Record every process, each in a separate file; false: only rank 0."""
    memory_snapshot: bool = False
    """Also record GPU allocations, for https://pytorch.org/memory_viz. Written even if the run ends out of memory."""
    with_stack: bool = False
    """Record the Python call stack of each operator. The trace is several times larger, and the run slower."""

    def build(self, folder: Path, *, device: torch.device, rank: int) -> Profiler:
        """Return the profiler of this process, which writes to `folder`. Raises ValueError."""
        if self.steps and self.memory_snapshot and device.type != "cuda":
            raise InputError(
                "memory_snapshot",
                f"the device is {device.type}, and only CUDA's allocator records its history; "
                "remove it, or train on a GPU",
            )
        return Profiler(self, folder, device, rank)


class Profiler:
    """Call `start_step` and `end_step` around each step, and `close` at the end of the run."""

    def __init__(self, config: ProfilerConfig, folder: Path, device: torch.device, rank: int) -> None:
        self._config, self._folder, self._device, self._rank = config, folder, device, rank
        self._waits = config.steps > 0 and (rank == 0 or config.all_ranks)
        """Whether the window has not started yet."""
        self._last = config.start_step + config.steps - 1
        self._profile: torch.profiler.profile | None = None
        self._step_range: torch.profiler.record_function | None = None
        self._recorded: list[int] = []
        self._seen: list[int] = []
        """The first and the latest step of this run."""

    def start_step(self, step: int) -> None:
        """Call before step number `step` of the run."""
        if self._waits:
            self._seen = [*self._seen[:1], step]
            if self._config.start_step <= step <= self._last:
                self._start()
        if self._profile is not None:
            self._step_range = torch.profiler.record_function(f"{STEP}{step}")
            self._step_range.__enter__()
            self._recorded.append(step)

    def end_step(self) -> None:
        """Call after each step; after the last step of the window the trace is written."""
        if self._step_range is None:
            return
        self._step_range.__exit__(None, None, None)
        self._step_range = None
        if self._recorded[-1] >= self._last:
            self._stop()

    def close(self, kind: type[BaseException] | None = None, *error: object) -> None:
        """Call at the end of the run, as the `__exit__` of a context; an unfinished window is written as it is."""
        if self._waits and self._seen and kind is None:
            first, last = self._config.start_step, self._last
            log.warning(
                f"no profile was recorded: steps {first} to {last} (profile.start_step = {first}, profile.steps = "
                f"{self._config.steps}) are not among steps {self._seen[0]} to {self._seen[-1]}, which this run took"
            )
        if self._profile is not None and kind is None:
            self._stop()
        elif self._profile is not None:
            # After an error the device may be unusable, but its memory history is on the host.
            self._snapshot_memory(f"{self._name()}.memory.pickle")
            self._profile.stop()
            self._profile = None

    def _start(self) -> None:
        self._waits = False
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            if self._config.memory_snapshot:
                torch.cuda.memory._record_memory_history(max_entries=_ALLOCATIONS)
        self._profile = torch.profiler.profile(activities=activities, with_stack=self._config.with_stack)
        self._profile.start()
        self._synchronize()  # kernels launched before the window must not be counted in it

    def _stop(self) -> None:
        profile, self._profile = self._profile, None
        assert profile is not None
        with torch.profiler.record_function(END_OF_WINDOW):
            self._synchronize()
        profile.stop()
        name = self._name()
        try:
            self._write(profile, name)
        except Exception as error:  # a full disk, or a trace format of another torch version: training continues
            log.warning(f"the profile of steps {self._steps()} is not complete: {type(error).__name__}: {error}")

    def _write(self, profile: torch.profiler.profile, name: str) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._snapshot_memory(f"{name}.memory.pickle")
        trace = self._folder / f"{name}.trace.json.gz"
        profile.export_chrome_trace(str(trace))
        table = break_down(read_trace(trace)).table(f"profile of steps {self._steps()}, rank {self._rank}")
        (self._folder / f"{name}.txt").write_text(table + "\n", encoding="utf-8")
        log.info(table)
        log.info(f"trace in {trace}: open it at https://ui.perfetto.dev")

    def _snapshot_memory(self, name: str) -> None:
        if self._device.type != "cuda" or not self._config.memory_snapshot:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(self._folder / name))
        torch.cuda.memory._record_memory_history(enabled=None)
        log.info(f"memory snapshot in {self._folder / name}: open it at https://pytorch.org/memory_viz")

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _steps(self) -> str:
        return f"{self._recorded[0]} to {self._recorded[-1]}" if self._recorded else "none"

    def _name(self) -> str:
        return f"steps-{self._steps().replace(' ', '-')}-rank-{self._rank}"
