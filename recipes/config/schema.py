"""The signature is the schema: the keys a class takes with their types, defaults and documentation, and their values.

The typed keyword-only parameters of a constructor are the keys of its table.
"""

from __future__ import annotations

import ast
import collections.abc
import dataclasses
import datetime
import enum
import inspect
import json
import sys
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, Union

from pydantic import ConfigDict, TypeAdapter, ValidationError, WithJsonSchema
from pydantic.errors import PydanticUserError
from pydantic_core import ErrorDetails

from recipes.config.errors import absolute, is_utf8
from recipes.config.toml import write_value
from recipes.config.tree import Node, to_python

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
"""Error type of pydantic -> (sign, key of the limit in its context)."""


class SignatureError(Exception):
    """A class cannot be a component; the message is for its author."""


@dataclass(frozen=True)
class FieldKind:
    """How the value of a key is written in TOML."""

    form: Literal["leaf", "section", "slot", "list", "dict"]
    """A value; a table with known keys; a table whose `use` names a component; an array or a table of such tables."""
    annotation: Any
    """The type, without its `| None`."""
    optional: bool = False
    """Whether the type includes `| None`; the text "none" then stands for None."""
    item: FieldKind | None = None
    """The kind of the items of a list or dict."""


@dataclass(frozen=True)
class Field:
    """One keyword of a constructor, which is one key of its table."""

    name: str
    kind: FieldKind
    make_default: Any = None
    """Returns the default; None for a required key."""

    @property
    def required(self) -> bool:
        return self.make_default is None


@cache
def fields_of(cls: type) -> dict[str, Field]:
    """Return the keys of a component, in the order of its constructor. Raises SignatureError."""
    factories = {
        field.name: field.default_factory
        for field in (dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ())
        if field.default_factory is not dataclasses.MISSING
    }
    try:
        parameters = inspect.signature(cls).parameters.values()
    except Exception:  # a custom class may compute its signature
        raise SignatureError("its constructor has no signature to read") from None
    fields = {}
    for parameter in parameters:
        name, default = parameter.name, parameter.default
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.kind is parameter.POSITIONAL_ONLY or name == "use":
            raise SignatureError(f"its parameter {name} cannot be a key: make it keyword-only, and not named `use`")
        make_default = None if default is parameter.empty else lambda default=default: default
        fields[name] = Field(name, kind_of(_annotation(cls, parameter)), factories.get(name, make_default))
    return fields


def kind_of(annotation: Any) -> FieldKind:
    """Return how a value of this type is written in TOML. Raises SignatureError."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        rest = tuple(argument for argument in arguments if argument is not types.NoneType)
        if len(rest) > 1 and any(kind_of(argument).form in ("section", "slot") for argument in rest):
            raise SignatureError("a union of tables; use a protocol instead, which makes it a slot with `use`")
        inner = FieldKind("leaf", Union[rest]) if len(rest) > 1 else kind_of(rest[0])  # noqa: UP007
        return dataclasses.replace(inner, optional=inner.optional or len(rest) < len(arguments))
    if origin is Annotated and (inner := kind_of(arguments[0])).form != "leaf":
        return inner
    if origin in (list, tuple, collections.abc.Sequence) and arguments and arguments[1:] in ((), (...,)):
        item = kind_of(arguments[0])
        return FieldKind("leaf" if item.form == "leaf" else "list", annotation, item=item)
    if origin in (dict, collections.abc.Mapping) and arguments[0] is str:
        return FieldKind("dict", annotation, item=kind_of(arguments[1]))
    cls = origin or annotation
    if isinstance(cls, type):
        if getattr(cls, "_is_protocol", False) or inspect.isabstract(cls):
            return FieldKind("slot", cls)
        if dataclasses.is_dataclass(cls) or _is_plain_component(cls):
            return FieldKind("section", cls)
    return FieldKind("leaf", annotation)


def _is_plain_component(cls: type) -> bool:
    """Return whether `cls` has a constructor written in Python and is neither an enum nor a path."""
    return inspect.isfunction(cls.__init__) and not issubclass(cls, (enum.Enum, PurePath))  # type: ignore[misc]


def _annotation(cls: type, parameter: inspect.Parameter) -> Any:
    """Return the type of a parameter; a string is evaluated in the module that contains it."""
    annotation = parameter.annotation
    if annotation is parameter.empty:
        raise SignatureError(f"its parameter {parameter.name} has no type")
    # The __init__ of a dataclass belongs to the decorated class, but a field to the base that declares it.
    owner = next((base for base in cls.__mro__ if parameter.name in vars(base).get("__annotations__", {})), None)
    if owner is None or not dataclasses.is_dataclass(owner):
        owner = next(base for base in cls.__mro__ if "__init__" in vars(base) or "__new__" in vars(base))
    holder = types.SimpleNamespace(__annotations__={parameter.name: annotation})
    scope = {**vars(sys.modules[owner.__module__]), **getattr(owner.__init__, "__globals__", {})}  # type: ignore[misc]
    try:
        hint = typing.get_type_hints(holder, scope, dict(vars(owner)), include_extras=True)[parameter.name]
    except Exception as error:
        raise SignatureError(f"the type of its parameter {parameter.name} cannot be read: {error}") from None
    return hint.type if isinstance(hint, dataclasses.InitVar) else hint


@cache
def describe(cls: type) -> dict[str, str]:
    """Return key -> documentation: the string that follows a field in the source of the class or of a base."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        except (OSError, TypeError, SyntaxError):  # made at run time, or not in Python
            continue
        assert isinstance(body, ast.ClassDef)
        for field, after in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(after, ast.Expr):
                text = after.value.value if isinstance(after.value, ast.Constant) else None
                if isinstance(text, str):
                    docs[field.target.id] = inspect.cleandoc(text)
    return docs


def describe_type(annotation: Any) -> str:
    """Return a description of the values of a type, for messages."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        extras = (getattr(extra, "json_schema", None) for extra in arguments[1:] if isinstance(extra, WithJsonSchema))
        return next(
            (extra["description"] for extra in extras if extra and "description" in extra), describe_type(arguments[0])
        )
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(map(write_value, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(describe_type(argument) for argument in arguments)
    if origin is tuple and arguments[-1] is not ...:
        return f"a list of {len(arguments)}: " + ", ".join(map(describe_type, arguments))
    if origin in (list, tuple, set, frozenset, collections.abc.Sequence):
        return f"a list, each item {describe_type(arguments[0])}"
    if origin in (dict, collections.abc.Mapping):
        return f"a table, each value {describe_type(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return describe_type(Literal[tuple(member.value for member in annotation)])
    if isinstance(annotation, type) and issubclass(annotation, PurePath):
        return "a path, as text"
    return _WORDS.get(annotation) or str(getattr(annotation, "__name__", annotation))


def describe_kind(kind: FieldKind) -> str:
    """Return `describe_type` of a key, followed by "none" if it is optional."""
    return describe_type(kind.annotation) + (', or "none"' if kind.optional else "")


def type_adapter(annotation: Any) -> TypeAdapter[Any]:
    """Return the pydantic adapter of a type. Raises SignatureError for a type that TOML cannot express."""
    try:
        return _strict_adapter(annotation)
    except TypeError:  # the annotation is not hashable
        return TypeAdapter(annotation)
    except PydanticUserError:
        raise SignatureError(f"TOML cannot express a {getattr(annotation, '__name__', annotation)}") from None


@cache
def _strict_adapter(annotation: Any) -> TypeAdapter[Any]:
    """Return an adapter that accepts only finite numbers, unless the key has `Field(allow_inf_nan=True)`.

    NaN passes limits such as `gt`, and 1e400 in TOML is infinite.
    """
    try:
        return TypeAdapter(annotation, config=ConfigDict(allow_inf_nan=False))
    except PydanticUserError as error:
        # raised for a type with its own pydantic configuration, such as a TypedDict
        if error.code != "type-adapter-config-unused":
            raise
        return TypeAdapter(annotation)


def decode_value(kind: FieldKind, node: Node) -> Any:
    """Return the typed value of a leaf. Raises ValueError with what was expected.

    Types are strict: "3" is not a number, 3.0 is not a whole number and 1 is not a boolean; but 3 is accepted as a
    float, and a list as a tuple. Text from the command line is parsed as TOML if the result fits the type, and used as
    typed otherwise.
    """
    value = to_python(node)
    try:
        return _decode(kind, value, node.origin.base_dir)
    except ValueError:
        if node.text is None or node.text == value:
            raise
        try:
            return _decode(kind, node.text, node.origin.base_dir)
        except ValueError:
            pass
        raise


def _decode(kind: FieldKind, value: Any, base_dir: Path) -> Any:
    if value is None or (kind.optional and value == "none"):
        return None
    if isinstance(value, (datetime.date, datetime.time)):
        raise ValueError(f"expected {describe_kind(kind)}; write a date or time in quotes")
    if not is_utf8(json.dumps(value, default=str, ensure_ascii=False)):
        raise ValueError(f"expected {describe_kind(kind)}, in UTF-8; rename the file or directory")
    adapter = type_adapter(kind.annotation)
    try:
        # Through JSON, which lacks tuples and paths like TOML, so that strict mode accepts what TOML can express.
        decoded = adapter.validate_json(json.dumps(value), strict=True)
    except TypeError:  # a date deep inside
        raise ValueError(f"expected {describe_kind(kind)}") from None
    except ValidationError as error:
        raise ValueError("; ".join(_explain(kind, error))) from None
    if value == "" and isinstance(decoded, PurePath):
        raise ValueError('expected a path, as text; the current directory is written "."')
    return _absolute_paths(decoded, base_dir)


def _absolute_paths(value: Any, base_dir: Path) -> Any:
    """Return `value` with every path in it absolute."""
    if isinstance(value, Path):
        return absolute(value, base_dir)
    if type(value) in (list, tuple):
        return type(value)(_absolute_paths(item, base_dir) for item in value)
    if type(value) is dict:
        return {key: _absolute_paths(item, base_dir) for key, item in value.items()}
    return value


def _explain(kind: FieldKind, error: ValidationError) -> Iterator[str]:
    """Yield the first three errors of pydantic about one leaf, reworded."""
    details: list[ErrorDetails] = error.errors(include_url=False)
    annotation = kind.annotation
    # for a union pydantic reports one error for each type
    if typing.get_origin(annotation) in (Union, types.UnionType):
        yield f"expected {describe_kind(kind)}"
        return
    bare = typing.get_args(annotation)[0] if typing.get_origin(annotation) is Annotated else annotation
    for detail in details[:3]:
        item = "".join(f"item {part + 1}: " for part in detail["loc"] if isinstance(part, int))
        context = detail.get("ctx", {})
        if detail["type"] in _LIMITS:
            sign, key = _LIMITS[detail["type"]]
            number = describe_type(type(detail["input"]) if item else bare)
            yield f"{item}expected {number} {sign} {str(context[key]).removesuffix('.0')}"
        elif detail["type"] == "finite_number":
            yield f"{item}expected a finite number"
        elif detail["type"] == "expected":
            yield f"{item}expected {detail['msg']}"
        elif detail["type"] == "value_error":
            yield f"{item}{context['error']}"
        elif detail["type"].endswith(("_type", "_parsing", "_from_float", "literal_error", "enum", "missing")):
            yield f"expected {describe_kind(kind)}"
            return
        else:
            yield item + detail["msg"][:1].lower() + detail["msg"][1:]
