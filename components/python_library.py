"""The source files of the Python standard library, in three fixed splits.

This module imports only components/paths.py, so that every component may import it.
"""

from __future__ import annotations

import hashlib
import io
import os
import sysconfig
import tokenize
from pathlib import Path
from typing import Literal

from components.paths import raise_error

Split = Literal["train", "validation", "test"]

_SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib-dynload", "ensurepip"}
_SKIPPED |= {"idlelib", "lib2to3", "turtledemo", "tkinter", "distutils", "msilib", "encodings"}
_SKIPPED_PREFIXES = ("config-", "_sysconfigdata")  # made per machine
_LEAST_BYTES = 2_000_000


def library_files(split: Split) -> dict[str, Path]:
    """Return relative path -> file of a split, sorted. Raises ValueError if the files are missing."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files: dict[str, Path] = {}
    for directory, folders, names in os.walk(root, onerror=raise_error):
        folders[:] = filter(_is_included, folders)  # in place: os.walk does not enter removed ones
        found_here = (Path(directory, name) for name in names if name.endswith(".py") and _is_included(name))
        files.update((path.relative_to(root).as_posix(), path) for path in found_here)
    found = sum(path.stat().st_size for path in files.values())
    if found < _LEAST_BYTES:
        raise ValueError(
            f"only {found:,} bytes of Python source in {root}, expected {_LEAST_BYTES:,}: the library of "
            'this interpreter is zipped or stripped. Use other text: use = "components.data:TextFiles", path = ...'
        )
    return {name: path for name, path in sorted(files.items()) if split_of(name) == split}


def split_of(name: str) -> Split:
    """Return the split of the file with the path `name`, relative to the library and with forward slashes."""
    bucket = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % 100
    return "validation" if bucket < 5 else "test" if bucket < 10 else "train"


def source_encoding(data: bytes) -> str:
    """Return the encoding that Python would use: of the byte-order mark or the coding comment, else UTF-8."""
    try:
        return tokenize.detect_encoding(io.BytesIO(data).readline)[0]
    except SyntaxError:
        return "utf-8"


def _is_included(name: str) -> bool:
    return name not in _SKIPPED and not name.startswith(_SKIPPED_PREFIXES)
