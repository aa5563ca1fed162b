"""The main job: pre-train a language model from scratch, or continue where a run stopped.

`TrainingRun.train` is the loop. Everything it calls is a component that the recipe named.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from components import precision
from components.batch.adaptive import Adaptive
from components.batch.layout import BatchLayout, StepBatch
from components.checkpoint import Checkpoint, TrainingTensors
from components.clock import Clock
from components.data.loader import MicroBatchLoader
from components.garbage_collection import GarbageCollection
from components.gradient_moments import GradientMeter, MeasureMoments
from components.guard import Guard
from components.metrics.console import start_log
from components.metrics.monitor import Metrics, Monitor
from components.parallel import fsdp
from components.parallel.elastic import launched_at
from components.parallel.layout import Parallel
from components.parallel.world import World
from components.quantities import format_count
from components.run_directory import RunDirectory
from components.stop_signal import NOTHING, SAVE, Requests, StopSignal, exit_status, reason, stops
from components.storage import give_storage
from components.throughput import Waited, device_memory, peak_flops
from components.train_step import TrainStep
from components.validation import HeldOut
from recipes.bad_steps import answer
from recipes.config import Config
from recipes.contracts import BatchPolicy, Data, HasPlan, LRSchedule, Model, Optimizer, Tokenizer
from recipes.course import follow_schedule
from recipes.divide import divide
from recipes.errors import RunError, blame
from recipes.language_model import build_model, keep_documents_apart
from recipes.micro_batches import checked
from recipes.opening import open_run
from recipes.resume import Resume, compare
from recipes.run_state import restore, state_of
from recipes.sections import Run, Training
from recipes.step_row import step_row
from recipes.unprepared import refuse_unprepared

log = logging.getLogger("powertrain")


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
    guard: Guard = field(default_factory=Guard)

    @property
    def device(self) -> str:
        """Where it computes, for the launcher, which starts a process for each GPU."""
        return self.run.device

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
        """Run to the end, or until it is asked to stop; returns the exit status."""
        with ExitStack() as cleanup:
            request = TrainingRun(self, config, resume, cleanup).train()
        return exit_status(request) if stops(request) else 0


class TrainingRun:
    """A recipe, wired up."""

    def __init__(self, recipe: Pretrain, config: Config, resume: Resume | None, cleanup: ExitStack) -> None:
        self.recipe, self.config = recipe, config
        signals = cleanup.enter_context(StopSignal())
        with blame(config, "run.device"):
            self.world = World.start(recipe.run.device)
        cleanup.push(self.world.stop_unless_failed)
        directory = RunDirectory(recipe.run.directory)
        opened = open_run(directory, config, resume, self.world, cleanup)
        checkpoint = opened.checkpoint
        with blame(config, "run"):
            console = start_log(directory.log if self.world.is_main else None, speak=self.world.is_main)
        for warning in opened.warnings:
            log.warning(warning)
        if checkpoint is not None:
            compare(checkpoint, config)
        limit = recipe.run.max_minutes
        self.requests = Requests(
            signals,
            file=directory.stop if self.world.is_main else None,
            ends_at=None if limit is None else launched_at() + 60 * limit,
        )

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
        self.vocab_size, self.tokenizer_fingerprint = tokenizer.vocab_size, tokenizer.fingerprint
        text: dict[str, Any] = {
            "tokenizer": tokenizer,
            "sequence_length": training.sequence_length,
            "cache_dir": recipe.run.cache_dir,
            "progress": log.info,
        }
        refuse_unprepared(config, tokenizer, self.world)
        with blame(config, "data"):
            self.samples = self.world.main_first(lambda: recipe.data.build(**text))
            self.content: str | None = getattr(self.samples, "fingerprint", None)
            if not self.world.agree(f"{len(self.samples)} {self.content}"):
                raise ValueError(
                    f"the processes do not see the same data; this one has {len(self.samples):,} sequences. Every node "
                    "needs the same files"
                )
        self.validation = None
        if (held_out := recipe.validation) is not None:
            with blame(config, "validation"):
                self.validation = self.world.main_first(lambda: held_out.open(**text))

        model = build_model(config, tokenizer.vocab_size)
        if training.attention_within == "document":
            with blame(config, "data"):
                keep_documents_apart(model, self.samples, tokenizer.end_of_document)
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
        self.guard = recipe.guard.build()
        if checkpoint is not None:
            with blame(config, "checkpoint"):
                restore(self, checkpoint)
        with blame(config, "batch"):
            self._check_that_noise_shows()
        self.store.saved_step = self.started_at = self.clock.step

        with blame(config, "data"):
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
        opened.begin()
        self.garbage = GarbageCollection(training.gc_interval_steps)
        cleanup.callback(self.garbage.close)
        self.flops_per_token = model.flops_per_token(training.sequence_length)
        self.peak_flops = peak_flops(device, precision.dtype_of(self.precision))
        self.monitor = Monitor([])
        if self.world.is_main:
            with blame(config, "run"):
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
        """The loop. Returns the request that ended it, or NOTHING when all tokens were trained."""
        request = NOTHING
        while not self.clock.done and not stops(request):
            started = time.perf_counter()
            batch = self.layout.fit(self.recipe.batch.samples(self.clock))
            step_tokens = batch.samples * self.sequence_length
            micro_batches = Waited(checked(self, self.loader.next_step(batch.micro_batches)))
            loss = self.step.accumulate(micro_batches, batch.micro_batches, step_tokens, measure=self.measures(batch))
            grad_norm, moments = self.step.clip()
            lr = self.recipe.lr_schedule.lr(self.clock.tokens, step_tokens, self.clock.total_tokens)
            if (bad := self.guard.judge(loss, grad_norm)) is None:
                self.step.update(lr, step_tokens)
            else:
                answer(self, bad, batch)

            self.clock.advance(batch.samples)
            self.loader.consumed()
            noise = self.noise.update(self.clock.samples, moments) if moments and not bad else None
            self.recipe.batch.observe(self.clock, noise)
            seconds = {"data_seconds": micro_batches.seconds, "step_seconds": time.perf_counter() - started}
            self.monitor.write(step_row(self, batch, noise, loss=loss, lr=lr, grad_norm=grad_norm, **seconds))

            if self.due(getattr(self.recipe.validation, "interval_steps", None)):
                self.validate()
            if self.due(self.recipe.checkpoint.interval_steps):
                self.save()
            request = self.world.maximum(self.requests.pending())
            if request == SAVE:
                self.requests.saved()
                self.save()
            if self.clock.step == self.started_at + 1:
                self.world.shorten_timeouts()
            self.garbage.after_step(self.clock.step)
        self.finish(request)
        return request

    def due(self, interval_steps: int | None) -> bool:
        """Whether something that happens every `interval_steps` happens now; the end of the run has its own."""
        return interval_steps is not None and self.clock.step % interval_steps == 0 and not self.clock.done

    def finish(self, request: int) -> None:
        """Save what is not saved, validate at the end, and tell again what went wrong on the way."""
        if self.clock.step == self.started_at:
            log.info(f"nothing to do: all {self.clock.total_tokens} tokens are trained; raise training.total_tokens")
            return
        self.store.wait()
        if self.store.saved_step != self.clock.step:
            self.save()
        if not stops(request) or self.clock.done:
            self.validate()
        self.store.wait()
        self.monitor.flush()
        self.requests.clear_file()
        for failed in self.store.failed_steps:
            log.error(f"the checkpoint of step {failed} could not be saved")
        for failure in self.monitor.failures():
            log.error(failure)
        if self.store.saved_step != self.clock.step:
            raise RunError(
                f"the run ended at step {self.clock.step}, which is not saved; the newest checkpoint is "
                f"{self.store.newest() or 'none'}. Make room, or mend the disk, and continue with --resume"
            )
        if stops(request) and not self.clock.done:
            log.info(f"stopped by {reason(request)} after step {self.clock.step}; continue with --resume")
        else:
            log.info(f"done: {format_count(self.clock.tokens)} tokens in {self.clock.step} steps")

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
        """Write a checkpoint of everything the next step depends on; if that fails it is told, and training goes on."""
        self.monitor.flush()  # no checkpoint is ahead of the metrics
        step = self.clock.step
        saved = self.store.save(step, self.tensors.collect(), state_of(self), self.config.to_toml())
        if saved is not False:
            log.info(f"step {step:>6}  {'saved' if saved else 'saving in the background'} {self.store.path(step)}")

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
