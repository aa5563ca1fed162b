"""Plans of torch.distributed.checkpoint, made once: which rank writes what is the same in every save of a run."""

from __future__ import annotations

from itertools import count

from torch.distributed.checkpoint import DefaultSavePlanner
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
