"""The speed of document masking: forward and backward passes with it and without it.

    python -m benchmarks.document_masking [--rounds 12] [--lengths 16 128 512 4096] [--device cpu]

A model of 7M parameters gets micro-batches of 4 x 1,024 random ids, whose documents have the given mean lengths. Passes
with and without masking take turns, so that the varying speed of the machine cancels in a pair.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from benchmarks.shared import machine, quartiles, repeat_with, seconds, spread
from models.decoder import Decoder
from models.presets import LlamaShape

SIZE = LlamaShape(dim=256, layers=6, heads=8, kv_heads=8, ffn_dim=768)
VOCAB, END, ROWS, LENGTH = 4096, 0, 4, 1024
WARM_UP = 2


def seconds_of_pass(model: Decoder, tokens: Tensor, end_of_document: int | None) -> float:
    """Return the seconds of a forward and a backward pass."""
    model.first_input = end_of_document
    model.zero_grad()
    return seconds(lambda: model(tokens, tokens).backward())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 128, 512, 4096])
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    with torch.device(arguments.device):
        model = Decoder(SIZE, VOCAB)
    model.init_weights(0)
    print(f"{machine()}, {arguments.rounds} rounds: medians, lowest to highest; quartiles of the pairs\n")
    print("| tokens per document | tokens/s without masking | with | ratio of a pair |\n|---|---|---|---|")
    for length in arguments.lengths:
        across, within = [], []
        for _ in range(WARM_UP + arguments.rounds):
            tokens = torch.randint(1, VOCAB, (ROWS, LENGTH), device=arguments.device)
            tokens[torch.rand(tokens.shape, device=arguments.device) < 1 / length] = END
            across.append(seconds_of_pass(model, tokens, None))
            within.append(seconds_of_pass(model, tokens, END))
        pairs = [one / other for one, other in zip(across[WARM_UP:], within[WARM_UP:], strict=True)]
        speeds = [spread([ROWS * LENGTH / each for each in times[WARM_UP:]], ",.0f") for times in (across, within)]
        print(f"| {length:,} | {speeds[0]} | {speeds[1]} | {quartiles(pairs)} |", flush=True)
    print(repeat_with("benchmarks.document_masking"))


if __name__ == "__main__":
    main()
