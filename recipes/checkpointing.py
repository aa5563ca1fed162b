"""Saving the state of a run, and returning to what was saved."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from components.checkpoint import CheckpointManager
from components.distributed.context import DistributedContext
from components.metrics.logger import MetricLogger
from recipes.bad_steps import NonFiniteStateError
from recipes.config import Config
from recipes.run_setup import newest_intact_checkpoint
from recipes.training_state import TrainingState

log = logging.getLogger("powertrain")


@dataclass
class RunCheckpoints:
    """The checkpoints of a run. Every rank calls its methods at the same step."""

    state: TrainingState
    store: CheckpointManager
    world: DistributedContext
    monitor: MetricLogger
    config: Config
    discard_gradients: Callable[[], None]
    """Drops the gradients of a step that is not taken."""
    read_launched: Callable[[], None]
    """Reads the steps that are still on the device."""
    restart_timer: Callable[[], None]
    """Leaves the time of a save out of that of the next step."""

    def __post_init__(self) -> None:
        self.store.saved_step = self.started_at = self.state.clock.step

    def save(self) -> None:
        """Write a checkpoint of everything the next step depends on. A failure is logged, and training goes on.

        Raises NonFiniteStateError for a state that is not finite.
        """
        self.read_launched()
        self.monitor.flush()  # no checkpoint is ahead of the metrics
        self._require_finite()
        step = self.state.clock.step
        saved = self.store.save(step, self.state.tensors.collect(), self.state.state_dict(), self.config.to_toml())
        if saved is not False:
            log.info(f"step {step:>6}  {'saved' if saved else 'saving in the background'} {self.store.path(step)}")
        self.restart_timer()

    def save_before_end(self) -> None:
        """Save what is not saved yet, if it is sound, because the run is about to end with an error."""
        self.store.wait()
        known = (self.started_at, self.store.saved_step, *self.store.failed_steps)
        if self.state.is_sound and self.state.clock.step not in known:
            self.discard_gradients()
            self.save()
            self.store.wait()

    def return_to_newest(self, what: str, then: str = "") -> bool:
        """Restore the newest intact checkpoint and log `what` made it necessary; return False if there is none."""
        self.store.wait()
        damages: list[str] = []
        checkpoint = newest_intact_checkpoint(self.store.list_checkpoints(), self.world, damages)
        for damage in damages:
            log.warning(f"{damage}; taking the checkpoint before it")
        if checkpoint is None:
            return False
        self.state.is_sound = False  # until all of it is read
        self.state.roll_back(checkpoint)
        self.state.is_sound = True
        log.warning(f"{what}; parameters and optimizer are those of {checkpoint.name} again{then}")
        return True

    @property
    def newest(self) -> str:
        """The path of the newest checkpoint, for messages, or "none"."""
        return str(self.store.latest() or "none")

    def _require_finite(self) -> None:
        """Raise NonFiniteStateError if a parameter or a state of the optimizer is not finite on any rank.

        So no such state is saved, nor takes the place of a sound checkpoint.
        """
        if not (names := self._not_finite()):
            return
        what = f"the state after step {self.state.clock.step} is not finite: {names}"
        on_nonfinite = self.state.guard.rules.on_nonfinite
        if on_nonfinite == "roll_back" and self.return_to_newest(what) and not self._not_finite():
            return
        self.state.is_sound = False
        raise NonFiniteStateError(
            f"{what}. It is not saved; the last good checkpoint is {self.newest}. Lower the learning rate "
            "(lr_schedule) and continue from there with --resume, or start again where there is none"
        )

    def _not_finite(self) -> str:
        """Return the first names that a rank has found, the same on all; empty where all is finite."""
        names = self.state.tensors.find_nonfinite()
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return next(filter(None, self.world.gather(", ".join(names[:3]) + more)), "")
