"""What a recipe may lack: optional attributes, and training. Without large imports, so that typos are found at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from components.protocol_defaults import with_defaults
from recipes.config import Config, ConfigError


class RunDefaults:
    """The optional attributes of the section `run` that the launcher uses, with their defaults."""

    hang_timeout_seconds: float | None = None
    """Seconds without progress after which the launcher restarts the processes; None: never."""


class CheckpointDefaults:
    """The optional attributes of the section `checkpoint` that the launcher uses, with their defaults."""

    in_memory_interval_steps: int | None = None
    """Steps between copies of the state in memory, for which the launcher makes a directory; None: none."""


class RecipeDefaults:
    """The optional attributes of a recipe, with their defaults."""

    device: str = "auto"
    """The device. "cpu" starts one process even if there are GPUs."""
    run: Any = None
    """The section with the run directory, and optionally what `RunDefaults` has."""
    checkpoint: Any = None
    """The section that says when to save; see `CheckpointDefaults`."""
    validation: Any = None
    """The section with the validation data."""
    average: Mapping[str, Any] = MappingProxyType({})
    """The sections of the averages of the weights, by name."""
    probes: Mapping[str, Any] = MappingProxyType({})
    """The sections of the probes, by name."""
    tasks: Mapping[str, Any] = MappingProxyType({})
    """The sections of the tasks, by name."""
    dry_run: Callable[..., int] | None = None
    """Called as `dry_run(config, world_size)` by --dry-run, instead of the dry run of pre-training."""


def complete_recipe(recipe: Any) -> RecipeDefaults:
    """Return `recipe` with defaults for the attributes that its class does not define."""
    return with_defaults(recipe, RecipeDefaults)


def require_training(config: Config) -> None:
    """Raise ConfigError for a recipe that trains nothing, such as train_configs/evaluate.toml."""
    if not hasattr(config.recipe, "training"):
        message = f"{type(config.recipe).__name__} trains nothing; give the recipe of a training run"
        raise ConfigError([config.problem("recipe", message)])
