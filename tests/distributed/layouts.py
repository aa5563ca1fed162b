"""The layouts that must train equally, and a function that runs many recipes on several processes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from components.data.dataset import TokenDataset
from components.data.sources.text_files import TextFiles
from tests.conftest import TEXT, launch_here
from tests.processes import run_ranks

LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one process": (1, []),
    "two replicas": (2, ["--parallel.dp_replicate=2"]),
    "two shards": (2, []),
    "two TP ranks": (2, ["--parallel.tp=2"]),
    "two CP ranks": (2, ["--parallel.cp=2"]),
    "four shards": (4, []),
    "two replicas of two shards": (4, ["--parallel.dp_replicate=2"]),
    "two shards of two TP ranks": (4, ["--parallel.tp=2"]),
    "two shards of two CP ranks": (4, ["--parallel.cp=2"]),
    "two CP ranks of two TP ranks": (4, ["--parallel.cp=2", "--parallel.tp=2"]),
}
"""Name -> processes, arguments."""


@dataclass(kw_only=True)
class RecordedText(TextFiles):
    """Text files that record the sequences read, in a file for each process."""

    notes: Path
    """The folder for those files."""

    def build(self, **settings) -> TokenDataset:
        samples = super().build(**settings)
        self.notes.mkdir(parents=True, exist_ok=True)
        read, notes = samples.__getitems__, self.notes / f"rank-{os.environ.get('RANK', '0')}"

        def noted(indices):
            with notes.open("a") as file:
                file.write(json.dumps(list(map(int, indices))) + "\n")
            return read(indices)

        samples.__getitems__ = noted
        return samples


def short_documents(folder: Path) -> Path:
    """Write documents of 2 to 46 characters, some of which share a sequence, and return the file."""
    texts = [TEXT[number * 5 :][: 2 + 11 * number % 45] for number in range(24)]
    path = folder / "short.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def run_cases(layout_of: dict[str, str], command: Callable[[str], list[str]], folder: Path) -> None:
    """Run the command of each case, a name -> layout, with the processes of its layout."""
    for processes in (1, 2, 4):
        here = [name for name, layout in layout_of.items() if LAYOUTS[layout][0] == processes]
        if here:
            run_all(processes, [command(name) for name in here], folder)


def run_all(processes: int, commands: list[list[str]], folder: Path) -> None:
    """Run the launcher with each of `commands` on `processes` processes, one thread each."""
    if processes == 1:
        for arguments in commands:
            assert launch_here(arguments) == 0, arguments
        return
    (folder / "commands.json").write_text(json.dumps(commands))
    run_ranks(processes, [sys.executable, "-m", "tests.distributed.several", folder / "commands.json"], folder)
