"""The run directory: where everything a run leaves behind is."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunDirectory:
    """`config.toml`, `metrics.jsonl`, `log.txt`, `tensorboard/` and `checkpoints/` of one run."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.toml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def launch(self) -> Path:
        return self.path / ".launch"

    def belongs_to(self, launch: str | None) -> bool:
        """Whether `launch`, the name of a start of processes, has made this directory its own before."""
        return launch is not None and self.launch.is_file() and self.launch.read_text(encoding="utf-8") == launch

    @property
    def used(self) -> bool:
        """Whether a run has left something here."""
        return self.metrics.exists() or self.checkpoints.exists()

    def create(self, launch: str | None = None) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        if launch is not None:
            self.launch.write_text(launch, encoding="utf-8")

    def clear(self) -> None:
        """Remove what a run leaves behind, and nothing else that may lie in the directory."""
        for file in (self.config, self.metrics, self.log):
            file.unlink(missing_ok=True)
        for folder in (self.tensorboard, self.checkpoints):
            shutil.rmtree(folder, ignore_errors=True)
