"""One leaf: from TOML to its type and back, with what was expected in plain words."""

from __future__ import annotations

import collections.abc
import datetime
import enum
import json
import types
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, Union

from pydantic import ConfigDict, TypeAdapter, ValidationError, WithJsonSchema
from pydantic.errors import PydanticUserError
from pydantic_core import ErrorDetails

from recipes.config.problems import absolute, is_utf8
from recipes.config.signatures import Shape, SignatureError
from recipes.config.toml import write_value
from recipes.config.tree import Node, plain

_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    Any: "anything",
    types.NoneType: '"none"',
}
_LIMITS = {
    "greater_than": (">", "gt"),
    "greater_than_equal": (">=", "ge"),
    "less_than": ("<", "lt"),
    "less_than_equal": ("<=", "le"),
}
"""pydantic's names for limits, the sign, and where it keeps the number."""


def decode(shape: Shape, node: Node) -> Any:
    """The typed value of a leaf. Raises ValueError that says what was expected.

    Strict: "3" is no number, 3.0 no whole number and 1 no boolean, but 3 is a number, and a list a tuple. Text from the
    command line is taken for TOML if that fits the type, else as it was typed.
    """
    candidates = [plain(node)]
    if node.text is not None and node.text != candidates[0]:
        candidates.append(node.text)
    first_error: ValueError | None = None
    for candidate in candidates:
        try:
            return _decode(shape, candidate, node.origin.folder)
        except ValueError as error:
            first_error = first_error or error
    assert first_error is not None
    raise first_error


def encode(value: Any) -> Any:
    """The TOML value of a decoded leaf. Raises TypeError where TOML has none."""
    if isinstance(value, enum.Enum):
        return encode(value.value)
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, (set, frozenset)):
        return sorted(encode(item) for item in value)
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    if isinstance(value, collections.abc.Mapping):
        return {key: encode(item) for key, item in value.items()}
    write_value(value)  # raises TypeError
    return value


def expected(annotation: Any) -> str:
    """What a value of this type looks like, to a person."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        extras = (getattr(extra, "json_schema", None) for extra in arguments[1:] if isinstance(extra, WithJsonSchema))
        return next(
            (extra["description"] for extra in extras if extra and "description" in extra), expected(arguments[0])
        )
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(map(write_value, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(expected(argument) for argument in arguments)
    if origin is tuple and arguments[-1] is not ...:
        return f"a list of {len(arguments)}: " + ", ".join(map(expected, arguments))
    if origin in (list, tuple, set, frozenset, collections.abc.Sequence):
        return f"a list, each item {expected(arguments[0])}"
    if origin in (dict, collections.abc.Mapping):
        return f"a table, each value {expected(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return expected(Literal[tuple(member.value for member in annotation)])
    if isinstance(annotation, type) and issubclass(annotation, PurePath):
        return "a path, as text"
    return _WORDS.get(annotation) or str(getattr(annotation, "__name__", annotation))


def expectation(shape: Shape) -> str:
    """`expected`, for a key."""
    return expected(shape.annotation) + (', or "none"' if shape.optional else "")


def _decode(shape: Shape, value: Any, folder: Path) -> Any:
    if value is None or (shape.optional and value == "none"):
        return None
    if isinstance(value, (datetime.date, datetime.time)):
        raise ValueError(f"expected {expectation(shape)}; a date or time has to be written in quotes")
    if not is_utf8(json.dumps(value, default=str, ensure_ascii=False)):
        raise ValueError(f"expected {expectation(shape)}, in UTF-8 as a recipe is; rename what it names")
    reader = adapter(shape.annotation)
    try:
        # Through JSON, which has no tuples or paths either: its strict reading is the one that TOML needs.
        decoded = reader.validate_json(json.dumps(value), strict=True)
    except TypeError:  # a date deep inside
        raise ValueError(f"expected {expectation(shape)}") from None
    except ValidationError as error:
        raise ValueError(_explain(shape, error)) from None
    if value == "" and isinstance(decoded, PurePath):
        raise ValueError('expected a path, as text; the directory you stand in is written "."')
    return _absolute_paths(decoded, folder)


def adapter(annotation: Any) -> TypeAdapter[Any]:
    """pydantic's reader of a type. Raises SignatureError for a type that TOML cannot write."""
    try:
        return _adapter(annotation)
    except TypeError:  # a type that cannot be hashed
        return TypeAdapter(annotation)
    except PydanticUserError:
        raise SignatureError(f"TOML cannot write a {getattr(annotation, '__name__', annotation)}") from None


@cache
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    """Numbers are finite, unless the key itself says `Field(allow_inf_nan=True)`: NaN passes many a limit, and TOML's
    1e400 is infinite."""
    try:
        return TypeAdapter(annotation, config=ConfigDict(allow_inf_nan=False))
    except PydanticUserError as error:
        if error.code != "type-adapter-config-unused":  # a type with a configuration of its own, such as a TypedDict
            raise
        return TypeAdapter(annotation)


def _absolute_paths(value: Any, folder: Path) -> Any:
    """`value` with every path in it absolute."""
    if isinstance(value, Path):
        return absolute(value, folder)
    if type(value) in (list, tuple):
        return type(value)(_absolute_paths(item, folder) for item in value)
    if type(value) is dict:
        return {key: _absolute_paths(item, folder) for key, item in value.items()}
    return value


def _explain(shape: Shape, error: ValidationError) -> str:
    """pydantic's errors about one leaf, in one line."""
    details = error.errors(include_url=False)
    if typing.get_origin(shape.annotation) in (Union, types.UnionType):  # one error for each type it might have been
        return f"expected {expectation(shape)}"
    return "; ".join(_lines(shape, details))


def _lines(shape: Shape, details: list[ErrorDetails]) -> Iterator[str]:
    for detail in details[:3]:
        item = "".join(f"item {part + 1}: " for part in detail["loc"] if isinstance(part, int))
        context = detail.get("ctx", {})
        if detail["type"] in _LIMITS:
            sign, key = _LIMITS[detail["type"]]
            number = expected(type(detail["input"])) if item else expected(_bare(shape.annotation))
            yield f"{item}expected {number} {sign} {str(context[key]).removesuffix('.0')}"
        elif detail["type"] == "finite_number":
            yield f"{item}expected a finite number"
        elif detail["type"] == "value_error":
            said = str(context["error"])
            yield f"{item}expected {said}" if said.startswith(("a ", "an ", "one of ", "text")) else item + said
        elif detail["type"].endswith(("_type", "_parsing", "_from_float", "literal_error", "enum", "missing")):
            yield f"expected {expectation(shape)}"
            return
        else:
            yield item + detail["msg"][:1].lower() + detail["msg"][1:]


def _bare(annotation: Any) -> Any:
    return typing.get_args(annotation)[0] if typing.get_origin(annotation) is Annotated else annotation
