"""Tokens per second of generation, against `transformers.generate` on the same weights.

    python -m benchmarks.generation [--rounds 10] [--tokens 64] [--sizes 2M 20M 100M] [--batches 1 8] [--unpacked]

Both continue the same prompts greedily by the same number of tokens in the same precision, with random weights; this
project's side is what tools/generate runs. They take turns, because the speed of a shared machine drifts by more than
they differ; the ratio is that of a pair.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.shared import machine, quartiles
from components.generation import Sampling, generate_tokens
from models.decoder import Decoder
from models.hf.config import llama_entries
from models.hf.weights import hf_parts
from models.presets import PRESETS, LlamaShape

SIZE = {
    "2M": PRESETS["debug"],
    "20M": LlamaShape(dim=384, layers=9, heads=6, kv_heads=6, ffn_dim=1152),
    "100M": LlamaShape(dim=768, layers=12, heads=12, kv_heads=4, ffn_dim=2048),
    "1B": PRESETS["tinyllama1b"],
}
VOCAB, PROMPT = 4096, 32


def make_generators(
    size: LlamaShape, rows: int, tokens: int, device: torch.device, packed: bool
) -> list[Callable[[], Tensor]]:
    """Return the two generators, this project's first: each writes `tokens` ids after each of `rows` prompts."""
    from transformers import LlamaConfig, LlamaForCausalLM

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = Decoder(size, VOCAB).to(device, dtype)
    model.init_weights(0)
    hf_model = LlamaForCausalLM(LlamaConfig(**llama_entries(size, VOCAB), attn_implementation="sdpa"))
    weights = model.state_dict()
    renamed = {name: part.of(weights[part.name]) for name, part in hf_parts(size).items()}
    hf_model.load_state_dict(renamed, strict=not size.tied_embeddings)
    hf_model.to(device, dtype).eval()
    hf_model.generation_config.eos_token_id = None
    if packed:
        model.use_mkldnn_linear()
    prompts = torch.randint(VOCAB, (rows, PROMPT), generator=torch.Generator().manual_seed(0))

    def generate_here() -> Tensor:
        greedy, numbers = Sampling(temperature=0.0), torch.zeros(rows, tokens, dtype=torch.float64)
        steps = generate_tokens(model, prompts.tolist(), greedy, numbers, end=None, vocab_size=VOCAB, device=device)
        return torch.tensor(list(steps)).T

    def generate_by_transformers() -> Tensor:
        given = prompts.to(device)
        written = hf_model.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=tokens, do_sample=False, pad_token_id=0
        )
        return written[:, PROMPT:].cpu()

    return [generate_here, generate_by_transformers]


def compare(name: str, rows: int, tokens: int, rounds: int, device: torch.device, packed: bool) -> str:
    """Return a row of the table."""
    writers = make_generators(SIZE[name], rows, tokens, device, packed)
    first, second = (write() for write in writers)  # also the warm-up
    same = (first == second).float().mean().item()
    seconds = []
    for _ in range(rounds):
        turn = []
        for write in writers:
            start = time.perf_counter()
            write()
            turn.append(time.perf_counter() - start)
        seconds.append(turn)
    speeds = [[rows * tokens / turn[side] for turn in seconds] for side in (0, 1)]
    ratios = [by_transformers / here for here, by_transformers in seconds]
    cells = [*(quartiles(of, ",.0f") for of in speeds), quartiles(ratios), f"{same:.0%}"]
    return " | ".join([name, str(rows), *cells])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--sizes", nargs="+", choices=SIZE, default=["2M", "20M", "100M"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--unpacked", action="store_true", help="keep the weights in torch's layout, not in oneDNN's")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    sizes, batches = " ".join(arguments.sizes), " ".join(map(str, arguments.batches))
    command = f"--rounds {arguments.rounds} --tokens {arguments.tokens} --sizes {sizes} --batches {batches}"
    command += f" --device {device}" + " --unpacked" * arguments.unpacked
    print(f"python -m benchmarks.generation {command}")
    print(f"{machine()}; after {PROMPT} tokens; medians, with the quartiles\n")
    print("| model | texts | tokens/s, ours | tokens/s, transformers | ratio of a pair | same tokens |")
    print("|---|---|---|---|---|---|")
    for name in arguments.sizes:
        for rows in arguments.batches:
            print(
                f"| {compare(name, rows, arguments.tokens, arguments.rounds, device, not arguments.unpacked)} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
