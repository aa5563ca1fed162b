"""Training throughput and memory against a plain loop over transformers' LlamaForCausalLM.

    python -m benchmarks.throughput [--steps 30] [--sizes 7M 20M]
    python -m benchmarks.throughput --variants      # float32 and bf16, eager and compiled, without transformers

Both have the same shape, precision, optimizer (fused AdamW), clipping and batch. The recipe runs with loader, metrics
and TensorBoard; the plain loop has its tokens in memory. They run in separate processes and take turns step by step,
because the speed of a shared machine drifts by more than they differ.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.shared import DEBUG, READY, ROOT, machine, quartiles, wait_for_turn
from models.hf.config import llama_entries
from models.presets import LlamaShape

SIZES: dict[str, dict[str, Any]] = {
    "7M": {"dim": 256, "layers": 6, "heads": 8, "kv_heads": 8, "head_dim": 32, "ffn_dim": 768},
    "20M": {"dim": 384, "layers": 9, "heads": 6, "kv_heads": 6, "head_dim": 64, "ffn_dim": 1152},
}
VARIANTS = {
    "float32": {"training.precision": "float32"},
    "float32, compiled": {"training.precision": "float32", "training.compile": "true"},
    "bf16": {"training.precision": "bf16"},
    "bf16, compiled": {"training.precision": "bf16", "training.compile": "true"},
}
"""The recipe in another precision, or compiled."""
SEQUENCE, MICRO_BATCH, VOCAB = 512, 8, 4096
WARM_UP = 3


def train_recipe(size: str, steps: int, variant: str = "float32") -> None:
    """Train a variant of the recipe."""
    from recipes.config import Override, load

    with tempfile.TemporaryDirectory() as directory:
        settings = {
            "run.dir": directory, "training.sequence_length": SEQUENCE, "training.micro_batch_size": MICRO_BATCH,
            "training.total_tokens": steps * SEQUENCE * MICRO_BATCH,
            "batch.use": "benchmarks.shared:TurnsBatch", "batch.initial_size": MICRO_BATCH,
            "model.vocab_size": VOCAB, "model.tied_embeddings": "false", "validation.max_sequences": 1,
            "lr_schedule.warmup_tokens": 0, "checkpoint.interval_steps": "none",
            **{f"model.{key}": value for key, value in SIZES[size].items()}, **VARIANTS[variant],
        }  # fmt: skip
        config = load(DEBUG, [Override(key, str(value)) for key, value in settings.items()])
        config.recipe.main(config, None)


def train_plain_loop(size: str, steps: int) -> None:
    """Train a plain loop."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaShape(**SIZES[size], max_sequence_length=SEQUENCE, tied_embeddings=False)
    model = LlamaForCausalLM(LlamaConfig(**llama_entries(shape, VOCAB), attn_implementation="sdpa", use_cache=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.randint(VOCAB, (64, SEQUENCE))
    for step in range(steps):
        wait_for_turn()
        batch = tokens[torch.arange(step * MICRO_BATCH, (step + 1) * MICRO_BATCH) % len(tokens)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()


BOTH = ("float32", "plain")


class Measured:
    """The plain loop, or a variant of the recipe, in a separate process, run step by step."""

    def __init__(self, who: str, size: str, steps: int, compiled: str | None = None) -> None:
        """`compiled`: the directory in which torch keeps what it has compiled."""
        command = [sys.executable, "-m", "benchmarks.throughput", "--measured", who, size, "--steps", str(steps)]
        environment = {**os.environ, **({} if compiled is None else {"TORCHINDUCTOR_CACHE_DIR": compiled})}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._until_ready()

    def step(self) -> float:
        """Run one step; return its seconds."""
        assert self.process.stdin is not None
        start = time.perf_counter()
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self._until_ready()
        return time.perf_counter() - start

    def end(self) -> float:
        """Stop the process; return its peak resident memory in MiB."""
        self.process.kill()
        _, _, usage = os.wait4(self.process.pid, 0)
        return usage.ru_maxrss / 1024

    def _until_ready(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.strip() == READY:
                return
        raise SystemExit(f"a measured process ended with status {self.process.wait()}")


def compare(size: str, steps: int) -> str:
    """Return a row of the table."""
    both = [Measured(who, size, steps + WARM_UP + 1) for who in BOTH]
    pairs = [[each.step() for each in both] for _ in range(steps + WARM_UP)][WARM_UP:]
    speeds = [[SEQUENCE * MICRO_BATCH / pair[side] for pair in pairs] for side in (0, 1)]
    peaks = [each.end() for each in both]
    cells = [*(quartiles(of, ",.0f") for of in speeds), quartiles([pair[1] / pair[0] for pair in pairs])]
    return " | ".join([size, *cells, *(f"{peak:,.0f}" for peak in peaks), f"{peaks[0] / peaks[1]:.2f}"])


def compare_variants(size: str, steps: int) -> Iterator[str]:
    """Yield a row for each variant; those that are compiled run once before, to measure compiling without a cache."""
    with tempfile.TemporaryDirectory() as compiled:
        cold: dict[str, float] = {}
        for name, settings in VARIANTS.items():
            if "training.compile" in settings:
                first = Measured(name, size, 2, compiled)
                cold[name] = first.step()
                first.end()
        each = {name: Measured(name, size, steps + WARM_UP + 1, compiled) for name in VARIANTS}
        turns = [{name: measured.step() for name, measured in each.items()} for _ in range(steps + WARM_UP)]
        peaks = {name: measured.end() for name, measured in each.items()}
    timed = turns[WARM_UP:]
    for name in VARIANTS:
        speeds = [SEQUENCE * MICRO_BATCH / turn[name] for turn in timed]
        gained = [turn[name.removesuffix(", compiled")] - turn[name] for turn in timed]
        ratios = [turn["float32"] / turn[name] for turn in timed]
        warm = turns[0][name] - statistics.median(turn[name] for turn in timed)
        compiling = f"{cold[name]:.0f} s, {warm:.0f} s" if name in cold else ""
        saved = statistics.median(gained)
        pays = "" if name not in cold else f"{cold[name] / saved:,.0f} steps" if saved > 0 else "never"
        cells = [quartiles(speeds, ",.0f"), quartiles(ratios), f"{peaks[name]:,.0f}", compiling, pays]
        yield f"| {size} | {name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--variants", action="store_true", help="precisions, eager and compiled")
    parser.add_argument("--measured", nargs=2, metavar=("WHO", "SIZE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measured:
        who, size = arguments.measured
        if who == "plain":
            train_plain_loop(size, arguments.steps)
        else:
            train_recipe(size, arguments.steps, who)
        return
    if arguments.variants:
        print(f"{machine()}; {MICRO_BATCH} x {SEQUENCE} tokens per step, {arguments.steps} turns; medians, quartiles\n")
        print("| model | variant | tokens/s | ratio to float32 | peak MiB | to compile, new and cached | break-even |")
        print("|---|---|---|---|---|---|---|")
        for size in arguments.sizes:
            print("\n".join(compare_variants(size, arguments.steps)), flush=True)
        return
    print(f"{machine()}; {MICRO_BATCH} x {SEQUENCE} tokens per step, float32, {arguments.steps} pairs of steps;")
    print("medians, with the quartiles\n")
    columns = "tokens/s, ours | tokens/s, transformers | ratio of a pair | peak MiB, ours | transformers | ratio"
    print(f"| model | {columns} |")
    print("|---|---|---|---|---|---|---|")
    for size in arguments.sizes:
        print(f"| {compare(size, arguments.steps)} |", flush=True)


if __name__ == "__main__":
    main()
