"""A thread that uploads checkpoints while training continues. A network that fails delays uploads, never the run."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from components.checkpoint.load import is_kept_forever
from components.checkpoint.remote import RemoteCheckpoints
from components.retry import Retries
from components.storage.address import StorageError

log = logging.getLogger("powertrain")
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
        self._retries = Retries()
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
        """Wait for the uploads, for `CLOSE_SECONDS` while they fail; log the checkpoints that are not uploaded."""
        with self._changed:
            self._retries.close(CLOSE_SECONDS)
            self._changed.notify()
        if self._thread.is_alive() and (self._waiting or self._uploading):
            log.info(f"waiting for the upload to {self._remote.directory}")
        while self._thread.is_alive():
            self._thread.join(0.2)
            if self._retries.hangs:
                break
        with self._changed:
            left = [path.name for path in (self._uploading, *self._waiting) if path is not None]
        if left:
            log.error(
                f"{', '.join(left)} could not be uploaded to {self._remote.directory}; the local files are complete, "
                "and --resume uploads the newest"
            )
        elif self._retries.failures:
            log.warning(
                f"uploads to {self._remote.directory} failed {self._retries.failures} times; "
                "the newest checkpoint is there"
            )

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._retries.closing.is_set())
                if not self._waiting:
                    return
                self._uploading = self._waiting.pop(0)
            # any error is one that training does not depend on
            if not self._retries.call(self._upload, Exception, _failure, f"{self._remote.directory} can be used again"):
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


def _failure(error: Exception) -> str:
    return f"{error}; training continues, and the upload is repeated"


def upload_order(pending: Sequence[Path], new: Path, keep_every: int | None) -> list[Path]:
    """Return the pending uploads once `new` is one of them: of the older ones, only those that are kept forever."""
    return [*(path for path in pending if is_kept_forever(path, keep_every)), new]
