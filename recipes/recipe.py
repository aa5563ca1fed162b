"""What the launcher and the tools ask of a recipe. It imports nothing large: a typo in a recipe is reported at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from components.defaults import with_defaults


class RecipeDefaults:
    """The optional attributes of a recipe, and what holds for a class that does not define them."""

    device: str = "auto"
    """Where it computes: "cpu" starts one process where there are GPUs, too."""
    run: Any = None
    """The section with the run directory."""
    validation: Any = None
    """The section with the held-out data."""
    dry_run: Callable[..., int] | None = None
    """Called as `dry_run(config, world_size)` by --dry-run, in place of the dry run of pre-training."""


def complete_recipe(recipe: Any) -> RecipeDefaults:
    """Return `recipe` with the defaults of what its class does not define."""
    return with_defaults(recipe, RecipeDefaults)
