"""Analyze a sweep of learning rates: the best of each group, the best for all groups, their law, and a figure.

    python -m benchmarks.lr_transfer.analysis mine.toml --results sweep.jsonl --grid ... --output sweep.svg

The arguments are those of `python -m tools.sweep`, which has run the sweep; nothing is run here. A group is one
combination of all keys except the learning rate and the seed. Needs the `plot` extra.
Exit status: 0 done, 2 for a user error.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.lr_transfer.law import PUBLISHED_A, PUBLISHED_B, fit_law, optimum_points, peak_lr_factor
from components.plotting import import_pyplot, save_figure
from components.units import format_count
from recipes.cli import reports_bad_input
from tools.sweep.__main__ import build_parser, read_sweep
from tools.sweep.grid import Job
from tools.sweep.groups import Group, group_results, lr_of, minimax_lr
from tools.sweep.optimum import Optimum

LR_KEYS = ("lr_schedule.max_lr", "lr_schedule.a")
"""The key that is tuned, if it is varied and --lr-key is not given."""


@reports_bad_input
def main(arguments: Sequence[str] | None = None) -> int:
    parser = build_parser("python -m benchmarks.lr_transfer.analysis", __doc__)
    parser.add_argument("--lr-key", metavar="KEY", help=f"the key whose best value is sought ({' or '.join(LR_KEYS)})")
    parser.add_argument("--output", type=Path, metavar="FIGURE", help="loss against learning rate: .svg, .png or .pdf")
    options, rest = parser.parse_known_args(arguments)
    jobs, results = read_sweep(options, rest)
    lr_key = find_lr_key(jobs, options.lr_key)
    done = [(job, outcome) for job in jobs if (outcome := results.get(job)) is not None]
    failed = [(job, outcome) for job, outcome in done if outcome.failure]
    print(f"{len(done)} of {len(jobs)} runs are done, {len(failed)} of them failed\n")
    if groups := group_results(done, lr_key):
        print("\n".join(analysis_lines(groups, lr_key)))
        if options.output is not None:
            plot_groups(groups, lr_key, options.output)
            print(f"\nwrote {options.output}")
    return 0


def find_lr_key(jobs: Sequence[Job], requested: str | None) -> str:
    """Return the key that is tuned. Raises ValueError if it is not varied, or not a number."""
    found = next((key for key in ([requested] if requested else LR_KEYS) if key in jobs[0].varied), None)
    if found is None:
        raise ValueError(f"{requested or ' or '.join(LR_KEYS)} is not varied by a --grid; --lr-key names what is tuned")
    for job in jobs:
        lr_of(job, found)
    return found


def analysis_lines(groups: Sequence[Group], lr_key: str) -> Iterator[str]:
    """Yield the table of the groups, and below it what all groups show together."""
    yield from group_table(groups, lr_key)
    if len(groups) > 1:
        chosen, worst = minimax_lr(groups)
        yield ""
        yield f"one {lr_key} for all groups: {chosen:g}, at the worst {worst:.2%} above the best of a group"
    if lr_key.endswith("max_lr"):
        yield ""
        yield from law_lines(groups)


def group_table(groups: Sequence[Group], lr_key: str) -> Iterator[str]:
    """Yield a row for each group: mean loss at each learning rate, the best in bold, and the vertex of the parabola."""
    lrs = sorted({lr for group in groups for lr in group.outcomes})
    names = list(groups[0].key)
    yield f"| {' | '.join([*names, *(f'{lr:g}' for lr in lrs), f'best {lr_key}', 'at the vertex'])} |"
    yield "|---" * (len(names) + len(lrs) + 2) + "|"
    for group in groups:
        losses = [_format_loss(group, lr) for lr in lrs]
        yield f"| {' | '.join([*group.key.values(), *losses, f'{group.best:g}', format_vertex(group)])} |"


def _format_loss(group: Group, lr: float) -> str:
    if lr not in group.outcomes:
        return ""
    loss = group.means[lr]
    if not math.isfinite(loss):
        return "failed"
    return f"**{loss:.3f}**" if lr == group.best else f"{loss:.3f}"


def format_vertex(group: Group) -> str:
    """Return the optimum of a group as text, with one standard error as a factor where it is known."""
    best = group.optimum
    if not isinstance(best, Optimum):
        return best
    return f"{best.lr:.3g}" + ("" if best.error is None else f" (× or ÷ {math.exp(best.error):.2f})")


def law_lines(groups: Sequence[Group]) -> Iterator[str]:
    """Yield gamma = eta_opt / beta = a T^b next to the published law; eta is the peak learning rate."""
    if unknown := sum(not peak_lr_factor(group) for group in groups):
        yield f"in {unknown} groups the peak learning rate is not a fixed multiple of the tuned one: they are left out"
    try:
        law = fit_law(optimum_points(groups))
    except ValueError as error:
        yield f"no law of the best learning rates: {error}"
        return
    published = PUBLISHED_A * law.middle**PUBLISHED_B
    yield f"best lr / beta = a T^b over {law.groups} groups (beta: batch in 4096 tokens), 95 % intervals:"
    yield f"  b = {law.b}; published {PUBLISHED_B}"
    yield f"  a = {law.a}; published {PUBLISHED_A}"
    yield f"  at T = {format_count(law.middle)}: best lr / beta = {law.gamma}; published {published:.3g}"
    if law.batch_exponent is not None:
        yield f"  the law assumes best lr ~ beta^1; left free, beta^c has c = {law.batch_exponent}"


def plot_groups(groups: Sequence[Group], lr_key: str, output: Path) -> None:
    """Plot loss against learning rate: a line for each value of the first key, a panel for each of the others.

    Raises ValueError without matplotlib, or for an unknown file type.
    """
    by_panel: dict[tuple[tuple[str, str], ...], list[Group]] = {}
    for group in groups:
        by_panel.setdefault(tuple(group.key.items())[1:], []).append(group)
    columns = min(4, len(by_panel))
    rows = -(-len(by_panel) // columns)
    figure, panels = import_pyplot().subplots(
        rows, columns, figsize=(1 + 4 * columns, 3.5 * rows), squeeze=False, sharex=True, layout="constrained"
    )
    for panel, (others, in_panel) in zip(panels.flat, by_panel.items(), strict=False):
        plot_panel(panel, in_panel)
        panel.set_title(", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in others))
    for panel in list(panels.flat)[len(by_panel) :]:
        panel.set_visible(False)
    for panel in panels[-1]:
        panel.set_xlabel(lr_key)
    for row in panels:
        row[0].set_ylabel("loss")
    save_figure(figure, output)


def plot_panel(axis: Any, groups: Sequence[Group]) -> None:
    """Plot a line for each group, and its vertex as a star."""
    for number, group in enumerate(groups):
        finite = {lr: loss for lr, loss in group.means.items() if math.isfinite(loss)}
        first = next(iter(group.key.items()), ("", "all"))
        label = f"{first[0].rpartition('.')[2]} {first[1]}".strip()
        axis.plot(list(finite), list(finite.values()), "o-", color=f"C{number}", markersize=4, label=label)
        if isinstance(best := group.optimum, Optimum):
            axis.plot(best.lr, best.loss, "*", color=f"C{number}", markersize=12, markeredgecolor="white")
    axis.set_xscale("log")
    axis.legend(fontsize=8)


if __name__ == "__main__":
    sys.exit(main())
