"""Make a directory fail on one host of an emulated network: read-only, or on a file system that is full for that host.

A host has its own mounts, because `ip netns exec` gives them to every command. Needs root on Linux, and
util-linux and e2fsprogs.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_GROUP = "12345"
PRIVILEGED = ["setpriv", f"--groups={_GROUP}"]
"""Words before a command that may use all blocks of a small file system."""
UNPRIVILEGED = ["setpriv", "--bounding-set=-sys_resource", "--inh-caps=-sys_resource"]
"""Words before a command that may not use its reserved blocks: root without the capability for that."""
_MEGABYTES, _RESERVED_PERCENT = 64, 40


def make_read_only(directory: Path, process: int) -> None:
    """Make a directory read-only for the host of `process`. Files that are open stay writable."""
    # a mount of its own on top, because a mount with files open for writing cannot be made read-only
    _in_mounts_of(process, "mount", "--bind", directory, directory)
    _in_mounts_of(process, "mount", "-o", "remount,bind,ro", directory)


def make_writable(directory: Path, process: int) -> None:
    """Undo `make_read_only`."""
    _in_mounts_of(process, "umount", "--lazy", directory)


@contextmanager
def small_file_system(folder: Path) -> Iterator[None]:
    """Mount a file system on `folder`, two fifths of which are reserved."""
    image = folder.with_suffix(".image")
    image.write_bytes(b"")
    with image.open("r+b") as file:
        file.truncate(_MEGABYTES << 20)
    folder.mkdir()
    _run("mkfs.ext4", "-q", "-m", _RESERVED_PERCENT, image)
    # by default the reserved blocks belong to user 0, with or without the capability; no user has this number
    _run("tune2fs", "-u", _GROUP, "-g", _GROUP, image)
    _run("mount", "-o", "loop", image, folder)
    try:
        yield
    finally:
        _run("umount", "--lazy", folder)
        image.unlink()


def fill(folder: Path) -> Path:
    """Fill all of a small file system but its reserved blocks, and return the file."""
    file = folder / "filled"
    for size in ("64k", "1k"):
        subprocess.run(
            [*UNPRIVILEGED, "dd", "if=/dev/zero", f"of={file}", f"bs={size}", "oflag=append", "conv=notrunc"],
            capture_output=True,
        )
    return file


def _in_mounts_of(process: int, *command: str | Path) -> None:
    _run("nsenter", f"--target={process}", "--mount", *command)


def _run(*command: str | int | Path) -> None:
    subprocess.run([str(word) for word in command], check=True, capture_output=True)
