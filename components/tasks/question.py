"""Question: what a task asks the model, and the metrics of its answers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from components.errors import InputError


@dataclass(frozen=True)
class Request:
    """A text whose probability after a context is computed."""

    context: str
    choice: str
    """The text that is predicted, without the delimiter before it. It is not empty."""
    delimiter: str = " "
    """Text between the two, which is predicted too but counts neither as characters nor as bytes of the choice."""

    @property
    def continuation(self) -> str:
        return self.delimiter + self.choice


@dataclass(frozen=True)
class Question:
    """The choices of a multiple-choice question, or the single right continuation of a cloze question."""

    requests: Sequence[Request]
    answer: int = 0
    """Index of the right request."""
    source: str = ""
    """Where it comes from, such as file and line; for error messages and the table of an evaluation."""


@dataclass(frozen=True)
class Answer:
    """What the model assigns to the requests of a question, in their order."""

    question: Question
    nats: Sequence[float]
    """-log probability of each continuation, summed over its tokens."""
    is_greedy: Sequence[bool]
    """Whether every token of the continuation is the most probable one."""

    @property
    def is_correct(self) -> bool:
        """Whether the right choice is the most probable one; for a single request, whether it is the greedy one."""
        if len(self.nats) == 1:
            return self.is_greedy[0]
        return _smallest(self.nats) == self.question.answer

    @property
    def is_correct_norm(self) -> bool:
        """Whether the right choice has the highest log probability per character."""
        lengths = (len(request.choice) for request in self.question.requests)
        return _smallest([n / length for n, length in zip(self.nats, lengths, strict=True)]) == self.question.answer

    @property
    def bits_per_byte(self) -> float:
        """Bits for each UTF-8 byte of the right choice."""
        right = self.question.requests[self.question.answer].choice
        return self.nats[self.question.answer] / math.log(2) / len(right.encode("utf-8", "surrogatepass"))


def accuracy_metrics(answers: Sequence[Answer]) -> Mapping[str, float]:
    """Return `acc` and `bits_per_byte`, and `acc_norm` if all questions have choices: means over the questions.

    They are those of lm-evaluation-harness (`acc`, `acc_norm`) and of OLMo-core (bits per byte).
    """
    metrics = {"acc": fmean(answer.is_correct for answer in answers)}
    if all(len(answer.nats) > 1 for answer in answers):
        metrics["acc_norm"] = fmean(answer.is_correct_norm for answer in answers)
    return {**metrics, "bits_per_byte": fmean(answer.bits_per_byte for answer in answers)}


def check_questions(questions: Iterable[Question]) -> list[Question]:
    """Return `questions` as a list. Raises InputError if there are none, or one is not a valid `Question`."""
    checked: list[Question] = []
    for question in questions:
        where = f"question {len(checked) + 1}: "
        if not isinstance(question, Question):
            raise InputError("", f"{where}{type(question).__name__} is not a components.tasks:Question")
        if not 0 <= question.answer < len(question.requests):
            raise InputError("", f"{where}answer = {question.answer}, but it has {len(question.requests)} requests")
        if not all(request.choice for request in question.requests):
            raise InputError("", f"{where}it has an empty choice, which cannot be predicted")
        checked.append(question)
    if not checked:
        raise InputError("", "it has no questions")
    return checked


def _smallest(values: Sequence[float]) -> int:
    """Return the index of the smallest value, the first of several; -1 if one is nan."""
    return -1 if any(math.isnan(value) for value in values) else min(range(len(values)), key=values.__getitem__)
