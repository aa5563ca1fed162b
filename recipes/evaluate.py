"""Evaluate a trained model: loss, perplexity and bits per byte on any text, on any number of processes.

./run_train.sh train_configs/evaluate.toml --evaluation.checkpoint=runs/debug
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from components import precision
from components.distributed.context import DistributedContext
from components.distributed.parallel_dims import ParallelConfig
from components.errors import InputError
from components.interfaces import DataConfig, Tokenizer
from components.metrics.console import setup_logging
from components.metrics.jsonl import json_object
from components.precision import Precision, WorkingWeights
from components.units import PositiveCount
from components.validation import Documents, LossTotals, SlidingWindow, ValidationConfig
from models.init import materialize
from recipes.config import Config
from recipes.errors import call_on_all_ranks, config_errors_at
from recipes.interfaces import HasParallelPlan, TokenizerConfig
from recipes.model_setup import enable_document_masking, require_document_masking
from recipes.parallelize import parallelize
from recipes.pretrained import PretrainedModel, load_pretrained
from recipes.recipe import complete_recipe
from recipes.resume import Resume
from recipes.run_config import default_cache_dir

log = logging.getLogger("powertrain")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """[evaluation]: of what, and how."""

    checkpoint: Path
    """A run directory (its newest checkpoint), a checkpoint, or a Hugging Face directory."""
    trust_code: bool = False
    """Import code of its own that the checkpoint names; without this it may name none but this project's."""
    method: Literal["packed", "documents"] = "packed"
    """Sequences cut from all text end to end, as in training; or each document by itself, under a sliding window."""
    sequence_length: PositiveCount | None = None
    """Tokens of a sequence, or of the window; unset: as in training (2048 at the most, where that is not known)."""
    document_masking: bool | None = None
    """Whether tokens attend only to their document; unset: as in training."""
    stride: PositiveCount | None = None
    """Tokens by which the window slides; unset: half of it. Smaller is slower, and gives more context."""
    micro_batch_size: PositiveCount = 8
    """Sequences, or windows, of one forward pass on one rank."""
    limit: PositiveCount | None = None
    """Use only so many sequences, spread over all of the text, or the first so many documents; unset: all."""
    precision: Precision = "auto"
    """Arithmetic of the matrix products; auto: bf16 where the hardware is faster with it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto: CUDA if there is a GPU."""
    cache_dir: Path = field(default_factory=default_cache_dir)
    """Where prepared data is kept, as [run] has it in training."""
    output: Path | None = None
    """A file for the result, as JSON."""
    table: Path | None = None
    """A file for the result of each document, a JSON object a line."""

    def __post_init__(self) -> None:
        if self.method == "packed":
            for key in ("stride", "table"):
                if getattr(self, key) is not None:
                    raise InputError(key, 'only valid with method = "documents"')
        elif self.document_masking is not None:
            raise InputError("document_masking", 'only valid with method = "packed": a window holds one document')


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """An evaluation. Its parameters are the sections of the recipe."""

    evaluation: Evaluation
    data: DataConfig | None = None
    """Unset: the held-out text of the run."""
    tokenizer: TokenizerConfig | None = None
    """Unset: that of the run, or of the directory."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    @property
    def device(self) -> str:
        """Where it computes, for the launcher, which starts a process for each GPU."""
        return self.evaluation.device

    def main(self, config: Config, resume: Resume | None) -> int:
        """Evaluate, print and write; returns the exit status."""
        with ExitStack() as cleanup:
            with config_errors_at(config, "evaluation"):
                if resume is not None:
                    raise InputError("checkpoint", "--resume is for training; this key names what to evaluate")
            with config_errors_at(config, "evaluation.device"):
                world = DistributedContext.init(self.evaluation.device)
            cleanup.push(world.close_unless_failed)
            setup_logging(None, to_console=world.is_main)
            with config_errors_at(config, "evaluation"):
                trained, length, model = world.main_process_first(lambda: self.open(world.rank, world.size))
            result, rows = self.measure(config, world, trained, length, model)
            if world.is_main:
                with config_errors_at(config, "evaluation"):
                    self.report(result, rows)
        return 0

    def dry_run(self, config: Config, world_size: int) -> int:
        """Check what can be checked without data, and say what would be evaluated."""
        with config_errors_at(config, "evaluation"):
            trained, length, model = self.open()
        parameters = sum(parameter.numel() for parameter in model.parameters())
        print(f"{trained.path}: {parameters:,} parameters, {self.evaluation.method}, {length} tokens at a time")
        return 0

    def open(self, rank: int = 0, ranks: int = 1) -> tuple[PretrainedModel, int, nn.Module]:
        """What to evaluate, the tokens of a sequence, and the model on the meta device.

        Each of `ranks` looks for damage in its share of a checkpoint. Raises ValueError, OSError or ConfigError where
        it cannot be.
        """
        keys = self.evaluation
        try:
            trained = load_pretrained(
                keys.checkpoint,
                trust_code=keys.trust_code,
                trust_option="--evaluation.trust_code=true",
                rank=rank,
                ranks=ranks,
            )
        except (ValueError, OSError) as error:
            raise InputError("checkpoint", str(error)) from None
        length = keys.sequence_length or trained.sequence_length
        tp = self.parallel.tp
        if keys.stride is not None and keys.stride > length:
            raise InputError("stride", f"{keys.stride} is more than the window's {length} tokens, and would skip some")
        if length % tp:
            raise InputError("sequence_length", f"{length} cannot be divided by parallel.tp = {tp}")
        if isinstance(trained.component, HasParallelPlan):
            trained.component.plan(tp=tp)
        elif tp > 1:
            raise ValueError(f"{type(trained.component).__name__} has no plan(tp), and parallel.tp is {tp}")
        model = trained.build(length)
        if self.document_masking(trained):
            require_document_masking(model)
        return trained, length, model

    def document_masking(self, trained: PretrainedModel) -> bool:
        """Return whether tokens of a sequence attend only to their document."""
        keys = self.evaluation
        if keys.method != "packed":
            return False
        return trained.document_masking if keys.document_masking is None else keys.document_masking

    def measure(
        self, config: Config, world: DistributedContext, trained: PretrainedModel, length: int, model: nn.Module
    ) -> tuple[dict[str, Any], list[LossTotals]]:
        """The result, and that of each document where they are told apart."""
        keys = self.evaluation
        with config_errors_at(config, "parallel"):
            layout = self.parallel.build(world)
        with config_errors_at(config, "tokenizer"):
            tokenizer = trained.encoder(self.tokenizer)
        with config_errors_at(config, "data"):
            data = self.data_of(trained)
            evaluated = self.open_data(data, world, tokenizer, length)
            if self.document_masking(trained):
                enable_document_masking(model, evaluated.samples, tokenizer.end_of_document)
        chosen = precision.resolve_precision(keys.precision, world.device)
        with config_errors_at(config, "evaluation"):
            parallelize(model, trained.component, layout, precision.dtype_of(chosen), world.device)
            materialize(model, world.device)
            trained.read(model, alone=world.size == 1)
        compute: Callable[[], AbstractContextManager[object]] = nullcontext
        if chosen == "bf16" and layout.fsdp is None:
            compute = WorkingWeights(model, torch.bfloat16)
        rows: list[LossTotals] = []

        def evaluate() -> Any:
            if keys.method == "packed":
                return evaluated.totals(model, layout.dp, compute)
            return evaluated.evaluate(model, layout.dp, compute, multiple=layout.mesh_shape.tp)

        total = call_on_all_ranks(evaluate, config, "data", world)
        if keys.method != "packed":
            rows = total
            total = LossTotals(*(sum(column) for column in zip(*(asdict(row).values() for row in rows), strict=True)))
        about = {"checkpoint": str(trained.path), "step": trained.step, "data": str(data), "method": keys.method}
        window: dict[str, Any] = {"sequence_length": length}
        if keys.method == "documents":
            window |= {"stride": evaluated.stride, "documents": len(rows)}
        else:
            window["document_masking"] = self.document_masking(trained)
        return {**about, **window, "precision": chosen, **metrics_of(total)}, rows

    def data_of(self, trained: PretrainedModel) -> DataConfig:
        """Return what to evaluate on. Raises ValueError where neither the recipe nor the run names it."""
        validation = complete_recipe(trained.recipe).validation
        data: DataConfig | None = self.data or (validation and validation.data)
        if data is None:
            raise ValueError(f"{trained.path} says no held-out text; name a source in [data]")
        return data

    def open_data(self, data: DataConfig, world: DistributedContext, tokenizer: Tokenizer, length: int) -> Any:
        """Return the `Validation` of packed sequences, or the `SlidingWindow` over documents, of `length` tokens."""
        keys = self.evaluation
        text: dict[str, Any] = {"tokenizer": tokenizer, "cache_dir": keys.cache_dir, "progress": log.info}
        if keys.method == "packed":
            held_out = ValidationConfig(data=data, max_sequences=keys.limit, micro_batch_size=keys.micro_batch_size)
            return world.main_process_first(lambda: held_out.open(**text, sequence_length=length))
        documents = world.main_process_first(lambda: data.build(**text, sequence_length=1))
        if not isinstance(documents, Documents):
            raise InputError("use", f'{type(data).__name__} has no documents; evaluate with method = "packed"')
        return SlidingWindow(
            documents,
            tokenizer.vocab_size,
            tokenizer.end_of_document,
            length,
            keys.stride or max(1, length // 2),
            keys.micro_batch_size,
            keys.limit,
        )

    def report(self, result: dict[str, Any], rows: list[LossTotals]) -> None:
        keys = self.evaluation
        log.info(
            f"{result['checkpoint']}: {result['tokens']:,} tokens, {result['bytes']:,} bytes of {result['data']}\n"
            f"loss {result['loss']:.4f}  perplexity {result['perplexity']:.2f}  "
            f"bits per byte {result['bits_per_byte']:.4f}"
        )
        written = {
            keys.output: json_object(result, indent=1) + "\n",
            keys.table: "".join(json_object({"document": i, **metrics_of(row)}) + "\n" for i, row in enumerate(rows)),
        }
        for path, content in written.items():
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(content, encoding="utf-8")
                log.info(f"wrote {path}")


def metrics_of(totals: LossTotals) -> dict[str, float]:
    """By their names in the result."""
    means = {"loss": totals.loss, "perplexity": totals.perplexity, "bits_per_byte": totals.bits_per_byte}
    return {**means, "tokens": totals.tokens, "bytes": totals.bytes, "nats": totals.nats}
