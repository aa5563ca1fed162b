"""The configuration in a checkpoint, which may be a stranger's: it names code, and may run none but this project's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from recipes.config import Config, Override, load
from recipes.config.imports import UseError, import_class
from recipes.config.toml import flatten

OURS = ("components.", "models.", "recipes.")
_LARGEST_BYTES = 2**22


def stored_config(checkpoint: Path, overrides: Sequence[Override] = (), *, trust_code: bool = False) -> Config:
    """The configuration in `checkpoint`, under `overrides`.

    Unless its code is trusted it may name none but this project's, and nothing is searched for beside it. Raises
    ValueError for one that does, ConfigError for one that is no configuration.
    """
    path = checkpoint / "config.toml"
    if not trust_code:
        _check(path, {override.path for override in overrides})
    return load(path, overrides, own_code=trust_code)


def _check(path: Path, overridden: set[str]) -> None:
    try:
        if (size := path.stat().st_size) > _LARGEST_BYTES:
            raise ValueError(f"{size:,} bytes is no size for it")
        leaves = flatten(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    for key, value in leaves.items():
        last = key.rpartition(".")[2]
        if key in overridden:
            continue
        if (last == "use" or key == "recipe") and not _is_ours(value):
            raise ValueError(
                f"{path} names code that is not of this project, {key} = {value!r}, and would run it; if you trust "
                "where it comes from, say --trust-code"
            )
        if key in ("import_paths", "extends"):
            raise ValueError(f"{path} names other places to read from, {key}; if you trust it, say --trust-code")


def _is_ours(use: object) -> bool:
    """Whether a class of this project is named, and not one that a module of it has only imported."""
    try:
        return isinstance(use, str) and use.startswith(OURS) and f"{import_class(use).__module__}.".startswith(OURS)
    except UseError:
        return False
