"""Writing the tensors of a checkpoint with torch.distributed.checkpoint, whose errors say nothing of the disk."""

from __future__ import annotations

from typing import Any

from torch.distributed.checkpoint import FileSystemWriter


class TensorWriter(FileSystemWriter):
    """A FileSystemWriter that raises what the disk has said."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        """Raises OSError for a file that cannot be written.

        torch's writer of archives, when a file takes no more, fails while it cleans up: "enforce fail at ...".
        The reason is the context of that error, and a context is lost on the way from one rank to another.
        """
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            reason: BaseException | None = error
            while reason is not None and not isinstance(reason, OSError):
                reason = reason.__cause__ or reason.__context__
            raise error if reason is None else OSError(reason.errno, reason.strerror, str(self.path)) from error
