"""Does a noise scale in the norm of another optimizer predict the critical batch better than the Euclidean one?

    python -m benchmarks.noise_norms --runs runs/square_root_rule/* --train novels/train --tokenizer novels2048.tiktoken
    python -m benchmarks.noise_norms --report        # tables of the results so far

Measures at the checkpoints of benchmarks.square_root_rule, on the samples that follow in the order of the run, and
compares with its critical batches. In the dual |.| of the norm in which an optimizer does steepest descent (arXiv
2602.03001), the noise scale is b (E|g - G| / |G|)^2, with g the mean gradient of b samples and G the true gradient.

K groups of samples, R rows, C columns
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.shared import machine, mean_and_deviation
from benchmarks.square_root_rule import (
    BATCH,
    BRANCH_TOKENS,
    LENGTH,
    POINTS,
    SENSORS,
    Measurement,
    rank_correlation,
)
from components.data.loader import MicroBatchLoader
from components.metrics.jsonl import read_rows
from recipes.trained_model import PretrainedModel, load_pretrained
from recipes.training_state import read_run_state

GROUPS = 32
"""An even number."""
MICRO_BATCH = 16
SPLITS = 8
"""Random halvings of the groups."""
CHECKPOINT_STEPS = math.gcd(*POINTS)
BRANCH_STEPS = BRANCH_TOKENS // (BATCH * LENGTH)
"""Of the branch of k = 1."""
STEPS = sorted({*POINTS, *(step + CHECKPOINT_STEPS for step in POINTS[:-1])})
"""A second checkpoint lies within each branch but the last."""
BOUNDS = ("low", "high")
Direction = Callable[[Sequence[Tensor]], list[Tensor]]
"""From a gradient x, to the y of dual norm 1 with the largest <x, y>, which is |x|."""


def l2_direction(gradient: Sequence[Tensor]) -> list[Tensor]:
    norm = math.sqrt(inner(gradient, gradient))
    return [part / norm for part in gradient]


def l1_direction(gradient: Sequence[Tensor]) -> list[Tensor]:
    return [part.sign() for part in gradient]


def nuclear_direction(gradient: Sequence[Tensor]) -> list[Tensor]:
    """Return U V^T for each matrix U S V^T; the norm is the sum over the matrices of their nuclear norms."""
    factors = (torch.linalg.svd(matrix, full_matrices=False) for matrix in gradient)
    return [left @ right for left, _, right in factors]


NORMS: Mapping[str, tuple[Direction, bool]] = {
    "l2": (l2_direction, False),
    "l1": (l1_direction, False),
    "l2_matrices": (l2_direction, True),
    "nuclear": (nuclear_direction, True),
}
"""The direction of each norm, and whether it is of the matrices of the blocks only, those that Muon updates."""
LABELS = {
    "noise_scale": "Euclidean, of the branch",
    "noise_scale_adam": "Adam, of the branch",
    "l2": "Euclidean",
    "l1": "l1",
    "l2_matrices": "Euclidean, matrices",
    "nuclear": "nuclear, matrices",
}


def inner(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Return the inner product of two gradients."""
    return sum(float((x * y).sum()) for x, y in zip(one, other, strict=True))


def noise_and_norm(groups: Sequence[Tensor], samples: int, direction: Direction) -> dict[str, float]:
    """Return `noise`, E|g - G| sqrt(b); bounds of |G|, `norm_low` and `norm_high`; and `growth`.

    `groups` has for each parameter the mean gradients (K, ...) of K groups of samples, `samples` in all. With A and B
    the means of halves of the groups, (A - B)/2 is distributed like the error of the mean M of all samples.
    |M| is above |G|. Its excess is removed as if |M|^2 fell as 1/samples, which is exact for the Euclidean norm; for
    others a part remains, in `norm_high`. <direction(M without group k), group k> is at most |G| in the mean:
    `norm_low`. `growth` checks the 1/sqrt(b) law: E|g - G| sqrt(b) of the samples of a group over that of all samples.
    """
    count = len(groups[0])
    generator = torch.Generator().manual_seed(0)

    def norm(gradient: Sequence[Tensor]) -> float:
        return inner(direction(gradient), gradient)

    mean = [part.mean(0) for part in groups]
    noise, halves, small = [], [], []
    for _ in range(SPLITS):
        order = torch.randperm(count, generator=generator)
        first = [part[order[: count // 2]].mean(0) for part in groups]
        error = [half - whole for half, whole in zip(first, mean, strict=True)]
        noise.append(norm(error))
        halves += [norm(first), norm([whole - part for whole, part in zip(mean, error, strict=True)])]
        small.append(norm([(part[order[0]] - part[order[1]]) / math.sqrt(2 * count) for part in groups]))
    low = statistics.fmean(
        inner(
            direction([(count * whole - part[k]) / (count - 1) for whole, part in zip(mean, groups, strict=True)]),
            [part[k] for part in groups],
        )
        for k in range(count)
    )
    return {
        "noise": statistics.fmean(noise) * math.sqrt(samples),
        "norm_low": max(0.0, low),
        "norm_high": math.sqrt(max(0.0, 2 * norm(mean) ** 2 - statistics.fmean(halves) ** 2)),
        "growth": statistics.fmean(small) / statistics.fmean(noise),
    }


def noise_scale(found: Sequence[Mapping[str, float]], bound: str) -> float:
    """Return the "low" or "high" bound of the noise scale, in samples, from squares averaged over checkpoints."""
    norm = "norm_high" if bound == "low" else "norm_low"
    signal = statistics.fmean(each[norm] ** 2 for each in found)
    return statistics.fmean(each["noise"] ** 2 for each in found) / signal if signal else math.inf


def measure(trained: PretrainedModel, train: Path, samples: int) -> dict[str, Any]:
    """Return the noise scales at a checkpoint, from the `samples` that follow in the order of its run."""
    model: Any = trained.build(trained.sequence_length).to_empty(device="cpu")
    trained.load_weights(model, single_process=True)
    recipe = trained.recipe
    data = replace(recipe.data, path=train.absolute()).build(
        tokenizer=trained.load_tokenizer(),
        sequence_length=trained.sequence_length,
        cache_dir=recipe.run.cache_dir,
        progress=lambda line: print(line, file=sys.stderr),
    )
    parameters = dict(model.named_parameters())
    groups = {
        name: torch.zeros(GROUPS, *parameter.shape, dtype=torch.float64) for name, parameter in parameters.items()
    }
    micro_batches = samples // (GROUPS * MICRO_BATCH)
    start = read_run_state(trained.path)["clock"]["samples"]
    loader = MicroBatchLoader(data, seed=recipe.run.seed, micro_batch_size=MICRO_BATCH, start=start)
    for number, micro_batch in enumerate(loader.next_step(GROUPS * micro_batches)):
        loss = model(micro_batch.tokens, micro_batch.labels) / micro_batch.tokens.numel()
        for name, gradient in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
            groups[name][number // micro_batches] += gradient / micro_batches
    matrices: list[Tensor] = []
    for name, group in groups.items():
        if name.startswith("layers.") and group.ndim == 3:
            matrices += group.chunk(model.merged_matrices(name, per_head=False), dim=1)
    return {
        name: noise_and_norm(matrices if only_matrices else list(groups.values()), samples, direction)
        for name, (direction, only_matrices) in NORMS.items()
    }


def join(
    rows: Sequence[Mapping[str, Any]], measured: Sequence[Mapping[str, Any]]
) -> list[tuple[Measurement, dict[tuple[str, str], float]]]:
    """Return the points of benchmarks.square_root_rule with their noise scales, by name and bound.

    The norms of this module are averaged over the checkpoints in the range of the branch of k = 1, which equals the
    run; the stored values are medians over that branch.
    """
    points = []
    for branched in measured:
        within = range(branched["step"], branched["step"] + BRANCH_STEPS)
        at = [row for row in rows if all(row[key] == branched[key] for key in ("seed", "lr")) and row["step"] in within]
        if at:
            stored = {(name, bound): branched[name] for name in SENSORS for bound in BOUNDS}
            own = {(name, bound): noise_scale([row[name] for row in at], bound) for name in NORMS for bound in BOUNDS}
            points.append((Measurement.from_row(branched), stored | own))
    return points


def report(rows: Sequence[Mapping[str, Any]], measured: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the tables of the noise scales at each point, and of how well each predicts the critical batch."""
    points = join(rows, measured)
    yield f"| step | {' | '.join(LABELS.values())} | critical batch |"
    yield "|---" * (2 + len(LABELS)) + "|"
    for step in POINTS:
        here = [(point.critical_batch, scales) for point, scales in points if point.step == step]
        bounds = [
            [mean_and_deviation([scales[name, bound] for _, scales in here], ".0f") for bound in BOUNDS]
            for name in LABELS
        ]
        cells = [low if low == high else f"{low} to {high}" for low, high in bounds]
        cells.append(mean_and_deviation([batch for batch, _ in here if batch is not None], ".0f"))
        yield f"| {step} | {' | '.join(cells)} |"
    yield ""
    yield "| noise scale | rank correlation | critical batch / noise scale | spread | exponent | growth |"
    yield "|---|---|---|---|---|---|"
    steps = [(point.step, batch) for point, _ in points if (batch := point.critical_batch)]
    yield f"| the number of the step | {rank_correlation(*zip(*steps, strict=True)):.2f} | - | - | - | - |"
    for name, label in LABELS.items():
        for bound in BOUNDS if name in NORMS else BOUNDS[:1]:
            pairs = [(scales[name, bound], batch) for point, scales in points if (batch := point.critical_batch)]
            ratios = [batch / scale for scale, batch in pairs]
            fit = statistics.linear_regression(*zip(*([*map(math.log, pair)] for pair in pairs), strict=True))
            growth = [row[name]["growth"] for row in rows if name in NORMS]
            yield (
                f"| {label}{f', {bound}' if name in NORMS else ''} | {rank_correlation(*zip(*pairs, strict=True)):.2f} "
                f"| {mean_and_deviation(ratios, '.2f')} | {statistics.stdev(ratios) / statistics.fmean(ratios):.0%} "
                f"| {fit.slope:.2f} | {mean_and_deviation(growth, '.2f')} |"
            )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.noise_norms",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--runs", type=Path, nargs="+", default=[], help="directories lr-<lr>-seed-<n>")
    parser.add_argument("--train", type=Path, help="text to train on")
    parser.add_argument("--tokenizer", type=Path, help="a tiktoken file of 2048 entries")
    parser.add_argument("--samples", type=int, default=1024, help="samples for each checkpoint")
    parser.add_argument("--results", type=Path, default=Path("docs/data/noise_norms.jsonl"))
    parser.add_argument("--branches", type=Path, default=Path("docs/data/square_root_rule.jsonl"))
    parser.add_argument("--report", action="store_true", help="measure nothing")
    options = parser.parse_args(arguments)
    if options.samples % (GROUPS * MICRO_BATCH):
        parser.error(f"--samples {options.samples}: expected a multiple of {GROUPS * MICRO_BATCH}")
    done = read_rows(options.results)
    for step, run in itertools.product(STEPS, [] if options.report else options.runs):
        trained = load_pretrained(run / "run" / "checkpoints" / f"step-{step:08d}", options.tokenizer)
        recipe = trained.recipe
        key = {"seed": recipe.run.seed, "step": step, "lr": recipe.lr_schedule.max_lr, "samples": options.samples}
        if any(row.items() >= key.items() for row in done):
            continue
        done.append(key | measure(trained, options.train, options.samples))
        with options.results.open("a") as file:
            file.write(json.dumps(done[-1]) + "\n")
        print(f"seed {recipe.run.seed}, step {step}: done", file=sys.stderr, flush=True)
    print(f"{machine()}\n")
    rows = [row for row in done if row["samples"] == options.samples]
    print("\n".join(report(rows, read_rows(options.branches))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
