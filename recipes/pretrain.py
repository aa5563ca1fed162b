"""The main job: pre-train a language model from scratch, or continue where a run stopped.

`TrainingRun.train` is the loop. Everything it calls is a component that the recipe named.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from components import precision
from components.batch.adaptive import Adaptive
from components.batch.layout import BatchLayout, StepBatch
from components.checkpoint import Checkpoint, TrainingTensors
from components.clock import Clock
from components.data.loader import MicroBatchLoader, check_workers
from components.garbage_collection import GarbageCollection
from components.gradient_moments import GradientMeter, GradientNoise, MeasureMoments, backward_parameters
from components.guard import BadStep, Guard
from components.metrics.console import start_log
from components.metrics.jsonl import last_row
from components.metrics.monitor import Metrics, Monitor
from components.parallel import fsdp
from components.parallel.elastic import launched_at
from components.parallel.layout import Parallel
from components.parallel.world import World
from components.processes import attempt
from components.profiler import ProfilerConfig
from components.quantities import format_count
from components.run_directory import RunDirectory
from components.stop_signal import NOTHING, SAVE, Requests, StopSignal, exit_status, reason, stops
from components.storage import give_storage
from components.throughput import peak_flops
from components.train_step import TrainStep, not_finite
from components.validation import HeldOut
from components.working_weights import WorkingWeights
from recipes.bad_steps import answer, learning_rate, require_finite_state
from recipes.config import Config, ConfigError, error_message
from recipes.contracts import BatchPolicy, Data, HasPlan, LRSchedule, Model, Optimizer, ReportsMetrics, Tokenizer
from recipes.divide import divide
from recipes.dry_run.memory import decide_grad_sync
from recipes.dry_run.schedule_preview import bind_schedule
from recipes.errors import RunError, blame, evaluate_together
from recipes.language_model import build_model, keep_documents_apart
from recipes.launched_step import LaunchedStep, StepResult, request_counts
from recipes.micro_batches import read_step
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
    profile: ProfilerConfig = field(default_factory=ProfilerConfig)

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
            except Exception as error:
                yield "parallel.tp", error_message(error)
        elif tp > 1:
            yield "parallel.tp", f"{type(self.model).__name__} has no plan(tp) to divide it by"

    def main(self, config: Config, resume: Resume | None) -> int:
        """Run to the end, or until it is asked to stop; returns the exit status."""
        with ExitStack() as cleanup:
            run = TrainingRun(self, config, resume, cleanup)
            try:
                request = run.train()
            except Exception as error:
                # All ranks raise these together. One that fails alone cannot save: the others wait for it elsewhere.
                if run.world.size == 1 or isinstance(error, (ConfigError, RunError)):
                    _, failure = attempt(run.save_before_end)
                    if failure is not None:
                        log.error(f"the state before this error could not be saved: {failure}")
                raise
        return exit_status(request) if stops(request) else 0


class TrainingRun:
    """A recipe, wired up."""

    def __init__(self, recipe: Pretrain, config: Config, resume: Resume | None, cleanup: ExitStack) -> None:
        self.recipe, self.config = recipe, config
        signals = cleanup.enter_context(StopSignal())
        with blame(config, "run.device"):
            self.world = World.start(recipe.run.device)
        cleanup.push(self.world.stop_unless_failed)
        with blame(config, "training.loader_workers"):
            check_workers(recipe.training.loader_workers)
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
            bind_schedule(recipe)
        with blame(config, "gradient_moments"):
            self.noise, self.told_unmeasurable = recipe.gradient_moments.build(), False
        with blame(config, "parallel"):
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

        model = build_model(config, self.vocab_size)
        dtype = precision.dtype_of(self.precision)
        local = decide_grad_sync(recipe, model, self.parallel.sizes, self.world, dtype)
        if training.attention_within == "document":
            with blame(config, "data"):
                keep_documents_apart(model, self.samples, tokenizer.end_of_document)
        if training.compiles(device):
            # compiled kernels are found again by the next run; it is read when the compiler is first imported
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(recipe.run.cache_dir / "compiled"))
        elif (why := training.slow_eager(device, recipe.parallel.tp)) is not None:
            log.warning(f'{why}: set training.compile = "auto"')
        with blame(config, "parallel"):
            divide(model, recipe.model, self.parallel, dtype, device, training)
        give_storage(model, device)
        if recipe.run.init_from is None or checkpoint is not None:
            with blame(config, "model"):
                model.init_weights(recipe.run.seed)
        else:
            from recipes.initial_weights import read_initial_weights  # brings every model along

            with blame(config, "run"):
                read_initial_weights(model, recipe.run.init_from)
        self.model: nn.Module = model
        # FSDP2 hands out parameters in the precision wanted; a model that is not sharded gets copies in it
        weights = None
        if self.parallel.fsdp is None and self.precision == "bf16":
            weights = WorkingWeights(model, torch.bfloat16)
        with blame(config, "optimizer"):
            optimizer = recipe.optimizer.build(parameters=model.named_parameters(), lr_multiplier=model.lr_multiplier)
        self.reduction = fsdp.GradientReduction(model, local=local)
        self.step = TrainStep(
            model,
            optimizer,
            self.ranks,
            self.world,
            meter=GradientMeter(weights.copies if weights else backward_parameters(model), device),
            reduction=self.reduction,
            max_grad_norm=training.max_grad_norm,
            compute=weights or nullcontext,
        )
        self.delay = read_delay(device, self.step, recipe.guard)
        self.tensors = TrainingTensors(model, optimizer, self.world)
        with blame(config, "checkpoint"):
            self.store = recipe.checkpoint.build(directory.checkpoints, self.world, run=opened.run)
        cleanup.callback(self.store.close)
        with blame(config, "guard"):
            self.guard = recipe.guard.build()
        self.launched: deque[tuple[LaunchedStep, BadStep | None]] = deque()
        self.observations: deque[tuple[Clock, GradientNoise | None]] = deque()
        self.request = NOTHING
        if checkpoint is not None:
            with blame(config, "checkpoint"):
                restore(self, checkpoint)
        with blame(config, "batch"):
            self._check_that_noise_shows()
        self.store.saved_step = self.started_at = self.clock.step
        self.is_sound = True
        """Whether tensors and clock belong together, as they do but during an update: only then may they be saved."""

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
        with blame(config, "profile"):
            self.profiler = recipe.profile.build(directory.profile, device=device, rank=self.world.rank)
        cleanup.push(self.profiler.close)
        with blame(config, "model"):
            self.flops_per_token = model.flops_per_token(training.sequence_length)
        opened.begin()
        self.garbage = GarbageCollection(training.gc_interval_steps)
        cleanup.callback(self.garbage.close)
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
                    run=opened.run,
                )
        cleanup.callback(self.monitor.close)
        self.lacks_validation = bool(self.world.maximum(int(self._lacks_validation(directory.metrics))))
        self._introduce(directory)

    def train(self) -> int:
        """The loop. Returns the request that ended it, or NOTHING when all tokens were trained."""
        self.read_at = time.perf_counter()
        if self.lacks_validation:
            self.validate()
        while not self.clock.done and not stops(self.request):
            self.profiler.start_step(self.clock.step + 1)
            self.launch(self.next_batch())
            self.read_launched(self.delay)
            self.observe()
            self.profiler.end_step()

            if self.request == SAVE or self.due(self.recipe.checkpoint.interval_steps):
                self.read_launched(0)  # a request that the step under way brings is met by this save, too
                self.request = NOTHING if self.request == SAVE else self.request
                self.requests.saved()
                self.save()
            # after the save, which data that cannot be read must not prevent
            if self.due(getattr(self.recipe.validation, "interval_steps", None)):
                self.validate()
            if self.clock.step == self.started_at + 1:
                self.world.shorten_timeouts()
                self._log_compiling()
            self.garbage.after_step(self.clock.step)
        self.finish(self.request)
        return self.request

    def launch(self, batch: StepBatch) -> None:
        """Give the device the next step, and advance the clock."""
        started, step_tokens = time.perf_counter(), batch.samples * self.sequence_length
        lr = learning_rate(self, step_tokens)
        micro_batches = read_step(self, batch)
        data_seconds, measured, numbers, bad = time.perf_counter() - started, False, None, None
        if micro_batches is not None:
            measured = self.measures(batch)
            numbers = self.step.accumulate(
                micro_batches, batch.micro_batches, step_tokens, measure=measured, more=self._summands
            )
        after = replace(self.clock)
        after.advance(batch.samples)
        launched = LaunchedStep(after, batch, lr, numbers, self.ranks.size, measured, data_seconds)
        if numbers is not None:
            if not self.delay and (bad := self._judge(launched.read())) is not None:
                self.step.discard()
                answer(self, bad, launched)
            else:
                self.is_sound = False
                self.step.update(lr, step_tokens, skip=not_finite(numbers) if self.delay else None)
        self.clock.advance(batch.samples)
        self.loader.consumed()
        self.is_sound = True
        self.launched.append((launched, bad))

    def read_launched(self, unread: int) -> None:
        """Read and log the numbers of the steps that were launched, but for the last `unread`."""
        bad_steps: list[tuple[BadStep, LaunchedStep]] = []
        while len(self.launched) > unread:
            launched, bad = self.launched.popleft()
            result = launched.read()
            if self.delay and launched.numbers is not None and (bad := self._judge(result)) is not None:
                bad_steps.append((bad, launched))
                unread = 0  # nothing may be under way when it is answered
            noise = None
            if result.moments is not None and bad is None:
                noise = self.noise.update(launched.progress.samples, result.moments)
            self.observations.append((launched.progress, noise))
            now = time.perf_counter()
            self.monitor.write(step_row(self, launched, result, noise, step_seconds=now - self.read_at))
            self.read_at = now
            # several processes agreed on it when the step was launched; one alone can look again
            request = result.request if self.world.size > 1 else self.requests.pending()
            self.request = max(self.request, request)
        for bad, launched in bad_steps:
            answer(self, bad, launched)

    def observe(self) -> None:
        """Let the batch policy observe the steps up to the one that was launched `delay` steps ago.

        A step that was read earlier, as for a checkpoint, waits here until then: when the policy hears of a step must
        not depend on when the run was saved.
        """
        while self.observations and self.observations[0][0].step <= self.clock.step - self.delay:
            self.recipe.batch.observe(*self.observations.popleft())

    def _judge(self, result: StepResult) -> BadStep | None:
        return self.guard.judge(result.loss, result.grad_norm)

    def _summands(self) -> dict[str, Tensor]:
        """What else is added up over all processes with the numbers of a step."""
        summands = {"requests": request_counts(self.requests.pending(), self.world.device)}
        if isinstance(self.model, ReportsMetrics) and (sums := self.model.pop_metric_sums()) is not None:
            summands["model"] = sums
        return summands

    def next_batch(self) -> StepBatch:
        """The batch of the next step. Raises ConfigError at [batch] for one that is none."""
        with blame(self.config, "batch", started=True):
            return self.layout.fit(self.recipe.batch.samples(self.clock))

    def due(self, interval_steps: int | None) -> bool:
        """Whether something that happens every `interval_steps` happens now; the end of the run has its own."""
        return interval_steps is not None and self.clock.step % interval_steps == 0 and not self.clock.done

    def finish(self, request: int) -> None:
        """Save what is not saved, validate at the end, and tell again what went wrong on the way."""
        if self.clock.step == self.started_at:
            log.info(f"nothing to do: all {self.clock.total_tokens} tokens are trained; raise training.total_tokens")
            return
        self.read_launched(0)
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
        """Write a row of the loss on held-out text. Raises ConfigError at [validation] where that cannot be read."""
        if (validation := self.validation) is not None:
            self.read_launched(0)
            numbers = evaluate_together(
                lambda: validation.evaluate(self.model, self.ranks, self.step.compute),
                self.config,
                "validation",
                self.world,
            )
            self.monitor.write({"step": self.clock.step, "tokens": self.clock.tokens, **numbers})
            self.read_at = time.perf_counter()

    def save(self) -> None:
        """Write a checkpoint of everything the next step depends on; if that fails it is told, and training goes on.

        Raises NonFiniteStateError for a state that is not finite.
        """
        self.read_launched(0)
        self.monitor.flush()  # no checkpoint is ahead of the metrics
        require_finite_state(self)
        step = self.clock.step
        saved = self.store.save(step, self.tensors.collect(), state_of(self), self.config.to_toml())
        if saved is not False:
            log.info(f"step {step:>6}  {'saved' if saved else 'saving in the background'} {self.store.path(step)}")
        self.read_at = time.perf_counter()

    def save_before_end(self) -> None:
        """Save what is not saved yet, if it is sound, because the run is about to end with an error."""
        self.store.wait()
        known = (self.started_at, self.store.saved_step, *self.store.failed_steps)
        if self.is_sound and self.clock.step not in known:
            self.step.discard()
            self.save()
            self.store.wait()

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

    def _lacks_validation(self, metrics: Path) -> bool:
        """Whether the run ended between the save of this step and the validation that was due after it."""
        interval = None if self.recipe.validation is None else self.recipe.validation.interval_steps
        due = self.clock.done or (interval is not None and self.clock.step % interval == 0)
        if self.validation is None or not due or not self.world.is_main:
            return False
        row = last_row(metrics)
        return row is not None and row["step"] == self.clock.step and "val_loss" not in row

    def _log_compiling(self) -> None:
        if self.recipe.training.compiles(self.world.device):
            from torch._dynamo.utils import calculate_time_spent

            log.info(f"compiling took {calculate_time_spent().get('total_wall_time', 0.0):.0f} s")

    def _introduce(self, directory: RunDirectory) -> None:
        """The first lines of the log: what is about to happen."""
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        total = self.clock.total_tokens
        log.info(
            f"{self.recipe.run.name}: {format_count(parameters)} parameters, vocabulary {self.vocab_size}, "
            f"{self.precision} on {self.world.size} x {self.world.device.type}, in {directory.path}"
        )
        if self.world.size > 1:
            replicas, shards, tp = self.parallel.sizes
            mode = "local" if self.reduction.local else "reduce"
            log.info(f"{replicas} (dp_replicate) x {shards} (dp_shard) x {tp} (tp) processes, accumulation = {mode}")
        log.info(
            f"{format_count(total)} tokens, {total / (len(self.samples) * self.sequence_length):.2f} epochs "
            f"of {format_count(len(self.samples))} sequences of {self.sequence_length}"
        )


def read_delay(device: torch.device, step: TrainStep, guard: Guard) -> int:
    """Steps between the launch of a step and the reading of its numbers.

    On a GPU 1: the host launches a step while the device computes the one before, and a step that is not finite is left
    out on the device. 0 where the host has to judge a step before its update: for `guard.on_spike`, and for an
    optimizer that cannot skip a step by itself. 0 on a CPU, which has nothing to wait for.
    """
    return int(device.type == "cuda" and step.skips_on_device and guard.on_spike is None)
