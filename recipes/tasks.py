"""The tasks of [tasks.NAME]: during training, and of a trained model (evaluate.py)."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain

from torch import nn

from components.clock import TrainingClock
from components.distributed.context import DistributedContext
from components.interfaces import Comm, Tokenizer
from components.tasks import Answer, EncodedRequest, Question, Scorer, check_questions, encode_questions
from recipes.builtin_hooks import EvaluateModel, is_due
from recipes.config import Config
from recipes.errors import config_errors_at, raised_in
from recipes.hooks import HookContext
from recipes.interfaces import TaskConfig, TaskDefaults, complete_task

log = logging.getLogger("powertrain")


@dataclass(frozen=True)
class Task:
    """A task whose questions are read and encoded."""

    name: str
    config: TaskDefaults
    questions: Sequence[Question]
    encoded: Sequence[Sequence[EncodedRequest]]
    """The requests of each question."""

    def metrics(self, answers: Sequence[Answer]) -> dict[str, float]:
        """Return the metrics by their names in metrics.jsonl, task_NAME_METRIC."""
        with raised_in(f"tasks.{self.name}"):
            return {f"task_{self.name}_{key}": float(value) for key, value in self.config.metrics(answers).items()}


def build_tasks(
    config: Config,
    configs: Mapping[str, TaskConfig],
    world: DistributedContext,
    tokenizer: Tokenizer,
    sequence_length: int,
    limit: int | None = None,
) -> list[Task]:
    """Read and encode the first `limit` questions of each task. Call on every rank.

    Raises ConfigError at the task that is at fault, also if the processes do not read the same questions.
    """
    tasks = []
    for name, each in configs.items():
        with config_errors_at(config, f"tasks.{name}"):
            questions = world.main_process_first(lambda each=each: check_questions(each.questions()))[:limit]  # type: ignore[misc]
            task = Task(name, complete_task(each), questions, encode_questions(questions, tokenizer, sequence_length))
            if not world.all_equal(_fingerprint(task)):
                raise ValueError("the processes do not read the same questions; put the same files on every node")
        tasks.append(task)
    return tasks


def evaluate_tasks(
    tasks: Sequence[Task],
    scorer: Scorer,
    model: nn.Module,
    dp: Comm,
    compute: Callable[[], AbstractContextManager[object]],
) -> dict[str, list[Answer]]:
    """Return the answers of `model` to each task, by its name. Call on every rank; the result is equal on all."""
    requests = [request for task in tasks for question in task.encoded for request in question]
    scores = iter(scorer.score(requests, model, dp, compute))
    answers: dict[str, list[Answer]] = {}
    for task in tasks:
        answers[task.name] = []
        for question in task.questions:
            nats, is_greedy = zip(*(next(scores) for _ in question.requests), strict=True)
            answers[task.name].append(Answer(question, nats, is_greedy))
    return answers


def _fingerprint(task: Task) -> str:
    digest = hashlib.sha256()
    for request in chain.from_iterable(task.encoded):
        digest.update(request.inputs.tobytes() + request.targets.tobytes())
    return digest.hexdigest()


@dataclass
class EvaluateTasks(EvaluateModel):
    """Evaluates the tasks that are due at a step, which are scored together, and all of them at the end."""

    tasks: Sequence[Task]
    scorer: Scorer
    prefix = "task_"

    def due(self, clock: TrainingClock) -> Sequence[Task]:
        return [task for task in self.tasks if clock.done or is_due(task.config.interval_steps, clock)]

    def evaluate(self, due: Sequence[Task], context: HookContext) -> dict[str, float]:
        answers = evaluate_tasks(due, self.scorer, context.model, self.dp, self.compute)
        metrics: dict[str, float] = {}
        for task in due:
            values = task.metrics(answers[task.name])
            metrics |= values
            if context.rank == 0:
                log.info(f"step {context.clock.step:>6}  {format_metrics(task, values)}")
        return metrics


def format_metrics(task: Task, values: Mapping[str, float]) -> str:
    """Return the metrics of a task for display."""
    named = {key.removeprefix(f"task_{task.name}_").replace("_per_", " per "): value for key, value in values.items()}
    return f"task {task.name}  " + "  ".join(f"{key} {value:.4f}" for key, value in named.items())
