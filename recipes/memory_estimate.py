"""The memory of one rank, from shapes alone, and what it decides: whether gradients are accumulated locally.

Exact: parameters, their gradients and the optimizer's state, by the largest share a rank holds, and what autograd keeps
of the blocks. Estimated: the moment at which most is held, and what CUDA and NCCL keep for themselves.
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

from components.activations import Activations, Checkpointing, count
from components.distributed.context import World
from components.distributed.fsdp import Accumulation, cut_dimension
from components.distributed.parallel_dims import Sizes
from components.throughput import device_memory

RESERVED = {"cuda": 2 * 2**30, "cpu": 2**29}
"""Bytes outside of tensors: CUDA context, cuBLAS and NCCL buffers; the interpreter and torch."""
PLANNED = 0.9
"""The share of a device's memory that may be planned: its allocator needs the rest."""


@dataclass(frozen=True)
class Memory:
    """Bytes on the rank that holds most."""

    parts: Mapping[str, tuple[int, str]]
    """What -> (bytes, why so many). Not all at one moment."""
    peak: int
    """The most at any moment with accumulation = "reduce"."""
    local_peak: int
    """The same with accumulation = "local": all weights stay gathered, and the gradient is whole, in float32."""
    block_inputs: int
    """What enters the blocks in one micro-batch, added up: what tensor-parallel ranks exchange."""
    parameters: int
    """Parameters of the whole model."""
    state_bytes: int
    """Bytes of parameters and optimizer state on all ranks together, once: a checkpoint."""


def estimate(
    model: nn.Module,
    *,
    sizes: Sizes,
    optimizer: Any,
    activations: Activations,
    checkpointing: Checkpointing,
    tokens: int,
    compute_dtype: torch.dtype,
    device_type: str,
    compiled: bool = False,
) -> Memory:
    """`model` is on the meta device; `activations` are those of a micro-batch of `tokens`."""
    parameters = list(model.parameters())
    total = sum(parameter.numel() for parameter in parameters)
    mine = sum(share(parameter, sizes) for parameter in parameters)
    per_parameter = optimizer_state(model, optimizer)
    state = sum(round(per_parameter[name] * share(p, sizes)) for name, p in model.named_parameters())
    full_state = sum(round(per_parameter[name] * p.numel()) for name, p in model.named_parameters())

    data_parallel, tp = sizes.dp_size, sizes.tp
    element = compute_dtype.itemsize
    blocks = [slice_of(block, tp) for _, block in blocks_of(model)]
    root, largest = slice_of(model, tp) - sum(blocks), max(blocks, default=0)
    if data_parallel * tp == 1:
        in_use, why = (2 * total, "copies in bf16") if element == 2 else (0, "used as they are")
    else:
        in_use = math.ceil(root + 2 * largest) * element
        why = "gathered: all outside the blocks, one block at work and the next"
    kept = activations.peak(checkpointing, tp, compiled=compiled)
    loss = math.ceil(loss_bytes(model, tokens, element_bytes=element, device_type=device_type, compiled=compiled) / tp)
    # After the last block's backward the gradients outside the blocks are reduced, in float32.
    reducing = math.ceil(root) * (2 * element + 4) if data_parallel > 1 else 0
    held = 4 * mine + 4 * mine + state + RESERVED[device_type]
    peak = held + max(in_use + kept + loss, reducing)
    whole = math.ceil(slice_of(model, tp))
    # The head is reduced first, when the loss has gone and all blocks still wait for their backward.
    local_peak = held + whole * (element + 4) + kept + max(loss, 4 * math.ceil(root)) if data_parallel > 1 else peak
    how = f"activation_checkpoint = {checkpointing}{', compiled' if compiled else ''}"
    return Memory(
        {
            "parameters": (4 * mine, "float32"),
            "gradients": (4 * mine, "float32"),
            "optimizer state": (state, f"{full_state / total:.3g} bytes a parameter"),
            "weights in use": (in_use, why),
            "activations": (kept, f"of {tokens:,} tokens, {how}"),
            "loss": (loss, "logits a chunk at a time, and their gradients"),
            "reserved": (RESERVED[device_type], "context and buffers, roughly"),
        },
        peak=peak,
        local_peak=local_peak,
        block_inputs=sum(block.input for block in activations.blocks),
        parameters=total,
        state_bytes=4 * total + full_state,
    )


def estimate_run(
    recipe: Any, model: nn.Module, sizes: Sizes, device_type: str, compute_dtype: torch.dtype
) -> Memory | str:
    """The memory of a run of `recipe`, whose `model` is on the meta device and whole; or why there is no estimate."""
    training = recipe.training
    try:
        activations = activations_of(
            model,
            micro_batch_size=training.micro_batch_size,
            sequence_length=training.sequence_length,
            compute_dtype=compute_dtype,
        )
    except Exception as error:  # a model of the user's may need data to run at all
        return f"not estimated: the model does not run without data ({type(error).__name__}: {str(error)[:100]})"
    return estimate(
        model,
        sizes=sizes,
        optimizer=recipe.optimizer,
        activations=activations,
        checkpointing=training.activation_checkpoint,
        tokens=training.micro_batch_size * training.sequence_length,
        compute_dtype=compute_dtype,
        device_type=device_type,
        compiled=training.compiles(torch.device(device_type)),
    )


def accumulates_locally(mode: Accumulation, local_peak: int, device_bytes: int) -> bool:
    """Whether weights and gradient stay whole for a step: `auto` does so where the estimate leaves the room for it."""
    return mode == "local" or (mode == "auto" and local_peak <= PLANNED * device_bytes)


def decide_accumulation(recipe: Any, model: nn.Module, sizes: Sizes, world: World, compute_dtype: torch.dtype) -> bool:
    """`accumulates_locally` for this run: all processes come to the same, by the smallest of their devices."""
    mode: Accumulation = recipe.training.accumulation
    if mode != "auto" or sizes.dp_size == 1:  # one rank has nothing to exchange
        return mode == "local"
    peak = 0
    if world.is_main:  # counting takes seconds of a processor, of which a node has few for each GPU
        memory = estimate_run(recipe, model, sizes, world.device.type, compute_dtype)
        peak = memory.local_peak if isinstance(memory, Memory) else sys.maxsize
    available = device_memory(world.device)
    if world.device.type == "cpu":
        available //= world.local_size
    return accumulates_locally(mode, world.maximum(peak), -world.maximum(-available))


def slice_of(module: nn.Module, tp: int) -> float:
    """Parameters of `module` on each of `tp` ranks: experts are whole on all, and of the rest each has its slice."""
    return sum(p.numel() if p.ndim == 3 else p.numel() / tp for p in module.parameters())


def share(parameter: nn.Parameter, sizes: Sizes) -> int:
    """Elements of `parameter` on the rank that has most: tp slices matrices but not experts, dp_shard cuts all."""
    if not parameter.ndim:
        return 1
    shape = list(parameter.shape)
    cut = cut_dimension(shape, sizes.dp_shard)
    shape[cut] = math.ceil(shape[cut] / sizes.dp_shard)
    elements = math.prod(shape)
    return math.ceil(elements / sizes.tp) if parameter.ndim == 2 else elements


def optimizer_state(model: nn.Module, optimizer: Any) -> dict[str, float]:
    """Bytes of state for each element of each parameter, by name: one step is taken on the meta device.

    8 where that fails, as Adam has it.
    """
    model = copy.deepcopy(model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    try:
        built = optimizer.build(parameters=model.named_parameters(), lr_multiplier=lambda name: 1.0)
        for parameter in names:
            parameter.grad = torch.empty_like(parameter)
        built.step()
    except Exception:  # a user's optimizer may ask for anything; an estimate must not fail for it
        return dict.fromkeys(names.values(), 8.0)
    return {
        name: sum(value.nbytes for value in built.state[parameter].values() if torch.is_tensor(value) and value.ndim)
        / parameter.numel()
        for parameter, name in names.items()
    }


def loss_bytes(model: nn.Module, tokens: int, *, element_bytes: int, device_type: str, compiled: bool) -> int:
    """Memory of the head and the loss: what the model says, else float32 logits, log-probabilities and gradients."""
    told: Any = getattr(model, "loss_bytes", None)
    if told is not None:
        return int(told(tokens, element_bytes=element_bytes, device_type=device_type, compiled=compiled))
    return tokens * int(getattr(model, "vocab_size", 0)) * 12


def blocks_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The blocks that are sharded, compiled and checkpointed one by one, with their names."""
    if not hasattr(model, "layers"):
        return []
    return [(f"layers.{name}", block) for name, block in model.get_submodule("layers").named_children()]


def activations_of(
    model: nn.Module, *, micro_batch_size: int, sequence_length: int, compute_dtype: torch.dtype
) -> Activations:
    """Counted by running `model` once without storage. Raises whatever the model raises."""
    return count(
        model,
        [name for name, _ in blocks_of(model)],
        micro_batch_size=micro_batch_size,
        sequence_length=sequence_length,
        compute_dtype=compute_dtype,
    )
