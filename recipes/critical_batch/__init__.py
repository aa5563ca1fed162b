"""Measure the critical batch size at a checkpoint by branched training (Merrill et al., arXiv 2505.23971).

    ./run_train.sh train_configs/critical_batch.toml --branches.checkpoint=runs/debug/checkpoints/step-00000100

From a checkpoint of a run with batch B and learning rate lr, branch k trains on the same tokens with batch k B and the
constant learning rate lr sqrt(k). Each branch is an ordinary pre-training run, in branches/k-004/ of the run directory.
The same command continues a measurement that was stopped: finished branches are not trained again.
"""

from __future__ import annotations

import gc
import json
import logging
import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from components.atomic_files import atomic_write
from components.checkpoint import list_checkpoints
from components.distributed.context import DistributedContext
from components.errors import InputError
from components.metrics.console import setup_logging
from components.metrics.jsonl import read_rows
from components.run_directory import RunDirectory
from components.units import format_count
from recipes.batch_policy import build_batch_rounding
from recipes.config import Config, ConfigError, Problem, derive
from recipes.critical_batch.branches import Branches, find_branch_point, read_branch_point
from recipes.critical_batch.report import NOISE_SCALES, Branch, Report, draw_report
from recipes.errors import NonFiniteError, RunError, config_errors_at
from recipes.pretrain import Pretrain
from recipes.resume import Resume, check_resumable, diff_config, is_inside, rule_of
from recipes.run_setup import remove_old_run
from recipes.training_state import read_run_state

log = logging.getLogger("powertrain")

BRANCH_RECIPE = "recipes.pretrain:Pretrain"


@dataclass(frozen=True, kw_only=True)
class CriticalBatch(Pretrain):
    """The sections of pre-training, and [branches]. The branches replace [batch] and [lr_schedule]."""

    branches: Branches

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield the problems of pre-training, except about gradient noise: the batch of a branch is constant."""
        ignored = "gradient_noise.interval_steps", "batch.norm"
        yield from (problem for problem in super().check() if problem[0] not in ignored)

    def main(self, config: Config, resume: Resume | None) -> int:
        """Train the branches that are not finished, then compare all. Returns the exit status."""
        with ExitStack() as cleanup:
            with config_errors_at(config, "run.device"):
                world = DistributedContext.init(self.run.device)  # the branches use the same process group
            cleanup.push(world.close_unless_failed)
            measurement = CriticalBatchMeasurement(self, config, world.size)
            with config_errors_at(config, "run"):
                if resume is not None and resume.path is not None:
                    raise ValueError("--resume takes no path here: branches.checkpoint names the checkpoint")
                measurement.claim_directory(world, cleanup)
            log.info("\n".join(measurement.describe()))
            for multiplier in self.branches.batch_multipliers:
                status = measurement.train_branch(multiplier)
                if status:
                    return status
            if world.is_main:
                setup_logging(measurement.directory.log, to_console=True)
                write_report(measurement)
            return 0

    def dry_run(self, config: Config, world_size: int) -> int:
        """Check the measurement and print the branches."""
        print("\n".join(CriticalBatchMeasurement(self, config, world_size).describe()))
        return 0


class CriticalBatchMeasurement:
    """The branches of one checkpoint. Raises ConfigError if they cannot be trained."""

    def __init__(self, recipe: CriticalBatch, config: Config, world_size: int) -> None:
        self.recipe, self.config, self.branches = recipe, config, recipe.branches
        self.directory = RunDirectory(recipe.run.directory)
        self.folder = self.directory.path / "branches"
        self.start_file = self.folder / "start.json"
        self.report = self.directory.path / "critical_batch.json"
        self.picture = self.report.with_suffix(".png")
        with config_errors_at(config, "parallel"):
            rounding = build_batch_rounding(recipe, world_size)
        self.length = recipe.training.sequence_length
        with config_errors_at(config, "branches"):
            self.start = find_branch_point(self.branches, rounding, config)
            places = [self.directory.path, self.folder, *self.folder.glob("k-*"), *self.folder.glob("k-*/checkpoints")]
            if any(is_inside(Path(self.start.checkpoint), place) for place in places):  # each of them may be a link
                raise InputError(
                    "checkpoint",
                    f"{self.start.checkpoint} is in the directory of this run; use another --run.name",
                )
            most = self.branches.batch_multipliers[-1]
            largest = self.start.batch_of(most) * self.length
            if self.branches.tokens < largest:
                raise InputError(
                    "tokens",
                    f"less than one step of {largest} tokens at k = {most}; raise it, or remove the largest of "
                    "batch_multipliers",
                )
        self.tokens = -(-self.branches.tokens // largest) * largest
        self.smoothing_tokens = self.branches.smoothing_tokens or -(-self.tokens // 4)
        check_resumable(Path(self.start.checkpoint), self.config_for(1))

    def config_for(self, multiplier: int) -> Config:
        """Return this config with the directory, length, batch size and learning rate of branch k = `multiplier`."""
        checkpoint, start = self.recipe.checkpoint, self.start
        interval = checkpoint.interval_steps
        return derive(
            self.config,
            BRANCH_RECIPE,
            {
                "run": {
                    "name": f"{self.recipe.run.name}, k = {multiplier}",
                    "dir": str(self.branch_folder(multiplier)),
                    "if_exists": "replace",  # a run without a checkpoint has nothing to keep
                },
                "training": {"total_tokens": start.tokens + self.tokens},
                "batch": {"use": "components.batch:Constant", "initial_size": start.batch_of(multiplier)},
                "lr_schedule": {
                    "use": "components.lr_schedules:Constant",
                    "max_lr": start.lr_of(multiplier),
                    "warmup_tokens": 0,
                },
                # the same interval in tokens for all branches; only the last checkpoint is needed to resume
                "checkpoint": {
                    "interval_steps": "none" if interval is None else max(1, interval // multiplier),
                    "keep_last": 1,
                    "keep_every": "none",
                },
            },
            why=f"branch k = {multiplier}",
        )

    def describe(self) -> Iterator[str]:
        """Yield the lines of a table of the branches."""
        start = self.start
        yield f"branches of {start.checkpoint}: step {start.step}, {format_count(start.tokens)} tokens"
        yield f"{'k':>6} {'batch':>8} {'batch tokens':>13} {'steps':>8} {'lr':>10}"
        for multiplier in self.branches.batch_multipliers:
            batch, lr = start.batch_of(multiplier), start.lr_of(multiplier)
            tokens = format_count(batch * self.length)
            yield f"{multiplier:>6} {batch:>8} {tokens:>13} {self.planned_steps(multiplier):>8} {lr:>10.3g}"
        total = format_count(len(self.branches.batch_multipliers) * self.tokens)
        yield f"{format_count(self.tokens)} tokens each, {total} in total, in {self.folder}"

    def branch_folder(self, multiplier: int) -> Path:
        return self.folder / f"k-{multiplier:03d}"

    def planned_steps(self, multiplier: int) -> int:
        return -(-self.tokens // (self.start.batch_of(multiplier) * self.length))

    def last_step(self, multiplier: int) -> int:
        """Return the number of the last step of a branch, counted from the start of the run that it branches from."""
        return self.start.step + self.planned_steps(multiplier)

    def claim_directory(self, world: DistributedContext, cleanup: ExitStack) -> None:
        """Lock the run directory until `cleanup`, claim it and set up logging. Branches of this measurement are kept.

        Raises ValueError or ConfigError if another run uses the directory, or if it holds another measurement, unless
        that is to be replaced.
        """

        def claim() -> None:
            self.directory.check_links(self.folder)
            if world.is_main:
                if cleanup.enter_context(self.directory.lock()):
                    self.directory.remove_temporary_files(self.report, self.start_file)
                self.directory.claim("a measurement of the critical batch", (self.folder, self.report, self.picture))

        def store() -> None:
            if not continues:
                self._remove_old()
            self.folder.mkdir(parents=True, exist_ok=True)
            atomic_write(self.directory.config, self.config.to_toml())
            atomic_write(self.start_file, json.dumps(asdict(self.start), indent=1) + "\n")

        world.main_process_first(claim)
        changes = self._changes() if self.start_file.exists() else []
        if changes and self.recipe.run.if_exists == "refuse":
            raise ConfigError(changes)
        continues = self.start_file.exists() and not changes
        world.barrier()  # the other ranks are done with the files that are deleted here
        world.on_main_process(store)
        setup_logging(self.directory.log if world.is_main else None, to_console=world.is_main)

    def _remove_old(self) -> None:
        """Remove the files of an earlier measurement; only directories that a branch has marked are removed."""
        for branch in map(RunDirectory, sorted(self.folder.glob("k-*"))):
            remove_old_run(branch)
            branch.release()
        self.directory.clear()
        self.directory.stop_file.unlink(missing_ok=True)
        for written in (self.start_file, self.report, self.picture):
            written.unlink(missing_ok=True)

    def train_branch(self, multiplier: int) -> int:
        """Train a branch to its end, from its newest checkpoint if there is one. Returns the exit status.

        A branch whose loss is not finite has also ended: its batch or learning rate was too large.
        """
        config = self.config_for(multiplier)
        saved = list_checkpoints(config.recipe.run.directory / "checkpoints")
        if saved and self._is_finished(multiplier, saved[-1]):
            log.info(f"branch k = {multiplier} is finished")
            return 0
        try:
            status: int = config.recipe.main(config, Resume(None if saved else Path(self.start.checkpoint)))
        except NonFiniteError as error:
            if multiplier == 1:
                raise
            log.error(f"branch k = {multiplier}: {error}")
            status = 0
        gc.collect()  # a model is part of reference cycles, and the next one needs its memory
        return status

    def read_rows(self, multiplier: int) -> list[dict[str, Any]]:
        """Return the metrics of a branch, up to the last step of this measurement."""
        metrics, last = RunDirectory(self.branch_folder(multiplier)).metrics, self.last_step(multiplier)
        return [row for row in read_rows(metrics) if row["step"] <= last]

    def read_branch(self, multiplier: int) -> Branch:
        batch, rows = self.start.batch_of(multiplier), self.read_rows(multiplier)
        validated = [row["val_loss"] for row in rows if "val_loss" in row]
        has_ended = bool(rows) and rows[-1]["step"] == self.last_step(multiplier)
        return Branch(
            multiplier=multiplier,
            batch=batch,
            batch_tokens=batch * self.length,
            lr=self.start.lr_of(multiplier),
            steps=self.planned_steps(multiplier),
            losses=tuple(math.nan if row["loss"] is None else row["loss"] for row in rows if "loss" in row),
            val_loss=validated[-1] if validated and has_ended else None,
            noise_scales={name: tuple(row[name] for row in rows if row.get(name) is not None) for name in NOISE_SCALES},
        )

    def _is_finished(self, multiplier: int, newest: Path) -> bool:
        rows = self.read_rows(multiplier)
        reached = read_run_state(newest)["clock"]["tokens"] >= self.start.tokens + self.tokens
        return reached and (
            self.recipe.validation is None or any("val_loss" in row for row in rows if row["step"] == rows[-1]["step"])
        )

    def _changes(self) -> list[Problem]:
        """Return what the existing branches do not fit. Raises ValueError if they are damaged."""
        before, remedy = read_branch_point(self.start_file), "use another --run.name, or --run.if_exists=replace"
        changes = [
            self.config.problem(key, f"{old!r} in the existing branches, {now!r} now; {remedy}")
            for key, old, now in diff_config(self.directory.config, self.config)
            if rule_of(key) != "allow" and not key.startswith(("branches.", "batch.", "lr_schedule."))
        ]
        if before != self.start:
            message = f"{self.directory.path} started from {before}, this is {self.start}; {remedy}"
            changes.append(self.config.problem("branches", message))
        return changes


def write_report(measurement: CriticalBatchMeasurement) -> None:
    """Log the table, and write critical_batch.json and the plot."""
    branches, start = measurement.branches, measurement.start
    found = Report(
        branches=tuple(measurement.read_branch(multiplier) for multiplier in branches.batch_multipliers),
        smoothing_tokens=measurement.smoothing_tokens,
        tolerance=branches.tolerance,
        sequence_length=measurement.length,
    )
    if not math.isfinite(found.losses[0]):
        raise RunError("the loss of branch k = 1 is not finite, so the other branches cannot be compared with it")
    log.info("\n".join(found.lines()))
    written = {**asdict(start), "branch_tokens": measurement.tokens, **found.summary()}
    path = measurement.report
    atomic_write(path, json.dumps(written, indent=1) + "\n")
    log.info(f"wrote {path}")
    try:
        draw_report(found, measurement.picture)
    except ValueError as error:
        log.warning(f"{error}; the same command then draws {measurement.picture.name}")
