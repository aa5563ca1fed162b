"""A thread that uploads checkpoints while training continues. A network that fails delays uploads, never the run."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from components.checkpoint.load import is_kept_forever
from components.checkpoint.remote import RemoteCheckpoints
from components.storage.address import StorageError

log = logging.getLogger("powertrain")
FIRST_RETRY_SECONDS, MAX_RETRY_SECONDS = 1.0, 60.0
"""The time between two attempts; it doubles with each."""
CLOSE_SECONDS = 60.0
"""How long the end of a run repeats uploads that fail. An upload that makes progress is waited for."""


class CheckpointUploader:
    """Uploads the checkpoints of a run, and removes old ones there. Only the main rank has one.

    While the storage cannot be reached, only the newest checkpoint and those kept by `keep_every` wait, so that the
    local disk holds one checkpoint more than without uploads.
    """

    def __init__(
        self, remote: RemoteCheckpoints, *, run: str, keep_last: int | None, keep_every: int | None, newest: Path | None
    ) -> None:
        """`newest` is the newest local checkpoint of a resumed run, which is uploaded if it is not there yet."""
        self._remote, self._run = remote, run
        self._keep_last, self._keep_every = keep_last, keep_every
        self._changed = threading.Condition()
        self._waiting = [] if newest is None else [newest]
        self._uploading: Path | None = None
        self._failures, self._is_failing = 0, False
        self._closing_at: float | None = None
        self._closing = threading.Event()
        self._logged_removal_error = False
        self._thread = threading.Thread(target=self._work, name="checkpoint upload", daemon=True)
        self._thread.start()

    def submit(self, checkpoint: Path) -> None:
        """Upload a complete checkpoint as soon as possible."""
        with self._changed:
            self._waiting = upload_order(self._waiting, checkpoint, self._keep_every)
            self._changed.notify()

    def is_needed(self, checkpoint: Path) -> bool:
        """Return whether the files of `checkpoint` are still to be uploaded, so that they must not be removed."""
        with self._changed:
            return checkpoint == self._uploading or checkpoint in self._waiting

    def close(self) -> None:
        """Wait for the uploads, for `CLOSE_SECONDS` while they fail; log what is not uploaded."""
        with self._changed:
            self._closing_at = time.monotonic()
            self._closing.set()
            self._changed.notify()
        if self._thread.is_alive() and (self._waiting or self._uploading):
            log.info(f"waiting for the upload to {self._remote.directory}")
        while self._thread.is_alive():
            self._thread.join(0.2)
            if self._is_failing and time.monotonic() > self._closing_at + CLOSE_SECONDS + MAX_RETRY_SECONDS:
                break  # the last attempt hangs
        with self._changed:
            left = [path.name for path in (self._uploading, *self._waiting) if path is not None]
        if left:
            log.error(
                f"{', '.join(left)} could not be uploaded to {self._remote.directory}; the local files are complete, "
                "and --resume uploads the newest"
            )
        elif self._failures:
            log.warning(
                f"uploads to {self._remote.directory} failed {self._failures} times; the newest checkpoint is there"
            )

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing_at is not None)
                if not self._waiting:
                    return
                self._uploading = self._waiting.pop(0)
            if not self._repeat_upload():
                return
            with self._changed:
                self._uploading = None

    def _upload(self) -> bool:
        """Upload the current checkpoint; return False if that is no longer necessary."""
        checkpoint = self._uploading
        assert checkpoint is not None
        with self._changed:
            if self._waiting and not is_kept_forever(checkpoint, self._keep_every):
                return False  # after a failed attempt, a newer one is pending
        started = time.monotonic()
        if not checkpoint.is_dir():
            log.warning(f"{checkpoint} was removed before it could be uploaded")
            return False
        if self._remote.upload(checkpoint):
            log.info(f"uploaded {checkpoint.name} to {self._remote.directory} in {time.monotonic() - started:.0f} s")
        self._remove_old()  # also if nothing was uploaded: an earlier run may have been killed during a removal
        return True

    def _remove_old(self) -> None:
        """Remove the remote checkpoints that are not to be kept; a failure is logged once."""
        try:
            self._remote.remove_old(self._run, keep_last=self._keep_last, keep_every=self._keep_every)
        except StorageError as error:  # such as a bucket without delete permission: the upload must not be repeated
            if not self._logged_removal_error:
                self._logged_removal_error = True
                log.warning(f"{error}; old checkpoints stay there")

    def _repeat_upload(self) -> bool:
        """Upload until it succeeds, at the end for `CLOSE_SECONDS`; return whether it did."""
        seconds, was_closing = FIRST_RETRY_SECONDS, self._closing.is_set()
        while True:
            try:
                used_storage = self._upload()
            except Exception as error:  # whatever it is, training does not depend on it
                self._failures += 1
                if not self._is_failing:
                    self._is_failing = True
                    log.error(f"{error}; training continues, and the upload is repeated")
                if self._closing_at is not None and time.monotonic() > self._closing_at + CLOSE_SECONDS:
                    return False
                if not was_closing and self._closing.wait(seconds):
                    was_closing, seconds = True, FIRST_RETRY_SECONDS
                else:
                    time.sleep(seconds if was_closing else 0)
                    seconds = min(2 * seconds, MAX_RETRY_SECONDS)
            else:
                if self._is_failing and used_storage:
                    self._is_failing = False
                    log.warning(f"{self._remote.directory} can be used again")
                return True


def upload_order(pending: Sequence[Path], new: Path, keep_every: int | None) -> list[Path]:
    """Return the pending uploads once `new` is one of them: of the older ones, only those that are kept forever."""
    return [*(path for path in pending if is_kept_forever(path, keep_every)), new]
