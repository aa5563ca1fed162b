"""Tokens/s, MFU and memory of the published recipes on one GPU, against a plain loop over transformers' model.

    python -m benchmarks.gpu_throughput [--minutes 8.5] [--models 1.1B 3B 300M] [--kinds compiled plain] ...

Each case runs in a separate process on random tokens in bf16, so running out of memory or time affects only its row.
The most important cases come first; those that do not fit in the minutes are reported as skipped. A recipe runs with
loader, metrics and TensorBoard; the plain loop has fused AdamW over float32 weights under autocast, with the same
micro-batches. --smoke runs the cases on the CPU in tiny shapes, which only shows that they run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from benchmarks.gpu_throughput_case import KINDS, MODELS, options
from benchmarks.shared import ROOT, machine, spread

ORDER = [
    ("1.1B", "compiled"), ("3B", "compiled"), ("MoE-1B", "compiled"), ("1.1B", "plain"), ("1.1B", "no noise"),
    ("3B", "plain"), ("300M", "compiled"), ("300M", "plain"), ("1.1B", "eager"), ("3B", "eager"), ("MoE-1B", "eager"),
    ("1.1B", "documents"), ("1.1B", "plain compiled"), ("3B", "plain compiled"), ("3B", "no noise"), ("300M", "eager"),
    ("300M", "plain compiled"),
]  # fmt: skip
"""In order of importance: the cases of the goals first."""
GOALS = {"1.1B": (0.5, 1.3), "3B": (0.5, 1.3)}
"""Goals of the compiled recipe: MFU, and tokens/s as a multiple of the plain loop."""
WARM_UP = 3
LEAST_SECONDS = {False: 25.0, True: 2.0}
"""A case with less time left is skipped; keyed by --smoke."""


@dataclass
class Row:
    """A case and its result. Without `step_seconds` nothing was measured, and `note` holds the reason."""

    model: str
    kind: str
    note: str = ""
    start_seconds: float | None = None
    """From the command to the end of the first step: imports, weights, compilation."""
    step_seconds: list[float] = field(default_factory=list)
    """Seconds of each step after the warm-up."""
    tokens_per_step: int = 0
    mfu: float | None = None
    memory_bytes: int = 0
    """Peak bytes allocated on the device."""
    reserved_bytes: int | None = None
    """Peak bytes reserved by torch."""
    estimated_bytes: int | None = None
    """Peak bytes of tensors by the dry run; recipes only."""
    losses: list[float] = field(default_factory=list)

    @property
    def speeds(self) -> list[float]:
        """Tokens per second of each step."""
        return [self.tokens_per_step / seconds for seconds in self.step_seconds]

    def read(self, lines: list[dict[str, Any]], started: float) -> None:
        """Set the fields from the report of the case; `started` is the time of its command."""
        if len(lines) < 2:
            return
        head, steps = lines[0], lines[1:]
        ends = [step["at"] for step in steps]
        self.start_seconds = ends[0] - started
        self.step_seconds = [later - earlier for earlier, later in pairwise(ends)][WARM_UP - 1 :]
        self.tokens_per_step, self.estimated_bytes = head["tokens_per_step"], head["estimated_bytes"]
        self.memory_bytes, self.reserved_bytes = steps[-1]["memory_bytes"], steps[-1]["reserved_bytes"]
        self.losses = [step["loss"] for step in steps]
        if self.step_seconds and head["peak_flops"]:
            self.mfu = statistics.median(self.speeds) * head["flops_per_token"] / head["peak_flops"]

    def line(self, plain: Row | None) -> str:
        """Return the row of the table; `plain` is the row to compare with."""
        cells = [self.model, self.kind, "", "", "", "", "", "", self.note]
        if self.step_seconds:
            cells[2] = spread(self.speeds, ",.0f")
            cells[3] = f"{self.mfu:.1%}" if self.mfu is not None else "?"
            cells[4] = f"{self.memory_bytes / 1e9:.1f}"
            cells[5] = f"{self.estimated_bytes / 1e9:.1f}" if self.estimated_bytes else ""
        if (ratio := self.against(plain)) is not None:
            cells[6] = f"{ratio:.2f}"
        if self.start_seconds is not None:
            cells[7] = f"{self.start_seconds:.0f}"
        return f"| {' | '.join(cells)} |"

    def against(self, plain: Row | None) -> float | None:
        """Return the speed as a multiple of that of `plain`, by the medians."""
        if plain is None or not (self.step_seconds and plain.step_seconds):
            return None
        return statistics.median(self.speeds) / statistics.median(plain.speeds)


def run_case(row: Row, extra: list[str], limit: float) -> None:
    """Measure in a separate process for at most `limit` seconds; `row.note` reports failures."""
    with tempfile.TemporaryDirectory() as directory:
        report, errors = Path(directory) / "report.jsonl", Path(directory) / "errors.txt"
        case = "benchmarks.gpu_throughput_case"
        command = [sys.executable, "-m", case, row.model, row.kind, "--report", str(report), *extra]
        started = time.monotonic()
        with errors.open("w") as file:
            process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True)
            try:
                if process.wait(limit):
                    row.note = failure_reason(errors.read_text(errors="replace"), process.returncode)
            except subprocess.TimeoutExpired:
                row.note = f"stopped after {limit:.0f} s"
            except KeyboardInterrupt:
                row.note = "interrupted"
                raise
            finally:
                kill_group(process)
                row.read(complete_lines(report), started)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and its children, such as the workers of the compiler."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        process.wait()


def complete_lines(report: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a report; an incomplete last one is ignored."""
    text = report.read_text(encoding="utf-8") if report.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def failure_reason(output: str, status: int) -> str:
    """Return the first sentence of the last error in the output of a process."""
    errors = re.findall(r"^(?:\w+\.)*(\w*(?:Error|Exception|Unsupported)\b.*)", output, flags=re.MULTILINE)
    lines = errors or output.strip().splitlines() or [""]
    sentence = re.split(r"(?<=\w)\. ", lines[-1])[0].replace("|", "/")
    return f"failed ({status}): {sentence[:160]}"


def table(rows: list[Row]) -> str:
    plain = {row.model: row for row in rows if row.kind == "plain"}
    lines = [
        "| model | loop | tokens/s | MFU | peak GB | dry run | times the plain loop | s to the first step | |",
        "|---|---|---|---|---|---|---|---|---|",
        *(row.line(plain.get(row.model)) for row in rows),
    ]
    return "\n".join(lines)


def verdicts(rows: list[Row]) -> list[str]:
    """Return a line for each goal whose case is among `rows`."""
    plain = {row.model: row for row in rows if row.kind == "plain"}
    lines = []
    for row in rows:
        if row.kind != "compiled" or row.model not in GOALS:
            continue
        mfu, times = GOALS[row.model]
        for name, value, goal, form in (
            ("MFU", row.mfu, mfu, ".0%"),
            ("times the plain loop", row.against(plain.get(row.model)), times, ".2f"),
        ):
            outcome = "not measured" if value is None else f"{value:{form}}, {'met' if value >= goal else 'missed'}"
            lines.append(f"goal: {row.model}, {name}, at least {goal:{form}}: {outcome}")
    return lines


def measure(rows: list[Row], arguments: argparse.Namespace, deadline: float) -> None:
    """Fill `rows` in order until the monotonic time `deadline`; write all rows after each."""
    passed = [f"--steps={arguments.steps}", f"--accumulation={arguments.accumulation}"]
    passed += ["--smoke"] if arguments.smoke else []
    if arguments.activation_checkpoint:
        passed.append(f"--activation-checkpoint={arguments.activation_checkpoint}")
    micro_batches = dict(pair.split("=", 1) for pair in arguments.micro_batch)
    for row in rows:
        left = deadline - time.monotonic()
        if left < LEAST_SECONDS[arguments.smoke]:
            row.note = f"skipped: {max(0.0, left):.0f} s were left"
        else:
            micro_batch = [f"--micro-batch={micro_batches[row.model]}"] if row.model in micro_batches else []
            run_case(row, [*passed, *micro_batch], min(left, arguments.case_seconds))
            print(f"{row.model} {row.kind}: {row.note or 'measured'}", file=sys.stderr, flush=True)
        save(rows, arguments.output)


def save(rows: list[Row], output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    about = {"machine": machine(), "command": sys.argv[1:], "rows": [asdict(row) for row in rows]}
    output.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    started = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[options()]
    )
    parser.add_argument("--minutes", type=float, default=8.5, help="time limit of all cases together")
    parser.add_argument("--case-seconds", type=float, default=150, help="time limit of one case")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--micro-batch", nargs="+", default=[], metavar="MODEL=SAMPLES")
    parser.add_argument("--output", type=Path, default=Path("runs") / "gpu.json", help="all rows, as JSON")
    arguments = parser.parse_args()
    if not (arguments.smoke or torch.cuda.is_available()):
        print("no CUDA device is available; --smoke runs the same cases on the CPU, in tiny shapes", file=sys.stderr)
        return 2
    if arguments.steps <= WARM_UP:
        parser.error(
            f"--steps {arguments.steps}: expected at least {WARM_UP + 1}, since the first {WARM_UP} are warm-up"
        )
    if invalid := [pair for pair in arguments.micro_batch if not re.fullmatch(rf"({'|'.join(MODELS)})=[1-9]\d*", pair)]:
        parser.error(f"--micro-batch {invalid[0]}: expected a model and a number of samples, such as 1.1B=8")
    rows = [Row(*case) for case in ORDER if case[0] in arguments.models and case[1] in arguments.kinds]
    signal.signal(signal.SIGTERM, interrupt)  # sent at the time limit of a job: print the table anyway
    status = 0
    try:
        measure(rows, arguments, started + 60 * arguments.minutes)
    except KeyboardInterrupt:
        status = 130
        for row in rows:
            row.note = row.note or ("" if row.step_seconds else "not run: interrupted")
        save(rows, arguments.output)
    print(f"\n{machine()}; bf16, {arguments.accumulation} micro-batches per step, ", end="")
    print(f"{arguments.steps - WARM_UP} steps after {WARM_UP} of warm-up;")
    print("tokens/s: median (lowest to highest)\n")
    print(table(rows))
    if not arguments.smoke:
        print("\n" + "\n".join(verdicts(rows)))
    print(f"\nAll rows: {arguments.output}. Repeat with:\n")
    print(f"    python -m benchmarks.gpu_throughput {shlex.join(sys.argv[1:])}".rstrip())
    return status


if __name__ == "__main__":
    sys.exit(main())
