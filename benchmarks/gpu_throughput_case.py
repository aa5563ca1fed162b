"""One case of benchmarks.gpu_throughput: train a recipe or a plain loop for a few steps, in this process.

    python -m benchmarks.gpu_throughput_case 1.1B compiled --report report.jsonl [--steps 13] [--smoke] ...

The report gets a line of JSON before the first step and after each step, so that a killed case still has its
measurements. The run ends with an exception after its last step, because its checkpoint would have tens of gigabytes.
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

from benchmarks.shared import ROOT
from components.hardware import peak_flops, peak_memory_bytes
from models.hf.config import llama_entries
from recipes.config import Config, Override, load

KINDS = ("compiled", "eager", "no noise", "documents", "plain", "plain compiled")
"""The recipe with and without torch.compile; compiled without gradient noise, or with document masking; the plain loop
over transformers' model without and with torch.compile."""


@dataclass(frozen=True)
class Measured:
    """A recipe, with the micro-batch and activation checkpointing of its measurement."""

    config: Path
    micro_batch: int
    activation_checkpoint: str = "none"


MODELS = {
    "300M": Measured(ROOT / "train_configs" / "microllama300m.toml", 16),
    "1.1B": Measured(ROOT / "train_configs" / "tinyllama1b.toml", 8),
    "3B": Measured(ROOT / "train_configs" / "llama3b.toml", 16, "selective"),  # sequences of 512 tokens; 2,048 above
    "MoE-1B": Measured(ROOT / "train_configs" / "powermoe1b.toml", 4, "selective"),  # sequences of 4,096
}
VOCAB = 32_000
SMOKE = {
    "model.dim": 64, "model.layers": 2, "model.heads": 4, "model.kv_heads": 2, "model.ffn_dim": 128,
    "model.vocab_size": 512, "tokenizer.vocab_size": 512, "training.sequence_length": 32, "model.head_dim": 16,
    "training.micro_batch_size": 2,
}  # fmt: skip


class AllStepsDone(Exception):  # noqa: N818 - not an error
    """Raised after the last measured step."""


class Report:
    """Writes lines of JSON without buffering. Times are in seconds of the monotonic clock."""

    def __init__(self, path: Path, steps: int, device: torch.device) -> None:
        self.file, self.left, self.device = path.open("w", encoding="utf-8", buffering=1), steps, device

    def begin(self, *, flops_per_token: float, tokens_per_step: int, estimated_bytes: int | None = None) -> None:
        """Write the first line. `estimated_bytes`: the peak bytes of tensors by the dry run."""
        peak = peak_flops(self.device, torch.bfloat16)
        head = {"flops_per_token": flops_per_token, "tokens_per_step": tokens_per_step, "peak_flops": peak}
        self._write({**head, "estimated_bytes": estimated_bytes})

    def step(self, loss: float) -> None:
        """Write the line of a step. Raises AllStepsDone after the last."""
        reserved = torch.cuda.max_memory_reserved() if self.device.type == "cuda" else None
        memory = {"memory_bytes": peak_memory_bytes(self.device), "reserved_bytes": reserved}
        self._write({"at": time.monotonic(), "loss": loss, **memory})
        self.left -= 1
        if not self.left:
            raise AllStepsDone

    def _write(self, row: dict[str, Any]) -> None:
        self.file.write(json.dumps(row) + "\n")


def configure(arguments: argparse.Namespace, directory: str) -> Config:
    """Return the published recipe with the changes of a measurement: no files, a small batch, less checkpointing."""
    case = MODELS[arguments.model]
    settings: dict[str, object] = {
        "run.dir": directory, "run.device": "cpu" if arguments.smoke else "cuda",
        "tokenizer.use": "benchmarks.shared:Vocabulary", "tokenizer.vocab_size": VOCAB, "model.vocab_size": VOCAB,
        "data.use": "benchmarks.shared:RandomTokens", "validation.data.use": "benchmarks.shared:RandomTokens",
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


def train_recipe(config: Config, report: Report) -> None:
    """Train the recipe, with its loader, metrics.jsonl and TensorBoard."""
    import models.decoder
    from recipes.pretrain import Trainer

    # A run draws its weights on the CPU, equal for every layout; 3B takes half a minute, which is not measured.
    models.decoder.fill_normal = draw_on_device  # type: ignore[attr-defined, assignment]
    with ExitStack() as cleanup, suppress(AllStepsDone):
        run = Trainer(config, None, cleanup)
        write = run.metric_logger.log

        def reported(row: Any) -> None:
            write(row)
            report.step(row["loss"])

        run.metric_logger.log = reported  # type: ignore[method-assign]
        samples = config.recipe.batch.initial_size
        report.begin(
            flops_per_token=run.metrics.flops_per_token,
            tokens_per_step=samples * run.clock.sequence_length,
            # a smoke run has so many tiny steps that simulating its schedule takes minutes
            estimated_bytes=None if report.device.type == "cpu" else estimated_bytes(config),
        )
        run.train()


def estimated_bytes(config: Config) -> int | None:
    """Return the peak bytes of tensors of a rank by the dry run, or None if they are unknown."""
    from recipes.dry_run.memory import RESERVED_BYTES
    from recipes.dry_run.plan import HardwareTarget, make_plan

    memory = make_plan(config, 1, HardwareTarget()).memory
    return None if isinstance(memory, str) else memory.peak - RESERVED_BYTES[config.recipe.run.device]


def train_plain_loop(config: Config, report: Report, *, compiled: bool) -> None:
    """Train a hand-written loop: float32 weights, bf16 autocast, sdpa, fused AdamW, tokens on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    recipe = config.recipe
    shape, training, vocab_size = recipe.model.resolved_shape, recipe.training, recipe.tokenizer.vocab_size
    with torch.device("meta"):
        same = recipe.model.build(vocab_size=vocab_size, sequence_length=training.sequence_length)
    with report.device:
        hf_config = LlamaConfig(**llama_entries(shape, vocab_size), attn_implementation="sdpa", use_cache=False)
        model = LlamaForCausalLM(hf_config)
    if sum(p.numel() for p in model.parameters()) != sum(p.numel() for p in same.parameters()):
        raise ValueError("the two models differ in their number of parameters")
    if compiled:
        model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    accumulation = recipe.batch.initial_size // training.micro_batch_size
    micro_batches = torch.randint(
        vocab_size, (accumulation, training.micro_batch_size, training.sequence_length), device=report.device
    )
    flops = same.flops_per_token(training.sequence_length)
    report.begin(flops_per_token=flops, tokens_per_step=micro_batches.numel())
    with suppress(AllStepsDone):
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
    """Return the parser of the options that benchmarks.gpu_throughput passes to every case."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--steps", type=int, default=13, help="optimizer steps, including the warm-up")
    parser.add_argument("--accumulation", type=int, default=4, help="micro-batches per step")
    parser.add_argument("--activation-checkpoint", help="as in [training]; recipes only (default: by model)")
    parser.add_argument(
        "--smoke", action="store_true", help="tiny shapes on the CPU, which only shows that the case runs"
    )
    return parser


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[options()]
    )
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--micro-batch", type=int, help="samples per micro-batch")
    parser.add_argument("--report", type=Path, required=True)
    arguments = parser.parse_args()
    report = Report(arguments.report, arguments.steps, torch.device("cpu" if arguments.smoke else "cuda"))
    with tempfile.TemporaryDirectory() as directory:
        config = configure(arguments, directory)
        if arguments.kind.startswith("plain"):
            train_plain_loop(config, report, compiled=arguments.kind == "plain compiled")
        else:
            train_recipe(config, report)


if __name__ == "__main__":
    main()
