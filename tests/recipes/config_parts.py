"""A small recipe and its components, of every shape that a configuration can have."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

from pydantic import Field

from components.errors import InputError
from components.units import PositiveCount, Tokens

HERE = __name__


@runtime_checkable
class BatchPolicy(Protocol):
    name: str

    def samples(self, step: int) -> int: ...
    def observe(self, step: int, *, moments: Any) -> None: ...


@dataclass(kw_only=True)
class Constant:
    """Always the same batch."""

    initial: PositiveCount = 8
    """Samples of every step."""
    name = "constant"

    def samples(self, step: int) -> int:
        return self.initial

    def observe(self, step: int, *, moments: Any) -> None: ...


@dataclass(kw_only=True)
class Ramp(Constant):
    """A batch that grows."""

    stages: list[tuple[Tokens, PositiveCount]] = field(default_factory=list)
    eta: float = 0.5
    """Above 0."""
    table: Path | None = None

    def __post_init__(self) -> None:
        if self.eta <= 0:
            raise InputError("eta", f"{self.eta} must be above 0")
        if self.eta > 100:
            raise TypeError("too noisy")


class Plain:
    """No dataclass."""

    def __init__(self, *, initial: int, name: str = "plain") -> None:
        self.initial, self.name = initial, name

    def samples(self, step: int) -> int:
        return self.initial

    def observe(self, step: int, **_: Any) -> None: ...


class WithoutObserve:
    name = "x"

    def samples(self, step: int) -> int:
        return 1


class OtherObserve(Constant):
    def observe(self, step: int) -> None: ...  # type: ignore[override]


class Nameless:
    def samples(self, step: int) -> int:
        return 1

    def observe(self, step: int, *, moments: Any) -> None: ...


class Schedule(ABC):
    @abstractmethod
    def lr(self) -> float: ...


@dataclass(kw_only=True)
class Flat(Schedule):
    max_lr: Annotated[float, Field(gt=0)] = 1e-3

    def lr(self) -> float:
        return self.max_lr


@dataclass(kw_only=True)
class Source:
    path: Path
    weight: Annotated[float, Field(ge=0)] = 1.0


@dataclass(kw_only=True)
class Run:
    name: str = "debug"
    dir: Path = Path("runs")
    note: str | None = None


@dataclass(kw_only=True)
class Training:
    """How much to train."""

    total_tokens: Tokens
    """Length of the run."""
    precision: Literal["bf16", "float32"] = "bf16"
    compile: bool = False
    max_grad_norm: float | None = 1.0
    seed: int = 0


@dataclass(kw_only=True)
class Recipe:
    """A recipe."""

    training: Training
    batch: BatchPolicy
    run: Run = field(default_factory=Run)
    schedule: Schedule = field(default_factory=lambda: Flat(max_lr=0.5))
    sources: list[Source] = field(default_factory=list)
    policies: dict[str, BatchPolicy] = field(default_factory=dict)
    multipliers: dict[str, float] = field(default_factory=dict)
    validation: Source | None = None

    def check(self) -> Iterator[tuple[str, str]]:
        if self.training.compile and self.training.precision == "float32":
            yield "training.precision", "compile wants bf16"
        if len(self.sources) > 5:
            yield "sources", f"{len(self.sources)} sources are too many"
