"""Estimate the memory of one rank from shapes, and decide from it how often gradients are synchronized.

Exact: parameters, gradients and optimizer state of the rank that holds most, and what autograd saves in the blocks.
Estimated: the moment of the highest use, and what CUDA and NCCL reserve.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from components.distributed.context import DistributedContext
from components.distributed.fsdp import GradSyncMode, shard_dim
from components.distributed.parallel_dims import MeshShape
from components.hardware import device_memory
from recipes.averages import count_copies
from recipes.dry_run.activation_memory import count_activations
from recipes.interfaces import complete_model
from recipes.model_setup import transformer_blocks

RESERVED_BYTES = {"cuda": 2 * 2**30, "cpu": 2**29}
"""Bytes outside of tensors: CUDA context, cuBLAS and NCCL buffers; the interpreter and torch."""
PLANNED_FRACTION = 0.9
"""The fraction of a device's memory that may be planned: its allocator needs the rest."""


@dataclass(frozen=True)
class Memory:
    """Bytes on the rank that holds most."""

    parts: Mapping[str, tuple[int, str]]
    """Part -> (bytes, explanation). The parts do not all exist at the same moment."""
    peak: int
    """The highest use with grad_sync = "every_micro_batch"."""
    local_peak: int
    """The highest use with grad_sync = "once_per_step": weights stay gathered, gradients unsharded in float32."""
    block_inputs: int
    """The sum of all block inputs in one micro-batch: what tensor-parallel ranks exchange."""
    parameters: int
    """Parameters of the whole model."""
    state_bytes: int
    """Bytes of parameters, averages and optimizer state of the whole model: the size of a checkpoint."""


def estimate_memory(
    recipe: Any, model: nn.Module, mesh_shape: MeshShape, device_type: str, compute_dtype: torch.dtype
) -> Memory | str:
    """Return the memory of a run of `recipe`, or the reason why there is no estimate.

    `model` is on the meta device and not sharded.
    """
    training, blocks = recipe.training, transformer_blocks(model)
    try:
        activations = count_activations(
            model,
            list(blocks),
            micro_batch_size=training.micro_batch_size,
            sequence_length=training.sequence_length // mesh_shape.cp,
            compute_dtype=compute_dtype,
            device_type=device_type,
        )
    except Exception as error:  # a custom model may need data to run at all
        return f"not estimated: the model does not run without data ({type(error).__name__}: {str(error)[:100]})"
    mode, compiled = training.activation_checkpoint, training.compiles(torch.device(device_type))
    shards, tp, element = mesh_shape.dp_size * mesh_shape.cp, mesh_shape.tp, compute_dtype.itemsize
    tokens = training.micro_batch_size * training.sequence_length // mesh_shape.cp
    state, state_bytes = _count_state(recipe, model, mesh_shape)

    block_numels = [numel_per_tp_rank(block, tp) for block in blocks.values()]
    whole = numel_per_tp_rank(model, tp)
    root = whole - sum(block_numels)
    gathered, why = _weights_in_use(root, block_numels, mesh_shape, element)
    kept = activations.peak(mode, tp, compiled=compiled)
    # without checkpointing every layer keeps them, in addition to this rank's part
    whole_keys = key_value_bytes(model, training, element) // tp if mesh_shape.cp > 1 else 0
    keys = round(len(blocks) * whole_keys * (1 - 1 / mesh_shape.cp)) if mode == "none" else whole_keys
    loss = complete_model(model).loss_bytes(tokens, element_bytes=element, device_type=device_type, compiled=compiled)
    loss = math.ceil(loss / tp)
    factors = _adam_norm_bytes(recipe, model, mesh_shape)
    resident = sum(size for size, _ in state.values()) + factors + RESERVED_BYTES[device_type]
    # After the last block's backward the gradients outside the blocks are reduced, in float32.
    reducing = math.ceil(root) * (2 * element + 4) if shards > 1 else 0
    peak = resident + max(gathered + kept + keys + loss, reducing)
    # The head is reduced first, when the loss is freed and all blocks still wait for their backward.
    local = peak
    if shards > 1:
        local = resident + math.ceil(whole) * (element + 4) + kept + keys + max(loss, 4 * math.ceil(root))
    return Memory(
        {
            **state,
            "weights in use": (gathered, why),
            "activations": (kept, f"{tokens:,} tokens, activation_checkpoint = {mode}{', compiled' * compiled}"),
            **({"keys and values": (keys, "gathered from the cp ranks")} if keys else {}),
            "loss": (loss, "one chunk of logits, and the gradients"),
            **({"norm of Adam": (factors, "factors in bf16, in measured steps")} if factors else {}),
            "reserved": (RESERVED_BYTES[device_type], "context and buffers, roughly"),
        },
        peak=peak,
        local_peak=local,
        block_inputs=sum(block.input for block in activations.blocks),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        state_bytes=state_bytes,
    )


def _count_state(recipe: Any, model: nn.Module, mesh_shape: MeshShape) -> tuple[dict[str, tuple[int, str]], int]:
    """Return part -> (bytes, explanation) of what a rank holds all the time, and the bytes of a checkpoint."""
    total = sum(parameter.numel() for parameter in model.parameters())
    local = sum(local_numel(parameter, mesh_shape) for parameter in model.parameters())
    per_element = optimizer_bytes_per_element(model, recipe.optimizer)
    local_state = sum(round(per_element[name] * local_numel(p, mesh_shape)) for name, p in model.named_parameters())
    full_state = sum(round(per_element[name] * p.numel()) for name, p in model.named_parameters())
    copies = count_copies(recipe)
    parts = {
        "parameters": (4 * local, "float32"),
        "gradients": (4 * local, "float32"),
        "optimizer state": (local_state, f"{full_state / total:.3g} bytes per parameter"),
        **({"averages": (4 * copies * local, "float32 copies")} if copies else {}),
    }
    return parts, (4 + 4 * copies) * total + full_state


def _weights_in_use(
    root: float, block_numels: list[float], mesh_shape: MeshShape, element_bytes: int
) -> tuple[int, str]:
    """Return the bytes of the weights that a rank computes with, in addition to the float32 parameters, and why.

    `root` and `block_numels` are the parameters on a tensor-parallel rank, outside the blocks and of each block.
    """
    if mesh_shape.world_size == 1 and element_bytes == 2:
        return round(2 * (root + sum(block_numels))), "copies in bf16"
    if mesh_shape.world_size == 1:
        return 0, "used as they are"
    gathered = math.ceil(root + 2 * max(block_numels, default=0)) * element_bytes
    return gathered, "gathered: all outside the blocks, the current block and the next"


def _adam_norm_bytes(recipe: Any, model: nn.Module, mesh_shape: MeshShape) -> int:
    """Return the bytes of the factors of the norm of Adam, which are also gathered if there are shards."""
    if "adam" not in recipe.gradient_noise.norms:
        return 0
    local = sum(local_numel(parameter, mesh_shape) for parameter in model.parameters())
    has_shards = mesh_shape.dp_size * mesh_shape.cp > 1
    return 2 * local + (2 * math.ceil(numel_per_tp_rank(model, mesh_shape.tp)) if has_shards else 0)


def syncs_once_per_step(mode: GradSyncMode, local_peak: int, device_bytes: int) -> bool:
    """Return whether weights and gradient stay whole for a step: `auto` does so if the estimated peak fits."""
    return mode == "once_per_step" or (mode == "auto" and local_peak <= PLANNED_FRACTION * device_bytes)


def decide_grad_sync(
    recipe: Any, model: nn.Module, mesh_shape: MeshShape, world: DistributedContext, compute_dtype: torch.dtype
) -> bool:
    """Return `syncs_once_per_step` of this run: equal on all processes, by the smallest of their devices."""
    mode: GradSyncMode = recipe.training.grad_sync
    if mode != "auto" or mesh_shape.dp_size * mesh_shape.cp == 1:  # one rank has nothing to exchange
        return mode == "once_per_step"
    peak = 0
    if world.is_main:  # the estimate takes seconds of a CPU core, and a node has few cores per GPU
        memory = estimate_memory(recipe, model, mesh_shape, world.device.type, compute_dtype)
        peak = memory.local_peak if isinstance(memory, Memory) else sys.maxsize
    available = device_memory(world.device)
    if world.device.type == "cpu":
        available //= world.local_size
    return syncs_once_per_step(mode, world.all_reduce_max(peak), -world.all_reduce_max(-available))


def numel_per_tp_rank(module: nn.Module, tp: int) -> float:
    """Return the parameters of `module` on each of `tp` ranks: experts are replicated, all others are split."""
    return sum(p.numel() if p.ndim == 3 else p.numel() / tp for p in module.parameters())


def local_numel(parameter: nn.Parameter, mesh_shape: MeshShape) -> int:
    """Return the elements of `parameter` on the rank that has most: tp splits matrices but not experts, FSDP all."""
    if not parameter.ndim:
        return 1
    shape = list(parameter.shape)
    cut = shard_dim(shape, mesh_shape.fsdp_size)
    shape[cut] = math.ceil(shape[cut] / mesh_shape.fsdp_size)
    elements = math.prod(shape)
    return math.ceil(elements / mesh_shape.tp) if parameter.ndim == 2 else elements


def optimizer_bytes_per_element(model: nn.Module, optimizer: Any) -> dict[str, float]:
    """Return the bytes of optimizer state per element of each parameter, by name: one step is taken on the meta device.

    8, as for Adam, if that step fails.
    """
    model = copy.deepcopy(model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    try:
        built = optimizer.build(model=model)
        for parameter in names:
            parameter.grad = torch.empty_like(parameter)
        built.step()
    except Exception:  # a custom optimizer may need anything; an estimate must not fail for it
        return dict.fromkeys(names.values(), 8.0)
    return {
        name: sum(value.nbytes for value in built.state[parameter].values() if torch.is_tensor(value) and value.ndim)
        / parameter.numel()
        for parameter, name in names.items()
    }


def key_value_bytes(model: nn.Module, training: Any, element_bytes: int) -> int:
    """Return the bytes of the keys and values of one layer for the whole sequences of a micro-batch."""
    tokens = training.micro_batch_size * training.sequence_length
    return int(complete_model(model).key_value_bytes(tokens, element_bytes=element_bytes))
