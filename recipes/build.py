"""Build the parts of a training run from its recipe, in the order of these functions.

Call each function on every rank. It raises ConfigError at the section of the recipe that is at fault. The first part,
the `Environment`, is built by `recipes.run_setup`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from components import precision
from components.batch import BatchPolicy, BatchRounding
from components.checkpoint import CheckpointManager, StateTensors
from components.clock import TrainingClock
from components.data.loader import MicroBatchLoader
from components.distributed import fsdp
from components.distributed.context import DistributedContext
from components.distributed.parallel_dims import ParallelDims
from components.environment import describe_environment, record_environment
from components.float8 import convert_to_float8
from components.gradient_noise import AdamNorm, GradientNoiseHooks, named_backward_parameters, require_preconditioner
from components.hardware import peak_flops
from components.interfaces import PackedDataset
from components.metrics.logger import MetricLogger
from components.metrics.writer import RunInfo
from components.precision import WorkingWeights
from components.profiler import Profiler
from components.tasks import Scorer
from components.token_ids import describe_start, first_input
from components.train_step import TrainStep
from components.units import format_count
from components.validation import Validator
from recipes.averages import Averages
from recipes.batch_policy import build_batch_policy
from recipes.checkpointing import RunCheckpoints
from recipes.config import Config
from recipes.config.errors import PROJECT
from recipes.config.toml import to_toml_value
from recipes.dry_run.memory import decide_grad_sync
from recipes.errors import config_errors_at
from recipes.hooks import Hook, HookContext, complete_hook
from recipes.model_setup import build_model, build_tokenizer, enable_document_masking, transformer_blocks
from recipes.parallelize import materialize, parallelize
from recipes.prepared_data import require_prepared_data
from recipes.resume import log_moved_data
from recipes.run_setup import Environment
from recipes.step_metrics import StepMetrics
from recipes.tasks import EvaluateTasks, Task, build_tasks
from recipes.training_state import DataIdentity, TrainingState

log = logging.getLogger("powertrain")


def build_policy(config: Config) -> BatchPolicy:
    """Build the batch policy for the learning-rate schedule of the recipe."""
    with config_errors_at(config, "batch"):
        return build_batch_policy(config.recipe)


def build_hooks(config: Config) -> dict[str, Hook]:
    """Return the hooks of [hooks] by name, in the order of the recipe."""
    hooks = {}
    for name, hook in config.recipe.hooks.items():
        with config_errors_at(config, f"hooks.{name}"):
            hooks[name] = complete_hook(hook)
    return hooks


def build_mesh(config: Config, world: DistributedContext) -> tuple[ParallelDims, BatchRounding]:
    """Build the mesh of the processes, and the rule that rounds batches up to it."""
    recipe = config.recipe
    with config_errors_at(config, "parallel"):
        mesh = recipe.parallel.build(world)
    return mesh, BatchRounding(recipe.training.micro_batch_size, mesh.dp.size)


@dataclass(frozen=True)
class TrainingData:
    """The data to train and validate on."""

    dataset: PackedDataset
    identity: DataIdentity
    first_input: int
    """The id with which documents begin."""
    validation: Validator | None
    tasks: list[Task]


def build_data(config: Config, world: DistributedContext) -> TrainingData:
    """Build the tokenizer and open the training and validation data, which the main process prepares first."""
    recipe = config.recipe
    with config_errors_at(config, "tokenizer"):
        tokenizer = build_tokenizer(recipe)
        vocab_size, fingerprint = tokenizer.vocab_size, tokenizer.fingerprint
    if (start := describe_start(tokenizer)) is not None:
        log.info(f"documents begin with {start}")
    data_kwargs: dict[str, Any] = {
        "tokenizer": tokenizer,
        "sequence_length": recipe.training.sequence_length,
        "cache_dir": recipe.run.cache_dir,
        "progress": log.info,
    }
    require_prepared_data(config, tokenizer, world)
    with config_errors_at(config, "data"):
        dataset = world.main_process_first(lambda: recipe.data.build(**data_kwargs))
        data_fingerprint: str | None = getattr(dataset, "fingerprint", None)
        if not world.all_equal(f"{len(dataset)} {data_fingerprint}"):
            raise ValueError(
                f"the processes do not see the same data; this one has {len(dataset):,} sequences. Put the same "
                "files on every node"
            )
    validation = None
    if (held_out := recipe.validation) is not None:
        with config_errors_at(config, "validation"):
            validation_data = world.main_process_first(lambda: held_out.data.build(**data_kwargs))
            validation = held_out.build(
                validation_data, tokenizer=tokenizer, sequence_length=recipe.training.sequence_length
            )
    tasks = build_tasks(config, recipe.tasks, world, tokenizer, recipe.training.sequence_length)
    identity = DataIdentity(vocab_size, fingerprint, len(dataset), data_fingerprint)
    return TrainingData(dataset, identity, first_input(tokenizer), validation, tasks)


@dataclass(frozen=True)
class ShardedModel:
    """The model on the devices of the run, with its weights."""

    model: Any
    precision: Literal["bf16", "float32"]
    """The dtype of the matrix products."""
    grad_sync: fsdp.GradSync
    compute: Callable[[], AbstractContextManager[object]]
    """Returns the context in which forward and backward run."""
    working_copies: list[Tensor] | None
    """The bf16 copies of the weights in which backward accumulates, for a model that FSDP2 does not shard."""


def build_sharded_model(
    config: Config, world: DistributedContext, mesh: ParallelDims, data: TrainingData, *, is_resumed: bool
) -> ShardedModel:
    """Build the model on the meta device, parallelize it, allocate it and initialize its weights."""
    recipe, training, device = config.recipe, config.recipe.training, world.device
    chosen = precision.resolve_precision(training.precision, device)
    dtype = precision.dtype_of(chosen)
    model = build_model(config, data.identity.vocab_size)
    local = decide_grad_sync(recipe, model, mesh.mesh_shape, world, dtype)
    if training.document_masking:
        with config_errors_at(config, "data"):
            enable_document_masking(model, data.dataset, data.first_input)
    if training.compiles(device):
        # lets the next run reuse compiled kernels; read when the compiler is first imported
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(recipe.run.cache_dir / "compiled"))
    elif (why := training.slow_eager(device, recipe.parallel.tp)) is not None:
        log.warning(why)
    if training.float8 != "off":
        with config_errors_at(config, "training"):
            convert_to_float8(transformer_blocks(model), training.float8, device, tp=mesh.mesh_shape.tp)
    with config_errors_at(config, "parallel"):
        parallelize(model, recipe.model, mesh, dtype, device, training)
    materialize(model, device)
    _initialize(model, config, world, is_resumed=is_resumed)
    # FSDP2 already casts parameters to the compute dtype; a model that is not sharded computes with bf16 copies
    weights = WorkingWeights(model, torch.bfloat16) if mesh.fsdp is None and chosen == "bf16" else None
    return ShardedModel(
        model=model,
        precision=chosen,
        grad_sync=fsdp.GradSync(model, once_per_step=local),
        compute=weights or nullcontext,
        working_copies=None if weights is None else weights.copies,
    )


def _initialize(model: Any, config: Config, world: DistributedContext, *, is_resumed: bool) -> None:
    """Initialize the parameters at random or from [run] init_from; a checkpoint that is resumed replaces them later."""
    run = config.recipe.run
    if run.init_from is None or is_resumed:
        with config_errors_at(config, "model"):
            model.init_weights(run.seed)
        return
    from recipes.initial_weights import load_initial_weights  # not at the top: it imports every model

    with config_errors_at(config, "run"):
        load_initial_weights(model, config, world)


def build_train_step(config: Config, world: DistributedContext, mesh: ParallelDims, built: ShardedModel) -> TrainStep:
    """Build the optimizer and the train step, which accumulates, measures and clips gradients, and updates."""
    recipe, model = config.recipe, built.model
    with config_errors_at(config, "optimizer"):
        optimizer = recipe.optimizer.build(model=model)
    summands = None
    if mesh.summands is not None:
        from components.distributed.context_parallel import SummandGradients  # not at the top: it imports DTensor

        summands = partial(SummandGradients, mesh.summands)
    tensors, adam = dict(named_backward_parameters(model)), None
    if built.working_copies is not None:
        tensors = dict(zip(tensors, built.working_copies, strict=True))
    if "adam" in recipe.gradient_noise.norms:
        with config_errors_at(config, "gradient_noise.norms"):
            preconditioner = require_preconditioner(optimizer)
        adam = AdamNorm(preconditioner, tensors, dict(model.named_parameters()), world)
    return TrainStep(
        model,
        optimizer,
        mesh.dp,
        world,
        noise_hooks=GradientNoiseHooks(tensors.values(), world.device, summands, adam),
        grad_sync=built.grad_sync,
        max_grad_norm=recipe.training.max_grad_norm,
        compute_context=built.compute,
    )


def build_checkpoint_manager(config: Config, environment: Environment, cleanup: ExitStack) -> CheckpointManager:
    directory, start = environment.directory, environment.start
    with config_errors_at(config, "checkpoint"):
        manager: CheckpointManager = config.recipe.checkpoint.build(
            directory.checkpoints, environment.world, run=start.run
        )
    cleanup.callback(manager.close)
    return manager


def build_state(
    config: Config,
    environment: Environment,
    step: TrainStep,
    policy: BatchPolicy,
    data: DataIdentity,
    hooks: dict[str, Hook],
) -> TrainingState:
    """Build the state of a new run, or restore that of the checkpoint that is resumed."""
    recipe, training = config.recipe, config.recipe.training
    with config_errors_at(config, "gradient_noise"):
        noise = recipe.gradient_noise.build()
    with config_errors_at(config, "guard"):
        guard = recipe.guard.build()
    with config_errors_at(config, "average"):
        averages = Averages(step.model, recipe.average)
    state = TrainingState(
        clock=TrainingClock(training.total_tokens, training.sequence_length),
        tensors=StateTensors(step.model, step.optimizer, environment.world, averages.tensors),
        policy=policy,
        noise=noise,
        guard=guard,
        data=data,
        averages=averages,
        hooks=hooks,
    )
    if (checkpoint := environment.start.checkpoint) is not None:
        with config_errors_at(config, "checkpoint"):
            if None in (state.restore(checkpoint, environment.start.fetch), data.content):
                log_moved_data(checkpoint, config)
    return state


def build_loader(
    config: Config, mesh: ParallelDims, dataset: PackedDataset, start: int, cleanup: ExitStack
) -> MicroBatchLoader:
    """Build the loader of this rank's micro-batches, starting at global sample `start`."""
    recipe, dp = config.recipe, mesh.dp
    with config_errors_at(config, "data"):
        loader = MicroBatchLoader(
            dataset,
            seed=recipe.run.seed,
            micro_batch_size=recipe.training.micro_batch_size,
            dp_rank=dp.rank,
            dp_size=dp.size,
            start=start,
            num_workers=recipe.training.num_workers,
            pin_memory=dp.device.type == "cuda",
        )
    cleanup.callback(loader.close)
    return loader


def build_profiler(config: Config, environment: Environment, cleanup: ExitStack) -> Profiler:
    world = environment.world
    with config_errors_at(config, "profile"):
        profiler: Profiler = config.recipe.profile.build(
            environment.directory.profile, device=world.device, rank=world.rank
        )
    cleanup.push(profiler.close)
    return profiler


def build_step_metrics(
    config: Config, world: DistributedContext, data: TrainingData, built: ShardedModel
) -> StepMetrics:
    """Build what makes the row of a step, with the FLOPs per token as the model counts them."""
    with config_errors_at(config, "model"):
        flops_per_token = float(built.model.flops_per_token(config.recipe.training.sequence_length))
    peak = peak_flops(world.device, precision.dtype_of(built.precision))
    return StepMetrics(built.model, data.dataset, world.device, flops_per_token, peak and peak * world.size)


def build_metric_logger(
    config: Config, environment: Environment, clock: TrainingClock, cleanup: ExitStack
) -> MetricLogger:
    """Build the metric logger; it has writers only on the main process."""
    world, directory, metric_logger = environment.world, environment.directory, MetricLogger()
    if world.is_main:
        described = describe_environment(PROJECT, world.device, world.size)
        run = RunInfo(
            name=config.recipe.run.name,
            id=environment.start.run,
            directory=directory.path,
            metrics=directory.metrics,
            console=environment.console,
            after_step=clock.step,
            total_tokens=clock.total_tokens,
            recipe=config.to_toml(provenance=False),
            hyperparameters={
                key: to_toml_value(leaf.value) for key, leaf in config.leaves.items() if leaf.value is not None
            },
            environment=described,
        )
        with config_errors_at(config, "run"):
            record_environment(directory.environment, described, clock.step)
            metric_logger = config.recipe.metrics.build(run, directory.writers)
        if environment.start.restart is not None:
            metric_logger.log({"step": clock.step, "tokens": clock.tokens, **environment.start.restart})
    cleanup.callback(metric_logger.close)
    return metric_logger


def build_task_hook(
    environment: Environment, mesh: ParallelDims, data: TrainingData, step: TrainStep, checkpoints: RunCheckpoints
) -> EvaluateTasks:
    training = checkpoints.config.recipe.training
    scorer = Scorer(
        sequence_length=training.sequence_length,
        pass_tokens=training.micro_batch_size * training.sequence_length,
        vocab_size=data.identity.vocab_size,
        first_input=data.first_input,
        multiple=checkpoints.config.recipe.parallel.sequence_multiple,
        min_length=128 if training.document_masking else 64,  # flex attention computes blocks of 128
    )
    metrics = environment.directory.metrics
    return EvaluateTasks(checkpoints, mesh.dp, step.compute_context, metrics, data.tasks, scorer)


def build_hook_context(
    environment: Environment, step: TrainStep, clock: TrainingClock, metric_logger: MetricLogger
) -> HookContext:
    """Build what hooks see of the run."""

    def log_metrics(values: Mapping[str, float]) -> None:
        metric_logger.log({"step": clock.step, "tokens": clock.tokens, **values})

    world = environment.world
    return HookContext(
        model=step.model,
        optimizer=step.optimizer,
        clock=clock,
        device=world.device,
        rank=world.rank,
        world_size=world.size,
        directory=environment.directory.path,
        log_metrics=log_metrics,
    )


def log_startup(
    config: Config, environment: Environment, mesh: ParallelDims, data: TrainingData, built: ShardedModel
) -> None:
    """Log the size of the model, the processes and the length of the run."""
    training, world, sequences = config.recipe.training, environment.world, len(data.dataset)
    parameters = sum(parameter.numel() for parameter in built.model.parameters())
    log.info(
        f"{config.recipe.run.name}: {format_count(parameters)} parameters, vocabulary {data.identity.vocab_size}, "
        f"{built.precision} on {world.size} x {world.device.type}, in {environment.directory.path}"
    )
    if world.size > 1:
        mode = "once_per_step" if built.grad_sync.once_per_step else "every_micro_batch"
        log.info(f'{mesh.mesh_shape} processes, grad_sync = "{mode}"')
    log.info(
        f"{format_count(training.total_tokens)} tokens, "
        f"{training.total_tokens / (sequences * training.sequence_length):.2f} epochs "
        f"of {format_count(sequences)} sequences of {training.sequence_length}"
    )
