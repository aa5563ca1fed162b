"""Whether a component fits the slot it was put into: it has the methods, and they can be called as the recipe will."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

from recipes.config.imports import import_path

_CALLED = ("__call__", "__len__", "__getitem__", "__iter__")
"""Special methods that a protocol may ask for; the others every class has."""


def misfit(cls: type, slot: type) -> str | None:
    """What keeps instances of `cls` from being a `slot`, or None. Data attributes are for `lacks` to find."""
    if not getattr(slot, "_is_protocol", False) and inspect.isabstract(slot) and not issubclass(cls, slot):
        return f"it does not derive from {import_path(slot)}"
    if inspect.isabstract(cls):
        return "it lacks " + ", ".join(f"{name}()" for name in sorted(cls.__abstractmethods__))  # type: ignore[attr-defined]
    if getattr(cls, "_is_protocol", False):
        return "it is itself a protocol"
    methods = dict(_methods(slot))
    absent = [f"{name}()" for name in methods if not callable(getattr(cls, name, None))]
    if absent:
        return "it lacks " + ", ".join(absent)
    calls = (_uncallable(cls, name, method) for name, method in methods.items())
    return next((complaint for complaint in calls if complaint), None)


def lacks(instance: Any, slot: type) -> str | None:
    """Which attribute of the protocol `instance` does not have, or None."""
    names = (name for base in _protocols(slot) for name in vars(base).get("__annotations__", {}))
    absent = [name for name in names if not hasattr(instance, name)]
    return "it lacks " + ", ".join(absent) if absent else None


def slot_name(slot: type) -> str:
    """`batch policy (recipes.contracts:BatchPolicy)`."""
    words = re.findall(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z0-9]+|[A-Z]+", slot.__name__)
    spoken = " ".join(word if word.isupper() and len(word) > 1 else word.lower() for word in words)
    return f"{spoken} ({import_path(slot)})"


def _methods(slot: type) -> Iterator[tuple[str, Any]]:
    """The public methods that `slot` declares."""
    for base in _protocols(slot):
        for name, member in vars(base).items():
            if inspect.isfunction(member) and (name in _CALLED or not name.startswith("_")):
                yield name, member


def _protocols(slot: type) -> list[type]:
    """`slot` and the bases that add to it, without what every protocol inherits."""
    return [base for base in slot.__mro__ if base.__module__ not in ("typing", "builtins", "abc")]


def _uncallable(cls: type, name: str, asked: Any) -> str | None:
    """What is wrong with calling the method of `cls` the way the slot's method is called."""
    own = getattr(cls, name)
    is_bound = not inspect.isfunction(own) or isinstance(inspect.getattr_static(cls, name), staticmethod)
    try:
        signature = inspect.signature(own)
    except (TypeError, ValueError):
        return None
    _, *parameters = inspect.signature(asked).parameters.values()  # without self
    required = [p for p in parameters if p.kind is p.POSITIONAL_ONLY or p.kind is p.POSITIONAL_OR_KEYWORD]
    named = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    try:
        signature.bind(*[None] * (len(required) + (not is_bound)), **dict.fromkeys(named))
    except TypeError as error:
        call = ", ".join([p.name for p in required] + [f"{keyword}=..." for keyword in named])
        return f"its {name}() cannot be called as {name}({call}): {error}"
    return None
