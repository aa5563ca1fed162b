"""What a run was made with: versions of the code and of packages, host and devices."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from components.atomic_files import atomic_write

_PACKAGES = ("torch", "torchdata", "tiktoken", "safetensors", "numpy", "pydantic")
_GIT_SECONDS = 10.0


def describe_environment(code: Path, device: torch.device, world_size: int) -> dict[str, Any]:
    """Return the versions and devices by name; `code` is the checkout of the project."""
    return {
        **_git_state(code),
        "command": sys.argv,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "world_size": world_size,
        "host": socket.gethostname(),
    }


def record_environment(file: Path, environment: Mapping[str, Any], after_step: int) -> None:
    """Append the environment to the JSON list in `file`, unless the last one is equal; a resumed run may have another.

    Each entry also has `after_step`. A damaged file is replaced. Raises OSError.
    """
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        last = {key: value for key, value in entries[-1].items() if key != "after_step"}
    except (OSError, ValueError, RecursionError, LookupError, AttributeError, TypeError):
        entries, last = [], None
    if environment != last:
        atomic_write(file, json.dumps([*entries, {"after_step": after_step, **environment}], indent=1) + "\n")


def _git_state(code: Path) -> dict[str, Any]:
    """Return the commit of a checkout, and whether files in it differ from the commit; None without git."""
    try:
        commit, changes = (
            subprocess.run(
                ["git", "--no-optional-locks", "-C", str(code), *command],
                capture_output=True,
                text=True,
                timeout=_GIT_SECONDS,
                check=True,
            ).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return {"git_commit": None, "git_dirty": None}
    return {"git_commit": commit, "git_dirty": bool(changes)}
