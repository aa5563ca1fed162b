"""Load the configuration in a checkpoint, which may be untrusted: it may name only code of this project."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from components.json_files import read_limited
from recipes.config import Config, Override, flatten, load
from recipes.config.imports import UseError, import_class

TRUSTED_PREFIXES = ("components.", "models.", "recipes.")
_LARGEST_BYTES = 2**22


def load_stored_config(
    checkpoint: Path,
    overrides: Sequence[Override] = (),
    *,
    trust_code: bool = False,
    trusted_config: Config | None = None,
    remedy: str = "use --trust-code",
) -> Config:
    """Return the configuration in `checkpoint`, under `overrides`.

    Unless `trust_code` is set, it may name only code of this project and of `trusted_config`, the recipe of the user,
    and no modules are searched for next to it. Raises ValueError if it names other code, with `remedy` for a user who
    trusts it, and ConfigError if it is not a valid configuration.
    """
    path = checkpoint / "config.toml"
    if not trust_code:
        leaves = trusted_config.leaves if trusted_config is not None else {}
        known = [leaf.value for key, leaf in leaves.items() if _names_code(key)]
        places = leaves["import_paths"].value if "import_paths" in leaves else []
        _require_trusted(path, {override.path for override in overrides}, known, places, remedy)
    return load(path, overrides, own_code=trust_code)


def read_stored_config(path: Path) -> dict[str, Any]:
    """Return the values in the config.toml of a checkpoint, by dotted key. Raises ValueError if it cannot be
    read."""
    try:
        return flatten(read_limited(path, _LARGEST_BYTES))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def _require_trusted(
    path: Path, overridden: set[str], known: Sequence[object], places: Sequence[object], remedy: str
) -> None:
    for key, value in read_stored_config(path).items():
        if _names_code(key) and key not in overridden and value not in known and not _is_project_class(value):
            raise ValueError(
                f"{path} names code that is not part of this project, {key} = {value!r}, which would be run; if you "
                f"trust its source, {remedy}"
            )
        elsewhere = key == "import_paths" and not (isinstance(value, list) and all(place in places for place in value))
        if elsewhere or key == "extends":
            raise ValueError(
                f"{path} names other directories or files to read, {key}; if you trust its source, {remedy}"
            )


def _names_code(key: str) -> bool:
    return key == "recipe" or key.rpartition(".")[2] == "use"


def _is_project_class(use: object) -> bool:
    """Return whether `use` names a class that is defined in this project, not one that a module of it imports."""
    try:
        return (
            isinstance(use, str)
            and use.startswith(TRUSTED_PREFIXES)
            and f"{import_class(use).__module__}.".startswith(TRUSTED_PREFIXES)
        )
    except UseError:
        return False
