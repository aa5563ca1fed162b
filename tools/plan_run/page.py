"""A plan as a page of text, and as a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from components.atomic_files import atomic_write
from recipes.config import Config
from recipes.config.imports import import_path
from recipes.config.load import derive
from tools.plan_run.answers import answers
from tools.plan_run.doubts import doubts
from tools.plan_run.plan import Plan


def page_lines(plan: Plan) -> Iterator[str]:
    """Yield the page: every number with its source, warnings, and the pilot runs."""
    yield "| | | from |"
    yield "|---|---|---|"
    for answer in answers(plan):
        yield f"| {answer.name} | {answer.value} | {answer.source} |"
    for warning in doubts(plan):
        yield f"\nwarning: {warning}"
    yield ""
    seeds = f"{plan.pilots.seeds} seed{'s' * (plan.pilots.seeds > 1)}"
    yield f"Pilot runs, in {plan.ladder.results.path}: {plan.pilots.batch} samples a step, {seeds}, decay included."
    yield ""
    yield f"| parameters | N | tokens, D | best {plan.pilots.lr_key} | loss | of the law | runs |"
    yield "|---|---|---|---|---|---|---|"
    for (size, group), point in zip(plan.groups, plan.points, strict=True):
        law = plan.loss_law.loss(point.parameters, point.tokens)
        runs = len(group.finished)
        cells = (f"{size.parameters:,}", f"{size.multiplied:,}", f"{group.tokens:,}", f"{group.best:g}")
        yield f"| {' | '.join(cells)} | {point.loss:.4f} | {law:.4f} | {runs} |"
    if plan.noise_points:
        yield ""
        yield "Noise scales of the stable phases at their best learning rates, in samples:"
        yield ""
        yield "| parameters | tokens | noise scale |"
        yield "|---|---|---|"
        for size, tokens, scale in plan.noise_points:
            yield f"| {size.parameters:,} | {tokens:,.0f} | {scale:.3g} |"


def write_plan(plan: Plan, output: Path) -> Config:
    """Write the recipe of the plan to `output` and the page next to it; return the recipe. Raises OSError."""
    changes = {"run": {"name": output.stem, "dir": "none"}, **plan.changes()}
    config = derive(plan.config, import_path(type(plan.config.recipe)), changes, why="the plan")
    output.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(output, config.to_toml())
    atomic_write(output.with_suffix(".md"), "\n".join(page_lines(plan)) + "\n")
    return config
