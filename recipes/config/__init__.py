"""Typed TOML: turn recipe files and `--section.key=value` into components, and back into TOML.

load.py     reads files, merges the overrides, builds and checks, in this order
toml.py     the line of every key; writing TOML
tree.py     merged tables and values, each with its place
schema.py   the keys of a class, from its signature
imports.py  imports what `use` names
build.py    decodes values and constructs components
errors.py   problems with place and key; did_you_mean

The signature is the schema: the typed keyword-only parameters of a component's constructor are the keys of its table,
those of a recipe's constructor are its sections. There is no registry and no second declaration.
"""

from recipes.config.errors import ConfigError, Origin, Problem, problem_message
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
    "flatten",
    "load",
    "problem_message",
]
