"""Save the state of a run, and restore the newest checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from components.checkpoint import CheckpointManager
from components.distributed.context import DistributedContext
from components.metrics.logger import MetricLogger
from recipes.config import Config
from recipes.errors import NonFiniteStateError
from recipes.resume import newest_intact_checkpoint
from recipes.training_state import TrainingState

log = logging.getLogger("powertrain")


@dataclass
class RunCheckpoints:
    """The checkpoints of a run. Every rank calls each method at the same step."""

    state: TrainingState
    manager: CheckpointManager
    world: DistributedContext
    metric_logger: MetricLogger
    config: Config
    discard_gradients: Callable[[], None]
    """Zeroes the gradients of a step that is not taken."""
    read_launched: Callable[[], None]
    """Reads the results of the steps that are still on the device."""
    restart_timer: Callable[[], None]
    """Restarts the step timer, so that the time of a save does not count as step time."""
    is_on_disk: bool = True
    """Whether the state with which the run starts needs no save: it is new, or that of a checkpoint on disk."""
    started_from: Path | None = None
    """The checkpoint on disk with which the run starts, which may be one of another run; None if there is none."""

    def __post_init__(self) -> None:
        self.started_at = self.state.clock.step
        self.manager.saved_step = self.started_at if self.is_on_disk else None

    def save(self) -> None:
        """Write a checkpoint of everything the next step depends on. A failed write is logged and training continues.

        Raises NonFiniteStateError if the state is not finite.
        """
        step = self._prepare()
        saved = self.manager.save(step, self.state.tensors.collect(), self.state.state_dict(), self.config.to_toml())
        if saved is not False:
            log.info(f"step {step:>6}  {'saved' if saved else 'saving in the background'} {self.manager.path(step)}")
        self.restart_timer()

    def save_in_memory(self) -> None:
        """Keep a copy of the state in the memory of the nodes, unless a save to disk is still running."""
        if not self.manager.can_save_in_memory():
            return
        step = self._prepare()
        self.manager.save_in_memory(step, self.state.tensors.collect(), self.state.state_dict(), self.config.to_toml())
        self.restart_timer()

    def save_before_end(self) -> None:
        """Save the current step, if it is consistent and not saved yet, before the run ends with an error."""
        self.manager.wait()
        known = (self.manager.saved_step, *self.manager.failed_steps)
        if self.state.is_consistent and self.state.clock.step not in known:
            self.discard_gradients()
            self.save()
            self.manager.wait()

    def restore_newest(self, reason: str, then: str = "") -> bool:
        """Restore the newest intact checkpoint and log `reason`; return False if there is no checkpoint."""
        self.manager.wait()
        damages: list[str] = []
        candidates, own = self.manager.list_checkpoints(), self.manager.directory
        if self.started_from is not None and self.started_from.parent != own:
            candidates.insert(0, self.started_from)
        checkpoint = newest_intact_checkpoint(candidates, self.world, damages, own)
        for damage in damages:
            log.warning(f"{damage}; using {checkpoint or 'none'}")
        if checkpoint is None:
            return False
        self.state.is_consistent = False  # until it is restored completely
        self.state.roll_back(checkpoint)
        self.state.is_consistent = True
        log.warning(f"{reason}; rolled back to {checkpoint.name}{then}")
        return True

    @property
    def newest(self) -> str:
        """The path of the newest checkpoint, for messages, or "none"."""
        return str(self.manager.latest() or self.started_from or "none")

    def _prepare(self) -> int:
        """Write all metrics to the disk, check that the state is finite, and return the step to save."""
        self.read_launched()
        self.metric_logger.flush()  # metrics reach the disk before the checkpoint does
        self._require_finite()
        return self.state.clock.step

    def _require_finite(self) -> None:
        """Raise NonFiniteStateError if a parameter or optimizer state is not finite on any rank.

        Such a state is never saved, so it cannot replace a good checkpoint.
        """
        if not (names := self._not_finite()):
            return
        what = f"the state after step {self.state.clock.step} is not finite: {names}"
        on_nonfinite = self.state.guard.rules.on_nonfinite
        if on_nonfinite == "roll_back" and self.restore_newest(what) and not self._not_finite():
            return
        self.state.is_consistent = False
        raise NonFiniteStateError(
            f"{what}. It is not saved; the last good checkpoint is {self.newest}. Lower the learning rate "
            "(lr_schedule) and continue from it with --resume, or start again if there is none"
        )

    def _not_finite(self) -> str:
        """Return the names of the first non-finite tensors, equal on all ranks; empty if all are finite."""
        names = self.state.tensors.find_nonfinite()
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return next(filter(None, self.world.gather(", ".join(names[:3]) + more)), "")
