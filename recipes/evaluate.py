"""Evaluate a trained model, on any number of processes: its loss on any text, or tasks.

./run_train.sh train_configs/evaluate.toml --evaluation.checkpoint=runs/debug

components/validation/sliding_window.py makes the windows, components/tasks/ the scores of tasks.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from components import precision
from components.distributed.context import DistributedContext
from components.distributed.parallel_dims import ParallelConfig, ParallelDims
from components.errors import InputError, invalid_names, message_of
from components.interfaces import DataConfig, Tokenizer
from components.metrics.console import setup_logging
from components.metrics.jsonl import json_object
from components.paths import check_output_file
from components.precision import Precision, WorkingWeights
from components.tasks import Answer, Scorer, check_questions
from components.token_ids import describe_start, first_input, start_of_document
from components.units import PositiveCount
from components.validation import Documents, LossTotals, SlidingWindow, ValidationConfig
from recipes.config import Config
from recipes.errors import call_on_all_ranks, config_errors_at
from recipes.interfaces import TaskConfig, TokenizerConfig
from recipes.model_setup import (
    check_tensor_parallelism,
    enable_document_masking,
    require_context_parallelism,
    require_document_masking,
)
from recipes.parallelize import materialize, parallelize
from recipes.recipe import complete_recipe
from recipes.resume import Resume
from recipes.run_config import default_cache_dir
from recipes.tasks import build_tasks, evaluate_tasks, format_metrics
from recipes.trained_model import PretrainedModel, load_pretrained

log = logging.getLogger("powertrain")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """[evaluation]: what to evaluate, and how."""

    checkpoint: Path
    """A run directory (its newest checkpoint), a checkpoint, or a Hugging Face directory."""
    average: str | None = None
    """Name of the average of the weights to evaluate; unset: the weights of the last step."""
    trust_code: bool = False
    """Allow the checkpoint to import custom code; without this it may name only code of this project."""
    method: Literal["packed", "documents", "tasks"] = "packed"
    """packed: loss of sequences cut from the concatenated text, as in training; documents: of each one, with a sliding
    window; tasks: the metrics of [tasks]."""
    sequence_length: PositiveCount | None = None
    """Tokens of a sequence or of the window; unset: as in training (at most 2048 for a Hugging Face model)."""
    document_masking: bool | None = None
    """Whether tokens attend only to tokens of their document; unset: as in training."""
    add_special_tokens: bool = True
    """Begin documents, and windows with method = "documents", with the start token of the training, if it had one."""
    stride: PositiveCount | None = None
    """Tokens by which the window moves; unset: half of it. Smaller values are slower and give more context."""
    micro_batch_size: PositiveCount = 8
    """Sequences or windows per forward pass of one rank."""
    limit: PositiveCount | None = None
    """Number of sequences, spread over the text, of the first documents, or of the first questions of each task to
    evaluate; unset: all."""
    precision: Precision = "auto"
    """Precision of the matrix products; auto: bf16 where the hardware is faster with it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """The device; auto: CUDA if there is a GPU."""
    cache_dir: Path = field(default_factory=default_cache_dir)
    """Cache directory of tokenized data, as `run.cache_dir` in training."""
    output: Path | None = None
    """File to write the result to, as JSON."""
    table: Path | None = None
    """File to write the result of each document or question to, one JSON object per line."""

    def __post_init__(self) -> None:
        if self.stride is not None and self.method != "documents":
            raise InputError("stride", 'only valid with method = "documents"')
        if self.table is not None and self.method == "packed":
            raise InputError("table", 'only valid with method = "documents" or "tasks"')
        if self.document_masking is not None and self.method != "packed":
            raise InputError("document_masking", 'only valid with method = "packed"; a window never spans documents')


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """An evaluation. Its fields are the sections of the recipe."""

    evaluation: Evaluation
    data: DataConfig | None = None
    """The text to evaluate on; unset: the validation data of the run."""
    tokenizer: TokenizerConfig | None = None
    """The tokenizer; unset: that of the run or of the Hugging Face directory."""
    tasks: dict[str, TaskConfig] = field(default_factory=dict)
    """The tasks of method = "tasks", by name; unset: those of the run."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield problems between sections, as (dotted path, message)."""
        if self.tasks and self.evaluation.method != "tasks":
            yield "tasks", 'only valid with evaluation.method = "tasks"'
        yield from (("tasks", problem) for problem in invalid_names(self.tasks))

    @property
    def device(self) -> str:
        """The device. The launcher starts one process for each GPU unless it is "cpu"."""
        return self.evaluation.device

    def main(self, config: Config, resume: Resume | None) -> int:
        """Evaluate, print and write the result. Returns the exit status."""
        with ExitStack() as cleanup:
            with config_errors_at(config, "evaluation"):
                if resume is not None:
                    raise InputError(
                        "checkpoint", "--resume only applies to training; set this key to what to evaluate"
                    )
            with config_errors_at(config, "evaluation.device"):
                world = DistributedContext.init(self.evaluation.device)
            cleanup.push(world.close_unless_failed)
            setup_logging(None, to_console=world.is_main)
            with config_errors_at(config, "evaluation"):
                pretrained, length, model = world.main_process_first(lambda: self.prepare_model(world.rank, world.size))
            if self.evaluation.method == "tasks":
                self.evaluate_tasks(config, world, pretrained, length, model)
                return 0
            result, rows = self.measure(config, world, pretrained, length, model)
            if world.is_main:
                with config_errors_at(config, "evaluation"):
                    self.write_report(result, rows)
        return 0

    def dry_run(self, config: Config, world_size: int) -> int:
        """Check what can be checked without data, and print what would be evaluated."""
        with config_errors_at(config, "evaluation"):
            pretrained, length, model = self.prepare_model()
            if self.evaluation.method == "tasks":
                for name, task in self.select_tasks(pretrained).items():
                    with config_errors_at(config, f"tasks.{name}"):
                        check_questions(task.questions())
        parameters = sum(parameter.numel() for parameter in model.parameters())
        print(f"{pretrained.path}: {parameters:,} parameters, {self.evaluation.method}, {length} tokens at a time")
        return 0

    def prepare_model(self, rank: int = 0, ranks: int = 1) -> tuple[PretrainedModel, int, nn.Module]:
        """Return the pretrained model, the tokens of a sequence, and the module on the meta device.

        Each of `ranks` verifies a part of the checkpoint. Raises ValueError, OSError or ConfigError if it cannot be
        evaluated.
        """
        cfg = self.evaluation
        for key, path in (("output", cfg.output), ("table", cfg.table)):
            if rank == 0 and path is not None:
                try:
                    check_output_file(path)
                except OSError as error:
                    raise InputError.below(key, error) from None
        try:
            pretrained = load_pretrained(
                cfg.checkpoint,
                average=cfg.average,
                add_special_tokens=cfg.add_special_tokens,
                trust_code=cfg.trust_code,
                trust_option="--evaluation.trust_code=true",
                rank=rank,
                ranks=ranks,
            )
        except (ValueError, OSError) as error:
            at_fault = "average" if getattr(error, "key", "") == "average" else "checkpoint"
            raise InputError(at_fault, message_of(error)) from None
        length = cfg.sequence_length or pretrained.sequence_length
        if cfg.stride is not None and cfg.stride > length:
            raise InputError(
                "stride", f"{cfg.stride} is more than sequence_length = {length}, and would skip tokens; lower it"
            )
        if (problem := self.parallel.length_problem(length)) is not None:
            raise InputError("sequence_length", problem)
        check_tensor_parallelism(pretrained.component, self.parallel.tp)
        model = pretrained.build(length)
        if self.parallel.cp > 1:
            require_context_parallelism(model)
        if self.uses_document_masking(pretrained):
            require_document_masking(model)
        return pretrained, length, model

    def uses_document_masking(self, pretrained: PretrainedModel) -> bool:
        """Return whether tokens of a sequence attend only to tokens of their document."""
        cfg = self.evaluation
        if cfg.method != "packed":
            return False
        return pretrained.document_masking if cfg.document_masking is None else cfg.document_masking

    def measure(
        self, config: Config, world: DistributedContext, pretrained: PretrainedModel, length: int, model: nn.Module
    ) -> tuple[dict[str, Any], list[LossTotals]]:
        """Return the result, and the totals of each document with `method = "documents"`."""
        cfg = self.evaluation
        mesh, tokenizer = self.open_mesh_and_tokenizer(config, world, pretrained)
        with config_errors_at(config, "data"):
            data = self.select_data(pretrained)
            evaluated = self.open_data(data, world, tokenizer, length)
            if self.uses_document_masking(pretrained):
                enable_document_masking(model, evaluated.dataset, first_input(tokenizer))
        chosen, compute = self.load_model(config, world, mesh, pretrained, model)
        rows: list[LossTotals] = []

        def evaluate() -> Any:
            if cfg.method == "packed":
                return evaluated.totals(model, mesh.dp, compute)
            return evaluated.evaluate(model, mesh.dp, compute, multiple=self.parallel.sequence_multiple)

        total = call_on_all_ranks(evaluate, config, "data", world)
        if cfg.method != "packed":
            rows = total
            total = LossTotals(*(sum(column) for column in zip(*(asdict(row).values() for row in rows), strict=True)))
        about = {**self.describe_model(pretrained), "data": str(data)}
        window: dict[str, Any] = {"sequence_length": length}
        if cfg.method == "documents":
            window |= {"stride": evaluated.stride, "documents": len(rows)}
        else:
            window["document_masking"] = self.uses_document_masking(pretrained)
        return {**about, **window, "precision": chosen, **total.metrics(), **asdict(total)}, rows

    def evaluate_tasks(
        self, config: Config, world: DistributedContext, pretrained: PretrainedModel, length: int, model: nn.Module
    ) -> None:
        """Evaluate the tasks, print and write the result."""
        cfg = self.evaluation
        mesh, tokenizer = self.open_mesh_and_tokenizer(config, world, pretrained)
        with config_errors_at(config, "evaluation"):
            selected = self.select_tasks(pretrained)
        tasks = build_tasks(config, selected, world, tokenizer, length, cfg.limit)
        chosen, compute = self.load_model(config, world, mesh, pretrained, model)
        scorer = Scorer(
            sequence_length=length,
            pass_tokens=cfg.micro_batch_size * length,
            vocab_size=tokenizer.vocab_size,
            first_input=first_input(tokenizer),
            multiple=self.parallel.sequence_multiple,
        )
        answers = evaluate_tasks(tasks, scorer, model, mesh.dp, compute)
        result = {**self.describe_model(pretrained), "sequence_length": length, "precision": chosen}
        table: list[dict[str, Any]] = []
        for task in tasks:
            values = task.metrics(answers[task.name])
            result |= {f"task_{task.name}_questions": len(task.questions), **values}
            table += [{"task": task.name, **row_of(answer)} for answer in answers[task.name]]
            if world.is_main:
                log.info(f"{format_metrics(task, values)}  ({len(task.questions)} questions)")
        if world.is_main:
            with config_errors_at(config, "evaluation"):
                self.write_files(result, table)

    def open_mesh_and_tokenizer(
        self, config: Config, world: DistributedContext, pretrained: PretrainedModel
    ) -> tuple[ParallelDims, Tokenizer]:
        with config_errors_at(config, "parallel"):
            mesh = self.parallel.build(world)
        with config_errors_at(config, "tokenizer"):
            tokenizer = pretrained.load_tokenizer(self.tokenizer)
        if (start := describe_start(tokenizer)) is not None:
            log.info(
                f"documents begin with {start}, which is not counted; evaluation.add_special_tokens = false omits it"
            )
        return mesh, tokenizer

    def load_model(
        self,
        config: Config,
        world: DistributedContext,
        mesh: ParallelDims,
        pretrained: PretrainedModel,
        model: nn.Module,
    ) -> tuple[str, Callable[[], AbstractContextManager[object]]]:
        """Parallelize and fill `model`. Return the precision, and what returns the context of a forward pass."""
        chosen = precision.resolve_precision(self.evaluation.precision, world.device)
        with config_errors_at(config, "evaluation"):
            parallelize(model, pretrained.component, mesh, precision.dtype_of(chosen), world.device)
            materialize(model, world.device)
            pretrained.load_weights(model, single_process=world.size == 1)
        if chosen == "bf16" and mesh.fsdp is None:
            return chosen, WorkingWeights(model, torch.bfloat16)
        return chosen, nullcontext

    def describe_model(self, pretrained: PretrainedModel) -> dict[str, Any]:
        """Return what the result says of the model and the method."""
        cfg = self.evaluation
        about = {"checkpoint": str(pretrained.path), "step": pretrained.step, "method": cfg.method}
        return about | ({"average": cfg.average} if cfg.average else {})

    def select_tasks(self, pretrained: PretrainedModel) -> Mapping[str, TaskConfig]:
        """Return the tasks to evaluate. Raises InputError if neither the recipe nor the run names any."""
        tasks = self.tasks or complete_recipe(pretrained.recipe).tasks
        if not tasks:
            raise InputError("method", f"{pretrained.path} has no [tasks]; add a table [tasks.NAME]")
        return tasks

    def select_data(self, pretrained: PretrainedModel) -> DataConfig:
        """Return the data to evaluate on. Raises ValueError if neither the recipe nor the run names any."""
        validation = complete_recipe(pretrained.recipe).validation
        data: DataConfig | None = self.data or (validation and validation.data)
        if data is None:
            raise ValueError(f"{pretrained.path} has no [validation] data; choose text in [data]")
        return data

    def open_data(self, data: DataConfig, world: DistributedContext, tokenizer: Tokenizer, length: int) -> Any:
        """Return a `Validator` of packed sequences or a `SlidingWindow` over documents, of `length` tokens."""
        cfg = self.evaluation
        data_kwargs: dict[str, Any] = {"tokenizer": tokenizer, "cache_dir": cfg.cache_dir, "progress": log.info}
        if cfg.method == "packed":
            validation = ValidationConfig(data=data, max_sequences=cfg.limit, micro_batch_size=cfg.micro_batch_size)
            dataset = world.main_process_first(lambda: data.build(**data_kwargs, sequence_length=length))
            return validation.build(dataset, tokenizer=tokenizer, sequence_length=length)
        documents = world.main_process_first(lambda: data.build(**data_kwargs, sequence_length=1))
        if not isinstance(documents, Documents):
            raise InputError("use", f'{type(data).__name__} does not give documents; use method = "packed"')
        return SlidingWindow(
            documents,
            tokenizer.vocab_size,
            tokenizer.end_of_document,
            length,
            cfg.stride or max(1, length // 2),
            cfg.micro_batch_size,
            cfg.limit,
            start_of_document(tokenizer),
        )

    def write_report(self, result: dict[str, Any], rows: list[LossTotals]) -> None:
        """Print the result and write the files that [evaluation] names."""
        log.info(
            f"{result['checkpoint']}: {result['tokens']:,} tokens, {result['bytes']:,} bytes of {result['data']}\n"
            f"loss {result['loss']:.4f}  perplexity {result['perplexity']:.2f}  "
            f"bits per byte {result['bits_per_byte']:.4f}"
        )
        self.write_files(result, [{"document": i, **row.metrics(), **asdict(row)} for i, row in enumerate(rows)])

    def write_files(self, result: dict[str, Any], table: Sequence[dict[str, Any]]) -> None:
        """Write the files that [evaluation] names."""
        cfg = self.evaluation
        written = {
            cfg.output: json_object(result, indent=1) + "\n",
            cfg.table: "".join(json_object(row) + "\n" for row in table),
        }
        for path, content in written.items():
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(content, encoding="utf-8")
                log.info(f"wrote {path}")


def row_of(answer: Answer) -> dict[str, Any]:
    """Return the row of a question in the table of an evaluation."""
    return {
        "source": answer.question.source,
        "answer": answer.question.answer,
        "nats": [nats if math.isfinite(nats) else None for nats in answer.nats],
        "is_greedy": list(answer.is_greedy),
    }
