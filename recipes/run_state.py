"""What a run puts into a checkpoint beside its tensors, and how it comes back."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from components.checkpoint import read_state
from components.gradient_moments import GradientNoise

if TYPE_CHECKING:
    from recipes.pretrain import TrainingRun

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
    """What the data was; unknown of a dataset without a `fingerprint`."""


class _State(BaseModel):
    """Of state.json what is read outside the component that wrote it."""

    model_config = ConfigDict(strict=True)

    clock: _Clock
    batch: dict[str, Any]
    loader: _Loader
    vocab_size: Annotated[int, Field(ge=1, lt=2**31)]
    tokenizer: str | None = None
    """Its fingerprint; checkpoints of before it was kept have none."""


def read_run_state(checkpoint: Path) -> dict[str, Any]:
    """`state.json` of the checkpoint of a run. Raises ValueError when it is none, damaged or too new."""
    state = read_state(checkpoint)
    try:
        _State.model_validate(state)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{checkpoint} is damaged: state.json: {where}: {first['msg']}") from None
    return state


def state_of(run: TrainingRun) -> dict[str, Any]:
    """Everything the next step depends on that is no tensor, as JSON."""
    return {
        "clock": run.clock.state_dict(),
        "batch": dict(run.policy.state_dict()),
        "gradient_noise": run.noise.state_dict(),
        "observations": [[progress.state_dict(), noise and noise.state_dict()] for progress, noise in run.observations],
        "guard": run.guard.state_dict(),
        "loader": {
            "cursor": run.clock.samples,
            "epoch_length": len(run.samples),
            "content": run.content,
        },
        "vocab_size": run.vocab_size,
        "tokenizer": run.tokenizer_fingerprint,
        "world_size": run.world.size,
    }


def restore(run: TrainingRun, checkpoint: Path) -> None:
    """Continue from `checkpoint`. Raises ValueError if it is damaged, or not of this model."""
    state = read_run_state(checkpoint)
    if state["vocab_size"] != run.vocab_size:
        raise ValueError(f"{checkpoint} was trained with a vocabulary of {state['vocab_size']}, not {run.vocab_size}")
    if state.get("tokenizer") not in (None, run.tokenizer_fingerprint):
        raise ValueError(
            f"{checkpoint} was trained with another tokenizer of {run.vocab_size} ids: "
            f"{state['tokenizer']}, not {run.tokenizer_fingerprint}"
        )
    run.tensors.restore(checkpoint)
    run.clock.load_state_dict(state["clock"])
    _restore_parts(run, checkpoint, state)
    before = state["loader"].get("content")
    if state["loader"]["epoch_length"] != len(run.samples):
        log.warning(
            f"the data has {len(run.samples)} sequences, it had {state['loader']['epoch_length']}: "
            "the order of samples is another from here on"
        )
    elif None not in (before, run.content) and before != run.content:
        log.warning(f"the data is not what it was: {run.content}, before {before}")
    log.info(f"resumed from {checkpoint}: step {run.clock.step}, {run.clock.tokens} tokens")


def roll_back(run: TrainingRun, checkpoint: Path) -> None:
    """Parameters, optimizer and batch become those of `checkpoint`; clock and data go on from where they are."""
    consecutive = run.guard.consecutive
    run.tensors.restore(checkpoint)
    _restore_parts(run, checkpoint, read_run_state(checkpoint))
    run.guard.consecutive = consecutive


def _restore_parts(run: TrainingRun, checkpoint: Path, state: dict[str, Any]) -> None:
    try:
        run.policy.load_state_dict(state["batch"])
        for name, part in (("gradient_noise", run.noise), ("guard", run.guard)):
            if name in state:  # checkpoints of before there was one have none
                part.load_state_dict(state[name])
        run.observations.clear()
        for progress, noise in state.get("observations", []):
            after = replace(run.clock)
            after.load_state_dict(progress)
            run.observations.append((after, noise and GradientNoise.from_state_dict(noise)))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{checkpoint} is damaged: state.json: {type(error).__name__} {error}") from None
