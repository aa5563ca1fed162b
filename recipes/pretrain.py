"""The main job: pre-train a language model from scratch, or continue where a run stopped.

`Trainer.train` is the loop. What it calls is a component that the recipe named, or a hook of `recipes.hooks`.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from components import precision
from components.batch import StepBatch
from components.checkpoint import CheckpointConfig
from components.distributed.collectives import try_call
from components.distributed.parallel_dims import ParallelConfig
from components.garbage_collection import GarbageCollection
from components.gradient_noise import GradientNoiseConfig
from components.guard import BadStep, GuardConfig
from components.hardware import peak_flops
from components.interfaces import DataConfig
from components.interrupts import exit_status, is_stop, reason
from components.metrics.logger import MetricsConfig
from components.profiler import ProfilerConfig
from components.train_step import TrainStep, nonfinite_flag
from components.units import format_count
from components.validation import ValidationConfig
from recipes import build
from recipes.bad_steps import checked_lr, handle_bad_samples, handle_bad_step
from recipes.batch_policy import build_batch_policy
from recipes.checkpointing import RunCheckpoints
from recipes.config import Config, ConfigError, error_message
from recipes.data_checks import BadSamples, MicroBatchReader
from recipes.errors import RunError, config_errors_at, raised_in
from recipes.hooks import Hook, HookContext, Hooks
from recipes.interfaces import (
    AnyHook,
    BatchConfig,
    HasParallelPlan,
    LRSchedule,
    ModelConfig,
    OptimizerConfig,
    ReportsMetrics,
    TokenizerConfig,
    complete_schedule,
)
from recipes.launched_step import LaunchedStep, StepResult, request_counts
from recipes.loop_hooks import AfterFirstStep, CollectGarbage, ProfileSteps, SaveCheckpoints, Validate
from recipes.resume import Resume
from recipes.run_config import RunConfig, TrainingConfig
from recipes.step_metrics import StepMetrics

log = logging.getLogger("powertrain")


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    """Pre-training. Its parameters are the sections of the recipe."""

    model: ModelConfig
    tokenizer: TokenizerConfig
    data: DataConfig
    training: TrainingConfig
    optimizer: OptimizerConfig
    lr_schedule: LRSchedule
    batch: BatchConfig
    gradient_noise: GradientNoiseConfig = field(default_factory=GradientNoiseConfig)
    run: RunConfig = field(default_factory=RunConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    validation: ValidationConfig | None = None
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    profile: ProfilerConfig = field(default_factory=ProfilerConfig)
    hooks: dict[str, AnyHook] = field(default_factory=dict)
    """Code that is called at points of the training loop, by name; docs/hooks.md has the points."""

    @property
    def device(self) -> str:
        """Where it computes, for the launcher, which starts a process for each GPU."""
        return self.run.device

    def check(self) -> Iterator[tuple[str, str]]:
        """Problems that only show across sections, as (dotted path, message)."""
        warmup = complete_schedule(self.lr_schedule).warmup_tokens
        if warmup > self.training.total_tokens:
            yield (
                "lr_schedule.warmup_tokens",
                f"{warmup} tokens of warm-up do not end within training.total_tokens = {self.training.total_tokens}",
            )
        if self.gradient_noise.interval_steps is None and _is_adaptive(self):
            yield (
                "gradient_noise.interval_steps",
                f"never measured, the gradient gives {type(self.batch).__name__} nothing to follow; leave it out, or "
                "take components.batch:Constant",
            )
        tp = self.parallel.tp
        if self.training.sequence_length % tp:
            yield "parallel.tp", f"training.sequence_length = {self.training.sequence_length} cannot be divided by {tp}"
        if isinstance(self.model, HasParallelPlan):
            try:
                self.model.plan(tp=tp)
            except Exception as error:
                yield "parallel.tp", error_message(error)
        elif tp > 1:
            yield "parallel.tp", f"{type(self.model).__name__} has no plan(tp) to divide it by"

    def main(self, config: Config, resume: Resume | None) -> int:
        """Run to the end, or until it is asked to stop; returns the exit status."""
        with ExitStack() as cleanup:
            trainer = Trainer(config, resume, cleanup)
            try:
                request = trainer.train()
            except Exception as error:
                # All ranks raise these together. One that fails alone cannot save: the others wait for it elsewhere.
                if trainer.world.size == 1 or isinstance(error, (ConfigError, RunError)):
                    _, failure = try_call(trainer.checkpoints.save_before_end)
                    if failure is not None:
                        log.error(f"the state before this error could not be saved: {failure}")
                raise
        return exit_status(request) if is_stop(request) else 0


def _is_adaptive(recipe: Pretrain) -> bool:
    """Whether the batch follows the gradient; False where no policy can be built, which is reported when one is."""
    try:
        return build_batch_policy(recipe).is_adaptive
    except ValueError:
        return False


class Trainer:
    """The parts of a run, built in order, and the loop over its steps."""

    def __init__(self, config: Config, resume: Resume | None, cleanup: ExitStack) -> None:
        """Raises ConfigError at the section of the recipe that is at fault; then nothing of an old run was removed."""
        recipe: Pretrain = config.recipe
        self.config, self.recipe = config, recipe
        environment = build.build_environment(config, resume, cleanup)
        self.world, self.requests, opened = environment.world, environment.requests, environment.opened
        self.policy, hooks = build.build_policy(config), build.build_hooks(config)
        self.mesh, self.layout = build.build_mesh(config, self.world)
        self.data = build.build_data(config, self.world)
        built = build.build_sharded_model(
            config, self.world, self.mesh, self.data, is_resumed=opened.checkpoint is not None
        )
        self.model = built.model
        self.step = build.build_train_step(config, self.world, self.mesh, built)
        self.delay = metrics_delay(self.world.device, self.step, recipe.guard)
        store = build.build_checkpoint_manager(config, environment, cleanup)
        self.state = build.build_state(config, environment, self.step, self.policy, self.data.identity, hooks)
        self.clock = self.state.clock
        build.check_initial_batch(config, self.state, self.layout)
        loader = build.build_loader(config, self.mesh, self.data.dataset, self.clock.samples, cleanup)
        self.reader = MicroBatchReader(loader, self.world, self.clock.sequence_length, self.data.identity.vocab_size)
        profiler = build.build_profiler(config, environment, cleanup)
        self.flops_per_token = build.flops_per_token(config, self.model)
        opened.begin()
        garbage = GarbageCollection(recipe.training.gc_interval_steps)
        cleanup.callback(garbage.close)
        device = self.world.device
        peak = peak_flops(device, precision.dtype_of(built.precision))
        self.metrics = StepMetrics(
            self.model, self.data.dataset, device, self.flops_per_token, peak and peak * self.world.size
        )
        self.monitor = build.build_metric_logger(config, environment, self.clock, cleanup)
        self.checkpoints = RunCheckpoints(
            self.state,
            store,
            self.world,
            self.monitor,
            config,
            discard_gradients=self.step.zero_grad,
            read_launched=self.read_launched,
            restart_timer=self.restart_timer,
        )
        self.launched: deque[tuple[LaunchedStep, BadStep | None]] = deque()
        self.read_at, self.told_unmeasurable = 0.0, False
        after: list[Hook] = [SaveCheckpoints(self.checkpoints, self.requests, recipe.checkpoint.interval_steps)]
        if (validation := self.data.validation) is not None:
            metrics = environment.directory.metrics
            after.append(
                Validate(validation, self.checkpoints, self.requests, self.mesh.dp, self.step.compute_context, metrics)
            )
        compiles = recipe.training.compiles(device)
        after += [AfterFirstStep(self.world, compiles, self.clock.step), CollectGarbage(garbage)]
        self.hooks = Hooks([ProfileSteps(profiler)], hooks, after)
        self.context = self._hook_context(environment)
        build.log_startup(config, environment, self.mesh, self.data, built)

    def train(self) -> int:
        """The loop. Returns the request that ended it, or NONE when all tokens were trained."""
        self.restart_timer()
        self.hooks.call("on_run_begin", self.context)
        while not self.clock.done and not is_stop(self.requests.agreed):
            self.hooks.call("on_step_begin", self.context)
            self.launch(self.next_batch())
            self.read_launched(self.delay)
            self.observe()
            self.hooks.call("on_step_end", self.context)
        self.finish()
        return self.requests.agreed

    def launch(self, batch: StepBatch) -> None:
        """Give the device the next step, and advance the clock."""
        started, step_tokens = time.perf_counter(), batch.samples * self.clock.sequence_length
        lr = checked_lr(self.recipe.lr_schedule, self.clock, step_tokens, self.checkpoints)
        micro_batches = self.reader.read(batch.micro_batches)
        data_seconds, measured, numbers, bad = time.perf_counter() - started, False, None, None
        if isinstance(micro_batches, BadSamples):
            handle_bad_samples(
                micro_batches, batch, self.clock, self.state.guard, self.checkpoints, self.config, self.world
            )
        else:
            measured = self.measures_noise(batch)
            numbers = self.step.accumulate(
                micro_batches, batch.micro_batches, step_tokens, measure=measured, more=self._summands
            )
        after = replace(self.clock)
        after.advance(batch.samples)
        launched = LaunchedStep(after, batch, lr, numbers, self.mesh.dp.size, measured, data_seconds)
        if numbers is not None:
            if not self.delay and (bad := self._judge(launched.read())) is not None:
                self.step.zero_grad()
                handle_bad_step(bad, launched, self.checkpoints)
            else:
                self.hooks.call("on_gradients_ready", self.context)
                self.state.is_sound = False
                self.step.update(lr, step_tokens, skip=nonfinite_flag(numbers) if self.delay else None)
        self.clock.advance(batch.samples)
        self.state.is_sound = True
        self.launched.append((launched, bad))

    def read_launched(self, unread: int = 0) -> None:
        """Read and log the numbers of the steps that were launched, except the last `unread`."""
        bad_steps: list[tuple[BadStep, LaunchedStep]] = []
        while len(self.launched) > unread:
            launched, bad = self.launched.popleft()
            result = launched.read()
            if self.delay and launched.numbers is not None and (bad := self._judge(result)) is not None:
                bad_steps.append((bad, launched))
                unread = 0  # nothing may be under way when it is handled
            noise = None
            if result.moments is not None and bad is None:
                noise = self.state.noise.update(launched.progress.samples, result.moments)
            self.state.observations.append((launched.progress, noise))
            step_seconds = time.perf_counter() - self.read_at
            self.monitor.write(self.metrics.row(launched, result, noise, step_seconds=step_seconds))
            self.restart_timer()
            # several processes agreed on it when the step was launched; one alone can look again
            request = result.request if self.world.size > 1 else self.requests.poll()
            self.requests.agreed = max(self.requests.agreed, request)
        for bad, launched in bad_steps:
            handle_bad_step(bad, launched, self.checkpoints)

    def observe(self) -> None:
        """Let the batch policy observe the steps up to the one that was launched `delay` steps ago.

        A step that was read earlier, as for a checkpoint, waits here until then: when the policy hears of a step must
        not depend on when the run was saved.
        """
        observations = self.state.observations
        while observations and observations[0][0].step <= self.clock.step - self.delay:
            with raised_in("batch"):
                self.policy.observe(*observations.popleft())

    def restart_timer(self) -> None:
        """Start the time of a step now."""
        self.read_at = time.perf_counter()

    def next_batch(self) -> StepBatch:
        """Return the batch of the next step. Raises ConfigError at [batch] for a size that is not one."""
        with config_errors_at(self.config, "batch", started=True), raised_in("batch"):
            return self.layout.round_up(self.policy.next_batch_size(self.clock))

    def measures_noise(self, batch: StepBatch) -> bool:
        """Return whether the gradient noise of the step that starts now is measured."""
        interval = self.recipe.gradient_noise.interval_steps
        if interval is None or self.clock.step % interval:
            return False
        with raised_in("batch"):
            if not self.policy.measures_noise(self.clock):
                return False
        if self.layout.can_measure_noise(batch):
            return True
        if not self.told_unmeasurable:
            self.told_unmeasurable = True
            log.info(
                f"a step of one micro-batch of {batch.samples} samples does not show the noise of its gradient; "
                "a smaller training.micro_batch_size or a larger batch would"
            )
        return False

    def finish(self) -> None:
        """Save what is not saved, validate at the end, and report again what went wrong on the way."""
        store, request = self.checkpoints.store, self.requests.agreed
        if self.clock.step == self.checkpoints.started_at:
            log.info(f"nothing to do: all {self.clock.total_tokens} tokens are trained; raise training.total_tokens")
            return
        self.read_launched()
        self.hooks.call("on_run_end", self.context)
        store.wait()
        self.monitor.flush()
        self.requests.remove_stop_file()
        for failed in store.failed_steps:
            log.error(f"the checkpoint of step {failed} could not be saved")
        for failure in self.monitor.failures():
            log.error(failure)
        if store.saved_step != self.clock.step:
            raise RunError(
                f"the run ended at step {self.clock.step}, which is not saved; the newest checkpoint is "
                f"{self.checkpoints.newest}. Make room, or mend the disk, and continue with --resume"
            )
        if is_stop(request) and not self.clock.done:
            log.info(f"stopped by {reason(request)} after step {self.clock.step}; continue with --resume")
        else:
            log.info(f"done: {format_count(self.clock.tokens)} tokens in {self.clock.step} steps")

    def _judge(self, result: StepResult) -> BadStep | None:
        return self.state.guard.check(result.loss, result.grad_norm)

    def _summands(self) -> dict[str, Tensor]:
        """Return what else is added up over all processes with the numbers of a step."""
        summands = {"requests": request_counts(self.requests.poll(), self.world.device)}
        if isinstance(self.model, ReportsMetrics) and (sums := self.model.pop_metric_sums()) is not None:
            summands["model"] = sums
        return summands

    def _hook_context(self, environment: build.Environment) -> HookContext:
        def log_metrics(values: Mapping[str, float]) -> None:
            self.monitor.write({"step": self.clock.step, "tokens": self.clock.tokens, **values})

        return HookContext(
            model=self.model,
            optimizer=self.step.optimizer,
            clock=self.clock,
            device=self.world.device,
            rank=self.world.rank,
            world_size=self.world.size,
            directory=environment.directory.path,
            log_metrics=log_metrics,
        )


def metrics_delay(device: torch.device, step: TrainStep, guard: GuardConfig) -> int:
    """Steps between the launch of a step and the reading of its numbers.

    On a GPU 1: the host launches a step while the device computes the one before, and a step that is not finite is left
    out on the device. 0 where the host has to judge a step before its update: for `guard.on_spike`, and for an
    optimizer that cannot skip a step by itself. 0 on a CPU, which has nothing to wait for.
    """
    return int(device.type == "cuda" and step.skips_on_device and guard.on_spike is None)
