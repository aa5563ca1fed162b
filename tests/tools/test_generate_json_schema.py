"""The JSON Schema accepts what the recipes accept, and marks typing errors."""

import json
from pathlib import Path
from typing import Any

import pytest
import tomli
from jsonschema import Draft7Validator

from recipes.config.imports import import_class
from tests.recipes import config_parts as parts
from tools.component_catalog import RECIPES
from tools.generate_json_schema import Schema, main, recipe_schema

FILES = sorted((Path(__file__).parents[2] / "train_configs").glob("**/*.toml"))


@pytest.fixture(scope="module")
def schema() -> Schema:
    """The schema of the small recipe in config_parts, whose components are those of tests.recipes."""
    return recipe_schema([parts.Recipe], ["tests.recipes"])


@pytest.fixture(scope="module")
def pretrain_schema() -> Schema:
    return recipe_schema([import_class(name) for name in RECIPES])


def is_valid(schema: Schema, toml: str) -> bool:
    Draft7Validator.check_schema(schema)
    return Draft7Validator(schema).is_valid(tomli.loads(toml))


RECIPE_LINE = f'recipe = "{parts.HERE}:Recipe"\n'
RAMP = f'use = "{parts.HERE}:Ramp"'


@pytest.mark.quick
@pytest.mark.parametrize(
    "toml",
    [
        "",
        'extends = ["base.toml"]\nimport_paths = ["code"]',
        RECIPE_LINE + 'training = {total_tokens = "20M", precision = "float32", max_grad_norm = "none"}',
        f"batch = {{{RAMP}, eta = 3, stages = [[0, 8]]}}",
        "batch.eta = 3  # of a component that another file names",
        'batch = {use = "my.own:Policy", anything = 1}',
        'sources = [{path = "x", weight = 1}]\nvalidation = "none"',
        f"policies.a = {{{RAMP}}}\nmultipliers = {{a = 1.5}}",
        'recipe = "my.own:Recipe"\nanything = {a = 1}',
    ],
)
def test_good_files_are_valid(schema: Schema, toml: str) -> None:
    assert is_valid(schema, toml)


@pytest.mark.quick
@pytest.mark.parametrize(
    "toml",
    [
        "traning = {}",
        "training.total_token = 3",
        "training.total_tokens = 3.5",
        'training.precision = "bf17"',
        f"batch = {{{RAMP}, etta = 3}}",
        f'batch = {{use = "{parts.HERE}:Constant", eta = 3}}',
        "batch.etta = 3",
        f'batch.use = "{parts.HERE}"',
        'sources = [{path = "x", wait = 1}]',
        'sources = {path = "x"}',
    ],
)
def test_typing_errors_are_invalid(schema: Schema, toml: str) -> None:
    assert not is_valid(schema, toml)


def test_a_section_is_not_offered_for_a_slot_whose_methods_it_happens_to_have(pretrain_schema: Schema) -> None:
    tables = pretrain_schema["definitions"]["recipes.interfaces.TokenizerConfig"]["oneOf"]
    offered = {use for table in tables for use in table.get("properties", {}).get("use", {}).get("enum", ())}
    assert "components.tokenizers:Bytes" in offered
    assert {use.partition(":")[0].split(".")[1] for use in offered} == {"tokenizers"}


@pytest.mark.quick
def test_a_slot_offers_the_classes_that_fit_it(schema: Schema) -> None:
    alternatives = schema["definitions"][f"{parts.HERE}.BatchPolicy"]["oneOf"]
    offered = {use for table in alternatives for use in table.get("properties", {}).get("use", {}).get("enum", ())}
    assert {f"{parts.HERE}:{name}" for name in ("Constant", "Ramp", "Plain")} <= offered
    assert not {f"{parts.HERE}:{name}" for name in ("WithoutObserve", "OtherObserve", "BatchPolicy", "Flat")} & offered


@pytest.mark.quick
def test_keys_carry_their_documentation_and_default(schema: Schema) -> None:
    ramp: dict[str, Any] = next(
        table
        for table in schema["definitions"][f"{parts.HERE}.BatchPolicy"]["oneOf"]
        if table["title"].endswith(":Ramp")
    )
    assert ramp["properties"]["use"]["description"] == "A batch that grows."
    assert ramp["properties"]["initial"]["description"] == "Samples of every step."
    assert ramp["properties"]["initial"]["default"] == 8


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_shipped_recipe_is_valid(pretrain_schema: Schema, path: Path) -> None:
    document = tomli.loads(path.read_text(encoding="utf-8"))
    assert [error.message for error in Draft7Validator(pretrain_schema).iter_errors(document)] == []
    assert not Draft7Validator(pretrain_schema).is_valid({**document, "training": {"total_token": 3}})


def test_the_command_writes_the_schema(tmp_path: Path, pretrain_schema: Schema) -> None:
    assert main(["--output", str(tmp_path / "schema.json")]) == 0
    assert json.loads((tmp_path / "schema.json").read_text(encoding="utf-8")) == pretrain_schema
