"""Writing tensors with torch.distributed.checkpoint: cached save plans, and the system's own error messages."""

from __future__ import annotations

from itertools import count
from typing import Any

from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlanner

_keys = count()


class SavePlans:
    """Creates the planner of each save. Plans are cached: a rank sends one only if its shards have changed."""

    def __init__(self) -> None:
        # torch caches plans by this key, by default the class name: shared by all managers of a process
        self._key = f"powertrain-{next(_keys)}"

    def planner(self) -> DefaultSavePlanner:
        planner = DefaultSavePlanner(enable_plan_caching=True)
        planner._cached_plans_key = self._key
        return planner

    def clear(self) -> None:
        """Drop the cached plans. Every rank calls it after a failed save: not all may have reached the same point."""
        for kept in ("save_plan", "final_save_plan", "all_plans", "global_plan", "metadata"):
            getattr(SavePlanner, f"_cached_{kept}", {}).pop(self._key, None)


class TensorWriter(FileSystemWriter):
    """A FileSystemWriter that raises the error of the system for a file that cannot be written."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        """Write the tensors of `plan`. Raises OSError for a file that cannot be written.

        When the disk is full, torch's archive writer fails in its cleanup with "enforce fail at ...". The cause is the
        context of that error, which is lost when the error is sent to another rank.
        """
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            reason: BaseException | None = error
            while reason is not None and not isinstance(reason, OSError):
                reason = reason.__cause__ or reason.__context__
            raise error if reason is None else OSError(reason.errno, reason.strerror, str(self.path)) from error
