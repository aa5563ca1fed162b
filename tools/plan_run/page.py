"""A plan as a page of text, and as a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from components.atomic_files import atomic_write
from recipes.config import Config
from recipes.config.imports import import_path
from recipes.config.load import derive
from tools.plan_run.plan import Plan


def page_lines(plan: Plan) -> Iterator[str]:
    """Yield the page: every number with its source, warnings, and the pilot runs."""
    yield "| | | from |"
    yield "|---|---|---|"
    for answer in plan.answers():
        yield f"| {answer.name} | {answer.value} | {answer.source} |"
    for warning in plan.warnings:
        yield f"\nwarning: {warning}"
    yield ""
    yield f"| parameters | tokens | best {plan.pilots.lr_key} | loss | of the law | runs |"
    yield "|---|---|---|---|---|---|"
    for (size, group), point in zip(plan.groups, plan.points, strict=True):
        law = plan.loss_law.loss(point.parameters, point.tokens)
        runs = len(group.finished)
        yield f"| {size.parameters:,} | {group.tokens:,} | {group.best:g} | {point.loss:.4f} | {law:.4f} | {runs} |"


def write_plan(plan: Plan, output: Path) -> Config:
    """Write the recipe of the plan to `output` and the page next to it; return the recipe. Raises OSError."""
    changes = {"run": {"name": output.stem}, **plan.changes()}
    config = derive(plan.config, import_path(type(plan.config.recipe)), changes, why="the plan")
    output.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(output, config.to_toml())
    atomic_write(output.with_suffix(".md"), "\n".join(page_lines(plan)) + "\n")
    return config
