"""The norm of gradients in the geometry of Adam: sum_i p_i g_i^2, for an update lr p m of the momentum m.

With p = multiplier / (sqrt(v) + eps), the step lr p G lowers the loss by lr sum_i p_i G_i^2 to first order, as plain
gradient descent lowers it by lr |G|^2. Gradients times sqrt(p) therefore have the noise scale of Adam's steps. p is the
same for all micro-batches of a step: that of the steps before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from components.gradient_noise.norms import local_part
from components.interfaces import Comm

FLOOR = 0.01
"""Smallest second moment, relative to the mean of its tensor. That of an embedding of a rare token decays to nothing,
and p would let one gradient of it outweigh all others; in the update itself that gradient is part of v."""


@runtime_checkable
class DiagonalPreconditioner(Protocol):
    """An optimizer like Adam, which divides each element of the momentum by the root of a second moment."""

    def second_moments(self) -> Iterable[tuple[Tensor, Tensor, float, float]]:
        """Yield each parameter that has a state, v without the bias of its start, its learning-rate multiplier and eps.
        v is sharded like the parameter, and nan before its first update."""
        ...


class AdamNorm:
    """The factors sqrt(p) of the parameters of a model, for one step at a time."""

    def __init__(
        self,
        optimizer: DiagonalPreconditioner,
        tensors: Mapping[str, Tensor],
        parameters: Mapping[str, Tensor],
        world: Comm,
    ) -> None:
        """`tensors` are those that backward writes gradients of, by the name of their parameter; see
        `named_backward_parameters`. `world` is the group of all processes."""
        self._optimizer, self._world = optimizer, world
        self._pairs = [(parameters[name], tensor) for name, tensor in tensors.items()]
        self._sharded: dict[int, Tensor] = {}
        """id of a parameter -> the factors of this process's shard of it."""
        self._arriving: dict[int, Tensor] = {}
        """Index of a tensor -> the factors of its gradients: of all of them, or of this TP rank's shard."""

    @torch.no_grad()
    def prepare(self) -> bool:
        """Compute the factors from the optimizer's state, on all processes together; False before its first step.

        They are rounded to bf16, which affects the norms of micro-batches and step equally, and is the same on every
        layout. With FSDP2 they are gathered: 2 bytes per parameter until `clear`.
        """
        sums = []
        for _, moment, _, _ in self._optimizer.second_moments():
            copies, local = local_part(moment)
            sums.append(local.sum(dtype=torch.float64) / copies / moment.numel())
        if not sums:
            return False
        # v is corrected twice: keeping it in between would take 4 bytes per parameter
        means = self._world.all_reduce_sum(torch.stack(sums))
        for (parameter, moment, multiplier, eps), mean in zip(self._optimizer.second_moments(), means, strict=True):
            _, local = local_part(moment)
            root = torch.maximum(local, FLOOR * mean.to(local.dtype)).sqrt_().add_(eps)
            # a parameter that never had a gradient has no second moment to divide by
            factors = torch.where(mean > 0, (multiplier / root).sqrt_(), 0.0).to(torch.bfloat16)
            self._sharded[id(parameter)] = factors
        for index, (parameter, tensor) in enumerate(self._pairs):
            if id(parameter) in self._sharded:
                self._arriving[index] = _like_gradient(self._sharded[id(parameter)], parameter, tensor)
        return True

    def clear(self) -> None:
        """Drop the factors."""
        self._sharded.clear()
        self._arriving.clear()

    def scale(self, index: int, local: Tensor) -> Tensor:
        """Return this process's part of a gradient that arrives in backward, times its factors."""
        factors = self._arriving.get(index)
        return torch.zeros_like(local) if factors is None else local * factors

    def scale_sharded(self, parameter: Tensor, local: Tensor) -> Tensor:
        """Return this process's part of the reduced gradient of a parameter, times its factors."""
        factors = self._sharded.get(id(parameter))
        return torch.zeros_like(local) if factors is None else local * factors


def _like_gradient(local: Tensor, parameter: Tensor, tensor: Tensor) -> Tensor:
    """Return the factors for gradients of `tensor`, from those of this process's shard of `parameter`."""
    if tensor is parameter or not hasattr(parameter, "placements"):
        return local
    from torch.distributed.tensor import DTensor, Replicate  # imported here: a single process never needs it

    assert isinstance(parameter, DTensor)
    sharded = DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    whole = sharded.full_tensor()
    if not isinstance(tensor, DTensor):
        return whole
    copies = [Replicate()] * tensor.device_mesh.ndim
    return (
        DTensor.from_local(whole, tensor.device_mesh, copies, run_check=False)
        .redistribute(placements=tensor.placements)
        .to_local()
    )


def require_preconditioner(optimizer: object) -> DiagonalPreconditioner:
    """Return `optimizer`. Raises ValueError if it has no second moments of all parameters."""
    if not isinstance(optimizer, DiagonalPreconditioner):
        raise ValueError(
            f'"adam" needs the second moments of all parameters, from a method second_moments of the optimizer, and '
            f"{type(optimizer).__name__} has none; use components.optimizers:AdamW, or remove it"
        )
    return optimizer
