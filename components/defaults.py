"""Optional attributes of a component: the one place where what a class does not define gets its default."""

from __future__ import annotations

from typing import Any, TypeVar

T = TypeVar("T")


def with_defaults(instance: Any, base: type[T]) -> T:
    """Return `instance` as a `base`; an attribute that it does not have is that of `base`.

    So a class of the user's need not derive from `base`, and no caller asks with getattr whether an attribute is there.
    What is returned has the class name of `instance`. Attributes are read once, when this is called.
    """
    if isinstance(instance, base):
        return instance
    complete = type(type(instance).__name__, (base,), {})()
    for name in dir(base):
        if not name.startswith("_") and hasattr(instance, name):
            setattr(complete, name, getattr(instance, name))
    return complete
