"""Typed TOML: turn recipe files and `--section.key=value` into components, and back into TOML.

The signature is the schema: the typed keyword-only parameters of a component's constructor are the keys of its table,
those of a recipe's constructor are its sections. There is no registry and no second declaration.
"""

from recipes.config.errors import ConfigError, Origin, Problem, error_message
from recipes.config.load import Config, derive, load
from recipes.config.schema import describe
from recipes.config.tree import Leaf, Override, flatten

__all__ = [
    "Config",
    "ConfigError",
    "Leaf",
    "Origin",
    "Override",
    "Problem",
    "derive",
    "describe",
    "error_message",
    "flatten",
    "load",
]
