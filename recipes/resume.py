"""Resuming: which checkpoint, and whether this configuration may continue it."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from components.checkpoint import list_checkpoints, step_of
from components.units import expand_home, format_count
from recipes.config import Config, ConfigError, flatten
from recipes.config.errors import DEFAULT
from recipes.stored_config import load_stored_config
from recipes.training_state import read_run_state

log = logging.getLogger("powertrain")

Rule = Literal["allow", "warn", "refuse"]

RULES: dict[str, Rule] = {
    # What the saved tensors and counters mean: another value makes them another run's.
    "recipe": "refuse",
    "model": "refuse",
    "tokenizer": "refuse",
    "optimizer.use": "refuse",
    "training.sequence_length": "refuse",
    # What a resumed run may change, but not without being told that its curve now has a joint.
    "data": "warn",
    "optimizer": "warn",
    "lr_schedule": "warn",
    "batch": "warn",
    "gradient_noise": "warn",
    "run.seed": "warn",
    "training.max_grad_norm": "warn",
    "training.precision": "warn",
    "training.document_masking": "warn",
    # How, where and how long: extending total_tokens is what the schedules are anchored for.
    "training": "allow",
    "run": "allow",
    "parallel": "allow",
    "validation": "allow",
    "checkpoint": "allow",
    "metrics": "allow",
    "guard": "allow",
    "profile": "allow",
    "import_paths": "allow",
}
"""The rule of a key is that of its longest prefix here; what nothing covers is warned about."""

LOCATION_KEYS = ("path", "cache_dir")
"""Keys that say where something lies. Data and tokenizers that moved are recognised by content, not by path."""

LR_SAMPLES = 1000
"""Steps of the past, at most, at which two schedules are compared."""


@dataclass(frozen=True)
class Resume:
    """What --resume asked for."""

    path: Path | None = None
    """A checkpoint or a run directory; None: the newest checkpoint of this run."""


def rule_of(key: str) -> Rule:
    """The rule for a dotted key."""
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        if prefix in RULES:
            return RULES[prefix]
    return "warn"


def find_checkpoints(resume: Resume | None, checkpoints: Path, *, restarted: bool = False) -> list[Path]:
    """Checkpoints that may be continued, the last of which ought to be: the others are for when it is damaged.

    What was `restarted` after a failure continues with its own newest. Raises ValueError when there is not what was
    asked for, or when it would be overtaken by newer ones.
    """
    own = list_checkpoints(checkpoints)
    if restarted and own:
        return own
    if resume is None:
        return []
    if resume.path is None:
        if not own:
            raise ValueError(f"--resume: no complete checkpoint in {checkpoints}; leave --resume out to start the run")
        return own
    try:
        chosen = [_canonical(checkpoints, each) for each in list_checkpoints_at(resume.path)]
    except ValueError as error:
        raise ValueError(f"--resume: {error}") from None
    if chosen[-1] in own and chosen[-1] != own[-1]:
        raise ValueError(
            f"--resume: {own[-1].name} is newer than {chosen[-1].name} and would be overwritten; "
            "give the continued run a --run.name of its own, or move the newer checkpoints away"
        )
    return chosen


def is_inside(path: Path, folder: Path) -> bool:
    """Also by another name: through a link, or `..`."""
    return path.resolve().is_relative_to(folder.resolve())


def _canonical(checkpoints: Path, path: Path) -> Path:
    """`path` as a child of `checkpoints` where it is one by another name, through links or `..`, of the directory or of
    its files: a new run removes those, and continues with this one only what it knows as its own."""
    files = _resolved(path)
    for own in list_checkpoints(checkpoints):
        if own.exists() and (own.samefile(path) or files & _resolved(own)):
            return own
    return checkpoints / path.name if checkpoints.exists() and path.parent.samefile(checkpoints) else path


def _resolved(checkpoint: Path) -> set[Path]:
    """The files of a checkpoint, wherever they really are."""
    return {path.resolve() for path in checkpoint.iterdir()} if checkpoint.is_dir() else set()


def list_checkpoints_at(path: Path) -> list[Path]:
    """The checkpoint that `path` is, or those of the run directory that it is, oldest first. Raises ValueError."""
    path = expand_home(path).absolute()
    if not path.is_dir():
        raise ValueError(f"{path} is no directory")
    inside = list_checkpoints(path / "checkpoints") or list_checkpoints(path)
    if not ((inside[-1] if inside else path) / "state.json").exists():
        raise ValueError(f"{path} is neither a checkpoint nor a run directory with one")
    return inside or [path]


def find_checkpoint_at(path: Path) -> Path:
    """The checkpoint that `path` is, or the newest one of the run directory that it is. Raises ValueError."""
    return list_checkpoints_at(path)[-1]


def diff_config(stored_in: Path, config: Config) -> Iterator[tuple[str, Any, Any]]:
    """(key, before, now) of what the configuration in the file `stored_in` has otherwise; None where a key is unset.

    A key that the file does not have, and nobody set since, is one that its component did not know yet: the default
    is then what the component did without it. Raises ValueError if the file is damaged.
    """
    try:
        stored = flatten(stored_in.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{stored_in} is damaged: {error}") from None
    current = flatten(config.to_toml(provenance=False))
    defaults = {key for key, leaf in config.leaves.items() if leaf.origin.source == DEFAULT}
    for key in sorted(stored.keys() | (current.keys() - defaults)):
        before, now = stored.get(key), current.get(key)
        if before != now and key.rpartition(".")[2] not in LOCATION_KEYS:
            yield key, before, now


def check_resumable(checkpoint: Path, config: Config) -> None:
    """Raises ConfigError with every change since `checkpoint` that would make it another run's."""
    refused = [
        config.problem(
            key,
            f"{_format_value(before)} in the checkpoint, {_format_value(now)} now: "
            "this would be another run's state; start a new run",
        )
        for key, before, now in diff_config(checkpoint / "config.toml", config)
        if rule_of(key) == "refuse"
    ]
    if refused:
        raise ConfigError(refused)


def log_config_diff(checkpoint: Path, config: Config) -> None:
    """Log what this configuration has otherwise than the one stored in `checkpoint`, after `refuse`."""
    reshapes = False
    for key, before, now in diff_config(checkpoint / "config.toml", config):
        reshapes |= key == "training.total_tokens" or key.startswith("lr_schedule.")
        if rule_of(key) == "warn":
            log.warning(f"resuming with a change: {key} was {_format_value(before)}, is {_format_value(now)}")
        else:
            log.info(f"resuming with {key} = {_format_value(now)} (was {_format_value(before)})")
    if reshapes and (told := schedule_mismatch(checkpoint, config)):
        log.warning(told)


def schedule_mismatch(checkpoint: Path, config: Config) -> str | None:
    """What to say where the steps before `checkpoint` had another rate than this schedule would have given them.

    So it is where the decay of a run had begun that is now given more tokens. None where the rates are the same, and
    where the schedule is of another kind altogether, or cannot be made any more.
    """
    try:
        old, clock = load_stored_config(checkpoint, trusted_config=config).recipe, read_run_state(checkpoint)["clock"]
    except (ConfigError, ValueError):  # what is damaged is told where it is needed
        return None
    new = config.recipe
    if type(old.lr_schedule) is not type(new.lr_schedule) or not clock["step"]:
        return None
    batch = clock["tokens"] // clock["step"]

    def rates(step: int) -> tuple[float, float]:
        before, now = (
            recipe.lr_schedule.lr(step * batch, batch, recipe.training.total_tokens) for recipe in (old, new)
        )
        return before, now

    every = max(1, clock["step"] // LR_SAMPLES)
    coarse = [*range(0, clock["step"], every), clock["step"] - 1]
    other = next((step for step in coarse if not math.isclose(*rates(step))), None)
    if other is None:
        return None
    first = next(step for step in range(max(0, other - every), other + 1) if not math.isclose(*rates(step)))
    last, now = rates(clock["step"] - 1)[0], rates(clock["step"])[1]
    before = [each for each in list_checkpoints(checkpoint.parent) if step_of(each) <= first]
    remedy = f"resume from {before[-1]} or earlier" if before else "start anew: no checkpoint from before that is left"
    return (
        "the tokens trained so far had another rate than this schedule would have given them, from "
        f"{format_count(first * batch)} tokens on; it goes from {last:.3g} to {now:.3g} now. "
        f"For the run as if it had been so from its start, {remedy}"
    )


def _format_value(value: Any) -> str:
    return "unset" if value is None else repr(value)
