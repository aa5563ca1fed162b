"""Import the class that `use = "package.module:Name"` names, and check that it fits its slot."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import tomli

from recipes.config.errors import PROJECT, did_you_mean, error_with_location, join_limited

_SPECIAL_METHODS = ("__call__", "__len__", "__getitem__", "__iter__")
"""Special methods that a protocol may require; every class has the others."""
_OURS = ("recipes", "components", "models", "tools")


class UseError(Exception):
    """The `use` of a table does not name a suitable class; the message is for the user."""


def make_importable(folders: Iterable[Path]) -> None:
    """Add `folders` to the end of the module search path, where they cannot shadow the project or its libraries."""
    for folder in folders:
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    importlib.invalidate_caches()


def import_class(use: str, folders: Sequence[Path] = ()) -> type:
    """Return the class that `use` names. Custom modules are searched for in `folders`. Raises UseError."""
    module_name, colon, name = use.partition(":")
    if not colon or not module_name or not name:
        raise UseError(_not_a_path(use))
    if module_name.endswith(".py") or "/" in module_name:
        raise UseError(
            f"write the module's name, not its file: {Path(module_name).stem}:{name}"
            " (add its directory to import_paths, unless it is next to the recipe)"
        )
    found: object = _import_module(module_name, folders)
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise UseError(_no_attribute(module_name, found, part, folders)) from None
        except (Exception, SystemExit) as error:  # a module may define __getattr__
            raise UseError(f"{use} cannot be read: {error_with_location(error)}") from None
    if not isinstance(found, type):
        raise UseError(f"{use} is not a class but a {type(found).__name__}")
    return found


def import_path(cls: type) -> str:
    """Return the `use` that names `cls`."""
    return f"{cls.__module__}:{cls.__qualname__}"


def import_root(use: str, folders: Iterable[Path]) -> Path | None:
    """Return which of `folders` the module that `use` names came from; None for the project and installed packages."""
    module = sys.modules[use.partition(":")[0].partition(".")[0]]
    package = list(getattr(module, "__path__", ()))
    places = [Path(place).parent for place in package] or [Path(getattr(module, "__file__", None) or "/").parent]
    return next((folder for folder in folders if folder in places and folder != PROJECT), None)


def _import_module(name: str, folders: Sequence[Path]) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing == name or name.startswith(f"{missing}."):
            raise UseError(_no_module(missing, folders)) from None
        if missing and missing.partition(".")[0] not in _OURS:
            package = missing.partition(".")[0]
            raise UseError(f"{name} needs {package}, which is not installed: {_install(package)}") from None
        raise UseError(f"{name} fails on import: {error_with_location(error)}") from None
    except (Exception, SystemExit) as error:
        raise UseError(f"{name} fails on import: {error_with_location(error)}") from None


def _not_a_path(use: str) -> str:
    message = "expected an import path, package.module:Name"
    module, dot, name = use.rpartition(".")
    return f"{message}; did you mean {module}:{name}?" if dot and name[:1].isupper() else message


def _no_module(missing: str, folders: Sequence[Path]) -> str:
    """Return the message for `missing`: the first part of a dotted name that does not exist; its parent does."""
    parent, _, last = missing.rpartition(".")
    if parent and (hidden := _hidden(missing, folders)):
        return hidden
    if parent and not hasattr(sys.modules.get(parent), "__path__"):
        return f"no module named {missing}: {parent} is a module, not a package; a class in it is {parent}:{last}"
    places = list(sys.modules[parent].__path__) if parent else [str(place) for place in (PROJECT, *folders)]
    names = sorted({module.name for module in pkgutil.iter_modules(places)})
    prefix = f"{parent}." if parent else ""
    if match := did_you_mean(last, names, cutoff=0.6):
        return f"no module named {missing}; did you mean {prefix}{match}?"
    if parent:
        return f"no module named {missing}; {parent} has {join_limited(names)}"
    where = join_limited([str(folder) for folder in folders], limit=4)
    return (
        f"no module named {missing}, neither in the project nor in {where}" if where else f"no module named {missing}"
    )


def _no_attribute(module: str, found: object, name: str, folders: Sequence[Path]) -> str:
    if hidden := _hidden(module, folders):
        return hidden
    names = getattr(found, "__dict__", {})
    own = [key for key, value in names.items() if isinstance(value, type) and not key.startswith("_")]
    match = did_you_mean(name, own, cutoff=0.6) or next(iter(difflib.get_close_matches(name, names, n=1)), None)
    where = "" if module.partition(".")[0] in _OURS else f" ({getattr(found, '__file__', module)})"
    if match:
        return f"{module}{where} has no {name}; did you mean {match}?"
    local = [key for key in own if getattr(names[key], "__module__", None) == module]
    return f"{module}{where} has no {name}" + (f"; its classes are {join_limited(local)}" if local else "")


def _hidden(module: str, folders: Sequence[Path]) -> str | None:
    """Return a message if a custom file is named like `module` but shadowed by another module, else None."""
    taken = getattr(sys.modules.get(module) or sys.modules.get(module.partition(".")[0]), "__file__", None)
    files = [f"{module.replace('.', '/')}{ending}" for ending in (".py", "/__init__.py")]
    found = (folder / file for folder in folders if folder != PROJECT for file in files)
    own = next((path for path in found if path.is_file() and str(path) != taken), None)
    return f"{own} cannot be imported because {taken} has the same name; rename it, also in `use`" if own else None


def _install(package: str) -> str:
    """Return the command that installs a missing package: an extra of the project if it contains it."""
    from packaging.requirements import Requirement  # not at the top: only this message needs it

    pyproject = PROJECT / "pyproject.toml"
    if pyproject.is_file():
        extras = tomli.loads(pyproject.read_text(encoding="utf-8"))["project"].get("optional-dependencies", {})
        for extra, requirements in extras.items():
            if extra != "dev" and any(Requirement(line).name.lower() == package.lower() for line in requirements):
                return f"pip install -e '.[{extra}]'"
    return f"pip install {package}"


def protocol_error(cls: type, slot: type) -> str | None:
    """Return why instances of `cls` do not implement `slot`, or None; data attributes are not checked."""
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
    calls = (_call_error(cls, name, method) for name, method in methods.items())
    return next((complaint for complaint in calls if complaint), None)


def missing_attributes(instance: Any, slot: type) -> str | None:
    """Return which attributes of the protocol `instance` lacks, or None."""
    names = (name for base in _protocols(slot) for name in vars(base).get("__annotations__", {}))
    absent = [name for name in names if not hasattr(instance, name)]
    return "it lacks " + ", ".join(absent) if absent else None


def describe_slot(slot: type) -> str:
    """Return the name of a slot for a message: `batch config (recipes.interfaces:BatchConfig)`."""
    words = re.findall(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z0-9]+|[A-Z]+", slot.__name__)
    spoken = " ".join(word if word.isupper() and len(word) > 1 else word.lower() for word in words)
    return f"{spoken} ({import_path(slot)})"


def _methods(slot: type) -> Iterator[tuple[str, Any]]:
    """Yield the public methods that `slot` declares."""
    for base in _protocols(slot):
        for name, member in vars(base).items():
            if inspect.isfunction(member) and (name in _SPECIAL_METHODS or not name.startswith("_")):
                yield name, member


def _protocols(slot: type) -> list[type]:
    """Return `slot` and its bases, except those that every protocol inherits."""
    return [base for base in slot.__mro__ if base.__module__ not in ("typing", "builtins", "abc")]


def _call_error(cls: type, name: str, asked: Any) -> str | None:
    """Return why the method of `cls` cannot be called like that of the slot, or None."""
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
