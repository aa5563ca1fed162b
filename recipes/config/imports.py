"""From `use = "package.module:Name"` to the class, or to a sentence that says why not."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import sys
import sysconfig
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType

import tomli

from recipes.config.problems import closest, listed

PROJECT = Path(__file__).parents[2]
"""The directory that holds recipes, components and models."""

_OURS = ("recipes", "components", "models", "tools")


class UseError(Exception):
    """Why a `use` names no class, in words for the user."""


def make_importable(folders: Iterable[Path]) -> None:
    """Adds `folders` to the end of the module search path, where they cannot hide the project or the library."""
    for folder in folders:
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    importlib.invalidate_caches()


def import_class(use: str, folders: Sequence[Path] = ()) -> type:
    """The class that `use` names. `folders` are where the user's own modules may lie. Raises UseError."""
    module_name, colon, name = use.partition(":")
    if not colon or not module_name or not name:
        raise UseError(_not_a_path(use))
    if module_name.endswith(".py") or "/" in module_name:
        raise UseError(
            f"write the module's name, not its file: {Path(module_name).stem}:{name}"
            " (its directory goes into import_paths, unless it lies beside the recipe)"
        )
    found: object = _import_module(module_name, folders)
    for part in name.split("."):
        if not hasattr(found, part):
            raise UseError(_no_attribute(module_name, found, part))
        found = getattr(found, part)
    if not isinstance(found, type):
        raise UseError(f"{use} is no class but a {type(found).__name__}")
    return found


def import_path(cls: type) -> str:
    """What `use` would name."""
    return f"{cls.__module__}:{cls.__qualname__}"


def home_of(use: str, folders: Iterable[Path]) -> Path | None:
    """Which of `folders` the module that `use` names came from; None for the project and for installed packages."""
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
        raise UseError(_raised(name, error)) from None
    except (Exception, SystemExit) as error:
        raise UseError(_raised(name, error)) from None


def _not_a_path(use: str) -> str:
    message = "expected an import path, package.module:Name"
    module, dot, name = use.rpartition(".")
    return f"{message}; did you mean {module}:{name}?" if dot and name[:1].isupper() else message


def _no_module(missing: str, folders: Sequence[Path]) -> str:
    """`missing` is the first part of a dotted name that is not there; its parent, if any, was imported."""
    parent, _, last = missing.rpartition(".")
    if parent and not hasattr(sys.modules.get(parent), "__path__"):
        return f"no module named {missing}: {parent} is a module, not a package; a class in it is {parent}:{last}"
    places = list(sys.modules[parent].__path__) if parent else [str(place) for place in (PROJECT, *folders)]
    names = sorted({module.name for module in pkgutil.iter_modules(places)})
    prefix = f"{parent}." if parent else ""
    if match := closest(last, names, cutoff=0.6):
        return f"no module named {missing}; did you mean {prefix}{match}?"
    if parent:
        return f"no module named {missing}; {parent} has {listed(names)}"
    where = listed([str(folder) for folder in folders], limit=4)
    return (
        f"no module named {missing}, neither in the project nor in {where}" if where else f"no module named {missing}"
    )


def _no_attribute(module: str, found: object, name: str) -> str:
    own = [key for key, value in vars(found).items() if isinstance(value, type) and not key.startswith("_")]
    match = closest(name, own, cutoff=0.6) or next(iter(difflib.get_close_matches(name, vars(found), n=1)), None)
    where = "" if module.partition(".")[0] in _OURS else f" ({getattr(found, '__file__', module)})"
    if match:
        return f"{module}{where} has no {name}; did you mean {match}?"
    local = [key for key in own if getattr(vars(found)[key], "__module__", None) == module]
    return f"{module}{where} has no {name}" + (f"; its classes are {listed(local)}" if local else "")


def _raised(module: str, error: BaseException) -> str:
    """`module` is there, but fails on import: the exception, and the innermost line that is not a library's."""
    file, line = getattr(error, "filename", None), getattr(error, "lineno", None)  # a SyntaxError names its own place
    if not isinstance(error, SyntaxError):
        libraries = tuple(sysconfig.get_paths()[key] for key in ("stdlib", "purelib", "platlib"))
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
        frames = [frame for frame in frames if frame.filename != __file__]
        own = [frame for frame in frames if not frame.filename.startswith(libraries)]
        innermost = next(iter([*reversed(own), *reversed(frames)]), None)
        file, line = (innermost.filename, innermost.lineno) if innermost else (None, None)
    what = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{module} fails on import: {type(error).__name__}: {what}" + (f"\n{file}:{line}" if file else "")


def _install(package: str) -> str:
    """The command that installs a missing third-party package: one of the project's extras, where it is in one."""
    pyproject = PROJECT / "pyproject.toml"
    if pyproject.is_file():
        extras = tomli.loads(pyproject.read_text(encoding="utf-8"))["project"].get("optional-dependencies", {})
        for extra, requirements in extras.items():
            if extra != "dev" and any(_distribution(line) == package.lower() for line in requirements):
                return f"pip install -e '.[{extra}]'"
    return f"pip install {package}"


def _distribution(requirement: str) -> str:
    """`transformers` of `transformers>=5.0`."""
    return requirement[: next((at for at, char in enumerate(requirement) if char in "<>=!~[; "), None)].lower()
