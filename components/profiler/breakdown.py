"""Break down the time of a profiled window: a Chrome trace of torch.profiler, summed by kind.

Times are in microseconds, as in the trace. Every instant of the window is counted once, so the kinds sum to its length.
"""

from __future__ import annotations

import gzip
import heapq
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from components.profiler import kernel_kinds as kinds

STEP = "ProfilerStep#"
"""Prefix of the range of a step, by the convention of torch.profiler, which other trace readers use too."""
END_OF_WINDOW = "profiler: wait for the device"
"""Range after the last step, in which the host waits for the device."""

_ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
_ON_HOST = {"cpu_op", "user_annotation"}
_RUNTIME = {"cuda_runtime", "cuda_driver"}
_SYNCHRONIZATIONS = {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy"}


class Interval(NamedTuple):
    """A time interval of `kind`. Where intervals overlap, the lowest `priority` gets the time."""

    priority: int
    start: float
    end: float
    kind: str


@dataclass(frozen=True)
class Breakdown:
    """The time of a window by kind."""

    device: str
    """"cuda": kernels on the GPU. "cpu": operators of the training thread."""
    steps: int
    window: float
    """Length of the window: from the start of the first step until the device has finished the last."""
    times: dict[str, float]
    """Kind -> time; the sum is `window`."""
    communication: float
    """Time of communication, including what overlaps with computation."""
    kernels: int
    synchronizations: int
    """Number of times that the host waited for the device, over all steps."""
    synchronizing: float
    """Time that the host waited in them."""

    def table(self, title: str) -> str:
        """Return the breakdown as a text table, in milliseconds per step."""
        per_step = 1e3 * self.steps
        unused = sum(self.times.get(kind, 0.0) for kind in (kinds.IDLE, kinds.DATA, kinds.BETWEEN_STEPS))
        busy = 1 - unused / self.window
        lines = [f"{title}: {self.window / per_step:.2f} ms per step, {self.device} busy {busy:.1%}"]
        for kind in kinds.KINDS:
            if time := self.times.get(kind):
                lines.append(f"  {kind:<24}{time / per_step:>10.2f} ms{time / self.window:>8.1%}")
        if self.communication:
            overlapped = 1 - self.times.get(kinds.COMMUNICATION, 0.0) / self.communication
            lines.append(f"  communication takes {self.communication / per_step:.2f} ms, {overlapped:.0%} overlapped")
        if self.device == "cuda":
            lines.append(
                f"  {self.kernels / self.steps:,.0f} kernels and {self.synchronizations / self.steps:g} "
                f"synchronizations per step; the host waits {self.synchronizing / per_step:.2f} ms in them"
            )
        return "\n".join(lines)


def read_trace(file: Path) -> list[dict[str, Any]]:
    """Return the events with a duration of a trace, which may be gzip-compressed."""
    opener = gzip.open if file.suffix == ".gz" else open
    with opener(file, "rt", encoding="utf-8") as text:
        return [event for event in json.load(text)["traceEvents"] if event.get("ph") == "X"]


def break_down(events: Iterable[dict[str, Any]]) -> Breakdown:
    """Return the breakdown of a trace from its first step to its last. Raises ValueError without a step."""
    threads: defaultdict[tuple[Any, Any], list[dict[str, Any]]] = defaultdict(list)
    on_device: list[dict[str, Any]] = []
    for event in events:
        category = event.get("cat")
        if category in _ON_DEVICE:
            on_device.append(event)
        elif category in _ON_HOST or category in _RUNTIME:
            threads[event["pid"], event["tid"]].append(event)
    marks = {thread: [each for each in found if _is_step(each)] for thread, found in threads.items()}
    training_thread = max(marks, key=lambda thread: len(marks[thread]), default=None)
    if training_thread is None or not marks[training_thread]:
        raise ValueError(f"the trace has no range {STEP}...: no step was recorded")
    steps = marks[training_thread]
    start = min(step["ts"] for step in steps)
    last_step_ends = max(map(_end, steps))
    waits = [_end(each) for each in threads[training_thread] if each["name"] == END_OF_WINDOW]
    end = max([last_step_ends, *waits])

    for earlier, later in pairwise(steps):
        gap = {"name": kinds.BETWEEN_STEPS, "cat": "user_annotation", "ts": _end(earlier)}
        threads[training_thread].append({**gap, "dur": later["ts"] - _end(earlier)})

    segments: list[tuple[bool, Interval]] = []
    launched_in: dict[Any, str | None] = {}
    waits_in_steps: list[float] = []
    for thread, found in threads.items():
        for segment in _segments(found, launched_in):
            if thread == training_thread or segment.kind == kinds.COMMUNICATION:
                segments.append((thread == training_thread, segment))
        for event in found:
            if event["name"] in _SYNCHRONIZATIONS and start <= event["ts"] < last_step_ends:
                waits_in_steps.append(event["dur"])

    if on_device:
        intervals = [_device_interval(event, launched_in) for event in on_device]
        idle = (kinds.DATA, kinds.BETWEEN_STEPS)  # host activity that explains an idle device
        intervals += [Interval(3, *each[1:]) for own, each in segments if own and each.kind in idle]
    else:
        # gloo communicates on other threads, while the training thread waits outside of any operator
        intervals = [each if own else Interval(1, *each[1:]) for own, each in segments]
    communicates = [each for each in intervals if each.kind == kinds.COMMUNICATION]
    return Breakdown(
        device="cuda" if on_device else "cpu",
        steps=len(steps),
        window=end - start,
        times=exclusive_times(intervals, start, end),
        communication=exclusive_times(communicates, start, end).get(kinds.COMMUNICATION, 0.0),
        kernels=sum(event["cat"] == "kernel" and start <= event["ts"] < end for event in on_device),
        synchronizations=len(waits_in_steps),
        synchronizing=sum(waits_in_steps),
    )


def exclusive_times(intervals: Iterable[Interval], start: float, end: float) -> dict[str, float]:
    """Return kind -> time from `start` to `end`. Of overlapping intervals the smallest gets the time; gaps are IDLE."""
    times: defaultdict[str, float] = defaultdict(float)
    active: list[Interval] = []
    now = start
    for following in [*sorted(intervals, key=lambda each: each.start), None]:
        until = end if following is None else min(max(following.start, start), end)
        while now < until:
            while active and active[0].end <= now:
                heapq.heappop(active)
            stop = min(active[0].end, until) if active else until
            times[active[0].kind if active else kinds.IDLE] += stop - now
            now = stop
        if following is not None:
            heapq.heappush(active, following)
    return dict(times)


def _segments(events: Sequence[dict[str, Any]], launched_in: dict[Any, str | None]) -> Iterator[Interval]:
    """Split the nested events of a host thread into disjoint intervals, each of the kind of its innermost event.

    Fills `launched_in`: correlation number of each launch, which its kernel shares -> kind of the enclosing event.
    """
    stack: list[tuple[float, str | None]] = []
    now = 0.0

    def up_to(time: float) -> Iterator[Interval]:
        nonlocal now
        while stack and now < time:
            end, kind = stack[-1]
            if kind is not None and now < min(end, time):
                yield Interval(0, now, min(end, time), kind)
            now = max(now, min(end, time))
            if end > time:
                return
            stack.pop()

    for event in sorted(events, key=lambda each: (each["ts"], -each["dur"])):
        yield from up_to(event["ts"])
        now = event["ts"]
        surrounding = stack[-1][1] if stack else None
        if event["cat"] in _RUNTIME:
            launched_in[event.get("args", {}).get("correlation")] = surrounding
            continue
        kind = kinds.kind_within(event["name"], surrounding)
        if kind is None and event["cat"] == "cpu_op":
            kind = kinds.OTHER
        stack.append((_end(event), kind))
    yield from up_to(float("inf"))


def _device_interval(event: dict[str, Any], launched_in: dict[Any, str | None]) -> Interval:
    """Return the interval of a device event. Priorities: computation, then communication, then copies."""
    surrounding = launched_in.get(event.get("args", {}).get("correlation"))
    kind = kinds.kind_within(event["name"], surrounding) or kinds.OTHER
    priority = 1 if kind == kinds.COMMUNICATION else 0 if event["cat"] == "kernel" else 2
    if kind == kinds.DATA:  # the copy of a micro-batch to the device is not waiting for data
        kind = kinds.COPIES
    return Interval(priority, event["ts"], _end(event), kind)


def _is_step(event: dict[str, Any]) -> bool:
    return event["cat"] == "user_annotation" and event["name"].startswith(STEP)


def _end(event: dict[str, Any]) -> float:
    return float(event["ts"] + event["dur"])
