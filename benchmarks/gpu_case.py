"""One case of benchmarks.gpu, in this process: a recipe or a plain loop, trained for a few steps on random tokens.

    python -m benchmarks.gpu_case 1.1B compiled --report report.jsonl [--steps 13] [--micro-batch 8] [--smoke]

The report gets a line of JSON before the first step and one after each, so that a case that is killed has still said
what it measured. The run ends by an exception after its last step: its checkpoint would be tens of gigabytes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.measure import ROOT
from components.hardware import peak_flops, peak_memory_bytes
from recipes.config import Config, Override, load

KINDS = ("compiled", "eager", "no noise", "documents", "plain", "plain compiled")
"""Ours with and without torch.compile; compiled, without measuring gradient noise, or with document masking; the loop
over transformers' model without and with torch.compile."""


@dataclass(frozen=True)
class Measured:
    """A recipe, and the micro-batch and activation checkpointing it is measured with."""

    config: Path
    micro_batch: int
    activation_checkpoint: str = "none"


MODELS = {
    "300M": Measured(ROOT / "train_configs" / "microllama300m.toml", 16),
    "1.1B": Measured(ROOT / "train_configs" / "tinyllama1b.toml", 8),
    "3B": Measured(ROOT / "train_configs" / "llama3b.toml", 16, "selective"),  # of 512 tokens; those above of 2,048
    "MoE-1B": Measured(ROOT / "train_configs" / "powermoe1b.toml", 4, "selective"),  # of 4,096
}
VOCAB = 32_000
SMOKE = {
    "model.dim": 64, "model.layers": 2, "model.heads": 4, "model.kv_heads": 2, "model.ffn_dim": 128,
    "model.vocab_size": 512, "tokenizer.vocab_size": 512, "training.sequence_length": 32, "model.head_dim": 16,
    "training.micro_batch_size": 2,
}  # fmt: skip


class Enough(Exception):  # noqa: N818 - no error
    """All steps were measured."""


class Report:
    """Lines of JSON, each written at once. Times are of the monotonic clock, in seconds."""

    def __init__(self, path: Path, steps: int, device: torch.device) -> None:
        self.file, self.left, self.device = path.open("w", encoding="utf-8", buffering=1), steps, device

    def begin(self, *, flops_per_token: float, tokens_per_step: int, estimated_bytes: int | None = None) -> None:
        """`estimated_bytes`: what the dry run says that tensors take at the most."""
        peak = peak_flops(self.device, torch.bfloat16)
        head = {"flops_per_token": flops_per_token, "tokens_per_step": tokens_per_step, "peak_flops": peak}
        self._write({**head, "estimated_bytes": estimated_bytes})

    def step(self, loss: float) -> None:
        """Call after every step; raises Enough after the last."""
        reserved = torch.cuda.max_memory_reserved() if self.device.type == "cuda" else None
        memory = {"memory_bytes": peak_memory_bytes(self.device), "reserved_bytes": reserved}
        self._write({"at": time.monotonic(), "loss": loss, **memory})
        self.left -= 1
        if not self.left:
            raise Enough

    def _write(self, row: dict[str, Any]) -> None:
        self.file.write(json.dumps(row) + "\n")


def configure(arguments: argparse.Namespace, directory: str) -> Config:
    """The recipe as it is published, but for what a measurement needs: no files, a small batch, no recomputation."""
    case = MODELS[arguments.model]
    settings: dict[str, object] = {
        "run.dir": directory, "run.device": "cpu" if arguments.smoke else "cuda",
        "tokenizer.use": "benchmarks.measure:Vocabulary", "tokenizer.vocab_size": VOCAB, "model.vocab_size": VOCAB,
        "data.use": "benchmarks.measure:RandomTokens", "validation.data.use": "benchmarks.measure:RandomTokens",
        "validation.interval_steps": "none", "checkpoint.interval_steps": "none", "lr_schedule.warmup_tokens": 0,
        "training.micro_batch_size": case.micro_batch, "training.precision": "bf16",
        "training.activation_checkpoint": arguments.activation_checkpoint or case.activation_checkpoint,
        "training.compile": str(arguments.kind != "eager" and not arguments.smoke).lower(),
        "training.document_masking": "true" if arguments.kind == "documents" else "false",
        "batch.use": "components.batch:Constant", "batch.initial_size": 1,
    }  # fmt: skip
    if arguments.kind == "no noise":
        settings["gradient_noise.interval_steps"] = "none"
    if arguments.smoke:
        settings |= SMOKE
        if arguments.model.startswith("MoE"):
            settings |= {"model.experts": 4, "model.top_k": 2}
    if arguments.micro_batch:
        settings["training.micro_batch_size"] = arguments.micro_batch
    settings["batch.initial_size"] = int(str(settings["training.micro_batch_size"])) * arguments.accumulation
    return load(case.config, [Override(key, str(value)) for key, value in settings.items()])


def draw_on_device(parameter: nn.Parameter, *, name: str, seed: int, std: float) -> None:
    nn.init.normal_(parameter, std=std)


def ours(config: Config, report: Report) -> None:
    """The recipe, with its loader, metrics.jsonl and TensorBoard."""
    import models.decoder
    from recipes.pretrain import Trainer

    # Ours draws weights on the CPU, the same ones for every layout: for 3B half a minute that measures nothing.
    models.decoder.fill_normal = draw_on_device  # type: ignore[attr-defined]
    with ExitStack() as cleanup, suppress(Enough):
        run = Trainer(config, None, cleanup)
        write = run.metric_logger.write

        def reported(row: Any) -> None:
            write(row)
            report.step(row["loss"])

        run.metric_logger.write = reported  # type: ignore[method-assign]
        samples = config.recipe.batch.initial_size
        report.begin(
            flops_per_token=run.flops_per_token,
            tokens_per_step=samples * run.clock.sequence_length,
            # a smoke run is of so many tiny steps that foreseeing them takes minutes
            estimated_bytes=None if report.device.type == "cpu" else estimated_bytes(config),
        )
        run.train()


def estimated_bytes(config: Config) -> int | None:
    """What --dry-run says of the memory of a rank, without what is no tensor."""
    from recipes.dry_run.memory import RESERVED_BYTES
    from recipes.dry_run.plan import HardwareTarget, make_plan

    memory = make_plan(config, 1, HardwareTarget()).memory
    return None if isinstance(memory, str) else memory.peak - RESERVED_BYTES[config.recipe.run.device]


def plain(config: Config, report: Report, *, compiled: bool) -> None:
    """What one would write by hand: float32 weights, bf16 autocast, sdpa, fused AdamW, tokens on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    recipe = config.recipe
    shape, training, vocab_size = recipe.model.resolved_shape, recipe.training, recipe.tokenizer.vocab_size
    with torch.device("meta"):
        same = recipe.model.build(vocab_size=vocab_size, sequence_length=training.sequence_length)
    with report.device:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab_size, hidden_size=shape.dim, intermediate_size=shape.ffn_dim,
                num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
                head_dim=shape.head_width, rms_norm_eps=shape.norm_eps, tie_word_embeddings=shape.tied_embeddings,
                max_position_embeddings=shape.max_sequence_length, attn_implementation="sdpa", use_cache=False,
            )
        )  # fmt: skip
    if sum(p.numel() for p in model.parameters()) != sum(p.numel() for p in same.parameters()):
        raise ValueError("the two models are not of the same size")
    if compiled:
        model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    accumulation = recipe.batch.initial_size // training.micro_batch_size
    micro_batches = torch.randint(
        vocab_size, (accumulation, training.micro_batch_size, training.sequence_length), device=report.device
    )
    flops = same.flops_per_token(training.sequence_length)
    report.begin(flops_per_token=flops, tokens_per_step=micro_batches.numel())
    with suppress(Enough):
        for _ in count():
            total = torch.zeros((), device=report.device)
            for tokens in micro_batches:
                with torch.autocast(report.device.type, dtype=torch.bfloat16):
                    loss = model(input_ids=tokens, labels=tokens).loss / accumulation
                loss.backward()
                total += loss.detach()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            report.step(float(total))


def options() -> argparse.ArgumentParser:
    """What benchmarks.gpu passes on to every case."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--steps", type=int, default=13, help="optimizer steps, the warm-up among them")
    parser.add_argument("--accumulation", type=int, default=4, help="micro-batches of a step")
    parser.add_argument("--activation-checkpoint", help="as in [training]; of ours only; default: each model's own")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU: shows that it runs, no more")
    return parser


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[options()]
    )
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--micro-batch", type=int, help="samples of a micro-batch")
    parser.add_argument("--report", type=Path, required=True)
    arguments = parser.parse_args()
    report = Report(arguments.report, arguments.steps, torch.device("cpu" if arguments.smoke else "cuda"))
    with tempfile.TemporaryDirectory() as directory:
        config = configure(arguments, directory)
        if arguments.kind.startswith("plain"):
            plain(config, report, compiled=arguments.kind == "plain compiled")
        else:
            ours(config, report)


if __name__ == "__main__":
    main()
