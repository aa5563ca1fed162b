"""The speed of expert layers: torch's grouped matrix product against one product per expert, forward and backward.

    python -m benchmarks.grouped_experts [--pairs 20] [--device cpu] [--dtype float32] [--tokens 2048]
        [--dim 256] [--ffn-dim 128] [--experts 8 40] [--top-k 2 8]

A pair is a pass of each, in turn, over the same tokens with the same weights, so that the varying speed of the machine
cancels. Both permute and sum tokens alike and differ only in the products. Their gradients are compared first.
"""

from __future__ import annotations

import argparse
import sys
from unittest.mock import patch

import torch

from benchmarks.shared import machine, quartiles, repeat_with, seconds, spread
from models.moe import MoE

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
WORST = {"float32": 1e-5, "bf16": 2e-2}
"""The largest relative difference of two gradients that rounding explains."""


class Case:
    """Experts with random weights, and tokens for them."""

    def __init__(self, arguments: argparse.Namespace, experts: int, top_k: int) -> None:
        generator = torch.Generator().manual_seed(0)
        dtype, self.device = DTYPES[arguments.dtype], torch.device(arguments.device)
        self.module = MoE(arguments.dim, arguments.ffn_dim, experts, top_k).to(self.device, dtype)
        for parameter in self.module.parameters():
            drawn = torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5
            parameter.data.copy_(drawn)
        x = torch.randn(1, arguments.tokens, arguments.dim, generator=generator)
        self.x = x.to(self.device, dtype).requires_grad_()

    def gradients(self, *, grouped: bool) -> tuple[torch.Tensor, ...]:
        """Return the gradients of the tokens and all weights."""
        with patch("models.grouped_linear.KERNEL_DEVICES", ("cpu", "cuda") if grouped else ()):
            y, _ = self.module(self.x)
            return torch.autograd.grad(y.square().sum(), (self.x, *self.module.parameters()))

    def difference(self) -> float:
        """Return the largest difference of a gradient, relative to its norm."""
        pairs = zip(self.gradients(grouped=True), self.gradients(grouped=False), strict=True)
        return max(float((a - b).float().norm() / b.float().norm()) for a, b in pairs)

    def seconds(self, *, grouped: bool) -> float:
        return seconds(lambda: self.gradients(grouped=grouped))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--ffn-dim", type=int, default=128)
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 40])
    parser.add_argument("--top-k", type=int, nargs="+", default=[2, 8], help="one for each of --experts")
    arguments = parser.parse_args()
    table = []
    for experts, top_k in zip(arguments.experts, arguments.top_k, strict=True):
        case = Case(arguments, experts, top_k)
        worst = case.difference()
        if not worst <= WORST[arguments.dtype]:
            sys.exit(f"{experts} experts: gradients differ by {worst:.2g} of their norm")
        pairs = [(case.seconds(grouped=True), case.seconds(grouped=False)) for _ in range(arguments.pairs)]
        grouped, single = ([1000 * pair[side] for pair in pairs] for side in (0, 1))
        ratio = quartiles([b / a for a, b in pairs])
        table.append(f"| {experts}, {top_k} | {spread(grouped)} | {spread(single)} | {ratio} | {worst:.1g} |")
        print(f"{experts} experts: measured", file=sys.stderr, flush=True)
    print(f"\n{machine()}; {arguments.dtype} on {arguments.device}, {arguments.tokens} tokens, width {arguments.dim},")
    print(
        f"experts of {arguments.ffn_dim}; {arguments.pairs} pairs, medians (lowest to highest; quartiles of a pair)\n"
    )
    print("| experts, top k | ms, grouped | ms, one per expert | one per expert / grouped | gradients differ by |")
    print("|---|---|---|---|---|\n" + "\n".join(table))
    print(repeat_with("benchmarks.grouped_experts"))


if __name__ == "__main__":
    main()
