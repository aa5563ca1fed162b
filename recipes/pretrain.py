"""Pre-train a language model from scratch, or resume a run.

`Trainer.train` is the training loop. It calls the components that the recipe names, and hooks (`recipes.hooks`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor

from components.batch import Adaptive, StepBatch, StepTime
from components.checkpoint import CheckpointConfig
from components.distributed.collectives import try_call
from components.distributed.parallel_dims import ParallelConfig
from components.errors import invalid_names
from components.garbage_collection import GarbageCollection
from components.gradient_noise import GradientNoiseConfig
from components.guard import GuardConfig
from components.interfaces import DataConfig
from components.interrupts import RESTART, exit_status, is_stop, reason
from components.metrics.logger import MetricsConfig
from components.profiler import Profiler, ProfilerConfig
from components.train_step import StepSums, nonfinite_flag
from components.units import format_count
from components.validation import ValidationConfig
from recipes import build
from recipes.bad_steps import compute_lr, handle_bad_samples, handle_bad_step
from recipes.batch_policy import require_measurable_noise, uses_adaptive_batch
from recipes.builtin_hooks import AfterFirstStep, CollectGarbage, ProfileSteps, SaveCheckpoints, Validate
from recipes.checkpointing import RunCheckpoints
from recipes.config import Config, ConfigError, problem_message
from recipes.data_checks import MicroBatchReader
from recipes.errors import RunError, config_errors_at, raised_in
from recipes.hooks import Hook, Hooks
from recipes.interfaces import (
    AnyHook,
    AnyProbe,
    AverageConfig,
    BatchConfig,
    LRSchedule,
    ModelConfig,
    OptimizerConfig,
    ReportsMetrics,
    TaskConfig,
    TokenizerConfig,
    complete_schedule,
)
from recipes.model_setup import check_tensor_parallelism
from recipes.pending_steps import PendingSteps
from recipes.probe_runner import ProbeRunner
from recipes.probes import build_probes, check_probes
from recipes.resume import Resume
from recipes.run_config import RunConfig, TrainingConfig
from recipes.run_setup import Environment, build_environment
from recipes.step_results import LaunchedStep, metrics_delay, request_counts
from recipes.step_timer import StepTimer

log = logging.getLogger("powertrain")


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    """Pre-training. Its fields are the sections of the recipe."""

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
    """Classes that are called at points of the training loop, by name; see docs/hooks.md."""
    average: dict[str, AverageConfig] = field(default_factory=dict)
    """Averages of the weights over training, by name; see docs/averages.md."""
    probes: dict[str, AnyProbe] = field(default_factory=dict)
    """Numbers of single layers, measured every few steps, by name; see docs/probes.md."""
    tasks: dict[str, TaskConfig] = field(default_factory=dict)
    """Questions to evaluate during training, by name; see docs/tasks.md."""

    @property
    def device(self) -> str:
        """The device to train on. The launcher starts one process for each GPU unless it is "cpu"."""
        return self.run.device

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield problems between sections, as (dotted path, message)."""
        warmup = complete_schedule(self.lr_schedule).warmup_tokens
        if warmup > self.training.total_tokens:
            yield (
                "lr_schedule.warmup_tokens",
                f"{warmup} is more than training.total_tokens = {self.training.total_tokens}; lower it or train longer",
            )
        if self.gradient_noise.interval_steps is None and uses_adaptive_batch(self):
            yield (
                "gradient_noise.interval_steps",
                f'{type(self.batch).__name__} needs the gradient noise, and "none" never measures it; remove the key, '
                "or use components.batch:Constant",
            )
        if isinstance(self.batch, Adaptive) and self.batch.norm not in self.gradient_noise.norms:
            yield "batch.norm", f'"{self.batch.norm}" is not measured; add it to gradient_noise.norms'
        for section in ("average", "tasks", "probes"):
            yield from ((section, problem) for problem in invalid_names(getattr(self, section)))
        yield from check_probes(self)
        if self.training.float8 != "off" and self.training.compile is False:
            yield (
                "training.float8",
                'needs torch.compile: without it, casts take longer than float8 saves; set training.compile = "auto"',
            )
        if (problem := self.parallel.length_problem(self.training.sequence_length)) is not None:
            yield "training.sequence_length", problem
        try:
            check_tensor_parallelism(self.model, self.parallel.tp)
        except Exception as error:
            yield "parallel.tp", problem_message(error)

    def main(self, config: Config, resume: Resume | None) -> int:
        """Train to the end or until a request to stop. Returns the exit status."""
        with ExitStack() as cleanup:
            trainer = Trainer(config, resume, cleanup)
            try:
                request = trainer.train()
            except Exception as error:
                # All ranks raise these together. A rank that fails alone cannot save: the others wait in a collective.
                if trainer.world.size == 1 or isinstance(error, (ConfigError, RunError)):
                    _, failure = try_call(trainer.checkpoints.save_before_end)
                    if failure is not None:
                        log.error(f"the state before this error could not be saved: {failure}")
                raise
        is_done = request == RESTART and trainer.clock.done
        return exit_status(request) if is_stop(request) and not is_done else 0


class Trainer:
    """Builds the parts of a run in order, and runs the training loop."""

    def __init__(self, config: Config, resume: Resume | None, cleanup: ExitStack) -> None:
        """Raises ConfigError at the section that is at fault. An old run is removed only by `start.commit()`."""
        recipe: Pretrain = config.recipe
        self.config, self.recipe = config, recipe
        environment = build_environment(config, resume, cleanup)
        self.world, self.requests, start = environment.world, environment.requests, environment.start
        self.policy, hooks = build.build_policy(config), build.build_hooks(config)
        self.mesh, self.batch_rounding = build.build_mesh(config, self.world)
        self.data = build.build_data(config, self.world)
        built = build.build_sharded_model(
            config, self.world, self.mesh, self.data, is_resumed=start.checkpoint is not None
        )
        self.model = built.model
        self.step = build.build_train_step(config, self.world, self.mesh, built)
        self.probes = ProbeRunner(self.step, build_probes(config, self.model), self.world, self.mesh.dp)
        manager = build.build_checkpoint_manager(config, environment, cleanup)
        self.state = build.build_state(config, environment, self.step, self.policy, self.data.identity, hooks)
        self.clock = self.state.clock
        with config_errors_at(config, "batch"):
            require_measurable_noise(self.policy, self.batch_rounding, self.clock)
        loader = build.build_loader(config, self.mesh, self.data.dataset, self.clock.samples, cleanup)
        self.reader = MicroBatchReader(loader, self.world, self.clock.sequence_length, self.data.identity.vocab_size)
        profiler = build.build_profiler(config, environment, cleanup)
        self.metrics = build.build_step_metrics(config, self.world, self.data, built)
        start.commit()
        garbage = GarbageCollection(recipe.training.gc_interval_steps)
        cleanup.callback(garbage.close)
        self.metric_logger = build.build_metric_logger(config, environment, self.clock, cleanup)
        layout = f"{self.mesh.mesh_shape}; {self.batch_rounding}"
        self.timer = StepTimer(layout, self.world.size, first_step=self.clock.step + 1)
        self.pending = PendingSteps(
            delay=metrics_delay(self.world.device, self.step, recipe.guard),
            state=self.state,
            metrics=self.metrics,
            metric_logger=self.metric_logger,
            timer=self.timer,
            requests=self.requests,
            world_size=self.world.size,
        )
        self.checkpoints = RunCheckpoints(
            self.state,
            manager,
            self.world,
            self.metric_logger,
            config,
            discard_gradients=self.step.zero_grad,
            read_launched=self.read_launched,
            restart_timer=self.timer.restart,
            is_on_disk=start.fetch is None,
            started_from=start.checkpoint if start.fetch is None else None,
        )
        self.warned_noise = False
        self.hooks = self._build_hooks(environment, hooks, profiler, garbage)
        self.context = build.build_hook_context(environment, self.step, self.clock, self.metric_logger)
        build.log_startup(config, environment, self.mesh, self.data, built)

    def _build_hooks(
        self, environment: Environment, custom: dict[str, Hook], profiler: Profiler, garbage: GarbageCollection
    ) -> Hooks:
        """Return the hooks of the run: those of the loop itself, and `custom`, those of [hooks]."""
        recipe, step = self.recipe, self.step
        intervals = recipe.checkpoint.interval_steps, recipe.checkpoint.in_memory_interval_steps
        after: list[Hook] = [SaveCheckpoints(self.checkpoints, self.requests, *intervals)]
        if (validation := self.data.validation) is not None:
            metrics, interval = environment.directory.metrics, self.config.recipe.validation.interval_steps
            after.append(Validate(self.checkpoints, self.mesh.dp, step.compute_context, metrics, validation, interval))
        if self.data.tasks:
            after.append(build.build_task_hook(environment, self.mesh, self.data, step, self.checkpoints))
        compiles = recipe.training.compiles(self.world.device)
        after += [AfterFirstStep(self.world, compiles, self.clock.step), CollectGarbage(garbage)]
        return Hooks([ProfileSteps(profiler)], custom, after)

    def train(self) -> int:
        """Run the training loop. Returns the request that ended it, or NONE after all tokens are trained."""
        self.timer.restart()
        self.hooks.call("on_run_begin", self.context)
        while not self.clock.done and not is_stop(self.requests.agreed):
            self.hooks.call("on_step_begin", self.context)
            self.launch(self.next_batch())
            self.read_launched(unread=self.pending.delay)
            self.pending.observe()
            self.hooks.call("on_step_end", self.context)
        self.finish()
        return self.requests.agreed

    def launch(self, batch: StepBatch) -> None:
        """Queue the next step on the device, and advance the clock."""
        launched = self.compute_gradients(batch)
        if launched.numbers is not None:
            self.update_weights(launched, launched.numbers)
        self.clock.advance(batch.samples)
        self.state.is_consistent = True
        self.pending.append(launched)

    def compute_gradients(self, batch: StepBatch) -> LaunchedStep:
        """Queue forward and backward of the next step, and the reduction of its gradients."""
        started, step_tokens = time.perf_counter(), batch.samples * self.clock.sequence_length
        lr = compute_lr(self.recipe.lr_schedule, self.clock, step_tokens, self.checkpoints)
        samples = self.reader.read(batch.micro_batches)
        data_seconds = time.perf_counter() - started
        timed, measured = self.timer.take(), self.measures_noise(batch)
        undo_forward = self.state.tensors.forward_state()
        self.probes.before_step(self.clock.step + 1, samples.micro_batches)
        numbers: StepSums | None = self.step.accumulate(
            samples.micro_batches,
            batch.micro_batches,
            step_tokens,
            measure=measured,
            more=partial(self._summands, timed),
        )
        if (bad_samples := samples.wait_for_bad()) is not None:
            self.step.zero_grad()
            undo_forward()
            numbers, measured = None, False
            handle_bad_samples(
                bad_samples, batch, self.clock, self.state.guard, self.checkpoints, self.config, self.world
            )
        after = replace(self.clock)  # the clock itself advances after the update; a bad step saves the state before it
        after.advance(batch.samples)
        with raised_in("batch"):
            explained = dict(self.policy.metrics())
        return LaunchedStep(after, batch, lr, numbers, self.mesh.dp.size, measured, data_seconds, timed, explained)

    def update_weights(self, launched: LaunchedStep, numbers: StepSums) -> None:
        """Queue the update of the weights, unless the guard finds the step to be bad."""
        if not self.pending.delay:
            result = launched.read()
            launched.bad = self.state.guard.check(result.loss, result.grad_norm)
            if launched.bad is not None:
                self.step.zero_grad()
                handle_bad_step(launched.bad, launched, self.checkpoints)
                return
        self.hooks.call("on_gradients_ready", self.context)
        self.state.is_consistent = False
        # with a delay the device skips a non-finite update, and `pending.read` checks the step
        self.step.update(launched.lr, skip=nonfinite_flag(numbers) if self.pending.delay else None)
        self.state.averages.update(tokens=launched.progress.tokens, step_tokens=launched.tokens)
        launched.probed = self.probes.after_update()

    def read_launched(self, unread: int = 0) -> None:
        """Read and log the results of the launched steps, except the last `unread`, and handle the bad ones."""
        for bad, launched in self.pending.read(unread):
            handle_bad_step(bad, launched, self.checkpoints)

    def next_batch(self) -> StepBatch:
        """Return the batch of the next step. Raises ConfigError at [batch] for an invalid size."""
        with config_errors_at(self.config, "batch", started=True), raised_in("batch"):
            return self.batch_rounding.round_up(self.policy.next_batch_size(self.clock))

    def measures_noise(self, batch: StepBatch) -> bool:
        """Return whether to measure the gradient noise of the next step."""
        interval = self.recipe.gradient_noise.interval_steps
        if interval is None or self.clock.step % interval:
            return False
        with raised_in("batch"):
            if not self.policy.measures_noise(self.clock):
                return False
        if self.batch_rounding.can_measure_noise(batch):
            return True
        if not self.warned_noise:
            self.warned_noise = True
            log.info(
                f"gradient noise is not measured: it needs at least 2 micro-batches per step, and {batch.samples} "
                "samples are one; lower training.micro_batch_size or raise the batch size"
            )
        return False

    def finish(self) -> None:
        """Save and validate at the end of the run, and report all failures again."""
        manager, request = self.checkpoints.manager, self.requests.agreed
        if self.clock.step == self.checkpoints.started_at == manager.saved_step:
            log.info(f"nothing to do: all {self.clock.total_tokens} tokens are trained; raise training.total_tokens")
            return
        self.read_launched()
        self.hooks.call("on_run_end", self.context)
        manager.wait()
        self.metric_logger.close()
        self.requests.remove_stop_file()
        for failed in manager.failed_steps:
            log.error(f"the checkpoint of step {failed} could not be saved")
        if manager.saved_step != self.clock.step:
            raise RunError(
                f"the run ended at step {self.clock.step}, which is not saved; the newest checkpoint is "
                f"{self.checkpoints.newest}. Free some disk space, then continue with --resume"
            )
        if request == RESTART and not self.clock.done:
            log.info(f"saved after step {self.clock.step}; the nodes change, and all processes are restarted")
        elif is_stop(request) and not self.clock.done:
            log.info(f"stopped by {reason(request)} after step {self.clock.step}; continue with --resume")
        else:
            log.info(f"done: {format_count(self.clock.tokens)} tokens in {self.clock.step} steps")

    def _summands(self, timed: StepTime | None) -> dict[str, Tensor]:
        """Return further values to sum over all processes together with those of the step.

        Called after the last backward, before the gradients are clipped.
        """
        self.probes.on_gradients()
        device = self.world.device
        summands = {
            "requests": request_counts(self.requests.poll(), device),
            "step_seconds": self.timer.summand(timed, device),
        }
        if isinstance(self.model, ReportsMetrics) and (sums := self.model.pop_metric_sums()) is not None:
            summands["model"] = sums
        return summands
