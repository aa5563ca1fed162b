"""Defaults for the optional members of a protocol, so that a custom class may leave them out."""

from __future__ import annotations

from typing import Any, TypeVar

T = TypeVar("T")


def with_defaults(instance: Any, base: type[T]) -> T:
    """Return `instance` as a `base`; attributes that it lacks are taken from `base`.

    So a custom class need not derive from `base`, and callers need not check for attributes. The returned object has
    the class name of `instance`. Attributes are read once, by this call.
    """
    if isinstance(instance, base):
        return instance
    complete = type(type(instance).__name__, (base,), {})()
    required = (name for each in base.__mro__ for name in vars(each).get("__annotations__", ()))  # without a default
    for name in {*dir(base), *required}:
        if not name.startswith("_") and hasattr(instance, name):
            setattr(complete, name, getattr(instance, name))
    return complete
