"""Addresses of remote files: their local copies, and a directory at an address with errors of one kind."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from components.errors import InputError

_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+)://?(.+)")
"""A `Path` folds the two slashes of an address into one."""
_PASSWORD = re.compile(r"(\w[\w+.-]*)://?[^/@:\s]*:(?!\d*(?:/|$))[^@\s\"']*@")
"""The start of an address with a password, in which a `/` may occur; digits up to a `/` are a port."""
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "hf": "hub"}
_OBJECT_STORES = {*_EXTRAS, "abfs", "az"}
"""File systems without directories, where a file needs no parent."""
_LOCAL = {"file", "local"}
_PARTIAL = ".{}.partial"
"""Name of the partial copy of a file in a local directory."""


class StorageError(OSError):
    """Remote storage could not be reached, or refused a request; the message names the address."""


def is_address(text: str) -> bool:
    """Return whether `text` is an address: a protocol, `://` and a location."""
    return "://" in text and _ADDRESS.fullmatch(text) is not None


def refuse_password(
    text: str, key: str = "", *, remedy: str = "set it for the library of the file system, as docs/storage.md shows"
) -> None:
    """Raise InputError at `key` if `text` is an address with a password: run directories and trackers have copies of
    the recipe."""
    if match := _PASSWORD.match(text):
        raise InputError(
            key,
            f"this {match[1]}:// address contains a password, which would be written to the run directory, to "
            f"checkpoints and to logs; remove it, and {remedy}",
        )


def hide_passwords(text: str) -> str:
    """Return `text` without the user and password of the addresses in it."""
    return _PASSWORD.sub(r"\1://...@", text)


def local_copies() -> Path:
    return Path("~/.cache/powertrain/storage").expanduser()


def local_copy_of(path: Path) -> Path | None:
    """Return the path of the local copy of the address that `path` was made from; None if it was made from a path.

    Raises ValueError for an address with a `..`, which would be a copy of something else, and for one with a password.
    """
    match = _ADDRESS.fullmatch(str(path))
    if match is None:
        return None
    refuse_password(str(path))
    protocol, location = match.groups()
    if ".." in location.split("/"):
        raise ValueError(f"{protocol}://{location} contains a `..`")
    return local_copies() / protocol / location.lstrip("/")


def address_of(path: Path) -> str | None:
    """Return the address whose local copy is `path`, or None."""
    try:
        protocol, *parts = path.relative_to(local_copies()).parts
    except (ValueError, RuntimeError):
        return None
    return f"{protocol}://{'/' if protocol == 'file' else ''}{'/'.join(parts)}" if parts else None


def display(path: Path) -> str:
    """Return `path` for messages: the address whose local copy it is, or itself."""
    return address_of(path) or str(path)


class RemoteDirectory:
    """The directory at an address. Names of files are relative to it; all methods raise StorageError."""

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        self.protocol = address.partition("://")[0]

    def __str__(self) -> str:
        return self.address

    def child(self, name: str) -> RemoteDirectory:
        return RemoteDirectory(f"{self.address}/{name}")

    def list_files(self, pattern: str = "") -> dict[str, tuple[int, str]]:
        """Return name -> (bytes, version) of all files in the directory and below, or of those that match `pattern`.

        The version changes whenever the content does: the ETag, or else the time of the last change. A missing
        directory has no files.
        """
        with self._errors("listed"):
            self._fs.invalidate_cache()
            try:
                found = (
                    self._fs.glob(f"{self._root}/{pattern}", detail=True)
                    if pattern
                    else self._fs.find(self._root, detail=True)
                )
            except FileNotFoundError:
                return {}
            files: dict[str, tuple[int, str]] = {}
            for path, entry in found.items():
                name = path.removeprefix(self._root).lstrip("/")
                # a file of size 0 whose name ends in "/" marks a directory of an object store
                if entry["type"] == "file" and name and not path.endswith("/") and ".." not in name.split("/"):
                    files[name] = (int(entry["size"]), _version(entry))
            return files

    def is_file(self) -> bool:
        """Return whether there is a file at this address itself."""
        with self._errors("read"):
            self._fs.invalidate_cache()
            return bool(self._fs.isfile(self._root))

    def read(self, name: str, largest: int) -> bytes | None:
        """Return the first `largest` bytes of a file, or None if it is missing."""
        with self._errors("read"):
            try:
                data: bytes = self._fs.cat_file(f"{self._root}/{name}", start=0, end=largest)
            except FileNotFoundError:
                return None
            return data

    def download(self, files: Mapping[str, Path]) -> None:
        """Copy files, name -> local path; a name of "" is the file at this address itself. Directories must exist."""
        with self._errors("read"):
            for name, path in files.items():
                self._fs.get_file(f"{self._root}/{name}".rstrip("/"), str(path))

    def download_file(self, name: str, path: Path, size: int) -> None:
        """Copy one file of `size` bytes. A file at `path` is replaced once the copy is complete."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(_PARTIAL.format(path.name))
        self.download({name: partial})
        if (copied := partial.stat().st_size) != size:
            partial.unlink()
            raise StorageError(f"{self}/{name} has changed while it was read: {copied:,} of {size:,} bytes")
        partial.replace(path)

    def upload(self, files: Mapping[str, Path]) -> None:
        """Copy local files, name -> local path, and replace those that exist.

        Object stores and local directories replace a file at once: an interrupted upload leaves the earlier one.
        """
        with self._errors("written"):
            for name, path in files.items():
                remote = f"{self._root}/{name}"
                if self.protocol not in _OBJECT_STORES:
                    self._fs.makedirs(remote.rpartition("/")[0], exist_ok=True)
                if self.protocol in _LOCAL:
                    folder, _, last = remote.rpartition("/")
                    partial = f"{folder}/{_PARTIAL.format(last)}"
                    self._fs.put_file(str(path), partial)
                    self._fs.mv(partial, remote)
                else:
                    self._fs.put_file(str(path), remote)

    def remove(self, names: Sequence[str]) -> None:
        """Delete files that exist, in this order."""
        with self._errors("removed"):
            for name in names:
                self._fs.rm_file(f"{self._root}/{name}")

    def remove_empty(self) -> None:
        if self.protocol not in _OBJECT_STORES:
            with self._errors("removed"):
                self._fs.rmdir(self._root)

    @property
    def _fs(self) -> Any:
        return self._opened[0]

    @property
    def _root(self) -> str:
        return self._opened[1].rstrip("/")

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        """The file system of fsspec and the path in it. Raises ValueError without it."""
        try:
            from fsspec.core import url_to_fs

            opened: tuple[Any, str] = url_to_fs(self.address)
        except ImportError as error:
            extra = _EXTRAS.get(self.protocol, "storage")
            raise ValueError(f"{self.address} needs a library: pip install -e '.[{extra}]' ({error})") from None
        except ValueError as error:
            raise ValueError(f"{self.address}: {error}") from None
        return opened

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """Raise what the library of a file system raises as StorageError: each has its own kinds of errors."""
        self._opened  # noqa: B018 (its errors are mistakes of the recipe, not of the network)
        try:
            yield
        except Exception as error:
            reason = str(error) or type(error).__name__
            raise StorageError(f"{self.address} cannot be {what}: {reason}") from error


def _version(entry: Mapping[str, Any]) -> str:
    keys = ("ETag", "etag", "blob_id", "LastModified", "last_modified", "updated", "mtime")
    return next((str(entry[key]) for key in keys if entry.get(key)), "")
