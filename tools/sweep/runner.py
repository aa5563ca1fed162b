"""The runs of a sweep: started as by the launcher, measured by what they logged, and recorded in a JSONL file."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

from components.paths import is_file
from components.run_directory import RunDirectory
from recipes.cli import ERROR_FILE, ROOT
from recipes.launch import resolve_world_shape
from tools.sweep.grid import Job, Settings
from tools.sweep.outcome import OUTCOMES, Outcome, measure

THROWAWAY_OVERRIDES = {"checkpoint.interval_steps": "none", "metrics.writers.tensorboard": "none"}
"""Overrides of a run whose directory is deleted: what it need not write."""
_LINE_PREFIX = b'{"digest": "'
"""The beginning of each line of the result file. An incomplete last line is removed only if it begins like this."""
INPUT, KILLED = 2, (129, 130, 137, 143)
"""Exit statuses: bad input, and ended by SIGHUP, SIGINT, SIGKILL or SIGTERM."""
VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"


def visible_gpus() -> list[str]:
    """Return the GPUs this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get(VISIBLE_GPUS)
    if named is not None:
        return [device.strip() for device in named.split(",") if device.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def gpu_assignments(gpus: Sequence[str], runs: int) -> list[Mapping[str, str]]:
    """Return the environment variables of each of `runs` runs: equally many GPUs each, and no GPU in two.

    With fewer GPUs than runs, some share one; a single GPU, or none, needs no variable.
    """
    if len(gpus) < 2 or runs < 2:
        return [{} for _ in range(runs)]
    each = len(gpus) // runs
    if not each:
        return [{VISIBLE_GPUS: gpus[run % len(gpus)]} for run in range(runs)]
    return [{VISIBLE_GPUS: ",".join(gpus[run * each : (run + 1) * each])} for run in range(runs)]


def processes_per_run(runs: int, recipe: object) -> int:
    """Return how many processes the launcher starts for the `recipe` of one of `runs` runs at a time.

    Raises UsageError.
    """
    gpus = visible_gpus()
    assigned = gpu_assignments(gpus, runs)[0].get(VISIBLE_GPUS)
    return resolve_world_shape(
        os.environ, recipe, len(gpus) if assigned is None else len(assigned.split(","))
    ).world_size


class Results:
    """Outcomes by the digest of their job, stored in a file. A job with an outcome is not run again."""

    def __init__(self, path: Path) -> None:
        """Read the file, if it exists. Raises ValueError if it holds something else."""
        self.path = path
        self._outcomes: dict[str, Outcome] = {}
        self._varied: dict[str, Settings] = {}
        self._lock = threading.Lock()
        self._torn_at: int | None = None
        """The offset of an incomplete last line, whose writer was killed."""
        text = path.read_bytes() if is_file(path) else b""
        for number, line in enumerate(text.splitlines(keepends=True), 1):
            if not line.endswith(b"\n") and line[: len(_LINE_PREFIX)] == _LINE_PREFIX[: len(line)]:
                self._torn_at = len(text) - len(line)
                break
            try:
                entry = json.loads(line)
                self._varied[entry["digest"]] = dict(entry["varied"])
                self._outcomes[entry["digest"]] = OUTCOMES.validate_python(entry["outcome"])
            except (ValueError, KeyError, TypeError, RecursionError):
                raise ValueError(f"{path}:{number} is not a result of a sweep; give --results another file") from None

    def get(self, job: Job) -> Outcome | None:
        return self._outcomes.get(job.digest)

    def items(self) -> list[tuple[Settings, Outcome]]:
        """Return the keys that were varied and the outcome of each run in the file."""
        return [(varied, self._outcomes[digest]) for digest, varied in self._varied.items()]

    def add(self, job: Job, outcome: Outcome) -> None:
        settings = {key: value for key, value in job.settings.items() if not key.endswith("path")}
        entry = {"digest": job.digest, "varied": dict(job.varied), "settings": settings, "outcome": asdict(outcome)}
        with self._lock:
            self._outcomes[job.digest], self._varied[job.digest] = outcome, job.varied
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self._torn_at is not None:
                os.truncate(self.path, self._torn_at)
                self._torn_at = None
            with self.path.open("ab") as file:
                file.write(json.dumps(entry).encode() + b"\n")


class Runner:
    """Runs jobs, some at a time, each in separate processes."""

    def __init__(
        self, results: Results, at_a_time: int = 1, keep_in: Path | None = None, curve_points: int = 0
    ) -> None:
        """Prepare to run `at_a_time` jobs at once.

        `keep_in`: the directory for run directories, named by digest; without it they are deleted. `curve_points`: at
        most this many points of each run's loss curve are kept with its outcome.
        """
        self.results, self.at_a_time, self.keep_in, self.curve_points = results, at_a_time, keep_in, curve_points
        self._free_gpus: queue.SimpleQueue[Settings] = queue.SimpleQueue()
        for assignment in gpu_assignments(visible_gpus(), at_a_time):
            self._free_gpus.put(assignment)
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._stopping = threading.Event()

    def run(self, jobs: Sequence[Job], *, again: bool = False) -> int:
        """Run the jobs without an outcome, and with `again` also the failed ones; return how many runs were killed.

        Raises ValueError for bad input, and KeyboardInterrupt also for SIGTERM and SIGHUP; either ends the others.
        """
        missing = [job for job in jobs if self._is_missing(job, again)]
        killed = 0
        with _interrupted_by_signals(), ThreadPoolExecutor(self.at_a_time) as pool:
            futures = {pool.submit(self._run, job): job for job in missing}
            try:
                for number, future in enumerate(as_completed(futures), 1):
                    job, outcome = futures[future], future.result()
                    if outcome is None:
                        killed += 1
                    result = "killed; the next start runs it again" if outcome is None else str(outcome)
                    print(f"[{number}/{len(missing)}] {job}: {result}", file=sys.stderr, flush=True)
            except BaseException:
                self._stopping.set()
                for process in list(self._processes):
                    process.terminate()
                pool.shutdown(cancel_futures=True)
                raise
        return killed

    def _is_missing(self, job: Job, again: bool) -> bool:
        outcome = self.results.get(job)
        return outcome is None or (again and outcome.failure is not None)

    def _run(self, job: Job) -> Outcome | None:
        """Return the outcome, or None if the run was killed."""
        if self.keep_in is not None:
            return self._run_in(self.keep_in / job.digest, job, {})
        with tempfile.TemporaryDirectory() as folder:
            return self._run_in(Path(folder) / "run", job, THROWAWAY_OVERRIDES)

    def _run_in(self, folder: Path, job: Job, extra: Settings) -> Outcome | None:
        if self._stopping.is_set():
            return None
        places = {"run.dir": str(folder), "run.name": job.digest, "run.if_exists": "replace"}
        status, output, error = self._launch(job, {**job.settings, **places, **extra})
        if self._stopping.is_set() or status < 0 or status in KILLED:
            return None
        if status == INPUT and not (error and error["started"]):
            self._stopping.set()  # at once: the next run of this thread would find the same
            raise ValueError(f"with {job}:\n{output.strip()}")
        message = error["problems"][-1]["message"].partition("\n")[0] if error else output
        failure = None if status == 0 else failure_reason(message)
        outcome = measure(RunDirectory(folder), failure, self.curve_points)
        self.results.add(job, outcome)
        return outcome

    def _launch(self, job: Job, settings: Settings) -> tuple[int, str, dict[str, Any] | None]:
        """Return the exit status, all output, and the configuration error that the run ended with, if it did."""
        threads = str(max(1, (os.cpu_count() or 1) // self.at_a_time))
        resume = {} if job.resume_from is None else {"resume": job.resume_from}
        options = (f"--{key}={value}" for key, value in {**settings, **resume}.items())
        command: list[Any] = [sys.executable, ROOT / "recipes", job.recipe, *options]
        assignment = self._free_gpus.get()
        with tempfile.TemporaryDirectory() as folder:
            error = Path(folder) / "error.json"
            process = subprocess.Popen(
                command,
                env={"OMP_NUM_THREADS": threads, **os.environ, **assignment, ERROR_FILE: str(error)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C is for the sweep, which ends its runs itself
            )
            self._processes.add(process)
            if self._stopping.is_set():
                process.terminate()
            output, _ = process.communicate()
            fields = None
            with suppress(ValueError):  # cut off by a full disk: the output has the message, too
                fields = json.loads(error.read_text(encoding="utf-8")) if error.exists() else None
        self._processes.discard(process)
        self._free_gpus.put(assignment)
        return process.returncode, output.decode(errors="replace"), fields


def report_stop(stop: KeyboardInterrupt) -> int:
    print("stopped; the same command continues with the remaining runs", file=sys.stderr)
    return 128 + (stop.args[0] if stop.args else signal.SIGINT)


@contextmanager
def _interrupted_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise KeyboardInterrupt with their number, as SIGINT does; ignored ones stay ignored."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(number)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        signal.signal(number, signal.SIG_IGN if handler == signal.SIG_IGN else interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def failure_reason(output: str) -> str:
    """Return the first sentence of the last message: what follows is advice, and names files that are deleted."""
    last = [line for line in output.splitlines() if line.strip()][-1:] or ["no output"]
    return last[0].strip().split(". ")[0][:300]
