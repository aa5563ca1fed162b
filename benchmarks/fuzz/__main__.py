"""Give damaged files to every reader of the project, and report those that neither accept nor refuse them cleanly.

    python -m benchmarks.fuzz --minutes 60 [--seed 0] [--folder DIRECTORY] [TARGET ...]

A reader of a mutated file must return, or raise one of the errors that its callers report as one message, which names
the file. A finding is any other exception, a crash, a need for more than `--memory` GB, or for more than `--timeout`
seconds of a processor. The targets are run in turn, for some seconds each, in child processes. Execution N of a target
is the same every time: `--first N --executions 1 TARGET` repeats it. Findings are counted by the type of the error and
the last line of the project on its traceback; DIRECTORY gets the input and the traceback of the first of each. Exit
status: 1 with findings.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.fuzz.corpus import make_corpus
from benchmarks.fuzz.targets import TARGETS, Executions
from benchmarks.shared import ROOT, machine

SLICE_SECONDS = 10.0
"""Time of a target before the next one has its turn."""
_WAITING = 10
"""Seconds that an execution may take, for each second of processor time: others may use the machine."""
PRODUCT = tuple(str(ROOT / name) for name in ("recipes", "components", "models", "tools"))


@dataclass
class Tally:
    """The executions of one target."""

    executed: int = 0
    accepted: int = 0
    seconds: float = 0.0
    findings: Counter[str] = field(default_factory=Counter)
    first: dict[str, int] = field(default_factory=dict)
    """Finding -> the number of the first execution that had it."""


@dataclass(frozen=True)
class Fuzzer:
    """Runs targets in child processes with limits."""

    corpus: Path
    work: Path
    """A directory for the files of one execution."""
    kept: Path
    """The directory of findings and logs."""
    timeout: float
    """Processor seconds of an execution."""
    memory: float
    """GB of address space that an execution may add."""

    def run_slice(self, name: str, first: int, count: int | None, tally: Tally) -> None:
        """Run a target from execution `first` on, for SLICE_SECONDS or `count` executions, and add to its tally."""
        executions, records = Executions(name, self.corpus, self.work), self.work.with_suffix(".records")
        log, started = self.kept / f"{name.replace(' ', '-')}.log", time.monotonic()
        records.unlink(missing_ok=True)
        status = in_child(lambda: self._execute(executions, first, count, records), log)
        tally.seconds += time.monotonic() - started
        for number, record in _read_records(records, status):
            tally.executed += 1
            tally.accepted += record.get("accepted", False)
            if (finding := record.get("finding")) is not None:
                tally.findings[finding] += 1
                if finding not in tally.first:
                    tally.first[finding] = number
                    self._keep(executions, number, finding, record.get("traceback", f"see {log}"))

    def _execute(self, executions: Executions, first: int, count: int | None, records: Path) -> None:
        """Execute in this process; write the number of an execution before it begins, and its record after it."""
        _limit_memory(self.memory)
        faulthandler.register(signal.SIGPROF, chain=True)  # write the stack, then end
        until = time.monotonic() + SLICE_SECONDS
        with records.open("w", encoding="utf-8") as file:
            number = first
            while time.monotonic() < until and (count is None or number < first + count):
                print(number, file=file, flush=True)
                signal.setitimer(signal.ITIMER_PROF, self.timeout)
                faulthandler.dump_traceback_later(_WAITING * self.timeout, exit=True)
                record = _record_of(executions, number)
                faulthandler.cancel_dump_traceback_later()
                signal.setitimer(signal.ITIMER_PROF, 0)
                print(json.dumps(record), file=file, flush=True)
                number += 1

    def _keep(self, executions: Executions, number: int, finding: str, details: str) -> None:
        """Store the input of a finding, and print the finding."""
        file, content, is_sealed = executions.mutation(number)
        folder = self.kept / f"{executions.name.replace(' ', '-')}-{number}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / Path(file).name).write_bytes(content)
        sealed = ", with new checksums" if is_sealed and executions.target.seal else ""
        (folder / "finding.txt").write_text(f"{finding}\n{file}{sealed}\n\n{details}", "utf-8", "replace")
        print(f"{executions.name}: {finding}; execution {number}, in {folder}", flush=True)


def _record_of(executions: Executions, number: int) -> dict[str, Any]:
    """Return the result of one execution."""
    try:
        return {"accepted": executions.run(number)}
    except (Exception, SystemExit) as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(PRODUCT)]
        place = f"{Path(frames[-1].filename).relative_to(ROOT)}:{frames[-1].lineno}" if frames else "no line"
        kind = str(error).split(":")[0] if isinstance(error, AssertionError) else type(error).__name__
        text = "".join(traceback.format_exception(error))
        return {"finding": f"{kind} at {place}", "traceback": text[-20_000:]}


def _read_records(records: Path, status: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield number and result of each execution of a process; that of the last one is how the process ended."""
    lines = records.read_text(encoding="utf-8").splitlines() if records.exists() else []
    for at in range(0, len(lines), 2):
        if at + 1 < len(lines):
            yield int(lines[at]), json.loads(lines[at + 1])
        else:
            how = signal.Signals(-status).name if status < 0 else f"exit with status {status}, as when it waits"
            yield int(lines[at]), {"finding": how}


def _limit_memory(memory: float) -> None:
    """Limit the address space to `memory` GB more than now, and write no core files."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
    limit = pages * resource.getpagesize() + int(memory * 1e9)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def in_child(do: Callable[[], None], log: Path) -> int:
    """Call `do` in a forked process whose output goes to `log`; return 0, its exit status, or minus its signal."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            faulthandler.enable()
            do()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def fuzz(fuzzer: Fuzzer, names: list[str], first: int, executions: int | None, minutes: float) -> dict[str, Tally]:
    """Run the targets in turn until the time is over, Ctrl-C, or each has had its executions."""
    tallies, waiting = {name: Tally() for name in names}, list(names)
    deadline = time.monotonic() + 60 * minutes
    with suppress(KeyboardInterrupt):
        while waiting and time.monotonic() < deadline:
            name = waiting.pop(0)
            tally = tallies[name]
            fuzzer.run_slice(name, first + tally.executed, executions and executions - tally.executed, tally)
            if executions is None or tally.executed < executions:
                waiting.append(name)
    return tallies


def print_report(tallies: dict[str, Tally]) -> None:
    print("\n| target | executions | per second | accepted | findings |\n|---|---|---|---|---|")
    for name, tally in tallies.items():
        rate, accepted = tally.executed / max(tally.seconds, 1e-9), tally.accepted / max(tally.executed, 1)
        print(f"| {name} | {tally.executed:,} | {rate:,.0f} | {accepted:.0%} | {len(tally.findings)} |")
    total = sum(tally.executed for tally in tallies.values())
    print(f"\n{total:,} executions, {sum(len(tally.findings) for tally in tallies.values())} findings; {machine()}")
    for name, tally in tallies.items():
        for finding, count in tally.findings.most_common():
            print(f"{name}: {finding}, {count} times; first in execution {tally.first[finding]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"default: all of {', '.join(TARGETS)}")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0, help="begin with execution SEED * 10**9 of each target")
    parser.add_argument("--first", type=int, help="begin with this execution, instead of --seed")
    parser.add_argument("--executions", type=int, help="of each target (default: as many as there is time for)")
    parser.add_argument("--timeout", type=float, default=60, help="processor seconds of an execution (default: 60)")
    parser.add_argument("--memory", type=float, default=4.0, help="GB of address space more than at first (default: 4)")
    parser.add_argument("--folder", type=Path, help="directory of findings and logs (default: a temporary one)")
    options = parser.parse_args()
    if unknown := sorted(set(options.targets) - TARGETS.keys()):
        parser.error(f"{unknown[0]!r} is not one of {', '.join(TARGETS)}")
    kept = options.folder or Path(tempfile.mkdtemp(prefix="fuzz-"))
    kept.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "HF_HOME": str(kept / "hub")}
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(Path(folder) / "corpus", Path(folder) / "work", kept, options.timeout, options.memory)
        # in a child, because libraries that have started threads cannot be used after a fork
        if in_child(lambda: make_corpus(fuzzer.corpus), kept / "corpus.log"):
            sys.exit(f"the valid files cannot be made: see {kept / 'corpus.log'}")
        first = options.seed * 10**9 if options.first is None else options.first
        tallies = fuzz(fuzzer, options.targets or list(TARGETS), first, options.executions, options.minutes)
    print_report(tallies)
    return 1 if any(tally.findings for tally in tallies.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
