"""manifest.json: size and SHA-256 of every file of a checkpoint, to find damage before anything is loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from components.atomic_files import write_fsync
from components.checkpoint.load import DamagedError, read_state
from components.json_files import Digest, Size, StrictModel, first_problem, read_limited
from components.paths import hash_file

MANIFEST = "manifest.json"
WRITTEN = re.compile(r"__\d+_.*|\.metadata(\.tmp)?|\.manifest-\d+|state\.json|config\.toml|manifest\.json|files\.json")
"""Names of all files that a save writes. Other files in a checkpoint are never removed."""


class _File(StrictModel):
    bytes: Size
    sha256: Digest


class Manifest(StrictModel):
    """The content of manifest.json."""

    files: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,200}$")], _File]
    run: str = ""
    """Identifier of the run that wrote the checkpoint, as in its run.json."""


def write_part(directory: Path, rank: int) -> None:
    """Record the tensor files of `rank` in `directory`, `__RANK_*`, for `write_manifest`.

    Each process hashes the files it wrote itself: they are still in its page cache, and the work is divided.
    """
    files = {path.name: _describe(path) for path in directory.glob(f"__{rank}_*")}
    write_fsync(_part(directory, rank), Manifest(files=files).model_dump_json())


def write_manifest(directory: Path, ranks: int, run: str = "") -> None:
    """Merge the records of all ranks of `run`, and add the remaining files. Call it after all files are written."""
    files: dict[str, _File] = {}
    for rank in range(ranks):
        part = _part(directory, rank)
        files |= Manifest.model_validate_json(part.read_bytes()).files
        part.unlink()
    for path in directory.iterdir():
        if path.name not in files:
            files[path.name] = _describe(path)
    write_fsync(directory / MANIFEST, Manifest(files=dict(sorted(files.items())), run=run).model_dump_json(indent=1))


def run_of(checkpoint: Path) -> str | None:
    """Return the identifier of the run that wrote `checkpoint`; None without a readable manifest."""
    try:
        return _read(checkpoint).run
    except (OSError, ValueError):
        return None


def verify(checkpoint: Path, *, rank: int = 0, ranks: int = 1) -> None:
    """Check every file of `checkpoint` against its manifest; each of several `ranks` hashes a part of the files.

    Raises DamagedError, or ValueError for another format.
    """
    read_state(checkpoint)
    try:
        files = _read(checkpoint).files
    except FileNotFoundError:
        raise _damaged(checkpoint, f"{MANIFEST} is missing") from None
    except ValidationError as error:
        raise _damaged(checkpoint, f"{MANIFEST}: {first_problem(error)}") from None
    except (ValueError, OSError) as error:
        raise _damaged(checkpoint, f"{MANIFEST}: {error}") from None
    if missing := {"state.json", "config.toml", ".metadata"} - files.keys():
        raise _damaged(checkpoint, f"{MANIFEST} does not list {min(missing)}")
    if unlisted := {path.name for path in checkpoint.glob("__*")} - files.keys():  # nothing would check its content
        raise _damaged(checkpoint, f"{MANIFEST} does not list {min(unlisted)}")
    for name, described in files.items():
        file = checkpoint / name
        if not file.is_file():
            raise _damaged(checkpoint, f"{name} is missing")
        if (size := file.stat().st_size) != described.bytes:
            raise _damaged(checkpoint, f"{name} has {size:,} bytes, {described.bytes:,} were written")
    for name in sorted(files)[rank::ranks]:
        try:
            found = _describe(checkpoint / name)
        except OSError as error:
            raise _damaged(checkpoint, f"{name} cannot be read: {error.strerror or error}") from None
        if found != files[name]:
            raise _damaged(checkpoint, f"{name} was altered: its SHA-256 differs from the one in {MANIFEST}")


def _read(checkpoint: Path) -> Manifest:
    return Manifest.model_validate_json(read_limited(checkpoint / MANIFEST))


def _damaged(checkpoint: Path, problem: str) -> DamagedError:
    return DamagedError(f"{checkpoint} is damaged: {problem}")


def _describe(path: Path) -> _File:
    return _File(bytes=path.stat().st_size, sha256=hash_file(path))


def _part(directory: Path, rank: int) -> Path:
    return directory / f".manifest-{rank}"
