"""The layouts that must all train alike, and a way to run many recipes on many processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from components.data.dataset import PackedTokens
from components.data.sources.text_files import TextFiles
from recipes import cli

ROOT = Path(__file__).resolve().parents[2]

LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one process": (1, []),
    "two replicas": (2, ["--parallel.dp_replicate=2"]),
    "two shards": (2, []),
    "two slices": (2, ["--parallel.tp=2"]),
    "four shards": (4, []),
    "two replicas of two shards": (4, ["--parallel.dp_replicate=2"]),
    "two shards of two slices": (4, ["--parallel.tp=2"]),
}
"""Name -> processes, arguments."""


@dataclass(kw_only=True)
class RecordedText(TextFiles):
    """Text files that note, in a file for each process, which sequences were read."""

    notes: Path
    """The folder for those files."""

    def build(self, **settings) -> PackedTokens:
        samples = super().build(**settings)
        self.notes.mkdir(parents=True, exist_ok=True)
        read, notes = samples.__getitems__, self.notes / f"rank-{os.environ.get('RANK', '0')}"

        def noted(indices):
            with notes.open("a") as file:
                file.write(json.dumps(list(map(int, indices))) + "\n")
            return read(indices)

        samples.__getitems__ = noted
        return samples


def run_all(processes: int, commands: list[list[str]], folder: Path) -> None:
    """Run the launcher with each of `commands` on `processes` processes, one thread each."""
    if processes == 1:
        for arguments in commands:
            assert cli.main(arguments) == 0, arguments
        return
    (folder / "commands.json").write_text(json.dumps(commands))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
         "-m", "tests.distributed.several", folder / "commands.json"],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
