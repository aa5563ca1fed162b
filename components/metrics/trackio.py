"""trackio, the experiment tracker of Hugging Face."""

from __future__ import annotations

from dataclasses import dataclass

from components.metrics.tensorboard import scalars
from components.metrics.writer import Row, RunInfo, Writer, require_library


@dataclass(kw_only=True)
class Trackio(Writer):
    """Writes the metrics to trackio, under the tags of TensorBoard; a resumed run continues the same run there.

    Runs are kept on this machine, in TRACKIO_DIR, unless `space_id` is set.
    """

    project: str
    """The project of the run."""
    group: str | None = None
    """The group of the run, such as a sweep."""
    space_id: str | None = None
    """A Hugging Face Space that keeps and shows the runs, `user/name`."""

    def __post_init__(self) -> None:
        require_library("trackio")

    def open(self, run: RunInfo) -> None:
        import trackio

        self._run = trackio.init(
            project=self.project,
            name=f"{run.name}-{run.id}",  # runs are resumed by name
            group=self.group,
            space_id=self.space_id,
            config=run.configuration,
            resume="allow",
            embed=False,
        )

    def write(self, row: Row) -> None:
        self._run.log(dict(scalars(row)), step=row["step"])

    def close(self) -> None:
        self._run.finish()
