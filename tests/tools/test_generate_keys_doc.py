"""The reference of all keys agrees with the classes."""

import re
from pathlib import Path

import pytest

from recipes.config.imports import import_class
from recipes.config.schema import fields_of
from tests.recipes import config_parts as parts
from tools.component_catalog import RECIPES
from tools.generate_keys_doc import main, page

pytestmark = pytest.mark.quick

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_up_to_date(tmp_path):
    assert main([f"--output={tmp_path / 'keys.md'}"]) == 0
    written = (DOCS / "keys.md").read_text(encoding="utf-8")
    assert (tmp_path / "keys.md").read_text(encoding="utf-8") == written, (
        "python -m tools.generate_keys_doc --output docs/keys.md"
    )
    sections = {name for recipe in RECIPES for name in fields_of(import_class(recipe))}
    assert set(re.findall(r"^### `\[(\w+)\]`$", written, re.MULTILINE)) == sections


def test_slots_sections_and_values_have_their_form():
    lines = page([parts.Recipe], ["tests.recipes"]).splitlines()
    titles = [line for line in lines if line.startswith("##")]
    assert titles.count("### `[training]`") == titles.count(f"#### `{parts.HERE}:Ramp`") == 1
    rows = dict(line.strip("| ").split(" | ", 1) for line in lines if line.startswith("| `"))
    assert rows["`total_tokens`"].startswith("a count | –")
    assert rows["`stages`"] == "a list, each item a list of 2: a count, a count | `[]`"
    assert rows["`multipliers`"] == "a table, name to: a number | none"
    assert rows["`note`"] == 'text, or "none" | `"none"`'
