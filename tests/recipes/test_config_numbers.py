"""Every numeric key of every section and component, with NaN, infinite, negative and huge values."""

from __future__ import annotations

import math
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pydantic
import pytest

from recipes import cli
from recipes.config.errors import Origin
from recipes.config.imports import import_class
from recipes.config.schema import Field, FieldKind, decode_value, fields_of, kind_of
from recipes.config.tree import Array, Leaf, Node
from tools.component_catalog import PACKAGES, RECIPES, component_classes, fits_slot

MAY_BE_NEGATIVE = {("ParallelConfig.dp_replicate", -1), ("ParallelConfig.dp_shard", -1), ("Power.b", -1)}
"""-1: the rest of the processes; an exponent."""
HERE = Origin("a test", Path("/"))


def written(number: float | int, kind: FieldKind) -> Node:
    """A leaf of this value, or a list of two where the key takes a list."""
    value = Leaf(number, HERE)
    is_list = typing.get_origin(kind.annotation) in (list, tuple)
    return Array((value, value), HERE) if is_list else value


def is_numeric(annotation: object) -> bool:
    return annotation in (int, float) or any(map(is_numeric, typing.get_args(annotation)))


def numeric_keys() -> Iterator[tuple[type, Field]]:
    """Return the numeric keys that a recipe can have with any components."""
    recipes = [import_class(recipe) for recipe in RECIPES]
    shipped = [each.cls for each in component_classes(PACKAGES, recipes)]
    waiting, seen = [FieldKind("section", recipe) for recipe in recipes], set()
    while waiting:
        kind = waiting.pop()
        kind = kind.item or kind
        fitting = [cls for cls in shipped if kind.form == "slot" and fits_slot(cls, kind.annotation)]
        for cls in fitting or ([kind.annotation] if kind.form == "section" else []):
            if cls in seen:
                continue
            seen.add(cls)
            for key in fields_of(cls).values():
                if key.kind.form != "leaf":
                    waiting.append(key.kind)
                elif is_numeric(key.kind.annotation):
                    yield cls, key


def complaint(cls: type, key: Field, number: float) -> str:
    """Return the error for this value of a key of `cls`, whose other keys are valid; empty if it is accepted."""
    try:
        decoded = decode_value(key.kind, written(number, key.kind))
        required = {name: 1 for name, each in fields_of(cls).items() if each.required and name != key.name}
        cls(**required, **{key.name: decoded})
    except ValueError as error:
        return str(error)
    return ""


def test_values_out_of_range_are_refused() -> None:
    keys = {f"{cls.__name__}.{key.name}": (cls, key) for cls, key in numeric_keys()}
    assert len(keys) > 80
    assert keys.keys() >= {
        "TrainingConfig.max_grad_norm",
        "AdamW.betas",
        "Power.b",
        "Stage.from_fraction",
        "RopeScaling.factor",
    }
    assert keys.keys() >= {
        "GuardConfig.spike_std",
        "ValidationConfig.max_sequences",
        "NormTest.eta",
        "Branches.tolerance",
    }
    taken = {
        (name, number): said
        for name, (cls, key) in keys.items()
        for number in (math.nan, math.inf, -math.inf, 10**400, -1)
        if not re.match(r"(item \d: )?expected |\w+: ", said := complaint(cls, key, number))
    }
    assert set(taken) - {("RunConfig.seed", 10**400)} == MAY_BE_NEGATIVE, taken


@dataclass(kw_only=True)
class Unbounded:
    a: Annotated[float, pydantic.Field(allow_inf_nan=True)]
    b: float
    c: dict[str, float]


def test_a_key_may_say_that_it_takes_any_number() -> None:
    shapes = {name: key.kind for name, key in fields_of(Unbounded).items()}
    assert decode_value(shapes["a"], Leaf(math.inf, HERE)) == math.inf
    with pytest.raises(ValueError, match="expected a finite number"):
        decode_value(shapes["b"], Leaf(math.inf, HERE))
    with pytest.raises(ValueError, match="expected a finite number"):
        decode_value(kind_of(list[float]), Array((Leaf(1.0, HERE), Leaf(math.nan, HERE)), HERE))


@pytest.mark.parametrize("number", ["nan", "inf", "-inf", "1e400", "-1"])
def test_it_is_one_problem_at_its_key(number: str, capsys) -> None:
    keys = ("training.max_grad_norm", "lr_schedule.max_lr", "optimizer.eps", "guard.spike_std", "model.init_std")
    keys += ("training.total_tokens", "run.max_minutes", "checkpoint.keep_last", "model.rope_theta")
    assert cli.main(["--print-config", *(f"--{key}={number}" for key in keys)]) == 2
    said = capsys.readouterr().err
    assert set(re.findall(r"^command line  ([\w.]+) = ", said, re.MULTILINE)) >= set(keys) - {"model.init_std"}
    assert "Traceback" not in said
