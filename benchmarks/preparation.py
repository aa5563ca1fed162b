"""Data preparation: MB/s, relative to tiktoken on the same documents in memory, and peak memory.

    python -m benchmarks.preparation [--megabytes 64] [--rounds 5] [--text FOLDER]
    python -m benchmarks.preparation --memory --megabytes 2000

Speed: `tiktoken.encode_batch` on one thread and preparation on one and on two cores take turns, in an order that
changes with the round; preparation reads JSON lines, encodes them and writes synced shards into an empty cache. The
documents are paragraphs of the standard library, or of --text, drawn by a seed. Clock time is the time one waits;
processor time, summed over all processes, is comparable on a shared machine.
Memory: the peaks of preparing such a corpus and of training the debug recipe on it, each in a separate process, above
those of the same process with 1 MB of text.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.corpus import tokenizer, write_files
from benchmarks.shared import DEBUG, ROOT, machine, quartiles, spread
from components.data import TextFiles

_PREPARE = """
import resource, sys
from pathlib import Path
from benchmarks.corpus import tokenizer
from components.data import TextFiles

TextFiles(path=Path(sys.argv[1])).build(
    tokenizer=tokenizer(), sequence_length=256, cache_dir=Path(sys.argv[2]), progress=lambda line: None
)
largest = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
print(max(largest) * (1 if sys.platform == "darwin" else 1024))
"""


Seconds = tuple[float, float]
"""Clock seconds and processor seconds."""


def timed(work: Callable[[], object]) -> Seconds:
    start, used = time.perf_counter(), _processor_seconds()
    work()
    return time.perf_counter() - start, _processor_seconds() - used


def _processor_seconds() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def encode_with_tiktoken(files: list[Path]) -> Callable[[], Seconds]:
    encoding = tokenizer()._encoding
    texts = [json.loads(line)["text"] for path in files for line in path.read_text(encoding="utf-8").splitlines()]

    def encode() -> None:
        for first in range(0, len(texts), 1024):  # a single batch would measure the memory of a list of all ids
            encoding.encode_batch(texts[first : first + 1024], num_threads=1, disallowed_special=())

    return lambda: timed(encode)


def prepare_on(folder: Path, cores: int) -> Callable[[], Seconds]:
    def prepare() -> None:
        allowed = os.sched_getaffinity(0)
        if len(allowed) < cores:
            raise SystemExit(f"this benchmark needs {cores} cores; {len(allowed)} are available")
        os.sched_setaffinity(0, set(sorted(allowed)[:cores]))
        try:
            with tempfile.TemporaryDirectory() as cache:
                TextFiles(path=folder).cache_entry(tokenizer(), Path(cache)).prepare(lambda state: None, 1.0)
        finally:
            os.sched_setaffinity(0, allowed)

    return lambda: timed(prepare)


def speed(folder: Path, megabytes: int, rounds: int, text: Path | None) -> None:
    files = write_files(folder, megabytes * 10**6, text)
    size = sum(path.stat().st_size for path in files) / 1e6
    ways = {
        "tiktoken, 1 thread": encode_with_tiktoken(files),
        "1 core": prepare_on(folder, 1),
        "2 cores": prepare_on(folder, 2),
    }
    seconds: dict[str, list[Seconds]] = {name: [] for name in ways}
    for turn in range(rounds):
        for name in sorted(ways, reverse=bool(turn % 2)):
            seconds[name].append(ways[name]())
    print(f"{machine()}; {size:,.0f} MB of JSON lines in {len(files)} files, {rounds} rounds in turn")
    for name, values in seconds.items():
        for clock, which in (("clock", 0), ("processor", 1)):
            times = [value[which] for value in values]
            ratios = [base[which] / value for base, value in zip(seconds["tiktoken, 1 thread"], times, strict=True)]
            print(
                f"{name:20} {clock:10} {spread([size / value for value in times])} MB/s; "
                f"{quartiles(ratios)} of tiktoken, with quartiles"
            )


def training_peak(folder: Path, cache: Path, out: Path) -> int:
    """Return the peak bytes of 20 steps of the debug recipe on the text."""
    out.mkdir()
    settings = {
        "data.use": "components.data:TextFiles", "data.path": str(folder), "validation": "none",
        "run.dir": f"{out}/run",
        "run.cache_dir": str(cache), "training.total_tokens": "80K", "lr_schedule.warmup_tokens": "10K",
        "batch.use": "benchmarks.shared:PeakMemoryBatch", "batch.initial_size": "16", "batch.folder": str(out),
        "checkpoint.interval_steps": "none",
    }  # fmt: skip
    arguments = [f"--{key}={value}" for key, value in settings.items()]
    subprocess.run([sys.executable, "-m", "recipes", str(DEBUG), *arguments], cwd=ROOT, check=True, capture_output=True)
    return int((out / "rank-0").read_text().split()[1])


def memory(folder: Path, megabytes: int, text: Path | None) -> None:
    peaks: list[tuple[int, int]] = []
    for name, size in (("small", 1), ("large", megabytes)):
        place, cache = folder / name / "text", folder / name / "cache"
        write_files(place, size * 10**6, text)
        command = [sys.executable, "-c", _PREPARE, str(place), str(cache)]
        prepared = int(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
        peaks.append((prepared, training_peak(place, cache, folder / name / "run")))
    print(f"{machine()}; {megabytes:,} MB of text")
    for what, small, large in zip(("preparing, the largest process", "training"), *peaks, strict=True):
        print(f"{what}: {large / 1e6:,.0f} MB, {(large - small) / 1e6:,.0f} MB above the same with 1 MB of text")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--text", type=Path, help="directory of text to draw from (default: the standard library)")
    parser.add_argument("--memory", action="store_true", help="measure memory instead of speed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.memory:
            memory(Path(folder), options.megabytes, options.text)
        else:
            speed(Path(folder), options.megabytes, options.rounds, options.text)


if __name__ == "__main__":
    main()
