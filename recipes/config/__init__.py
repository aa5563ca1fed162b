"""Typed TOML: from recipe files and `--section.key=value` to constructed components, and back.

The signature is the schema: the typed keyword-only parameters of a component's constructor are the keys of its table,
those of a recipe's constructor are its sections. Nothing is registered and nothing is declared twice.
"""

from recipes.config.derive import derive
from recipes.config.load import Checks, Config, load
from recipes.config.problems import ConfigError, Origin, Problem, error_message
from recipes.config.resolved import Leaf
from recipes.config.signatures import describe
from recipes.config.toml import flatten
from recipes.config.tree import Override

__all__ = [
    "Checks",
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
