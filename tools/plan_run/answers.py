"""Every number of a plan, with where it comes from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from components.units import format_count
from tools.plan_run.laws import error_on_largest
from tools.plan_run.plan import COEFFICIENT, TIME_CONSTANT, TIME_EXPONENT, WARMUP_FRACTION, Plan


@dataclass(frozen=True)
class Answer:
    name: str
    value: str
    source: str


def answers(plan: Plan) -> Iterator[Answer]:
    """Yield every number of the plan."""
    yield from _size(plan)
    yield _loss(plan)
    yield _lr(plan)
    yield _batch(plan)
    yield Answer("steps", f"{plan.steps:,.0f}", "the batch sizes that the law predicts")
    yield Answer("warm-up", format_count(plan.warmup_tokens), f"{WARMUP_FRACTION:.0%}, or that of the pilot runs")
    yield Answer("decay", f"{plan.pilots.decay_fraction:.0%}", "that of the pilot runs")
    yield from _optimizer(plan)
    if (hours := plan.hours) is not None:
        hardware, device = plan.target.hardware, plan.target.hardware.device
        assert device is not None
        source = f"{plan.target.devices} x {device.name} at {hardware.mfu:.0%} of peak"
        yield Answer("hours", f"{hours:.3g}", source)


def _size(plan: Plan) -> Iterator[Answer]:
    size, asked = plan.size, plan.target.parameters
    multiplied = (
        "" if size.multiplied == size.parameters else f", N = {size.multiplied:,} that a token is multiplied with"
    )
    reason = "the lowest predicted loss in these hours" if asked is None else f"asked for {format_count(asked)}"
    yield Answer("parameters", f"{size.parameters:,}{multiplied}", reason)
    proportions = "proportions of the recipe, in whole heads and layers"
    yield Answer("shape", f"{size.layers} layers of {size.dim}, {size.heads} heads", proportions)
    yield Answer("tokens", f"{plan.tokens:,}", f"{plan.tokens / size.multiplied:.3g} N")


def _loss(plan: Plan) -> Answer:
    checked = error_on_largest(plan.points)
    check = "" if checked is None else f"; without the largest size it is {checked:+.2%} off at its longest run"
    return Answer(
        "training loss" if plan.config.recipe.validation is None else "validation loss",
        f"{plan.loss.value:.3f} ({plan.loss.low:.3f} to {plan.loss.high:.3f})",
        f"{plan.loss_law}, {len(plan.points)} pilot runs{check}",
    )


def _lr(plan: Plan) -> Answer:
    key, runs, law = plan.pilots.lr_key, f"{len(plan.groups)} groups of pilot runs", plan.lr_law
    if law is None:
        _, worst = plan.minimax_lr
        scaling = "; linear in the batch, where half of the noise scale is justified by the square-root rule"
        source = f"one value for {runs}: at the worst {worst:.2%} above the best of one{scaling * plan.is_power}"
        return Answer(key, f"{plan.peak_lr:.3g}", source)
    estimate = law.at(N=plan.size.multiplied, D=plan.tokens)
    unknown = f"; the exponent of {' and '.join(law.dropped)} is not known to differ from 0" if law.dropped else ""
    return Answer(
        key,
        f"{estimate.value:.3g} ({estimate.low:.3g} to {estimate.high:.3g})",
        f"{law}, the vertices of {law.points} of {runs}{unknown}; for {format_count(plan.pilots.batch_tokens)} "
        "tokens a step, and with the square root of the batch",
    )


def _batch(plan: Plan) -> Answer:
    first, last = plan.bounds
    if plan.noise_law is None:
        return Answer("batch", f"{first}", "that of the pilot runs, which did not measure the noise scale")
    return Answer(
        "batch",
        f"{first} to {last}, mean {plan.mean_batch:.0f}",
        f"{COEFFICIENT:g} of the noise scale, {plan.noise_law} samples at {plan.noise_law.points} points; the run "
        "measures its own, within these bounds",
    )


def _optimizer(plan: Plan) -> Iterator[Answer]:
    given = getattr(plan.config.recipe.optimizer, "weight_decay", None)
    if plan.weight_decay is not None:
        law = f"time constant of {TIME_CONSTANT} (D / N)^{TIME_EXPONENT} of the run (arXiv 2505.13738)"
        yield Answer("weight decay", f"{plan.weight_decay:g}", f"{law}, not measured; pilot runs had {given:g}")
    elif given is not None:
        yield Answer("weight decay", f"{given:g}", "that of the recipe, where the published law does not hold")
    if plan.sets_beta2:
        source = "that of the pilot runs; its half-life in tokens is kept"
        yield Answer("batch of beta2", f"{format_count(plan.pilots.batch_tokens)} tokens", source)
