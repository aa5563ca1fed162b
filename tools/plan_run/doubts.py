"""What makes a plan less certain: extrapolation, laws that are not determined, failed runs, a batch above the noise."""

from __future__ import annotations

from collections.abc import Iterator

from components.units import format_count
from tools.plan_run.plan import COEFFICIENT, FAR, Plan
from tools.sweep.optimum import Optimum

TOLERANCE = 1.5
"""A batch this many times above what the law of the noise allows is warned of."""


def doubts(plan: Plan) -> Iterator[str]:
    """Yield a warning for each."""
    if unknown := plan.loss_law.undetermined(plan.points):
        yield f"the pilot runs do not determine {' and '.join(unknown)} of the law of the loss: vary them more"
    yield from _extrapolation(plan)
    edges = [group for _, group in plan.groups if not isinstance(group.optimum, Optimum)]
    if edges:
        yield (
            f"in {len(edges)} of {len(plan.groups)} groups of pilot runs the best learning rate is not between others "
            f"({edges[0].optimum}), and its loss enters the law: give more --lrs"
        )
    if failed := plan.ladder.failed():
        job, outcome = failed[0]
        yield f"{len(failed)} pilot runs failed, such as {job}: {outcome.failure}; --retry runs them again"
    yield from _batch_above_noise(plan)


def _extrapolation(plan: Plan) -> Iterator[str]:
    for what, target in (("parameters", plan.size.multiplied), ("tokens", plan.tokens)):
        values = [getattr(point, what) for point in plan.points]
        if target > FAR * max(values):
            yield f"{target / max(values):.0f} times the {what} of the largest pilot run: all laws extrapolate"
        if target * FAR < min(values):
            yield f"a {min(values) / target:.0f}th of the {what} of any pilot run: all laws extrapolate"


def _batch_above_noise(plan: Plan) -> Iterator[str]:
    if plan.noise_law is None:
        return
    first, last = plan.bounds
    for what, batch, tokens in (
        ("first batch of the plan", first, plan.adaptive_from),
        ("largest batch of the plan", last, plan.tokens),
        ("batch of the pilot runs", plan.pilots.batch, plan.pilots.stable_tokens(1)),
    ):
        scale = plan.noise_after(tokens)
        if batch > TOLERANCE * COEFFICIENT * scale:
            yield (
                f"the {what}, {batch} samples, is {batch / scale:.2g} of the noise scale after "
                f"{format_count(tokens)} tokens; above {COEFFICIENT:g} it costs loss"
            )
