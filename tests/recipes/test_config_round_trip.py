"""load(dump(c)) == c, for any configuration."""

import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.config import flatten, load
from recipes.config.toml import quote_key, write_value
from tests.recipes import config_parts as parts

pytestmark = pytest.mark.quick

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
paths = texts.filter(lambda text: text and "\0" not in text and not text.startswith("~"))
FINITE = st.floats(allow_nan=False, allow_infinity=False)
counts = st.one_of(st.integers(min_value=1, max_value=2**62 - 1), st.sampled_from(["20M", "1.5B", "4_096"]))
sources = st.fixed_dictionaries({"path": paths}, optional={"weight": st.floats(min_value=0, allow_infinity=False)})
optional_number = st.one_of(FINITE, st.integers(-(2**60), 2**60), st.just("none"))

constant = st.fixed_dictionaries({"use": st.just(f"{parts.HERE}:Constant")}, optional={"initial": counts})
ramp = st.fixed_dictionaries(
    {"use": st.just(f"{parts.HERE}:Ramp")},
    optional={
        "stages": st.lists(st.tuples(counts, counts).map(list), max_size=3),
        "eta": st.floats(min_value=1e-9, max_value=100),
        "table": st.one_of(paths, st.just("none")),
    },
)
training = st.fixed_dictionaries(
    {"total_tokens": counts},
    optional={
        "seed": st.integers(),
        "max_grad_norm": optional_number,
        "precision": st.sampled_from(["bf16", "float32"]),
    },
)
documents = st.fixed_dictionaries(
    {"training": training, "batch": constant | ramp},
    optional={
        "run": st.fixed_dictionaries({}, optional={"name": texts, "dir": paths, "note": texts}),
        "schedule": st.fixed_dictionaries(
            {}, optional={"max_lr": st.floats(min_value=0, exclude_min=True, allow_infinity=False)}
        ),
        "sources": st.lists(sources, max_size=3),
        "policies": st.dictionaries(texts, constant | ramp, max_size=2),
        "multipliers": st.dictionaries(texts, st.one_of(FINITE, st.integers(-(2**60), 2**60)), max_size=3),
        "validation": st.one_of(sources, st.just("none")),
    },
)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(documents)
def test_a_dump_loads_as_the_same_configuration(document: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder, "first.toml"), Path(folder, "second.toml")
        text = "\n".join(f"{quote_key(key)} = {write_value(value)}" for key, value in document.items())
        first.write_text(text, encoding="utf-8", newline="")
        config = load(first, default_recipe=f"{parts.HERE}:Recipe")
        for provenance in (True, False):
            second.write_text(config.to_toml(provenance), encoding="utf-8", newline="")
            again = load(second, cwd=Path("/"))
            assert again.to_toml(provenance=False) == config.to_toml(provenance=False)
            assert repr(again.recipe) == repr(config.recipe)  # not ==, since nan is not equal to itself
        assert _values(again) == _values(config)
        assert flatten(config.to_toml()).keys() == {path for path, leaf in config.leaves.items() if not leaf.unset}


def _values(config: Any) -> dict[str, str]:
    return {path: repr(leaf.value) for path, leaf in config.leaves.items()}


@given(st.recursive(st.one_of(st.integers(), st.booleans(), texts, st.floats()), st.lists, max_leaves=5))
def test_written_values_read_back(value: Any) -> None:
    read = flatten(f"value = {write_value(value)}")["value"]
    assert repr(read) == repr(value)


def test_floats_keep_their_type() -> None:
    assert [write_value(number) for number in (1.0, 1e16, 1e-7, math.inf, -math.inf)] == [
        "1.0",
        "1e+16",
        "1e-07",
        "inf",
        "-inf",
    ]
