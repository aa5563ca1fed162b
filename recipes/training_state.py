"""The state of a training run: what a checkpoint saves, and what a resumed run continues from."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from components.batch import BatchPolicy
from components.checkpoint import StateTensors, read_state
from components.clock import TrainingClock
from components.gradient_noise import GradientNoise, NoiseEstimator
from components.guard import StepGuard
from recipes.hooks import Hook

log = logging.getLogger("powertrain")

_Number = Annotated[int, Field(ge=0, lt=2**62)]


class _Clock(BaseModel):
    model_config = ConfigDict(strict=True)

    step: _Number
    samples: _Number
    tokens: _Number


class _Loader(BaseModel):
    model_config = ConfigDict(strict=True)

    epoch_length: Annotated[int, Field(ge=1, lt=2**62)]
    content: str | None = None
    """Fingerprint of the data; unknown for a dataset without one."""


class _State(BaseModel):
    """The part of state.json that is read outside the component that wrote it."""

    model_config = ConfigDict(strict=True)

    clock: _Clock
    batch: dict[str, Any]
    loader: _Loader
    vocab_size: Annotated[int, Field(ge=1, lt=2**31)]
    tokenizer: str | None = None
    """Fingerprint of the tokenizer; older checkpoints have none."""


def read_run_state(checkpoint: Path) -> dict[str, Any]:
    """Return `state.json` of the checkpoint of a run. Raises ValueError if it is not one, or damaged or too new."""
    state = read_state(checkpoint)
    try:
        _State.model_validate(state)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{checkpoint} is damaged: state.json: {where}: {first['msg']}") from None
    return state


@dataclass(frozen=True)
class DataIdentity:
    """What a run trains on: a resumed run is compared with it."""

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
    hooks: Mapping[str, Hook] = field(default_factory=dict)
    """Those of [hooks], by name."""
    observations: deque[tuple[TrainingClock, GradientNoise | None]] = field(default_factory=deque)
    """Steps that were read and that the batch policy has not observed yet."""
    is_sound: bool = True
    """Whether tensors and clock belong together, as they do except during an update: only then may they be saved."""

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the tensors, as JSON."""
        data = self.data
        return {
            "clock": self.clock.state_dict(),
            "batch": dict(self.policy.state_dict()),
            "gradient_noise": self.noise.state_dict(),
            "observations": [[after.state_dict(), noise and noise.state_dict()] for after, noise in self.observations],
            "guard": self.guard.state_dict(),
            "hooks": {name: dict(state) for name, hook in self.hooks.items() if (state := hook.state_dict())},
            "loader": {"epoch_length": data.epoch_length, "content": data.content},
            "vocab_size": data.vocab_size,
            "tokenizer": data.tokenizer,
        }

    def load_state_dict(self, state: dict[str, Any], *, clock: bool = True) -> None:
        """Continue from what `state_dict` returned; without `clock` from the step where this run is."""
        if clock:
            self.clock.load_state_dict(state["clock"])
        self.policy.load_state_dict(state["batch"])
        for name, part in (("gradient_noise", self.noise), ("guard", self.guard)):
            if name in state:  # older checkpoints do not have them
                part.load_state_dict(state[name])
        for name, hook in self.hooks.items():
            if name in state.get("hooks", {}):
                hook.load_state_dict(state["hooks"][name])
        self.observations.clear()
        for progress, noise in state.get("observations", []):
            after = replace(self.clock)
            after.load_state_dict(progress)
            self.observations.append((after, noise and GradientNoise.from_state_dict(noise)))

    def restore(self, checkpoint: Path) -> None:
        """Continue from `checkpoint`. Raises ValueError if it is damaged, or not of this model and tokenizer."""
        state, data = read_run_state(checkpoint), self.data
        if state["vocab_size"] != data.vocab_size:
            raise ValueError(
                f"{checkpoint} was trained with a vocabulary of {state['vocab_size']}, not {data.vocab_size}"
            )
        if state.get("tokenizer") not in (None, data.tokenizer):
            raise ValueError(
                f"{checkpoint} was trained with another tokenizer of {data.vocab_size} ids: "
                f"{state['tokenizer']}, not {data.tokenizer}"
            )
        self.tensors.restore(checkpoint)
        self.clock.load_state_dict(state["clock"])
        self._load(checkpoint, state)
        before = state["loader"].get("content")
        if state["loader"]["epoch_length"] != data.epoch_length:
            log.warning(
                f"the data has {data.epoch_length} sequences, it had {state['loader']['epoch_length']}: "
                "the order of samples is another from here on"
            )
        elif None not in (before, data.content) and before != data.content:
            log.warning(f"the data is not what it was: {data.content}, before {before}")
        log.info(f"resumed from {checkpoint}: step {self.clock.step}, {self.clock.tokens} tokens")

    def roll_back(self, checkpoint: Path) -> None:
        """Restore parameters, optimizer and batch from `checkpoint`; clock and data go on from where they are."""
        consecutive = self.guard.consecutive
        self.tensors.restore(checkpoint)
        self._load(checkpoint, read_run_state(checkpoint))
        self.guard.consecutive = consecutive

    def _load(self, checkpoint: Path, state: dict[str, Any]) -> None:
        """Load all but the clock. Raises ValueError that names `checkpoint`."""
        try:
            self.load_state_dict(state, clock=False)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{checkpoint} is damaged: state.json: {type(error).__name__} {error}") from None
