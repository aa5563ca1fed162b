"""Training throughput and memory against a plain loop over transformers' LlamaForCausalLM.

    python -m benchmarks.throughput [--repeats 5] [--steps 20] [--sizes 7M 20M]

Same shape, precision, optimizer (fused AdamW), clipping, batch and data; ours runs the whole recipe with its loader,
metrics and TensorBoard, theirs a bare loop over tokens that already lie in memory. Each measurement is a process of its
own, and the two alternate, because a shared machine drifts.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.measure import DEBUG, machine, spread

SIZES = {
    "7M": {"dim": 256, "layers": 6, "heads": 8, "kv_heads": 8, "head_dim": 32, "ffn_dim": 768},
    "20M": {"dim": 384, "layers": 9, "heads": 6, "kv_heads": 6, "head_dim": 64, "ffn_dim": 1152},
}
SEQUENCE, MICRO_BATCH, VOCAB = 512, 8, 4096
WARM_UP = 3


def ours(size: str, steps: int) -> list[float]:
    """Step seconds of the recipe."""
    from recipes.config import Override, load

    with tempfile.TemporaryDirectory() as directory:
        settings = {
            "run.dir": directory, "training.sequence_length": SEQUENCE, "training.micro_batch_size": MICRO_BATCH,
            "training.precision": "float32", "training.total_tokens": steps * SEQUENCE * MICRO_BATCH,
            "batch.use": "benchmarks.measure:StopwatchBatch", "batch.initial": MICRO_BATCH,
            "model.vocab_size": VOCAB, "model.tied_embeddings": "false", "validation.max_sequences": 1,
            "lr_schedule.warmup_tokens": 0, "checkpoint.interval_steps": "none",
            **{f"model.{key}": value for key, value in SIZES[size].items()},
        }  # fmt: skip
        config = load(DEBUG, [Override(key, str(value)) for key, value in settings.items()])
        status = config.recipe.main(config, None)
        assert status == 0
        return list(config.recipe.batch.step_seconds(skip=WARM_UP))


def theirs(size: str, steps: int) -> list[float]:
    """Step seconds of a plain loop."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = SIZES[size]
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=shape["dim"], intermediate_size=shape["ffn_dim"],
            num_hidden_layers=shape["layers"], num_attention_heads=shape["heads"],
            num_key_value_heads=shape["kv_heads"], head_dim=shape["head_dim"], tie_word_embeddings=False,
            attn_implementation="sdpa", use_cache=False, max_position_embeddings=SEQUENCE,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.randint(VOCAB, (64, SEQUENCE))
    seconds, last = [], time.perf_counter()
    for step in range(steps):
        batch = tokens[torch.arange(step * MICRO_BATCH, (step + 1) * MICRO_BATCH) % len(tokens)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        seconds.append(time.perf_counter() - last)
        last = time.perf_counter()
    return seconds[WARM_UP:]


def measure(who: str, size: str, steps: int) -> dict[str, float]:
    """One process: median tokens per second and peak resident memory."""
    command = [sys.executable, "-m", "benchmarks.throughput", "--measure", who, size, "--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).resolve().parent.parent)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--measure", nargs=2, metavar=("WHO", "SIZE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        who, size = arguments.measure
        seconds = {"ours": ours, "theirs": theirs}[who](size, arguments.steps + WARM_UP)
        speed = SEQUENCE * MICRO_BATCH / statistics.median(seconds)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"tokens_per_second": speed, "peak_mib": peak}))
        return
    print(f"{machine()}; {MICRO_BATCH} x {SEQUENCE} tokens a step, float32, {arguments.repeats} alternating pairs\n")
    print(
        "| model | tokens/s, ours | tokens/s, transformers | ratio | peak MiB, ours | peak MiB, transformers | ratio |"
    )
    print("|---|---|---|---|---|---|---|")
    for size in arguments.sizes:
        pairs = [
            (measure("ours", size, arguments.steps), measure("theirs", size, arguments.steps))
            for _ in range(arguments.repeats)
        ]
        cells = []
        for key in ("tokens_per_second", "peak_mib"):
            cells += [spread([pair[side][key] for pair in pairs], ",.0f") for side in (0, 1)]
            cells += [spread([mine[key] / other[key] for mine, other in pairs], ".2f")]
        print(f"| {size} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
