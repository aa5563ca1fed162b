"""Coordinate check: does the size of activations stay constant as models get wider, at the start and while they train?

    python -m tools.coord_check                                      # muP, and the standard parametrization
    python -m tools.coord_check --parametrization standard           # exit status 1: it fails
    python -m tools.coord_check --widths 128 256 512 1024 --output coord.svg
    python -m tools.coord_check --model experts=8 top_k=2            # mixture of experts
    python -m tools.coord_check --optimizer muon                     # also normuon, --lr-scale spectral, --per-head
    python -m tools.coord_check --model qk_norm=per_head norm_placement=both     # variants of the decoder
    python -m tools.coord_check --depths 2 4 8 16 32                 # CompleteP, and muP without it

Small Llamas that differ only in width take a few steps on the same batch of random tokens. The size of a module is the
mean absolute value of its output, and its slope is that of log size against log width. Under muP the slope is zero at
every module and step (Yang et al. 2022, arXiv 2203.03466, appendix D.1); a module whose slope is further off than the
tolerance fails. Logits may have a slope down to -1/2: random ones shrink with the square root of the width, learned
ones do not. With --depths the models differ only in their number of layers, and the same holds for the output of the
last block: what L random blocks add, each divided by L, shrinks with the square root of L. A figure needs the `plot`
extra. Exit status: 0 passed, 1 failed, 2 for a user error.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import linear_regression
from typing import Any, Literal, get_args, get_type_hints

import torch
from torch import Tensor, nn

from components.optimizers import AdamW, Muon
from components.plotting import import_pyplot, save_figure
from components.standard_streams import run_command
from models.llama import Llama
from models.mup import MuPConfig
from recipes.cli import ROOT, reports_bad_input
from recipes.config import Override, describe, load
from recipes.model_setup import transformer_blocks

VOCABULARY, BATCH = 256, 4
EXPECTED = {"output": (-0.5, 0.0), "last block": (-0.5, 0.0)}
"""Module -> range of slopes that pass; 0 for all others."""
Parametrization = Literal["mup", "standard", "completep"]


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """The settings that all models of a check share."""

    widths: Sequence[int] = (32, 64, 128, 256)
    """dim of each model; heads and ffn_dim grow with it"""
    depths: Sequence[int] = ()
    """layers of each model, all of the first width, instead of widths"""
    model: Sequence[str] = ()
    """variants of the decoder, KEY=VALUE of [model]"""
    head_dim: int = 16
    """channels of a head"""
    layers: int = 2
    """blocks of a model"""
    sequence_length: int = 32
    """tokens of each of the 4 samples of the batch; where Muon moves weights far, fewer tokens than a width"""
    steps: int = 5
    """optimizer steps, all on one batch"""
    seeds: int = 2
    """models of each width, whose sizes are averaged"""
    lr: float = 0.01
    """learning rate of all steps, before muP's multipliers"""
    init_std: float = 0.1
    """standard deviation of the initial weights, before muP's"""
    base_width: int = 32
    """the width at which all muP multipliers are 1"""
    optimizer: Literal["adamw", "muon", "normuon"] = "adamw"
    """optimizer of the matrices of the blocks"""
    lr_scale: Literal["match_rms_adamw", "spectral"] = "match_rms_adamw"
    """scale of the updates of Muon"""
    per_head: bool = False
    """Muon orthogonalizes each head of the query and key projections by itself"""

    def __post_init__(self) -> None:
        if self.depths and (len(set(self.depths)) < 2 or min(self.depths) < 1):
            raise ValueError(f"--depths: {list(self.depths)}: expected two or more numbers of layers")
        if not self.depths and len(set(self.widths)) < 2:
            raise ValueError(f"--widths: {list(self.widths)}: expected two or more widths")
        for width in self.widths:
            if width % (2 * self.head_dim):
                raise ValueError(f"--widths: {width} is not a multiple of {2 * self.head_dim}, two heads of --head-dim")
        if min(self.steps, self.seeds, self.sequence_length) < 1:
            counts = f"--steps {self.steps}, --seeds {self.seeds}, --sequence-length {self.sequence_length}"
            raise ValueError(f"{counts}: expected at least 1")


Sizes = dict[str, list[float]]
"""Module -> mean absolute value of its output, at the start and after each step."""


def measure_sizes(config: CheckConfig, width: int, layers: int, parametrization: Parametrization) -> Sizes:
    """Return the sizes of the modules, averaged over seeds."""
    runs = [_measure_one_seed(config, width, layers, parametrization, seed) for seed in range(config.seeds)]
    return {
        name: [sum(sizes) / len(runs) for sizes in zip(*(run[name] for run in runs), strict=True)] for name in runs[0]
    }


def _measure_one_seed(
    config: CheckConfig, width: int, layers: int, parametrization: Parametrization, seed: int
) -> Sizes:
    model = replace(
        _load_model(tuple(config.model)),
        dim=width,
        layers=layers,
        heads=width // config.head_dim,
        kv_heads=width // config.head_dim // 2,
        head_dim=config.head_dim,
        ffn_dim=2 * width,
        init_std=config.init_std,
        depth_scaled_init=False,
        mup=MuPConfig(
            enabled=parametrization != "standard",
            base_width=config.base_width,
            # over depths, muP without CompleteP is a plain residual stream
            residual_multiplier=1.0 if config.depths else 0.5,
            depth="completep" if parametrization == "completep" else "off",
        ),
    ).build(vocab_size=VOCABULARY, sequence_length=config.sequence_length)
    model.init_weights(seed)
    optimizer = _build_optimizer(config, model)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(VOCABULARY, (BATCH, config.sequence_length + 1), generator=generator)
    tokens, labels = drawn[:, :-1], drawn[:, 1:]
    sizes: Sizes = {}
    with _recording(model, sizes, by_depth=bool(config.depths)):
        for _ in range(config.steps):
            nn.functional.cross_entropy(model(tokens).flatten(0, 1), labels.flatten()).backward()
            for group in optimizer.param_groups:
                group["lr"] = config.lr * group["lr_multiplier"]
            optimizer.step()
            optimizer.zero_grad()
        model(tokens)
    return sizes


@cache  # one check builds a model for each width and seed
def _load_model(assignments: tuple[str, ...]) -> Llama:
    """Return [model] of the debug recipe with these keys, KEY=VALUE. Raises ValueError or ConfigError."""
    overrides = []
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise ValueError(f"--model {assignment}: expected KEY=VALUE")
        overrides.append(Override(f"model.{key}", value))
    model: Llama = load(ROOT / "train_configs" / "debug.toml", overrides).recipe.model
    return model


def _build_optimizer(config: CheckConfig, model: nn.Module) -> torch.optim.Optimizer:
    if config.optimizer == "adamw":
        return AdamW(weight_decay=0.0).build(model=model)  # type: ignore[arg-type]
    muon = Muon(weight_decay=0.0, variant=config.optimizer, lr_scale=config.lr_scale, per_head=config.per_head)
    return muon.build(model=model)  # type: ignore[arg-type]


@contextmanager
def _recording(model: nn.Module, sizes: Sizes, *, by_depth: bool) -> Iterator[None]:
    """Record the sizes of every forward pass: embedding, each block, its queries, keys, attention and feed-forward, and
    the head; `by_depth` only those that models of any depth have."""

    def record(name: str, label: str) -> torch.utils.hooks.RemovableHandle:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output  # a mixture of experts also returns its routing
            sizes.setdefault(label, []).append(float(output.detach().abs().mean()))

        return model.get_submodule(name).register_forward_hook(hook)

    blocks = list(transformer_blocks(model))
    parts = (".attention.wq", ".attention.wk", ".attention", ".feed_forward", "")
    names = [f"{block}{part}" for block in blocks for part in parts]
    labels = {"last block": blocks[-1]} if by_depth else {name: name for name in names}
    labels = {"tok_embeddings": "tok_embeddings", **labels, "output": "output"}
    handles = [record(name, label) for label, name in labels.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def fit_slope(widths: Sequence[int], sizes: Sequence[float]) -> float:
    """Return the least-squares slope of log size against log width; nan if a size is zero or not finite."""
    if not all(math.isfinite(size) and size > 0 for size in sizes):
        return math.nan
    return linear_regression([math.log(width) for width in widths], [math.log(size) for size in sizes]).slope


@dataclass(frozen=True)
class Check:
    """The sizes of one parametrization, by width or depth."""

    parametrization: Parametrization
    sizes: dict[int, Sizes]

    @property
    def slopes(self) -> dict[str, list[float]]:
        """Module -> slope at the start and after each step."""
        widths = list(self.sizes)
        return {
            name: [fit_slope(widths, row) for row in zip(*(self.sizes[width][name] for width in widths), strict=True)]
            for name in next(iter(self.sizes.values()))
        }

    @property
    def worst_slope(self) -> dict[str, float]:
        """Module -> the slope that is furthest from its expected range."""
        return {
            name: max(slopes, key=lambda value, name=name: distance_from_expected(name, value))  # type: ignore[misc]
            for name, slopes in self.slopes.items()
        }

    def failures(self, tolerance: float) -> list[str]:
        return [name for name, value in self.worst_slope.items() if distance_from_expected(name, value) > tolerance]

    def report(self, tolerance: float) -> Iterator[str]:
        """Yield a table of the sizes after the last step, and the verdict."""
        slopes, worst_slope, failures = self.slopes, self.worst_slope, self.failures(tolerance)
        yield f"{self.parametrization:<22}" + "".join(f"{width:>9}" for width in self.sizes) + "    slope     worst"
        for name in slopes:
            last = "".join(f"{sizes[name][-1]:>9.3g}" for sizes in self.sizes.values())
            yield f"{name:<22}{last}{slopes[name][-1]:>9.2f}{worst_slope[name]:>10.2f}{'  FAIL' * (name in failures)}"
        outcome = f"FAIL, {len(failures)} of {len(slopes)} modules" if failures else "pass"
        yield f"{self.parametrization}: {outcome} (tolerance {tolerance:g})"


def distance_from_expected(name: str, value: float) -> float:
    """Return the distance of a module's slope from its expected range; infinite for nan."""
    low, high = EXPECTED.get(name, (0.0, 0.0))
    return math.inf if math.isnan(value) else max(low - value, value - high, 0.0)


def run_check(config: CheckConfig, parametrization: Parametrization) -> Check:
    if config.depths:
        depths, width = sorted(set(config.depths)), config.widths[0]
        return Check(parametrization, {depth: measure_sizes(config, width, depth, parametrization) for depth in depths})
    widths = sorted(set(config.widths))
    return Check(
        parametrization, {width: measure_sizes(config, width, config.layers, parametrization) for width in widths}
    )


def plot_checks(checks: Sequence[Check], output: Path) -> None:
    """Plot a panel for each parametrization, a line for each module.

    Raises ValueError without matplotlib, or for an unknown file type.
    """
    panels = {"squeeze": False, "sharey": True, "layout": "constrained"}
    figure, axes = import_pyplot().subplots(1, len(checks), figsize=(5 * len(checks), 4), **panels)
    for axis, each in zip(axes.flat, checks, strict=True):
        for name in each.slopes:
            axis.loglog(list(each.sizes), [sizes[name][-1] for sizes in each.sizes.values()], "o-", label=name)
        axis.set_title(f"{each.parametrization}: size after the last step")
        axis.set_xticks(list(each.sizes), labels=[str(width) for width in each.sizes], minor=False)
        axis.set_xticks([], minor=True)
        axis.set_xlabel("width or layers")
    axes[0, -1].legend(fontsize=7)
    save_figure(figure, output)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser, with an option for every field of `CheckConfig`."""
    parser = argparse.ArgumentParser(prog="python -m tools.coord_check", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--parametrization",
        choices=get_args(Parametrization),
        help="which one decides the exit status (default: muP, with --depths CompleteP; another one is shown for "
        "comparison)",
    )
    types = get_type_hints(CheckConfig)
    for key, meaning in describe(CheckConfig).items():
        default = getattr(CheckConfig, key)
        if isinstance(default, bool):
            parser.add_argument(f"--{key.replace('_', '-')}", action="store_true", help=meaning)
            continue
        is_list = key in ("widths", "depths", "model")
        parser.add_argument(
            f"--{key.replace('_', '-')}",
            type=str if key == "model" else int if is_list else type(default),
            choices=get_args(types[key]) if isinstance(default, str) else None,
            nargs="+" if is_list else None,
            default=default,
            help=f"{meaning} (default: {' '.join(map(str, default)) if is_list else default})",
        )
    parser.add_argument(
        "--tolerance", type=float, default=0.15, help="distance from the expected slope that passes (default: 0.15)"
    )
    parser.add_argument("--output", type=Path, help="figure to write: .svg, .png or .pdf")
    return parser


@reports_bad_input
def main(arguments: Sequence[str] | None = None) -> int:
    options = vars(build_parser().parse_args(arguments))
    judged: Parametrization | None
    judged, tolerance, output = options.pop("parametrization"), options.pop("tolerance"), options.pop("output")
    config = CheckConfig(**options)
    checked: tuple[Parametrization, ...] = ("completep", "mup") if config.depths else ("mup", "standard")
    checked = (judged,) if judged else checked
    checks = [run_check(config, each) for each in checked]
    print("\n\n".join("\n".join(each.report(tolerance)) for each in checks))
    if output is not None:
        plot_checks(checks, output)
        print(f"\nwrote {output}")
    return 1 if checks[0].failures(tolerance) else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
