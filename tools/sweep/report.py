"""What a sweep found: a table, the best rate of each cell and of all, the law of the rates, and a picture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from components.units import format_count
from tools.pictures import pyplot, write
from tools.sweep.cells import Cell, one_for_all, points
from tools.sweep.optimum import PUBLISHED_A, PUBLISHED_B, Optimum, fit_law


def lines(cells: Sequence[Cell], rate_key: str) -> Iterator[str]:
    """The table, and below it what all cells say together."""
    yield from table(cells, rate_key)
    if len(cells) > 1:
        chosen, worst = one_for_all(cells)
        yield ""
        yield f"one {rate_key} for all cells: {chosen:g}, at the worst {worst:.2%} above the best of a cell"
    if rate_key.endswith("max_lr"):
        yield ""
        yield from law(cells)


def table(cells: Sequence[Cell], rate_key: str) -> Iterator[str]:
    """A row for each cell: mean loss at each rate, the best in bold, and the vertex of the parabola through it."""
    rates = sorted({rate for cell in cells for rate in cell.outcomes})
    names = list(cells[0].key)
    yield f"| {' | '.join([*names, *(f'{rate:g}' for rate in rates), f'best {rate_key}', 'at the vertex'])} |"
    yield "|---" * (len(names) + len(rates) + 2) + "|"
    for cell in cells:
        shown = [_shown(cell, rate) for rate in rates]
        yield f"| {' | '.join([*cell.key.values(), *shown, f'{cell.best:g}', vertex(cell)])} |"


def _shown(cell: Cell, rate: float) -> str:
    if rate not in cell.outcomes:
        return ""
    loss = cell.means[rate]
    if not math.isfinite(loss):
        return "failed"
    return f"**{loss:.3f}**" if rate == cell.best else f"{loss:.3f}"


def vertex(cell: Cell) -> str:
    """The optimum of a cell in words, with one standard error as a factor where it is known."""
    best = cell.optimum
    if not isinstance(best, Optimum):
        return best
    return f"{best.rate:.3g}" + ("" if best.error is None else f" (× or ÷ {math.exp(best.error):.2f})")


def law(cells: Sequence[Cell]) -> Iterator[str]:
    """gamma = eta_opt / beta = a T^b beside the published one; eta is the highest rate that was applied."""
    if capped := sum(not cell.applied for cell in cells):
        yield f"in {capped} cells the highest rate applied is no fixed multiple of the one tuned: they have no law"
    try:
        found = fit_law(points(cells))
    except ValueError as error:
        yield f"no law of the best rates: {error}"
        return
    there = PUBLISHED_A * found.middle**PUBLISHED_B
    yield f"best rate / beta = a T^b over {found.cells} cells (beta: batch in 4096 tokens), 95 % intervals:"
    yield f"  b = {found.b}; published {PUBLISHED_B}"
    yield f"  a = {found.a}; published {PUBLISHED_A}"
    yield f"  at T = {format_count(found.middle)}: best rate / beta = {found.gamma}; published {there:.3g}"
    if found.batch_exponent is not None:
        yield f"  the law says best rate ~ beta^1; left free, beta^c has c = {found.batch_exponent}"


def draw(cells: Sequence[Cell], rate_key: str, output: Path) -> None:
    """Loss against rate: a line for each value of the first key, a panel for each combination of the others.

    Raises ValueError without matplotlib, or for an unknown kind of file.
    """
    groups: dict[tuple[tuple[str, str], ...], list[Cell]] = {}
    for cell in cells:
        groups.setdefault(tuple(cell.key.items())[1:], []).append(cell)
    columns = min(4, len(groups))
    rows = -(-len(groups) // columns)
    figure, panels = pyplot().subplots(
        rows, columns, figsize=(1 + 4 * columns, 3.5 * rows), squeeze=False, sharex=True, layout="constrained"
    )
    for panel, (others, group) in zip(panels.flat, groups.items(), strict=False):
        draw_panel(panel, group)
        panel.set_title(
            ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in others), loc="left", fontsize=10
        )
    for panel in list(panels.flat)[len(groups) :]:
        panel.set_visible(False)
    for panel in panels[-1]:
        panel.set_xlabel(rate_key)
    for row in panels:
        row[0].set_ylabel("loss")
    write(figure, output)


def draw_panel(axis: Any, group: Sequence[Cell]) -> None:
    """A line for each cell, its vertex as a star."""
    for number, cell in enumerate(group):
        finite = {rate: loss for rate, loss in cell.means.items() if math.isfinite(loss)}
        first = next(iter(cell.key.items()), ("", "all"))
        label = f"{first[0].rpartition('.')[2]} {first[1]}".strip()
        axis.plot(list(finite), list(finite.values()), "o-", color=f"C{number}", markersize=4, label=label)
        if isinstance(best := cell.optimum, Optimum):
            axis.plot(best.rate, best.loss, "*", color=f"C{number}", markersize=12, markeredgecolor="white")
    axis.set_xscale("log")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
