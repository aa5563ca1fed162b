"""The drift of the best learning rate over widths, batches and lengths, and the cost of a single setting."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.lr_transfer.analysis import format_vertex, law_lines
from benchmarks.lr_transfer.methods import Method
from components.plotting import import_pyplot, save_figure
from tools.sweep.groups import Group, minimax_lr

GOAL = 0.01
"""One setting should end within this fraction of the best loss of every group."""
NAMES = {"model.dim": "width", "batch.initial_size": "batch", "training.total_tokens": "tokens"}

Coordinates = tuple[int, ...]
"""Width, batch and tokens of a group."""
Found = Mapping[Method, Sequence[Group]]


def coordinates(group: Group) -> Coordinates:
    return tuple(int(group.key[key]) for key in NAMES)


def report_lines(found: Found) -> Iterator[str]:
    """Yield a table of the groups, the drift of each method, and the law of its learning rates if it tunes these."""
    best = lowest_losses(found)
    chosen = {method: minimax_lr(groups)[0] for method, groups in found.items()}
    yield from table_lines(found, best, chosen)
    for method, groups in found.items():
        lr = chosen[method]
        regrets = [group.regret(lr) for group in groups]
        against_all = [group.regret(lr, best[coordinates(group)]) for group in groups]
        bests = [group.best for group in groups]
        yield ""
        yield (
            f"{method.name}: the best {method.lr_key} of a group is from {min(bests):g} to {max(bests):g}; the one "
            f"setting {lr:g} is within {GOAL:.0%} of the method's best in {_count_reached(regrets)} of {len(groups)} "
            f"groups, at the worst {max(regrets):.1%} above it, and of the best of all methods in "
            f"{_count_reached(against_all)}, at the worst {max(against_all):.1%} above that"
        )
        if method.lr_key.endswith("max_lr"):
            yield from law_lines(groups)


def _count_reached(regrets: Sequence[float]) -> int:
    return sum(regret <= GOAL for regret in regrets)


def lowest_losses(found: Found) -> dict[Coordinates, float]:
    """Return group -> the lowest loss of any method."""
    best: dict[Coordinates, float] = {}
    for groups in found.values():
        for group in groups:
            best[coordinates(group)] = min(best.get(coordinates(group), math.inf), *group.means.values())
    return best


def table_lines(found: Found, best: Mapping[Coordinates, float], chosen: Mapping[Method, float]) -> Iterator[str]:
    """Yield a row for each group: best setting, vertex and loss of each method, and the cost of its one setting."""
    columns = [f"{method.name}: best | vertex | loss | {chosen[method]:g} costs" for method in found]
    yield f"| {' | '.join([*NAMES.values(), *columns])} |"
    yield "|---" * (len(NAMES) + 4 * len(found)) + "|"
    by_coordinates = {method: {coordinates(group): group for group in groups} for method, groups in found.items()}
    for where in sorted(best):
        cells = [f"{number:,}" for number in where]
        for method, groups in by_coordinates.items():
            group = groups.get(where)
            if group is None:
                cells += ["", "", "", ""]
                continue
            cost = f"{group.regret(chosen[method]):+.2%}"
            cells += [f"{group.best:g}", format_vertex(group), f"{group.means[group.best]:.3f}", cost]
        yield f"| {' | '.join(cells)} |"


def plot_regret(found: Found, output: Path) -> None:
    """Plot the loss above the best of the group against the setting: a setting transfers if the minima coincide."""
    figure, panels = import_pyplot().subplots(
        1, len(found), figsize=(4 * len(found) + 2.5, 4.5), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (method, groups) in zip(panels.flat, found.items(), strict=True):
        widths, batches, lengths = (sorted({coordinates(group)[i] for group in groups}) for i in range(3))
        for group in groups:
            width, batch, tokens = coordinates(group)
            axis.plot(
                list(group.means),
                [100 * group.regret(lr) for lr in group.means],
                color=f"C{widths.index(width)}",
                marker="os^Dv"[batches.index(batch) % 5],
                linestyle=("-", "--", ":", "-.")[lengths.index(tokens) % 4],
                markersize=4,
                label=f"width {width}, batch {batch}, {tokens:,} tokens",
            )
        axis.axhline(100 * GOAL, color="grey", linewidth=0.8)
        axis.set(xscale="log", yscale="symlog", xlabel=method.lr_key, ylim=(0, None))
        lrs = sorted({lr for group in groups for lr in group.means})
        axis.set_xticks(lrs, labels=[f"{lr:g}" for lr in lrs])
        axis.set_xticks([], minor=True)
        axis.set_yticks([0, 1, 2, 5, 10, 20], labels=["0", "1", "2", "5", "10", "20"])
        axis.set_title(method.name)
    panels[0, 0].set_ylabel("loss above the best of the group, %")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), fontsize=8, handlelength=3, loc="outside right center")
    save_figure(figure, output)
