"""A configuration derived from another: what changes, what stays, and the origin of each value."""

from __future__ import annotations

import pytest

from recipes.config import ConfigError, derive, flatten, load

pytestmark = pytest.mark.quick

PRETRAIN = "recipes.pretrain:Pretrain"
CONSTANT = "components.batch:Constant"


def test_the_changes_are_the_last_layer_and_the_rest_is_as_it_was(tiny, tmp_path):
    config = load(tiny.recipe)
    changes = {"batch": {"use": CONSTANT, "initial_size": 32}, "checkpoint": {"interval_steps": "none"}}
    derived = derive(config, PRETRAIN, changes, why="branch")
    before, after = flatten(config.to_toml()), flatten(derived.to_toml())
    changed = {key: after.get(key) for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert changed == {
        "batch.use": CONSTANT,
        "batch.initial_size": 32,
        "batch.stages.0.from_tokens": None,
        "batch.stages.0.samples": None,
        "batch.linear": None,
        "batch.multiple_of": None,
        "checkpoint.interval_steps": "none",
    }
    assert derived.leaves["batch.initial_size"].origin.source == "branch"
    assert derived.leaves["model.dim"].origin == config.leaves["model.dim"].origin
    assert derived.recipe.batch is not config.recipe.batch
    printed = tmp_path / "printed.toml"
    printed.write_text(derived.to_toml())
    assert flatten(load(printed).to_toml()) == after


def test_sections_the_other_recipe_does_not_take_are_left_out_and_the_users_modules_are_found(tiny, tmp_path):
    (tmp_path / "my_derived.py").write_text(
        "from dataclasses import dataclass\nfrom recipes.pretrain import Pretrain\n"
        "from components.batch import Constant\n\n\nclass Mine(Constant):\n    pass\n\n\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Section:\n    key: int = 1\n\n\n"
        "@dataclass(frozen=True, kw_only=True)\nclass More(Pretrain):\n    more: Section\n"
    )
    mine = tmp_path / "mine.toml"
    mine.write_text(
        'recipe = "my_derived:More"\nextends = ["tiny.toml"]\nmore.key = 3\n[batch]\nuse = "my_derived:Mine"\n'
        "initial_size = 4\n"
    )
    derived = derive(load(mine), PRETRAIN, {}, why="test")
    assert type(derived.recipe).__name__ == "Pretrain"
    assert type(derived.recipe.batch).__name__ == "Mine"
    assert not any(key.startswith("more") for key in derived.leaves)


def test_a_change_that_does_not_decode_is_reported(tiny):
    with pytest.raises(ConfigError, match=r"training\.total_tokens = -1"):
        derive(load(tiny.recipe), PRETRAIN, {"training": {"total_tokens": -1}}, why="branch")
