"""The interface of batch policies, and the defaults of what a policy may leave out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from components.defaults import with_defaults
from components.errors import InputError


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


class GradientNoise(Protocol):
    """The gradient noise measured in one step, equal on all ranks. components/gradient_noise/ computes it."""

    @property
    def num_micro_batches(self) -> int:
        """K, the number of micro-batches of all ranks."""
        ...

    @property
    def micro_batch_size(self) -> int:
        """Samples in each micro-batch; `groups` times it is the global batch size."""
        ...

    @property
    def sum_micro_grad_sq_norms(self) -> float:
        """Sum over micro-batches of the squared norm of each one's mean gradient, in this step alone."""
        ...

    @property
    def mean_grad_sq_norm(self) -> float:
        """Squared norm of the mean gradient before clipping, in this step alone."""
        ...

    @property
    def grad_cov_trace(self) -> float:
        """tr(Sigma): trace of the covariance of one sample's gradient, smoothed over steps."""
        ...

    @property
    def grad_sq_norm(self) -> float:
        """Squared norm of the true gradient, smoothed over steps; an unbiased estimate, so it may be negative."""
        ...


class BatchPolicy:
    """Decides the global batch size of every step, from numbers that are equal on all ranks.

    Only `next_batch_size` is required. A class need not derive from this one: `complete_policy` adds the defaults.
    """

    is_adaptive: bool = False
    """Whether sizes depend on the measured gradient, so that they are not known before the run. A class that does not
    derive from this one is adaptive if it has a method `observe`, unless it says otherwise."""
    min_size: int | None = None
    """Smallest global batch size that an adaptive policy may return, in samples; None: the first."""
    max_size: int | None = None
    """Largest global batch size that an adaptive policy may return, in samples; None: unknown."""
    multiple_of: int = 1
    """The sizes are multiples of this many samples."""

    def next_batch_size(self, progress: Progress) -> int:
        """Return the global batch size wanted for the step that starts now, in samples; the layout rounds it up."""
        raise NotImplementedError

    def measures_noise(self, progress: Progress) -> bool:
        """Return whether to measure the gradient noise of the step that starts now, for the policy or the metrics."""
        return True

    def observe(self, progress: Progress, noise: GradientNoise | None) -> None:
        """Receive the noise of a step after it ended; None where it was not, or could not be, measured."""

    def state_dict(self) -> Mapping[str, Any]:
        """Return what a resumed run needs, as JSON."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`, which may be that of another policy."""


def complete_policy(policy: Any) -> BatchPolicy:
    """Return `policy` as a `BatchPolicy`: what its class does not define gets the default.

    Raises InputError for an object without `next_batch_size`.
    """
    if not callable(getattr(policy, "next_batch_size", None)):
        raise InputError("use", f"its build() returned a {type(policy).__name__} without next_batch_size(progress)")
    complete = with_defaults(policy, BatchPolicy)
    if complete is not policy and not hasattr(policy, "is_adaptive"):
        complete.is_adaptive = hasattr(policy, "observe")
    return complete
