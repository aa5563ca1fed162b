"""Find the checkpoint to resume from, and check that the configuration may continue it."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from components.checkpoint import DamagedError, list_checkpoints, mark_damaged, step_of, verify
from components.checkpoint.remote import fetch_model
from components.distributed.context import DistributedContext
from components.paths import expand_home
from components.storage.address import local_copy_of
from components.units import format_count
from recipes.config import Config, ConfigError, flatten
from recipes.config.errors import DEFAULT
from recipes.stored_config import load_stored_config, read_stored_config
from recipes.training_state import read_run_state

log = logging.getLogger("powertrain")

Rule = Literal["allow", "warn", "refuse"]

RULES: dict[str, Rule] = {
    # These define the meaning of the saved tensors and counters: another value does not fit them.
    "recipe": "refuse",
    "model": "refuse",
    "tokenizer": "refuse",
    "optimizer.use": "refuse",
    "optimizer.variant": "refuse",
    "optimizer.muon_on": "refuse",
    "optimizer.adamw_on": "refuse",
    "training.sequence_length": "refuse",
    # Allowed, with a warning: the curve is no longer one experiment.
    "data": "warn",
    "optimizer": "warn",
    "lr_schedule": "warn",
    "batch": "warn",
    "gradient_noise": "warn",
    "hooks": "warn",
    "run.seed": "warn",
    "training.max_grad_norm": "warn",
    "training.precision": "warn",
    "training.float8": "warn",
    "training.document_masking": "warn",
    # How, where and how long to train: extending total_tokens is supported by the schedules.
    "training": "allow",
    "run": "allow",
    "parallel": "allow",
    "validation": "allow",
    "average": "allow",
    "probes": "allow",
    "tasks": "allow",
    "checkpoint": "allow",
    "metrics": "allow",
    "guard": "allow",
    "profile": "allow",
    "import_paths": "allow",
}
"""Rules by prefix. The longest matching prefix of a key counts; a key without one is warned about."""

LOCATION_KEYS = ("path", "cache_dir")
"""Keys that are locations. Data and tokenizers that moved are recognized by content, not by path; see
`log_moved_data` for data without a fingerprint."""

LR_SAMPLES = 1000
"""Maximum number of past steps at which two schedules are compared."""


@dataclass(frozen=True)
class Resume:
    """A --resume on the command line."""

    path: Path | None = None
    """A checkpoint or a run directory; None: the newest checkpoint of this run."""


def rule_of(key: str) -> Rule:
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        if prefix in RULES:
            return RULES[prefix]
    return "warn"


def find_checkpoints(resume: Resume | None, checkpoints: Path, *, restarted: bool = False) -> list[Path]:
    """Return the checkpoints that may be resumed, oldest first. The earlier ones are used if the last is damaged.

    A run that was `restarted` after a failure continues from its newest checkpoint. Raises ValueError if the requested
    checkpoint does not exist, or if the run directory has newer ones, which the run would overwrite.
    """
    existing = list_checkpoints(checkpoints)
    if restarted and existing:
        return existing
    if resume is None:
        return []
    if resume.path is None:
        if not existing:
            raise ValueError(f"--resume: no complete checkpoint in {checkpoints}; leave --resume out to start the run")
        return existing
    try:
        chosen = [_canonical(checkpoints, each) for each in list_checkpoints_at(resume.path)]
    except ValueError as error:
        raise ValueError(f"--resume: {error}") from None
    if chosen[-1] in existing and chosen[-1] != existing[-1]:
        raise ValueError(
            f"--resume: {existing[-1].name} is newer than {chosen[-1].name} and would be overwritten; "
            "give the resumed run another --run.name, or move the newer checkpoints away"
        )
    return chosen


def newest_intact_checkpoint(
    candidates: list[Path], world: DistributedContext, damages: list[str], own: Path
) -> Path | None:
    """Return the last of `candidates` that is intact, or None; add a line to `damages` for each damaged one.

    Damaged ones after it are renamed if they are in `own`, the directory of this run. Each rank verifies a part of the
    files, and all return the same. Raises ValueError if the ranks have different candidates.
    """
    names = [checkpoint.name for checkpoint in candidates]
    if not world.all_equal(str(names)):
        raise ValueError(
            f"the processes do not see the same checkpoints; this one sees {', '.join(names) or 'none'}. Put "
            "the run directory on a file system that all nodes share, and try again"
        )
    damaged: list[Path] = []

    def rename_damaged() -> None:
        for each in damaged:
            if each.parent == own:
                mark_damaged(each)

    for checkpoint in reversed(candidates):
        damage = ""
        try:
            verify(checkpoint, rank=world.rank, ranks=world.size)
        except DamagedError as error:
            damage = str(error)
        found = [text for text in world.gather(damage) if text]
        if not found:
            world.on_main_process(rename_damaged)
            return checkpoint
        damaged.append(checkpoint)
        damages.append(found[0])
    return None


def is_inside(path: Path, folder: Path) -> bool:
    """Return whether `path` lies in `folder`, also through links and `..`."""
    return path.resolve().is_relative_to(folder.resolve())


def _canonical(checkpoints: Path, path: Path) -> Path:
    """Return `path` as a child of `checkpoints` if it is one under another name: through links, `..` or linked files.

    The comparison with the run's own checkpoints decides what a new run removes, so it must not depend on spelling.
    """
    files = _resolved(path)
    for existing in list_checkpoints(checkpoints):
        if existing.exists() and (existing.samefile(path) or files & _resolved(existing)):
            return existing
    return checkpoints / path.name if checkpoints.exists() and path.parent.samefile(checkpoints) else path


def _resolved(checkpoint: Path) -> set[Path]:
    """Return the resolved paths of the files of a checkpoint."""
    return {path.resolve() for path in checkpoint.iterdir()} if checkpoint.is_dir() else set()


def list_checkpoints_at(path: Path) -> list[Path]:
    """Return the checkpoint at `path`, or those of the run directory at `path`, oldest first. Raises ValueError."""
    path = local_copy_of(path) or expand_home(path).absolute()
    fetch_model(path)
    if not path.is_dir():
        raise ValueError(f"{path} is not a directory")
    inside = list_checkpoints(path / "checkpoints") or list_checkpoints(path)
    if not ((inside[-1] if inside else path) / "state.json").exists():
        raise ValueError(f"{path} is neither a checkpoint nor a run directory with one")
    return inside or [path]


def find_checkpoint_at(path: Path) -> Path:
    """Return the checkpoint at `path`, or the newest of the run directory at `path`. Raises ValueError."""
    return list_checkpoints_at(path)[-1]


def diff_config(config_file: Path, config: Config, *, locations: bool = False) -> Iterator[tuple[str, Any, Any]]:
    """Yield (key, stored value, current value) for each key that differs from `config_file`; None stands for unset.

    Either LOCATION_KEYS are skipped or, with `locations`, all other keys. A key with its default value that is missing
    in the file is skipped: the component did not have it yet, and its default keeps the old behavior. Raises ValueError
    if the file is damaged.
    """
    stored = read_stored_config(config_file)
    current = flatten(config.to_toml(provenance=False))
    defaults = {key for key, leaf in config.leaves.items() if leaf.origin.source == DEFAULT}
    for key in sorted(stored.keys() | (current.keys() - defaults)):
        before, now = stored.get(key), current.get(key)
        if before != now and (key.rpartition(".")[2] in LOCATION_KEYS) == locations:
            yield key, before, now


def check_resumable(checkpoint: Path, config: Config) -> None:
    """Raise ConfigError with every change since `checkpoint` that its saved state does not fit."""
    refused = [
        config.problem(
            key,
            f"{_format_value(before)} in the checkpoint, {_format_value(now)} now: "
            "the checkpoint does not fit this setting; start a new run, or restore the old value",
        )
        for key, before, now in diff_config(checkpoint / "config.toml", config)
        if rule_of(key) == "refuse"
    ]
    if refused:
        raise ConfigError(refused)


def log_config_diff(checkpoint: Path, config: Config) -> None:
    """Log how the configuration differs from the one stored in `checkpoint`. Call after `check_resumable`."""
    schedule_changed = False
    for key, before, now in diff_config(checkpoint / "config.toml", config):
        schedule_changed |= key == "training.total_tokens" or key.startswith("lr_schedule.")
        if rule_of(key) == "warn":
            log.warning(f"resuming with a change: {key} was {_format_value(before)}, is {_format_value(now)}")
        else:
            log.info(f"resuming with {key} = {_format_value(now)} (was {_format_value(before)})")
    if schedule_changed and (message := schedule_mismatch(checkpoint, config)):
        log.warning(message)


def log_moved_data(checkpoint: Path, config: Config) -> None:
    """Log changed locations of training data. Call if a fingerprint, now or in `checkpoint`, is not known."""
    for key, before, now in diff_config(checkpoint / "config.toml", config, locations=True):
        if key.startswith("data.") and not key.endswith(".cache_dir"):
            log.warning(
                f"resuming with a change: {key} was {_format_value(before)}, is {_format_value(now)}; the data may be "
                "other data, because it has no fingerprint"
            )


def schedule_mismatch(checkpoint: Path, config: Config) -> str | None:
    """Return a warning if the steps before `checkpoint` used another learning rate than this schedule gives them.

    This happens when a run that had started its decay is extended. Returns None if the learning rates are equal, if
    the schedule is of another class, or if the old one cannot be built. Assumes the mean batch of the past steps.
    """
    try:
        old, clock = load_stored_config(checkpoint, trusted_config=config).recipe, read_run_state(checkpoint)["clock"]
    except (ConfigError, ValueError):  # damage is reported where the file is needed
        return None
    new = config.recipe
    if type(old.lr_schedule) is not type(new.lr_schedule) or not clock["step"]:
        return None
    batch = clock["tokens"] // clock["step"]

    def old_and_new_lr(step: int) -> tuple[float, float]:
        before, now = (
            recipe.lr_schedule.lr(step * batch, batch, recipe.training.total_tokens) for recipe in (old, new)
        )
        return before, now

    # compare a sample of the past steps, then find the first differing step after the last equal sample
    every = max(1, clock["step"] // LR_SAMPLES)
    coarse = [*range(0, clock["step"], every), clock["step"] - 1]
    mismatch = next((step for step in coarse if not math.isclose(*old_and_new_lr(step))), None)
    if mismatch is None:
        return None
    first = next(
        step for step in range(max(0, mismatch - every), mismatch + 1) if not math.isclose(*old_and_new_lr(step))
    )
    last, now = old_and_new_lr(clock["step"] - 1)[0], old_and_new_lr(clock["step"])[1]
    before = [each for each in list_checkpoints(checkpoint.parent) if step_of(each) <= first]
    remedy = f"resume from {before[-1]} or earlier" if before else "start again: no earlier checkpoint is left"
    return (
        f"the steps after {format_count(first * batch)} tokens used a different learning rate than this schedule; it "
        f"jumps from {last:.3g} to {now:.3g} here. For a clean run, {remedy}"
    )


def _format_value(value: Any) -> str:
    return "unset" if value is None else repr(value)
