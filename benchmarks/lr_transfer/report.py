"""How far the best rate drifts over widths, batches and lengths, and what a single setting costs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.lr_transfer.analysis import format_vertex, law_lines
from benchmarks.lr_transfer.groups import Group, minimax_lr
from benchmarks.lr_transfer.methods import Method
from components.plotting import import_pyplot, save_figure

GOAL = 0.01
"""One setting should end this close to the best loss of every cell."""
NAMES = {"model.dim": "width", "batch.initial_size": "batch", "training.total_tokens": "tokens"}

Place = tuple[int, ...]
"""Width, batch and tokens of a cell."""
Found = Mapping[Method, Sequence[Group]]


def place(cell: Group) -> Place:
    return tuple(int(cell.key[key]) for key in NAMES)


def lines(found: Found) -> Iterator[str]:
    """A table of the cells, the drift of each method, and the law of the rates where they are rates."""
    best = best_of_all(found)
    chosen = {method: minimax_lr(cells)[0] for method, cells in found.items()}
    yield from table(found, best, chosen)
    for method, cells in found.items():
        rate = chosen[method]
        own = [cell.regret(rate) for cell in cells]
        against_all = [cell.regret(rate, best[place(cell)]) for cell in cells]
        bests = [cell.best for cell in cells]
        yield ""
        yield (
            f"{method.name}: the best {method.rate_key} of a cell is from {min(bests):g} to {max(bests):g}; the one "
            f"setting {rate:g} is within {GOAL:.0%} of the method's best in {_reached(own)} of {len(cells)} cells, at "
            f"the worst {max(own):.1%} above it, and of the best of all methods in {_reached(against_all)}, at the "
            f"worst {max(against_all):.1%} above that"
        )
        if method.rate_key.endswith("max_lr"):
            yield from law_lines(cells)


def _reached(regrets: Sequence[float]) -> int:
    return sum(regret <= GOAL for regret in regrets)


def best_of_all(found: Found) -> dict[Place, float]:
    """Cell -> the lowest loss of any method."""
    best: dict[Place, float] = {}
    for cells in found.values():
        for cell in cells:
            best[place(cell)] = min(best.get(place(cell), math.inf), *cell.means.values())
    return best


def table(found: Found, best: Mapping[Place, float], chosen: Mapping[Method, float]) -> Iterator[str]:
    """Best rate, vertex and loss of each method in each cell, and what its one setting costs against them."""
    columns = [f"{method.name}: best | vertex | loss | {chosen[method]:g} costs" for method in found]
    yield f"| {' | '.join([*NAMES.values(), *columns])} |"
    yield "|---" * (len(NAMES) + 4 * len(found)) + "|"
    by_place = {method: {place(cell): cell for cell in cells} for method, cells in found.items()}
    for where in sorted(best):
        shown = [f"{number:,}" for number in where]
        for method, cells in by_place.items():
            cell = cells.get(where)
            if cell is None:
                shown += ["", "", "", ""]
                continue
            cost = f"{cell.regret(chosen[method]):+.2%}"
            shown += [f"{cell.best:g}", format_vertex(cell), f"{cell.means[cell.best]:.3f}", cost]
        yield f"| {' | '.join(shown)} |"


def draw(found: Found, output: Path) -> None:
    """Loss above the best of the cell against the setting: minima that lie on top of one another transfer."""
    figure, panels = import_pyplot().subplots(
        1, len(found), figsize=(4 * len(found) + 2.5, 4.5), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (method, cells) in zip(panels.flat, found.items(), strict=True):
        widths, batches, lengths = (sorted({place(cell)[i] for cell in cells}) for i in range(3))
        for cell in cells:
            width, batch, tokens = place(cell)
            axis.plot(
                list(cell.means),
                [100 * cell.regret(rate) for rate in cell.means],
                color=f"C{widths.index(width)}",
                marker="os^Dv"[batches.index(batch) % 5],
                linestyle=("-", "--", ":", "-.")[lengths.index(tokens) % 4],
                markersize=4,
                label=f"width {width}, batch {batch}, {tokens:,} tokens",
            )
        axis.axhline(100 * GOAL, color="grey", linewidth=0.8)
        axis.set(xscale="log", yscale="symlog", xlabel=method.rate_key, ylim=(0, None))
        rates = sorted({rate for cell in cells for rate in cell.means})
        axis.set_xticks(rates, labels=[f"{rate:g}" for rate in rates])
        axis.set_xticks([], minor=True)
        axis.set_yticks([0, 1, 2, 5, 10, 20], labels=["0", "1", "2", "5", "10", "20"])
        axis.set_title(method.name)
    panels[0, 0].set_ylabel("loss above the best of the cell, %")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), fontsize=8, handlelength=3, loc="outside right center")
    save_figure(figure, output)
