"""Writing tensors with torch.distributed.checkpoint: cached save plans, and errors that say what the disk said."""

from __future__ import annotations

from itertools import count
from typing import Any

from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlanner

_keys = count()


class SavePlans:
    """Makes the planner of each save. A rank whose part has not changed sends no plan, and none is made of all."""

    def __init__(self) -> None:
        # torch keeps plans by the name of the planner's class, for all stores of a process
        self._key = f"powertrain-{next(_keys)}"

    def planner(self) -> DefaultSavePlanner:
        planner = DefaultSavePlanner(enable_plan_caching=True)
        planner._cached_plans_key = self._key
        return planner

    def forget(self) -> None:
        """Plan again in the next save. Every rank calls it after a save that failed: they may not have gone as far."""
        for kept in ("save_plan", "final_save_plan", "all_plans", "global_plan", "metadata"):
            getattr(SavePlanner, f"_cached_{kept}", {}).pop(self._key, None)


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
