"""The interface of batch policies, with the defaults of its optional members."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from components.errors import InputError
from components.gradient_noise.moments import GradientNoise
from components.protocol_defaults import with_defaults


class Progress(Protocol):
    """The part of the clock that a policy reads."""

    @property
    def step(self) -> int: ...
    @property
    def samples(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def total_tokens(self) -> int: ...


@dataclass(frozen=True)
class StepTime:
    """How long a step took, equal on all ranks."""

    layout: str
    """The mesh and the size of a micro-batch. Times of different layouts cannot be compared."""
    micro_batches: int
    """Micro-batches of each data-parallel rank."""
    samples: int
    """Samples of the step: the global batch size."""
    seconds: float
    """Mean over all processes, without saves, validation and tasks."""


class BatchPolicy:
    """Decides the global batch size of every step, from numbers that are equal on all ranks.

    Only `next_batch_size` is required. A class need not derive from this one: `complete_policy` adds the defaults.
    """

    is_adaptive: bool = False
    """Whether sizes depend on the measured gradient noise, so that they are unknown before the run. A class that does
    not derive from this one is adaptive if it has a method `observe`, unless it sets this attribute."""
    min_size: int | None = None
    """Smallest global batch size that an adaptive policy may return, in samples; None: the first."""
    max_size: int | None = None
    """Largest global batch size that an adaptive policy may return, in samples; None: unknown."""
    multiple_of: int = 1
    """All sizes are multiples of this many samples."""

    def next_batch_size(self, progress: Progress) -> int:
        """Return the wanted global batch size of the next step, in samples; `BatchRounding` rounds it up."""
        raise NotImplementedError

    def measures_noise(self, progress: Progress) -> bool:
        """Return whether to measure the gradient noise of the next step, for the policy or the metrics."""
        return True

    def observe(self, progress: Progress, noise: GradientNoise | None) -> None:
        """Receive the gradient noise of a step that ended; None if it was not, or could not be, measured."""

    def observe_time(self, time: StepTime) -> None:
        """Receive the time of a step, one or two steps later. Not called for the first step of a process."""

    def metrics(self) -> Mapping[str, float]:
        """Return the numbers that explain the size of the next step, by their names in metrics.jsonl."""
        return {}

    def state_dict(self) -> Mapping[str, Any]:
        """Return the state that a resumed run needs; it must be serializable as JSON."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`, which may be that of another policy."""


def check_sizes(initial_size: int, max_size: int, multiple_of: int, min_size: int | None = None) -> None:
    """Raise InputError for a largest size below the first, or a size that `multiple_of` does not divide."""
    if max_size < initial_size:
        raise InputError(
            "max_size", f"{max_size} is below initial_size = {initial_size}; raise it or lower initial_size"
        )
    for name, size in (("initial_size", initial_size), ("min_size", min_size), ("max_size", max_size)):
        if size is not None and size % multiple_of:
            message = f"{multiple_of} does not divide {name} = {size}; make {name} a multiple of it"
            raise InputError("multiple_of", message)


def complete_policy(policy: Any) -> BatchPolicy:
    """Return `policy` as a `BatchPolicy`: members that its class does not define get the default.

    Raises InputError for an object without `next_batch_size`.
    """
    if not callable(getattr(policy, "next_batch_size", None)):
        raise InputError("use", f"its build() returned a {type(policy).__name__} without next_batch_size(progress)")
    complete = with_defaults(policy, BatchPolicy)
    if complete is not policy and not hasattr(policy, "is_adaptive"):
        complete.is_adaptive = hasattr(policy, "observe")
    return complete
