"""Draw what runs wrote to metrics.jsonl, one or several in one picture, against tokens.

    python -m tools.plot_runs runs/debug --output debug.svg
    python -m tools.plot_runs runs/a runs/b --output both.png

Loss (each step faint, its running mean on top, validation as points), learning rate, batch size with the noise scale
where it was measured, and gradient norm.
Needs the `plot` extra. Exit status: 0 done, 2 for what the user can put right.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from components.metrics.jsonl import read_rows
from components.paths import is_file
from components.run_directory import RunDirectory
from components.standard_streams import run_command
from tools.pictures import count_tokens_on, pyplot, write

PANELS = {
    "loss": "loss, nats a token",
    "lr": "learning rate",
    "global_batch_size": "batch, and gradient noise scale (faint), samples",
    "grad_norm": "gradient norm",
}
SMOOTHING = 50
"""The running mean of the loss is over this share of the run: one step in fifty."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.plot_runs", description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run directories")
    parser.add_argument("--output", type=Path, required=True, help="the picture to write: .svg, .png or .pdf")
    options = parser.parse_args(arguments)
    try:
        plot({path.resolve().name: read_run(path) for path in options.runs}, options.output)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"wrote {options.output}")
    return 0


def read_run(run: Path) -> list[dict[str, Any]]:
    """Return the rows of a run. Raises ValueError where there is no finished step, or a line is not a row."""
    metrics = RunDirectory(run).metrics
    if not is_file(metrics):
        raise ValueError(f"{run} holds no {metrics.name}: name a run directory, such as runs/debug")
    rows = read_rows(metrics)
    if not any("loss" in row for row in rows):
        raise ValueError(f"{metrics} has no finished step yet")
    return rows


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and up to `window` - 1 before it."""
    means, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        means.append(total / min(i + 1, window))
    return means


def plot(runs: dict[str, list[dict[str, Any]]], output: Path) -> None:
    """One colour a run, one panel a quantity. Raises ValueError without matplotlib, or for an unknown kind of file."""
    figure, panels = pyplot().subplots(2, 2, figsize=(10, 6), sharex=True, layout="constrained")
    for number, (name, rows) in enumerate(runs.items()):
        colour = f"C{number}"
        for axis, key in zip(panels.flat, PANELS, strict=True):
            steps = [row for row in rows if row.get(key) is not None]
            tokens, values = [row["tokens"] for row in steps], [row[key] for row in steps]
            if key == "loss":
                axis.plot(tokens, values, color=colour, alpha=0.25, linewidth=0.8)
                axis.plot(tokens, running_mean(values, max(1, len(values) // SMOOTHING)), color=colour, label=name)
                held_out = [row for row in rows if row.get("val_loss") is not None]
                axis.plot(
                    [row["tokens"] for row in held_out], [row["val_loss"] for row in held_out],
                    "o", color=colour, markeredgecolor="white", label=f"{name}, validation",
                )  # fmt: skip
            else:
                axis.plot(tokens, values, color=colour, linewidth=1.2)
            if key == "global_batch_size" and (noisy := [row for row in rows if row.get("noise_scale") is not None]):
                scale = [row["noise_scale"] for row in noisy]
                axis.plot([row["tokens"] for row in noisy], scale, color=colour, alpha=0.35, linewidth=0.8)
                axis.set_yscale("log")
    for axis, title in zip(panels.flat, PANELS.values(), strict=True):
        axis.set_title(title, loc="left", fontsize=10)
        axis.grid(alpha=0.3)
    panels[0, 0].legend(frameon=False)
    for axis in panels[1]:
        count_tokens_on(axis)
    write(figure, output)


if __name__ == "__main__":
    sys.exit(run_command(main))
