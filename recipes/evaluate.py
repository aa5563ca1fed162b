"""Evaluate a trained model, on any number of processes: its loss on any text, or tasks.

./run_train.sh train_configs/evaluate.toml --evaluation.checkpoint=runs/debug

evaluator.py computes the result; components/validation/sliding_window.py makes the windows, components/tasks/ the
scores of tasks.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn

from components.distributed.context import DistributedContext
from components.distributed.parallel_dims import ParallelConfig
from components.errors import InputError, invalid_names, message_of
from components.interfaces import DataConfig
from components.metrics.console import setup_logging
from components.metrics.jsonl import json_object
from components.paths import check_output_file
from components.precision import Precision
from components.tasks import check_questions
from components.units import PositiveCount
from recipes.config import Config
from recipes.errors import config_errors_at
from recipes.evaluator import Evaluator
from recipes.interfaces import TaskConfig, TokenizerConfig
from recipes.model_setup import check_tensor_parallelism, require_context_parallelism, require_document_masking
from recipes.recipe import complete_recipe
from recipes.resume import Resume
from recipes.run_config import default_cache_dir
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
            evaluator = Evaluator(config, world, pretrained, length, model)
            methods = {
                "packed": evaluator.evaluate_packed,
                "documents": evaluator.evaluate_documents,
                "tasks": evaluator.evaluate_tasks,
            }
            result, table = methods[self.evaluation.method]()
            if world.is_main:
                with config_errors_at(config, "evaluation"):
                    self.write_files(result, table)
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
