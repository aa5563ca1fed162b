"""Measure the critical batch size at a checkpoint by branched training (Merrill et al., arXiv 2505.23971).

    ./run_train.sh train_configs/critical_batch.toml --branches.checkpoint=runs/debug/checkpoints/step-00000100

From a checkpoint of a run at batch B and rate lr, branch k trains on the same tokens at batch k B and the constant rate
lr sqrt(k). Each branch is a pre-training run like any other, in branches/k-004/ of this run's directory.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from components.atomic_files import atomic_write
from components.batch import BatchRounding
from components.checkpoint import list_checkpoints
from components.distributed.context import DistributedContext
from components.distributed.launcher import LAUNCH_ID
from components.errors import InputError
from components.metrics.console import setup_logging
from components.metrics.jsonl import read_rows
from components.run_directory import RunDirectory
from components.units import format_count
from recipes.bad_steps import NonFiniteError
from recipes.config import Config, ConfigError, derive
from recipes.critical_batch.branches import Branches, BranchPoint, find_branch_point
from recipes.critical_batch.report import Branch, Report, draw_report
from recipes.errors import RunError, config_errors_at
from recipes.pretrain import Pretrain
from recipes.resume import Resume, check_resumable, diff_config, is_inside, rule_of
from recipes.run_setup import remove_old_run
from recipes.training_state import read_run_state

log = logging.getLogger("powertrain")

BRANCH = "recipes.pretrain:Pretrain"


@dataclass(frozen=True, kw_only=True)
class CriticalBatch(Pretrain):
    """The sections of pre-training, and [branches]. [batch] and [lr_schedule] give way to what is measured."""

    branches: Branches

    def check(self) -> Iterator[tuple[str, str]]:
        """As of pre-training, but that the batch of a branch is constant: it need not be measured."""
        yield from (problem for problem in super().check() if problem[0] != "gradient_noise.interval_steps")

    def main(self, config: Config, resume: Resume | None) -> int:
        """Train the branches that are missing, then compare all; returns the exit status."""
        with ExitStack() as cleanup:
            with config_errors_at(config, "run.device"):
                world = DistributedContext.init(self.run.device)  # the branches join what is joined here
            cleanup.push(world.close_unless_failed)
            measurement = CriticalBatchMeasurement(self, config, world.size)

            def take() -> None:
                measurement.directory.check_links(measurement.folder)
                if world.is_main and cleanup.enter_context(measurement.directory.held()):
                    measurement.directory.sweep(measurement.report, measurement.begun)

            with config_errors_at(config, "run"):
                world.main_process_first(take)
            measurement.open(world, resume)
            log.info("\n".join(measurement.plan()))
            for factor in self.branches.factors:
                status = measurement.train(factor)
                if status:
                    return status
            if world.is_main:
                setup_logging(measurement.directory.log, to_console=True)
                report(measurement)
            return 0

    def dry_run(self, config: Config, world_size: int) -> int:
        """Check what can be checked, and show the branches."""
        print("\n".join(CriticalBatchMeasurement(self, config, world_size).plan()))
        return 0


class CriticalBatchMeasurement:
    """The branches of one checkpoint. Raises ConfigError where they cannot be trained."""

    def __init__(self, recipe: CriticalBatch, config: Config, world_size: int) -> None:
        self.recipe, self.config, self.branches = recipe, config, recipe.branches
        self.directory = RunDirectory(recipe.run.directory)
        self.folder = self.directory.path / "branches"
        self.begun = self.folder / "start.json"
        self.report = self.directory.path / "critical_batch.json"
        self.picture = self.report.with_suffix(".png")
        with config_errors_at(config, "parallel"):
            sizes = recipe.parallel.mesh_shape(world_size)
        layout = BatchRounding(recipe.training.micro_batch_size, sizes.dp_size)
        self.length = recipe.training.sequence_length
        with config_errors_at(config, "branches"):
            self.start = find_branch_point(self.branches, layout, config)
            own = [self.directory.path, self.folder, *self.folder.glob("k-*"), *self.folder.glob("k-*/checkpoints")]
            if any(is_inside(Path(self.start.checkpoint), place) for place in own):  # any of them may be a link
                raise InputError(
                    "checkpoint",
                    f"{self.start.checkpoint} lies in the directory of this run; "
                    "give the measurement a --run.name of its own",
                )
            largest = self.branches.factors[-1] * self.start.batch * self.length
            if self.branches.tokens < largest:
                raise InputError(
                    "tokens",
                    f"less than the {largest} of one step at factor {self.branches.factors[-1]}; "
                    "take more tokens, or leave out the largest factors",
                )
        self.tokens = -(-self.branches.tokens // largest) * largest
        check_resumable(Path(self.start.checkpoint), self.of(1))

    @cached_property
    def smoothing_tokens(self) -> int:
        return self.branches.smoothing_tokens or -(-self.tokens // 4)

    def of(self, factor: int) -> Config:
        """The configuration of a branch: all of this one but where, how far, and with which batch and rate."""
        checkpoint, start = self.recipe.checkpoint, self.start
        interval = checkpoint.interval_steps
        return derive(
            self.config,
            BRANCH,
            {
                "run": {
                    "name": f"{self.recipe.run.name}, k = {factor}",
                    "dir": str(self.folder / f"k-{factor:03d}"),
                    "if_exists": "replace",  # what is there without a checkpoint is worth nothing
                },
                "training": {"total_tokens": start.tokens + self.tokens},
                "batch": {"use": "components.batch:Constant", "initial": factor * start.batch},
                "lr_schedule": {
                    "use": "components.lr_schedules:Constant",
                    "max_lr": start.lr * math.sqrt(factor),
                    "warmup_tokens": 0,
                },
                # as often in tokens as the first branch, and no more than continuing it needs
                "checkpoint": {
                    "interval_steps": "none" if interval is None else max(1, interval // factor),
                    "keep_last": 1,
                    "keep_every": "none",
                },
            },
            why=f"branch k = {factor}",
        )

    def plan(self) -> Iterator[str]:
        """The branches in lines."""
        start = self.start
        yield f"branches of {start.checkpoint}: step {start.step}, {format_count(start.tokens)} tokens"
        yield f"{'k':>6} {'batch':>8} {'batch tokens':>13} {'steps':>8} {'lr':>10}"
        for factor in self.branches.factors:
            batch, rate = factor * start.batch, start.lr * math.sqrt(factor)
            tokens = format_count(batch * self.length)
            yield f"{factor:>6} {batch:>8} {tokens:>13} {self.steps(factor):>8} {rate:>10.3g}"
        in_all = format_count(len(self.branches.factors) * self.tokens)
        yield f"{format_count(self.tokens)} tokens each, {in_all} in all, in {self.folder}"

    def steps(self, factor: int) -> int:
        return -(-self.tokens // (factor * self.start.batch * self.length))

    def open(self, world: DistributedContext, resume: Resume | None) -> None:
        """Make the run directory ready, or find it so. The branches in it are kept only for the same measurement."""

        def claim() -> None:
            if world.is_main:
                self.directory.claim("a measurement of the critical batch", (self.folder, self.report, self.picture))

        launch = os.environ.get(LAUNCH_ID)
        again = resume is not None or bool(world.all_reduce_max(self.directory.belongs_to(launch)))
        begun = self.begun
        with config_errors_at(self.config, "run"):
            if resume is not None and resume.path is not None:
                raise ValueError("--resume=PATH: what to branch from is branches.checkpoint; say --resume alone")
            if resume is not None and not begun.exists():
                raise ValueError(f"--resume: no branches in {self.folder}; leave --resume out to start")
            world.main_process_first(claim)
            if again and begun.exists():
                self._compare(begun)
            elif begun.exists() and self.recipe.run.if_exists == "refuse":
                raise ValueError(
                    f"{self.directory.path} already holds a measurement; continue it with --resume, give this one "
                    "another --run.name, or say --run.if_exists=replace"
                )
        launches = world.gather(launch or "")

        def store() -> None:
            if not world.is_main:
                return
            if not (again and begun.exists()):
                self._remove()
            self.folder.mkdir(parents=True, exist_ok=True)
            if launch is not None:
                self.directory.remember(launches)
            atomic_write(self.directory.config, self.config.to_toml())
            atomic_write(begun, json.dumps(asdict(self.start), indent=1) + "\n")

        world.barrier()  # nobody may still be looking at what is deleted here
        with config_errors_at(self.config, "run"):
            world.main_process_first(store)
        setup_logging(self.directory.log if world.is_main else None, to_console=world.is_main)

    def _remove(self) -> None:
        """Remove what an earlier measurement has written, and nothing else: a branch is known by its mark."""
        for branch in map(RunDirectory, sorted(self.folder.glob("k-*"))):
            remove_old_run(branch)
            branch.release()
        self.directory.clear()
        self.directory.stop.unlink(missing_ok=True)
        for written in (self.begun, self.report, self.picture):
            written.unlink(missing_ok=True)

    def train(self, factor: int) -> int:
        """Train a branch to its end, from its newest checkpoint if it has one; returns the exit status.

        One whose loss is not finite has ended, too: the batch was too large, or its rate.
        """
        config = self.of(factor)
        own = list_checkpoints(config.recipe.run.directory / "checkpoints")
        if own and self._is_finished(factor, own[-1]):
            log.info(f"branch k = {factor} is finished")
            return 0
        # a branch that ended between its last save and its validation is trained again
        unfinished = own and read_run_state(own[-1])["clock"]["tokens"] < config.recipe.training.total_tokens
        try:
            status: int = config.recipe.main(config, Resume(None if unfinished else Path(self.start.checkpoint)))
        except NonFiniteError as error:
            if factor == 1:
                raise
            log.error(f"branch k = {factor}: {error}")
            status = 0
        gc.collect()  # a model holds itself in cycles, and the next one needs its memory
        return status

    def rows(self, factor: int) -> list[dict[str, Any]]:
        """What a branch wrote of the steps of this measurement."""
        last = self.start.step + self.steps(factor)
        return [row for row in read_rows(RunDirectory(self.folder / f"k-{factor:03d}").metrics) if row["step"] <= last]

    def branch(self, factor: int) -> Branch:
        """What a finished branch has shown."""
        start, rows = self.start, self.rows(factor)
        validated = [row["val_loss"] for row in rows if "val_loss" in row]
        return Branch(
            factor=factor,
            batch=factor * start.batch,
            batch_tokens=factor * start.batch * self.length,
            lr=start.lr * math.sqrt(factor),
            steps=self.steps(factor),
            losses=tuple(math.nan if row["loss"] is None else row["loss"] for row in rows if "loss" in row),
            val_loss=validated[-1] if validated and rows[-1]["step"] == start.step + self.steps(factor) else None,
            noise_scales=tuple(row["noise_scale"] for row in rows if row.get("noise_scale") is not None),
        )

    def _is_finished(self, factor: int, newest: Path) -> bool:
        rows = self.rows(factor)
        reached = read_run_state(newest)["clock"]["tokens"] >= self.start.tokens + self.tokens
        return reached and (
            self.recipe.validation is None or any("val_loss" in row for row in rows if row["step"] == rows[-1]["step"])
        )

    def _compare(self, begun: Path) -> None:
        """Raises ValueError if the branches that are there are not of this measurement."""
        try:
            before = BranchPoint(**json.loads(begun.read_bytes()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"--resume: {begun} is damaged: {error}") from None
        if before != self.start:
            raise ValueError(
                f"--resume: {self.directory.path} began with {before}, this is {self.start}; "
                "give this measurement a --run.name of its own, or the old one its branches.checkpoint, batch and lr"
            )
        unused = ("branches.", "batch.", "lr_schedule.")
        problems = [
            self.config.problem(key, f"{old!r} in the finished branches, {now!r} now; give this one a --run.name")
            for key, old, now in diff_config(self.directory.config, self.config)
            if rule_of(key) != "free" and not key.startswith(unused)
        ]
        if problems:
            raise ConfigError(problems)


def report(measurement: CriticalBatchMeasurement) -> None:
    """Table, critical_batch.json and picture."""
    branches, start = measurement.branches, measurement.start
    found = Report(
        branches=tuple(measurement.branch(factor) for factor in branches.factors),
        smoothing_tokens=measurement.smoothing_tokens,
        tolerance=branches.tolerance,
        sequence_length=measurement.length,
    )
    if not math.isfinite(found.losses[0]):
        raise RunError("the branch k = 1 has a loss that is not finite: there is nothing to compare with")
    log.info("\n".join(found.lines()))
    written = {**asdict(start), "branch_tokens": measurement.tokens, **found.summary()}
    path = measurement.report
    atomic_write(path, json.dumps(written, indent=1) + "\n")
    log.info(f"wrote {path}")
    try:
        draw_report(found, measurement.picture)
    except ValueError as error:
        log.warning(f"{error}; then --resume draws {measurement.picture.name}")
