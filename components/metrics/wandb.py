"""Weights & Biases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from components.metrics.tensorboard import scalars
from components.metrics.wandb_offline import last_offline_step
from components.metrics.writer import Row, RunInfo, Writer, require_library


@dataclass(kw_only=True)
class WandB(Writer):
    """Sends the metrics to Weights & Biases, under the tags of TensorBoard; a resumed run continues the same run there.

    Log in with `wandb login` or the environment variable WANDB_API_KEY.
    """

    project: str
    """The project of the run."""
    entity: str | None = None
    """The user or team; unset: the default of the account."""
    group: str | None = None
    """The group of the run, such as a sweep."""
    tags: Sequence[str] = ()
    """Tags of the run."""
    mode: Literal["online", "offline"] = "online"
    """offline: write to the run directory; `wandb sync` sends it later."""

    def __post_init__(self) -> None:
        require_library("wandb")

    def open(self, run: RunInfo) -> int:
        """Raises OSError if the server cannot be reached, ValueError if it refuses the run."""
        import wandb

        last_step = last_offline_step(run.directory, run.id) if self.mode == "offline" else 0
        try:
            self._run = wandb.init(
                project=self.project,
                entity=self.entity,
                name=run.name,
                group=self.group,
                tags=list(self.tags),
                id=run.id,
                # offline, the server combines the parts of a run by its identifier when they are sent
                resume="allow" if self.mode == "online" else None,
                mode=self.mode,
                dir=run.directory,
                config=run.configuration,
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.errors.CommError as error:
            raise OSError(str(error)) from error
        except wandb.errors.Error as error:
            raise ValueError(str(error)) from error
        return last_step if self.mode == "offline" else self._run.starting_step - 1

    def write(self, row: Row) -> None:
        # W&B sends in its own process, and keeps what it cannot send
        self._run.log({**dict(scalars(row)), **_position(row)}, step=row["step"])

    def close(self) -> None:
        self._run.finish()


def _position(row: Row) -> dict[str, Any]:
    """Return the tokens and samples of a row, as other x-axes."""
    return {name: row[name] for name in ("tokens", "samples") if name in row}
