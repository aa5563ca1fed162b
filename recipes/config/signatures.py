"""The signature is the schema: which keys a component takes, of what shape, with which defaults and documentation."""

from __future__ import annotations

import ast
import collections.abc
import dataclasses
import enum
import inspect
import sys
import textwrap
import types
import typing
from dataclasses import dataclass
from functools import cache
from pathlib import PurePath
from typing import Annotated, Any, Literal, Union

MISSING: Any = dataclasses.MISSING


class SignatureError(Exception):
    """Why a class cannot be a component, in words for whoever wrote it."""


@dataclass(frozen=True)
class Shape:
    """How the value of a key is written in TOML."""

    kind: Literal["leaf", "section", "slot", "list", "dict"]
    """A value; a table with known keys; a table whose `use` names a component; an array or a table of such tables."""
    annotation: Any
    """The type, without its `| None`."""
    optional: bool = False
    """Whether `| None` was there: the text "none" then stands for None."""
    of: Shape | None = None
    """What a list or dict holds."""


@dataclass(frozen=True)
class Key:
    """One keyword of a constructor, which is one key of its table."""

    name: str
    shape: Shape
    make_default: Any = None
    """Called for the default, where there is one."""

    @property
    def required(self) -> bool:
        return self.make_default is None


@cache
def keys_of(cls: type) -> dict[str, Key]:
    """The keys of a component, in the order of its constructor. Raises SignatureError."""
    factories = {
        field.name: field.default_factory
        for field in (dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ())
        if field.default_factory is not MISSING
    }
    try:
        parameters = inspect.signature(cls).parameters.values()
    except Exception:  # a class of the user's may compute its signature
        raise SignatureError("its constructor has no signature to read") from None
    keys = {}
    for parameter in parameters:
        name, default = parameter.name, parameter.default
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.kind is parameter.POSITIONAL_ONLY or name == "use":
            raise SignatureError(f"its parameter {name} cannot be a key: make it keyword-only, and not named `use`")
        shape = shape_of(_annotation(cls, parameter))
        if name in factories:
            keys[name] = Key(name, shape, factories[name])
        elif default is parameter.empty:
            keys[name] = Key(name, shape)
        else:
            keys[name] = Key(name, shape, lambda default=default: default)
    return keys


def shape_of(annotation: Any) -> Shape:
    """How a value of this type is written in TOML."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        rest = tuple(argument for argument in arguments if argument is not types.NoneType)
        if len(rest) > 1 and any(shape_of(argument).kind in ("section", "slot") for argument in rest):
            raise SignatureError("a table of one type or another: make it a slot, for a protocol")
        inner = Shape("leaf", Union[rest]) if len(rest) > 1 else shape_of(rest[0])  # noqa: UP007
        return dataclasses.replace(inner, optional=inner.optional or len(rest) < len(arguments))
    if origin is Annotated and (inner := shape_of(arguments[0])).kind != "leaf":
        return inner
    if origin in (list, tuple, collections.abc.Sequence) and arguments and arguments[1:] in ((), (...,)):
        item = shape_of(arguments[0])
        return Shape("leaf" if item.kind == "leaf" else "list", annotation, of=item)
    if origin in (dict, collections.abc.Mapping) and arguments[0] is str:
        return Shape("dict", annotation, of=shape_of(arguments[1]))
    cls = origin or annotation
    if isinstance(cls, type):
        if getattr(cls, "_is_protocol", False) or inspect.isabstract(cls):
            return Shape("slot", cls)
        if dataclasses.is_dataclass(cls) or _is_plain_component(cls):
            return Shape("section", cls)
    return Shape("leaf", annotation)


def _is_plain_component(cls: type) -> bool:
    """A class with a constructor of its own in Python, and none of the classes that stand for values."""
    return inspect.isfunction(cls.__init__) and not issubclass(cls, (enum.Enum, PurePath))  # type: ignore[misc]


def _annotation(cls: type, parameter: inspect.Parameter) -> Any:
    """The parameter's type, strings evaluated where they were written."""
    annotation = parameter.annotation
    if annotation is parameter.empty:
        raise SignatureError(f"its parameter {parameter.name} has no type")
    # A dataclass's __init__ is made in the class where it was decorated, but a field belongs to the base that names it.
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
    """Key -> its documentation: the string that follows a field in the source of the class or of one of its bases."""
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
