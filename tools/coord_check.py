"""Coordinate check: does the size of activations stay the same in a wider model, while it learns?

    python -m tools.coord_check                                      # muP beside the standard parametrisation
    python -m tools.coord_check --parametrisation standard           # exit status 1: it does not
    python -m tools.coord_check --widths 128 256 512 1024 --output coord.svg
    python -m tools.coord_check --experts 8 --top-k 2                # of a mixture of experts

Small Llamas, alike but for their width, take a few steps on the same batch of random tokens. Of what each module gives,
the mean absolute value is fitted against width: log size = slope x log width + constant. muP means a slope of zero at
every module and step (Yang et al. 2022, arXiv 2203.03466, appendix D.1); one further off than the tolerance is a
failure. Only logits may have one from -1/2 on: random, they shrink with the root of width, and what is learnt does not.
A picture needs the `plot` extra. Exit status: 0 passed, 1 failed, 2 for what the user can put right.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from components.optimizers import AdamW
from components.plotting import import_pyplot, save_figure
from components.standard_streams import run_command
from models.llama import Llama
from models.mup import MuPConfig
from recipes.config import describe
from recipes.model_setup import transformer_blocks

VOCABULARY, BATCH, SEQUENCE = 256, 4, 32
EXPECTED = {"output": (-0.5, 0.0)}
"""The range of slopes of a module; 0 for all others."""
Parametrization = Literal["mup", "standard"]


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """What all the models of a check have in common."""

    widths: Sequence[int] = (32, 64, 128, 256)
    """dim of each model; heads and ffn_dim grow with it"""
    head_dim: int = 16
    """channels of a head"""
    layers: int = 2
    """blocks of a model"""
    steps: int = 5
    """optimizer steps, all on one batch"""
    seeds: int = 2
    """models of each width, whose sizes are averaged"""
    lr: float = 0.01
    """rate of all steps, before muP's multipliers"""
    init_std: float = 0.1
    """standard deviation of the initial weights, before muP's"""
    base_width: int = 32
    """the width at which muP scales nothing"""
    experts: int = 0
    """experts of a feed-forward; 0: none"""
    top_k: int = 2
    """experts of a token"""

    def __post_init__(self) -> None:
        if len(set(self.widths)) < 2:
            raise ValueError(f"--widths: {list(self.widths)} has no slope; give two or more")
        for width in self.widths:
            if width % (2 * self.head_dim):
                raise ValueError(f"--widths: {width} is no multiple of two heads of --head-dim {self.head_dim}")
        if self.experts and not 1 <= self.top_k <= self.experts:
            raise ValueError(f"--top-k: {self.top_k} of {self.experts} --experts; take 1 to {self.experts}")
        if min(self.steps, self.seeds) < 1:
            raise ValueError("--steps and --seeds: at least 1 of each")


Sizes = dict[str, list[float]]
"""Module -> mean absolute value of what it gives, at the start and after each step."""


def coordinate_sizes(setting: CheckConfig, width: int, parametrisation: Parametrization) -> Sizes:
    """The mean over seeds."""
    runs = [_one_seed(setting, width, parametrisation, seed) for seed in range(setting.seeds)]
    return {
        name: [sum(sizes) / len(runs) for sizes in zip(*(run[name] for run in runs), strict=True)] for name in runs[0]
    }


def _one_seed(setting: CheckConfig, width: int, parametrisation: Parametrization, seed: int) -> Sizes:
    model = Llama(
        dim=width,
        layers=setting.layers,
        heads=width // setting.head_dim,
        kv_heads=width // setting.head_dim // 2,
        head_dim=setting.head_dim,
        ffn_dim=2 * width,
        init_std=setting.init_std,
        depth_scaled_init=False,
        experts=setting.experts,
        top_k=setting.top_k if setting.experts else None,
        mup=MuPConfig(enabled=parametrisation == "mup", base_width=setting.base_width, residual_multiplier=0.5),
    ).build(vocab_size=VOCABULARY, sequence_length=SEQUENCE)
    model.init_weights(seed)
    parameters = model.named_parameters()
    optimizer = AdamW(weight_decay=0.0).build(parameters=parameters, lr_multiplier=model.lr_multiplier)
    drawn = torch.randint(VOCABULARY, (BATCH, SEQUENCE + 1), generator=torch.Generator().manual_seed(seed))
    tokens, labels = drawn[:, :-1], drawn[:, 1:]
    sizes: Sizes = {}
    with _recording(model, sizes):
        for _ in range(setting.steps):
            nn.functional.cross_entropy(model(tokens).flatten(0, 1), labels.flatten()).backward()
            for group in optimizer.param_groups:
                group["lr"] = setting.lr * group["lr_multiplier"]
            optimizer.step()
            optimizer.zero_grad()
        model(tokens)
    return sizes


@contextmanager
def _recording(model: nn.Module, sizes: Sizes) -> Iterator[None]:
    """Append to `sizes` with every forward pass: what embedding, each block and its two halves, and the head give."""

    def record(name: str) -> torch.utils.hooks.RemovableHandle:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output  # with experts, their routing comes along
            sizes.setdefault(name, []).append(float(output.detach().abs().mean()))

        return model.get_submodule(name).register_forward_hook(hook)

    names = ["tok_embeddings"]
    for block in transformer_blocks(model):
        names += [f"{block}{part}" for part in (".attention", ".feed_forward", "")]
    handles = [record(name) for name in [*names, "output"]]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def slope(widths: Sequence[int], sizes: Sequence[float]) -> float:
    """Of log size against log width, by least squares; not a number where a size is zero or not finite."""
    if not all(math.isfinite(size) and size > 0 for size in sizes):
        return math.nan
    x, y = [math.log(width) for width in widths], [math.log(size) for size in sizes]
    middle, mean = sum(x) / len(x), sum(y) / len(y)
    return sum((a - middle) * (b - mean) for a, b in zip(x, y, strict=True)) / sum((a - middle) ** 2 for a in x)


@dataclass(frozen=True)
class Check:
    """The sizes of one parametrisation, by width."""

    parametrisation: Parametrization
    sizes: dict[int, Sizes]

    @property
    def slopes(self) -> dict[str, list[float]]:
        """Module -> slope at the start and after each step."""
        widths = list(self.sizes)
        return {
            name: [slope(widths, row) for row in zip(*(self.sizes[width][name] for width in widths), strict=True)]
            for name in next(iter(self.sizes.values()))
        }

    @property
    def steepest(self) -> dict[str, float]:
        """Module -> the slope that is furthest from what is expected of it."""
        return {
            name: max(slopes, key=lambda value, name=name: distance(name, value))  # type: ignore[misc]
            for name, slopes in self.slopes.items()
        }

    def failures(self, tolerance: float) -> list[str]:
        """Modules with a slope that is further off than `tolerance`."""
        return [name for name, value in self.steepest.items() if distance(name, value) > tolerance]

    def report(self, tolerance: float) -> Iterator[str]:
        """A table of the sizes after the last step, and the verdict."""
        slopes, steepest, failures = self.slopes, self.steepest, self.failures(tolerance)
        yield f"{self.parametrisation:<22}" + "".join(f"{width:>9}" for width in self.sizes) + "    slope  furthest"
        for name in slopes:
            last = "".join(f"{sizes[name][-1]:>9.3g}" for sizes in self.sizes.values())
            yield f"{name:<22}{last}{slopes[name][-1]:>9.2f}{steepest[name]:>10.2f}{'  FAIL' * (name in failures)}"
        outcome = f"FAIL, {len(failures)} of {len(slopes)} modules" if failures else "pass"
        yield f"{self.parametrisation}: {outcome} (tolerance {tolerance:g})"


def distance(name: str, value: float) -> float:
    """How far a module's slope is from what is expected of it."""
    low, high = EXPECTED.get(name, (0.0, 0.0))
    return math.inf if math.isnan(value) else max(low - value, value - high, 0.0)


def check(setting: CheckConfig, parametrisation: Parametrization) -> Check:
    widths = sorted(set(setting.widths))
    return Check(parametrisation, {width: coordinate_sizes(setting, width, parametrisation) for width in widths})


def plot(checks: Sequence[Check], output: Path) -> None:
    """One panel a parametrisation, one line a module. Raises ValueError without matplotlib, or for an unknown kind."""
    panels = {"squeeze": False, "sharey": True, "layout": "constrained"}
    figure, axes = import_pyplot().subplots(1, len(checks), figsize=(5 * len(checks), 4), **panels)
    for axis, each in zip(axes.flat, checks, strict=True):
        for name in each.slopes:
            axis.loglog(list(each.sizes), [sizes[name][-1] for sizes in each.sizes.values()], "o-", label=name)
        axis.set_title(f"{each.parametrisation}: size after the last step")
        axis.set_xticks(list(each.sizes), labels=[str(width) for width in each.sizes], minor=False)
        axis.set_xticks([], minor=True)
        axis.set_xlabel("width")
    axes[0, -1].legend(fontsize=7)
    save_figure(figure, output)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.coord_check", description=__doc__.split("\n")[0])
    parser.add_argument("--parametrisation", choices=["mup", "standard"], help="the one to judge; muP, beside standard")
    for key, meaning in describe(CheckConfig).items():
        default = getattr(CheckConfig, key)
        several = key == "widths"
        parser.add_argument(
            f"--{key.replace('_', '-')}",
            type=float if isinstance(default, float) else int,
            nargs="+" if several else None,
            default=default,
            help=f"{meaning} (default: {' '.join(map(str, default)) if several else default})",
        )
    parser.add_argument("--tolerance", type=float, default=0.15, help="how far off a slope may be (default: 0.15)")
    parser.add_argument("--output", type=Path, help="picture to draw: .svg, .png or .pdf")
    options = vars(parser.parse_args(arguments))
    judged: Parametrization | None
    judged, tolerance, output = options.pop("parametrisation"), options.pop("tolerance"), options.pop("output")
    try:
        setting = CheckConfig(**options)
        asked: tuple[Parametrization, ...] = (judged,) if judged else ("mup", "standard")
        checks = [check(setting, each) for each in asked]
        print("\n\n".join("\n".join(each.report(tolerance)) for each in checks))
        if output is not None:
            plot(checks, output)
            print(f"\nwrote {output}")
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 1 if checks[0].failures(tolerance) else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
