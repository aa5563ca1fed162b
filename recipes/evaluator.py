"""Evaluates the model of `recipes.evaluate:Evaluate`: its loss on text, or the metrics of tasks."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from components import precision
from components.distributed.context import DistributedContext
from components.errors import InputError
from components.interfaces import DataConfig, PackedDataset
from components.precision import WorkingWeights
from components.tasks import Answer, Scorer
from components.token_ids import describe_start, first_input, start_of_document
from components.validation import Documents, LossTotals, SlidingWindow, ValidationConfig, Validator
from recipes.config import Config
from recipes.errors import call_on_all_ranks, config_errors_at
from recipes.model_setup import enable_document_masking
from recipes.parallelize import materialize, parallelize
from recipes.tasks import build_tasks, evaluate_tasks, format_metrics
from recipes.trained_model import PretrainedModel

log = logging.getLogger("powertrain")

Row = dict[str, Any]
"""JSON values by name: the result of an evaluation, or of one document or question of it."""


class Evaluator:
    """A model to evaluate, with its mesh and its tokenizer. Call each method on every rank."""

    def __init__(
        self, config: Config, world: DistributedContext, pretrained: PretrainedModel, length: int, model: nn.Module
    ) -> None:
        """`length` is that of sequences or windows; `model` is on the meta device. Raises ConfigError."""
        self.config, self.world, self.pretrained, self.length, self.model = config, world, pretrained, length, model
        self.recipe, self.evaluation = config.recipe, config.recipe.evaluation
        with config_errors_at(config, "parallel"):
            self.mesh = self.recipe.parallel.build(world)
        with config_errors_at(config, "tokenizer"):
            self.tokenizer = pretrained.load_tokenizer(self.recipe.tokenizer)
        if (start := describe_start(self.tokenizer)) is not None:
            log.info(
                f"documents begin with {start}, which is not counted; evaluation.add_special_tokens = false omits it"
            )

    def evaluate_packed(self) -> tuple[Row, list[Row]]:
        """Log and return the loss of packed sequences, without a table."""
        masks = self.recipe.uses_document_masking(self.pretrained)
        with config_errors_at(self.config, "data"):
            data = self.recipe.select_data(self.pretrained)
            validator = self.open_sequences(data)
            if masks:
                enable_document_masking(self.model, validator.dataset, first_input(self.tokenizer))
        chosen, compute = self.load_model()

        def evaluate() -> LossTotals:
            return validator.totals(self.model, self.mesh.dp, compute)

        total = call_on_all_ranks(evaluate, self.config, "data", self.world)
        return self.log_loss(total, data, {"document_masking": masks, "precision": chosen}), []

    def evaluate_documents(self) -> tuple[Row, list[Row]]:
        """Log and return the loss with a sliding window, and that of each document."""
        with config_errors_at(self.config, "data"):
            data = self.recipe.select_data(self.pretrained)
            window = self.open_documents(data)
        chosen, compute = self.load_model()

        def evaluate() -> list[LossTotals]:
            multiple = self.recipe.parallel.sequence_multiple
            return window.evaluate(self.model, self.mesh.dp, compute, multiple=multiple)

        found = call_on_all_ranks(evaluate, self.config, "data", self.world)
        total = LossTotals(*(sum(column) for column in zip(*(asdict(each).values() for each in found), strict=True)))
        settings = {"stride": window.stride, "documents": len(found), "precision": chosen}
        return self.log_loss(total, data, settings), document_rows(found)

    def evaluate_tasks(self) -> tuple[Row, list[Row]]:
        """Log and return the metrics of the tasks, and the result of each question."""
        with config_errors_at(self.config, "evaluation"):
            selected = self.recipe.select_tasks(self.pretrained)
        tasks = build_tasks(self.config, selected, self.world, self.tokenizer, self.length, self.evaluation.limit)
        chosen, compute = self.load_model()
        scorer = Scorer(
            sequence_length=self.length,
            pass_tokens=self.evaluation.micro_batch_size * self.length,
            vocab_size=self.tokenizer.vocab_size,
            first_input=first_input(self.tokenizer),
            multiple=self.recipe.parallel.sequence_multiple,
        )
        answers = evaluate_tasks(tasks, scorer, self.model, self.mesh.dp, compute)
        result = {**self.describe_model(), "sequence_length": self.length, "precision": chosen}
        rows: list[Row] = []
        for task in tasks:
            values = task.metrics(answers[task.name])
            result |= {f"task_{task.name}_questions": len(task.questions), **values}
            rows += [{"task": task.name, **question_row(answer)} for answer in answers[task.name]]
            if self.world.is_main:
                log.info(f"{format_metrics(task, values)}  ({len(task.questions)} questions)")
        return result, rows

    def load_model(self) -> tuple[str, Callable[[], AbstractContextManager[object]]]:
        """Parallelize and fill the model. Return the precision, and what returns the context of a forward pass."""
        device = self.world.device
        chosen = precision.resolve_precision(self.evaluation.precision, device)
        with config_errors_at(self.config, "evaluation"):
            parallelize(self.model, self.pretrained.component, self.mesh, precision.dtype_of(chosen), device)
            materialize(self.model, device)
            self.pretrained.load_weights(self.model, single_process=self.world.size == 1)
        if chosen == "bf16" and self.mesh.fsdp is None:
            return chosen, WorkingWeights(self.model, torch.bfloat16)
        return chosen, nullcontext

    def describe_model(self) -> Row:
        """Return what the result says of the model and the method."""
        keys, pretrained = self.evaluation, self.pretrained
        about = {"checkpoint": str(pretrained.path), "step": pretrained.step, "method": keys.method}
        return about | ({"average": keys.average} if keys.average else {})

    def log_loss(self, total: LossTotals, data: DataConfig, settings: Row) -> Row:
        """Log and return the result of an evaluation on text."""
        result = {**self.describe_model(), "data": str(data), "sequence_length": self.length, **settings}
        if self.world.is_main:
            log.info(
                f"{self.pretrained.path}: {total.tokens:,} tokens, {total.bytes:,} bytes of {data}\n"
                f"loss {total.loss:.4f}  perplexity {total.perplexity:.2f}  bits per byte {total.bits_per_byte:.4f}"
            )
        return {**result, **total.metrics(), **asdict(total)}

    def open_sequences(self, data: DataConfig) -> Validator:
        keys = self.evaluation
        validation = ValidationConfig(data=data, max_sequences=keys.limit, micro_batch_size=keys.micro_batch_size)
        dataset = self.build_dataset(data, self.length)
        return validation.build(dataset, tokenizer=self.tokenizer, sequence_length=self.length)

    def open_documents(self, data: DataConfig) -> SlidingWindow:
        """Return a window over the documents of `data`. Raises InputError if it does not give documents."""
        documents = self.build_dataset(data, 1)
        if not isinstance(documents, Documents):
            raise InputError("use", f'{type(data).__name__} does not give documents; use method = "packed"')
        return SlidingWindow(
            documents,
            self.tokenizer.vocab_size,
            self.tokenizer.end_of_document,
            self.length,
            self.evaluation.stride or max(1, self.length // 2),
            self.evaluation.micro_batch_size,
            self.evaluation.limit,
            start_of_document(self.tokenizer),
        )

    def build_dataset(self, data: DataConfig, sequence_length: int) -> PackedDataset:
        def build() -> PackedDataset:
            return data.build(
                tokenizer=self.tokenizer,
                sequence_length=sequence_length,
                cache_dir=self.evaluation.cache_dir,
                progress=log.info,
            )

        return self.world.main_process_first(build)


def document_rows(documents: list[LossTotals]) -> list[Row]:
    """Return the row of each document in the table of an evaluation."""
    return [{"document": number, **each.metrics(), **asdict(each)} for number, each in enumerate(documents)]


def question_row(answer: Answer) -> Row:
    """Return the row of a question in the table of an evaluation."""
    return {
        "source": answer.question.source,
        "answer": answer.question.answer,
        "nats": [nats if math.isfinite(nats) else None for nats in answer.nats],
        "is_greedy": list(answer.is_greedy),
    }
