"""What each variant of the decoder costs and gives at 1M parameters: loss on real text, speed and memory beside Llama.

    python -m benchmarks.decoder_variants --train novels/train --valid novels/valid --tokenizer novels2048.tiktoken
    python -m benchmarks.decoder_variants ... --report       # the table of the runs so far, and speed and memory

The tokenizer is one of 2048 entries: python -m tools.train_tokenizer --path novels/train --vocab-size 2048 --output ...
All have the width, depth and learning rate of the Llama; windows are 32 of 128 tokens. Results are kept: the same
command continues. Speed is that of a forward and a backward pass in float32, in turns with the Llama, so that the
varying speed of the machine cancels in a pair; memory is what a micro-batch keeps for its backward pass.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.shared import spread
from benchmarks.text_runs import SIZES, comparison_parser, run_and_report, text_keys, text_run
from components.units import format_count
from models.decoder import Decoder
from models.llama import Llama
from recipes.config.toml import parse_value
from recipes.dry_run.activation_memory import count_activations
from tools.sweep.grid import Job, Settings
from tools.sweep.runner import Results

_BOTH = {"norm_placement": "both", "activation": "gelu_tanh", "zero_centered_norm": "true", "scaled_embeddings": "true"}
_WINDOW = {"sliding_window": "32"}
VARIANTS: dict[str, Settings] = {
    "Llama": {},
    "biases (Qwen 2)": {"qkv_bias": "true"},
    "norm of each head (Qwen 3)": {"qk_norm": "per_head"},
    "norm of each head, after rotation": {"qk_norm": "per_head_after_rope"},
    "norms after, and of all heads (OLMo 2)": {"norm_placement": "post", "qk_norm": "all_heads"},
    "OLMo 3: with windows, every 4th global": {
        "norm_placement": "post", "qk_norm": "all_heads", "global_attention_interval": "4", **_WINDOW,
    },
    "window (Mistral)": _WINDOW,
    "window, every 2nd global": {"global_attention_interval": "2", **_WINDOW},
    "Gemma 2": {
        **_BOTH, **_WINDOW, "global_attention_interval": "2", "attention_softcap": "50.0", "logit_softcap": "30.0",
    },
    "Gemma 3": {**_BOTH, **_WINDOW, "global_attention_interval": "6", "qk_norm": "per_head", "rope_local_theta": "1e3"},
    "gated attention": {"gated_attention": "true"},
    "GeGLU": {"activation": "gelu_tanh"},
    "half of the channels rotate": {"partial_rotary_factor": "0.5"},
    "every 4th layer without rotation": {"no_rope_interval": "4"},
    "z-loss 1e-4": {"z_loss_coefficient": "1e-4"},
}  # fmt: skip
LR, BATCH, VOCABULARY, ROWS, LENGTH = "4e-3", "32", 2048, 8, 128


def job_of(variant: str, seed: int, tokens: int, text: Mapping[str, Path]) -> Job:
    """Return the run of a variant."""
    varied = {
        **SIZES["1M"],
        **{f"model.{key}": value for key, value in VARIANTS[variant].items()},
        "batch.initial_size": BATCH,
        "training.total_tokens": str(tokens),
        "lr_schedule.warmup_tokens": str(tokens // 20),
        "lr_schedule.max_lr": LR,
        "run.seed": str(seed),
    }
    return text_run(varied, text)


def build_model(variant: str) -> Decoder:
    """Return the decoder of a variant."""
    keys = {key.removeprefix("model."): value for key, value in SIZES["1M"].items()}
    keys |= VARIANTS[variant]
    model = Llama(**{key: parse_value(value) for key, value in keys.items()}).build(
        vocab_size=VOCABULARY, sequence_length=LENGTH
    )
    model.init_weights(0)
    return model


def pass_seconds(model: Decoder, tokens: Tensor) -> float:
    """Return the seconds of a forward and a backward pass."""
    started = time.perf_counter()
    model(tokens, tokens).backward()
    seconds = time.perf_counter() - started
    model.zero_grad()
    return seconds


def relative_times(variant: str, rounds: int) -> list[float]:
    """Return the time of a pass over that of the Llama before it, `rounds` times."""
    tokens = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    llama, model = build_model("Llama"), build_model(variant)
    for _ in range(3):
        pass_seconds(llama, tokens), pass_seconds(model, tokens)
    pairs = [(pass_seconds(llama, tokens), pass_seconds(model, tokens)) for _ in range(rounds)]
    return [after / before for before, after in pairs]


def kept_bytes(variant: str) -> int:
    """Return the bytes that the blocks keep of a token of a micro-batch, in float32 on a CPU."""
    model = build_model(variant)
    activations = count_activations(
        model,
        [f"layers.{name}" for name in model.layers],
        micro_batch_size=ROWS,
        sequence_length=LENGTH,
        compute_dtype=torch.float32,
    )
    return sum(block.kept for block in activations.blocks) // (ROWS * LENGTH)


def report_lines(results: Results, tokens: int, seeds: int, rounds: int, text: Mapping[str, Path]) -> Iterator[str]:
    """Yield the table."""
    yield f"| variant | parameters | loss, {seeds} seeds | to Llama | time of a pass, ratio | kept of a token |"
    yield "|---|---|---|---|---|---|"
    base: float | None = None
    for variant in VARIANTS:
        outcomes = [results.get(job_of(variant, seed, tokens, text)) for seed in range(seeds)]
        losses = [outcome.loss for outcome in outcomes if outcome is not None]
        mean = statistics.mean(losses) if losses else None
        base = mean if variant == "Llama" else base
        numel = sum(parameter.numel() for parameter in build_model(variant).parameters())
        cells = [
            variant,
            format_count(numel),
            spread(losses, ".4f") if losses else "",
            f"{mean / base - 1:+.2%}" if mean is not None and base is not None and variant != "Llama" else "",
            spread(relative_times(variant, rounds), ".2f"),
            f"{kept_bytes(variant) / 1024:.0f} KiB",
        ]
        yield f"| {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = comparison_parser("decoder_variants", __doc__)
    parser.add_argument("--tokens", type=int, default=600_000)
    parser.add_argument("--rounds", type=int, default=20, help="pairs of passes")
    options = parser.parse_args(arguments)
    text = text_keys(options)

    def wanted(_: Results) -> Iterator[Job]:
        for seed in range(options.seeds):
            yield from (job_of(variant, seed, options.tokens, text) for variant in VARIANTS)

    def report(results: Results) -> None:
        print(f"{options.tokens:,} tokens, learning rate {LR}, batch {BATCH}\n")
        for line in report_lines(results, options.tokens, options.seeds, options.rounds, text):
            print(line)

    return run_and_report(options, wanted, report)


if __name__ == "__main__":
    sys.exit(main())
