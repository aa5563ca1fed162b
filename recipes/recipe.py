"""What a recipe may lack: optional attributes, and training. Without large imports, so that typos are found at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from components.protocol_defaults import with_defaults
from recipes.config import Config, ConfigError


class RecipeDefaults:
    """The optional attributes of a recipe, with their defaults."""

    device: str = "auto"
    """The device. "cpu" starts one process even if there are GPUs."""
    run: Any = None
    """The section with the run directory."""
    checkpoint: Any = None
    """The section that says when to save."""
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
