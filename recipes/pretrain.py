"""The main job: pre-train a language model from scratch, or continue where a run stopped.

`TrainingRun.train` is the loop. Everything it calls is a component that the recipe named.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from components import precision
from components.batch.adaptive import Adaptive
from components.batch.layout import BatchLayout, StepBatch
from components.checkpoint import Checkpoint, TrainingTensors, read_state
from components.clock import Clock
from components.data.loader import MicroBatchLoader
from components.gradient_moments import GradientMeter, MeasureMoments
from components.metrics.console import start_log
from components.metrics.monitor import Metrics, Monitor
from components.parallel import fsdp
from components.parallel.elastic import LAUNCH
from components.parallel.layout import Parallel
from components.parallel.world import World
from components.quantities import format_count
from components.run_directory import RunDirectory
from components.stop_signal import StopSignal
from components.storage import give_storage
from components.throughput import Waited, device_memory, peak_flops
from components.train_step import TrainStep
from components.validation import HeldOut
from recipes.config import Config
from recipes.contracts import BatchPolicy, Data, HasPlan, LanguageModel, LRSchedule, Model, Optimizer, Tokenizer
from recipes.course import follow_schedule
from recipes.divide import divide
from recipes.errors import RunError, blame
from recipes.resume import Resume, compare, find_checkpoint
from recipes.sections import Run, Training
from recipes.step_row import step_row

log = logging.getLogger("powertrain")


class NonFiniteError(RunError):
    """The loss or the gradient norm of a step is not finite, and the recipe says stop."""


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    """Pre-training. Its parameters are the sections of the recipe."""

    model: Model
    tokenizer: Tokenizer
    data: Data
    training: Training
    optimizer: Optimizer
    lr_schedule: LRSchedule
    batch: BatchPolicy
    gradient_moments: MeasureMoments = field(default_factory=MeasureMoments)
    run: Run = field(default_factory=Run)
    parallel: Parallel = field(default_factory=Parallel)
    validation: HeldOut | None = None
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    metrics: Metrics = field(default_factory=Metrics)

    def check(self) -> Iterator[tuple[str, str]]:
        """Problems that only show across sections, as (dotted path, message)."""
        warmup = getattr(self.lr_schedule, "warmup_tokens", 0)
        if warmup > self.training.total_tokens:
            yield (
                "lr_schedule.warmup_tokens",
                f"{warmup} tokens of warm-up do not end within training.total_tokens = {self.training.total_tokens}",
            )
        if isinstance(self.batch, Adaptive) and self.gradient_moments.interval_steps is None:
            yield (
                "gradient_moments.interval_steps",
                f"never measured, the gradient gives {type(self.batch).__name__} nothing to follow; leave it out, or "
                "take components.batch.constant:Constant",
            )
        tp = self.parallel.tp
        if self.training.sequence_length % tp:
            yield "parallel.tp", f"training.sequence_length = {self.training.sequence_length} cannot be divided by {tp}"
        if isinstance(self.model, HasPlan):
            try:
                self.model.plan(tp=tp)
            except ValueError as error:
                yield "parallel.tp", str(error)
        elif tp > 1:
            yield "parallel.tp", f"{type(self.model).__name__} has no plan(tp) to divide it by"

    def main(self, config: Config, resume: Resume | None) -> int:
        """Run to the end, or to a signal; returns the exit status."""
        with ExitStack() as cleanup:
            run = TrainingRun(self, config, resume, cleanup)
            stopped_by = run.train()
        return 128 + stopped_by if stopped_by else 0


class TrainingRun:
    """A recipe, wired up."""

    def __init__(self, recipe: Pretrain, config: Config, resume: Resume | None, cleanup: ExitStack) -> None:
        self.recipe, self.config = recipe, config
        self.stop = cleanup.enter_context(StopSignal())
        with blame(config, "run.device"):
            self.world = World.start(recipe.run.device)
        cleanup.callback(self.world.stop)
        directory = RunDirectory(recipe.run.directory)
        checkpoint = self._open(directory, resume)
        console = start_log(directory.log if self.world.is_main else None, speak=self.world.is_main)
        if checkpoint is not None:
            compare(checkpoint, config)
        if self.world.is_main:
            directory.config.write_text(config.to_toml(), encoding="utf-8")

        torch.manual_seed(recipe.run.seed + self.world.rank)
        torch.use_deterministic_algorithms(recipe.run.deterministic)
        training, device = recipe.training, self.world.device
        self.sequence_length = training.sequence_length
        self.precision = precision.resolve(training.precision, device)
        self.clock = Clock(training.total_tokens, training.sequence_length)
        with blame(config, "batch"):
            follow_schedule(recipe)
        self.noise, self.told_unmeasurable = recipe.gradient_moments.build(), False
        self.parallel = recipe.parallel.build(self.world)
        self.ranks = self.parallel.data
        self.layout = BatchLayout(training.micro_batch_size, self.ranks.size)

        with blame(config, "tokenizer"):
            tokenizer = recipe.tokenizer.build()
        self.vocab_size = tokenizer.vocab_size
        text: dict[str, Any] = {
            "tokenizer": tokenizer,
            "sequence_length": training.sequence_length,
            "cache_dir": recipe.run.cache_dir,
            "progress": log.info,
        }
        with blame(config, "data"):
            self.samples = self.world.main_first(lambda: recipe.data.build(**text))
        self.validation = None
        if (held_out := recipe.validation) is not None:
            with blame(config, "validation"):
                self.validation = self.world.main_first(lambda: held_out.open(**text))

        with blame(config, "model"), torch.device("meta"):
            model = recipe.model.build(vocab_size=tokenizer.vocab_size, sequence_length=training.sequence_length)
            if not isinstance(model, LanguageModel):
                raise ValueError(
                    f"use: builds a {type(model).__name__}, which is no LanguageModel of recipes.contracts"
                )
        divide(model, recipe.model, self.parallel, precision.dtype_of(self.precision), training)
        give_storage(model, device)
        if recipe.run.init_from is None or checkpoint is not None:
            model.init_weights(recipe.run.seed)
        else:
            from recipes.initial_weights import read_initial_weights  # brings every model along

            with blame(config, "run"):
                read_initial_weights(model, recipe.run.init_from)
        self.model: nn.Module = model
        with blame(config, "optimizer"):
            optimizer = recipe.optimizer.build(parameters=model.named_parameters(), lr_multiplier=model.lr_multiplier)
        self.step = TrainStep(
            model,
            optimizer,
            self.ranks,
            meter=GradientMeter(model, device, self.world.sum),
            reduction=fsdp.GradientReduction(
                model, training.accumulation, tp=recipe.parallel.tp, device_memory=device_memory(device)
            ),
            max_grad_norm=training.max_grad_norm,
            # FSDP2 hands out parameters in the precision wanted; autocast would cast what is cast already
            arithmetic=lambda: precision.autocast("float32" if self.parallel.fsdp else self.precision, device),
        )
        self.tensors = TrainingTensors(model, optimizer, self.world)
        self.store = recipe.checkpoint.build(directory.checkpoints, self.world)
        cleanup.callback(self.store.close)
        self.store.clean()
        if checkpoint is not None:
            with blame(config, "checkpoint"):
                self._restore(checkpoint)
        with blame(config, "batch"):
            self._check_that_noise_shows()
        self.saved_at = self.started_at = self.clock.step

        self.loader = MicroBatchLoader(
            self.samples,
            seed=recipe.run.seed,
            micro_batch_size=training.micro_batch_size,
            dp_rank=self.ranks.rank,
            dp_size=self.ranks.size,
            start=self.clock.samples,
            num_workers=training.loader_workers,
            pin_memory=device.type == "cuda",
        )
        cleanup.callback(self.loader.close)
        self.flops_per_token = model.flops_per_token(training.sequence_length)
        self.peak_flops = peak_flops(device, precision.dtype_of(self.precision))
        self.monitor = Monitor([])
        if self.world.is_main:
            self.monitor = recipe.metrics.build(
                jsonl=directory.metrics,
                tensorboard=directory.tensorboard,
                console=console,
                after_step=self.clock.step,
                total_tokens=training.total_tokens,
            )
        cleanup.callback(self.monitor.close)
        self._introduce(directory)

    def train(self) -> int:
        """The loop. Returns the signal that ended it, or 0 when all tokens were trained."""
        stopped_by = 0
        while not self.clock.done and not stopped_by:
            started = time.perf_counter()
            batch = self.layout.fit(self.recipe.batch.samples(self.clock))
            step_tokens = batch.samples * self.sequence_length
            micro_batches = Waited(self.loader.next_step(batch.micro_batches))
            loss = self.step.accumulate(micro_batches, batch.micro_batches, step_tokens, measure=self.measures(batch))
            grad_norm, moments = self.step.clip()
            lr = self.recipe.lr_schedule.lr(self.clock.tokens, step_tokens, self.clock.total_tokens)
            if math.isfinite(loss) and math.isfinite(grad_norm):
                self.step.update(lr, step_tokens)
            else:
                self.refuse_update(loss, grad_norm, batch)

            self.clock.advance(batch.samples)
            self.loader.consumed()
            noise = self.noise.update(self.clock.samples, moments) if moments else None
            self.recipe.batch.observe(self.clock, noise)
            seconds = {"data_seconds": micro_batches.seconds, "step_seconds": time.perf_counter() - started}
            self.monitor.write(step_row(self, batch, noise, loss=loss, lr=lr, grad_norm=grad_norm, **seconds))

            if self.due(getattr(self.recipe.validation, "interval_steps", None)):
                self.validate()
            if self.due(self.recipe.checkpoint.interval_steps):
                self.save()
            stopped_by = self.world.maximum(self.stop.received)
        self.finish(stopped_by)
        return stopped_by

    def due(self, interval_steps: int | None) -> bool:
        """Whether something that happens every `interval_steps` happens now; the end of the run has its own."""
        return interval_steps is not None and self.clock.step % interval_steps == 0 and not self.clock.done

    def finish(self, stopped_by: int) -> None:
        if self.clock.step == self.started_at:
            log.info(f"nothing to do: all {self.clock.total_tokens} tokens are trained; raise training.total_tokens")
            return
        if self.clock.step > self.saved_at:
            self.save()
        if not stopped_by or self.clock.done:
            self.validate()
        self.store.wait()
        if stopped_by and not self.clock.done:
            log.info(f"stopped by signal {stopped_by} after step {self.clock.step}; continue with --resume")
        else:
            log.info(f"done: {format_count(self.clock.tokens)} tokens in {self.clock.step} steps")

    def refuse_update(self, loss: float, grad_norm: float, batch: StepBatch) -> None:
        """Leave out the update of a step whose numbers are not finite; stop the run unless the recipe says skip."""
        self.step.discard()
        first, last = self.clock.samples, self.clock.samples + batch.samples - 1
        what = f"step {self.clock.step + 1} (samples {first} to {last}): loss {loss}, gradient norm {grad_norm}"
        if self.recipe.training.on_nonfinite == "skip":
            log.warning(f"{what}; its update is left out")
            return
        if self.clock.step > self.saved_at:
            self.save()
        raise NonFiniteError(
            f"{what}. The parameters were not updated; the last good checkpoint is {self.store.newest() or 'none'}. "
            "To leave such steps out, continue with --resume --training.on_nonfinite=skip"
        )

    def measures(self, batch: StepBatch) -> bool:
        """Whether the gradient noise of the step that starts now is measured."""
        interval = self.recipe.gradient_moments.interval_steps
        if interval is None or self.clock.step % interval or not self.recipe.batch.measures(self.clock):
            return False
        if batch.micro_batches * self.ranks.size > 1:
            return True
        if not self.told_unmeasurable:
            self.told_unmeasurable = True
            log.info(
                f"a step of one micro-batch of {batch.samples} samples does not show the noise of its gradient; "
                "a smaller training.micro_batch_size or a larger batch would"
            )
        return False

    def validate(self) -> None:
        if self.validation is not None:
            numbers = self.validation.evaluate(self.model, self.ranks, self.step.arithmetic)
            self.monitor.write({"step": self.clock.step, "tokens": self.clock.tokens, **numbers})

    def save(self) -> None:
        """Write a checkpoint of everything the next step depends on."""
        state = {
            "clock": self.clock.state_dict(),
            "batch": dict(self.recipe.batch.state_dict()),
            "gradient_noise": self.noise.state_dict(),
            "loader": {"cursor": self.clock.samples, "epoch_length": len(self.samples)},
            "vocab_size": self.vocab_size,
            "world_size": self.world.size,
        }
        path = self.store.save(self.clock.step, self.tensors.collect(), state, self.config.to_toml())
        self.saved_at = self.clock.step
        done = "saving in the background" if self.recipe.checkpoint.async_save else "saved"
        log.info(f"step {self.clock.step:>6}  {done} {path}")

    def _open(self, directory: RunDirectory, resume: Resume | None) -> Path | None:
        """Make the run directory ready; returns the checkpoint to continue, if any."""
        launch = os.environ.get(LAUNCH)
        # Processes that were started again after a failure find the directory as they left it, and may use it.
        restarted = bool(self.world.maximum(directory.belongs_to(launch)))
        with blame(self.config, "run"):
            checkpoint = find_checkpoint(resume, directory.checkpoints, restarted=restarted)
            if directory.used and (checkpoint is None or not checkpoint.is_relative_to(directory.path)):
                if self.recipe.run.if_exists == "refuse" and not restarted:
                    raise ValueError(
                        f"{directory.path} already holds a run; continue it with --resume, give this one another "
                        "--run.name, or say --run.if_exists=replace"
                    )
                self.world.barrier()  # nobody may still be looking for what is deleted here
                if self.world.is_main:
                    directory.clear()
            self.world.barrier()  # nobody may still be asking whose it is
            directory.create(launch if self.world.is_main else None)
        self.world.barrier()
        return checkpoint

    def _restore(self, checkpoint: Path) -> None:
        state = read_state(checkpoint)
        if state["vocab_size"] != self.vocab_size:
            raise ValueError(
                f"{checkpoint} was trained with a vocabulary of {state['vocab_size']}, not {self.vocab_size}"
            )
        self.tensors.restore(checkpoint)
        self.clock.load_state_dict(state["clock"])
        self.recipe.batch.load_state_dict(state["batch"])
        if "gradient_noise" in state:  # checkpoints of before noise was measured have none
            self.noise.load_state_dict(state["gradient_noise"])
        if state["loader"]["epoch_length"] != len(self.samples):
            log.warning(
                f"the data has {len(self.samples)} sequences, it had {state['loader']['epoch_length']}: "
                "the order of samples is another from here on"
            )
        log.info(f"resumed from {checkpoint}: step {self.clock.step}, {self.clock.tokens} tokens")

    def _check_that_noise_shows(self) -> None:
        """Raises ValueError for a batch that follows the gradient and could never do so."""
        if not isinstance(self.recipe.batch, Adaptive):
            return
        batch = self.layout.fit(self.recipe.batch.samples(self.clock))
        if batch.micro_batches * self.ranks.size < 2:
            raise ValueError(
                f"initial: a step of {batch.samples} samples is one micro-batch and does not show the noise of its "
                f"gradient, so the batch could never change; take {2 * self.layout.unit} or a smaller "
                "training.micro_batch_size"
            )

    def _introduce(self, directory: RunDirectory) -> None:
        """The first lines of the log: what is about to happen."""
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        total = self.clock.total_tokens
        log.info(
            f"{self.recipe.run.name}: {format_count(parameters)} parameters, vocabulary {self.vocab_size}, "
            f"{self.precision} on {self.world.size} x {self.world.device.type}, in {directory.path}"
        )
        log.info(
            f"{format_count(total)} tokens, {total / (len(self.samples) * self.sequence_length):.2f} epochs "
            f"of {format_count(len(self.samples))} sequences of {self.sequence_length}"
        )
