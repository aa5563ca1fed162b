"""The state of a training run: what a checkpoint saves and a resumed run restores."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from components.batch import BatchPolicy
from components.checkpoint import StateTensors, read_state
from components.clock import TrainingClock
from components.gradient_noise import GradientNoise, NoiseEstimator
from components.guard import StepGuard
from components.json_files import first_problem
from recipes.averages import Averages
from recipes.errors import raised_in
from recipes.hooks import Hook

log = logging.getLogger("powertrain")

_Number = Annotated[int, Field(ge=0, lt=2**62)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class _Clock(_Strict):
    step: _Number
    samples: _Number
    tokens: _Number


class _Loader(_Strict):
    epoch_length: Annotated[int, Field(ge=1, lt=2**62)]
    content: str | None = None
    """Fingerprint of the data; None for a dataset without one."""


class _Average(_Strict):
    use: str
    num_copies: int
    state: dict[str, Any]


class _State(_Strict):
    """The part of state.json that other code than the component that wrote it reads."""

    clock: _Clock
    batch: dict[str, Any]
    loader: _Loader
    hooks: dict[str, dict[str, Any]]
    average: dict[str, _Average] = Field(default_factory=dict)
    vocab_size: Annotated[int, Field(ge=1, lt=2**31)]
    tokenizer: str
    """Fingerprint of the tokenizer."""


def read_run_state(checkpoint: Path) -> dict[str, Any]:
    """Return `state.json` of a checkpoint. Raises ValueError if it is missing, damaged or of another format."""
    state = read_state(checkpoint)
    try:
        _State.model_validate(state)
    except ValidationError as error:
        raise ValueError(f"{checkpoint} is damaged: state.json: {first_problem(error)}") from None
    return state


@dataclass(frozen=True)
class DataIdentity:
    """Identifies the data and tokenizer of a run, to compare with those of a resumed run."""

    vocab_size: int
    tokenizer: str
    """Fingerprint of the tokenizer."""
    epoch_length: int
    """Sequences in one epoch."""
    content: str | None
    """Fingerprint of the data, if the dataset has one."""


@dataclass
class TrainingState:
    """Everything that the next step depends on."""

    clock: TrainingClock
    tensors: StateTensors
    policy: BatchPolicy
    noise: NoiseEstimator
    guard: StepGuard
    data: DataIdentity
    averages: Averages = field(default_factory=lambda: Averages(nn.Module(), {}))
    """The averages of [average]."""
    hooks: Mapping[str, Hook] = field(default_factory=dict)
    """The hooks of [hooks], by name."""
    observations: deque[tuple[TrainingClock, GradientNoise | None]] = field(default_factory=deque)
    """Steps that were read but not yet observed by the batch policy: (clock after the step, gradient noise)."""
    is_consistent: bool = True
    """Whether tensors and clock are consistent, as they are except during an update. Only then may they be saved."""

    def state_dict(self) -> dict[str, Any]:
        """Return everything except the tensors, as JSON values."""
        data = self.data
        return {
            "clock": self.clock.state_dict(),
            "batch": dict(self.policy.state_dict()),
            "gradient_noise": self.noise.state_dict(),
            "observations": [[after.state_dict(), noise and noise.state_dict()] for after, noise in self.observations],
            "guard": self.guard.state_dict(),
            "average": self.averages.state_dict(),
            "hooks": {name: dict(hook.state_dict()) for name, hook in self.hooks.items()},
            "loader": {"epoch_length": data.epoch_length, "content": data.content},
            "vocab_size": data.vocab_size,
            "tokenizer": data.tokenizer,
        }

    def load_state_dict(self, state: dict[str, Any], *, clock: bool = True) -> None:
        """Restore what `state_dict` returned, except the state of hooks and, without `clock`, the clock."""
        if clock:
            self.clock.load_state_dict(state["clock"])
        self.policy.load_state_dict(state["batch"])
        self.noise.load_state_dict(state["gradient_noise"])
        self.guard.load_state_dict(state["guard"])
        self.averages.load_state_dict(state.get("average", {}))
        self.observations.clear()
        for progress, noise in state["observations"]:
            after = replace(self.clock)
            after.load_state_dict(progress)
            self.observations.append((after, noise and GradientNoise.from_state_dict(noise)))

    def restore(self, checkpoint: Path, fetch: Callable[[set[str]], None] | None = None) -> str | None:
        """Restore `checkpoint`, and return the fingerprint of the data it was trained on, if that is known.

        Raises ValueError if it is damaged, or of another vocabulary or tokenizer. `fetch` is called before its tensors
        are read, with the names of the files that this rank reads.
        """
        state, data = read_run_state(checkpoint), self.data
        if "merged" in state:
            raise ValueError(
                f"{checkpoint} holds only the mean of weights of several checkpoints, which cannot be resumed; start a "
                "new run with run.init_from"
            )
        if state["vocab_size"] != data.vocab_size:
            raise ValueError(
                f"{checkpoint} was trained with a vocabulary of {state['vocab_size']}, not {data.vocab_size}"
            )
        if state["tokenizer"] != data.tokenizer:
            raise ValueError(
                f"{checkpoint} was trained with a different tokenizer of {data.vocab_size} ids: "
                f"{state['tokenizer']}, not {data.tokenizer}"
            )
        self.tensors.restore(checkpoint, fetch)
        self._load(checkpoint, state, clock=True)
        before: str | None = state["loader"].get("content")
        if state["loader"]["epoch_length"] != data.epoch_length:
            log.warning(
                f"the data has {data.epoch_length} sequences, it had {state['loader']['epoch_length']}: "
                "the sample order changes from here on"
            )
        elif None not in (before, data.content) and before != data.content:
            log.warning(f"the data has changed: its fingerprint is {data.content}, it was {before}")
        log.info(f"resumed from {checkpoint}: step {self.clock.step}, {self.clock.tokens} tokens")
        return before

    def roll_back(self, checkpoint: Path) -> None:
        """Restore `checkpoint` except the clock, so that training continues with the samples after the bad step."""
        consecutive = self.guard.consecutive  # with the count of the checkpoint, max_bad_steps would never be reached
        self.tensors.restore(checkpoint)
        self._load(checkpoint, read_run_state(checkpoint), clock=False)
        self.guard.consecutive = consecutive

    def _load(self, checkpoint: Path, state: dict[str, Any], *, clock: bool) -> None:
        """Load everything except tensors. Raises ValueError that names `checkpoint`; an error of a hook is its own."""
        try:
            self.load_state_dict(state, clock=clock)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{checkpoint} is damaged: state.json: {type(error).__name__} {error}") from None
        for name, hook in self.hooks.items():
            if name in state["hooks"]:  # else it is new in the recipe
                with raised_in(f"hooks.{name}"):
                    hook.load_state_dict(state["hooks"][name])
