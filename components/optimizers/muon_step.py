"""The step of Muon on any layout: momentum on the local shards, orthogonalization of whole matrices by their owners.

Matrices of one size are exchanged in buckets, and orthogonalized in one batch. While one bucket is computed, the shards
of the next one are sent.

E matrices of a parameter; K matrices of a bucket on this process, R rows, C columns
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from components.local_tensor import local_tensor
from components.optimizers.adamw import BatchScaledAdamW
from components.optimizers.matrix_exchange import MatrixExchange, Sharding, Unit, assign_units, sharding_of
from components.optimizers.orthogonalize import CoefficientsName, orthogonalize, orthogonalize_flops

LRScale = Literal["match_rms_adamw", "spectral"]

BUCKET_ELEMENTS = 2**25
"""Elements of a bucket on each process, which bounds the memory of a step: 64 MiB for each copy in bf16."""
NORMUON_EPS = 1e-8
"""Added to the root of the mean squares of a row."""


class MatrixParameter(NamedTuple):
    """A parameter that Muon updates."""

    name: str
    parameter: nn.Parameter
    """(R, C), or (E, R, C)."""
    merged: int
    """Number of matrices of equal size that it concatenates along its rows."""


class MuonKeys(Protocol):
    """The keys of [optimizer]; see `components.optimizers.Muon`."""

    @property
    def momentum(self) -> float: ...
    @property
    def momentum_half_life_tokens(self) -> int | None: ...
    @property
    def variant(self) -> Literal["muon", "normuon"]: ...
    @property
    def normuon_beta2(self) -> float: ...
    @property
    def coefficients(self) -> CoefficientsName: ...
    @property
    def lr_scale(self) -> LRScale: ...
    @property
    def compute_dtype(self) -> Literal["auto", "bf16", "float32"]: ...
    @property
    def reference_batch_tokens(self) -> int | None: ...
    @property
    def moment_dtype(self) -> torch.dtype: ...


@dataclass(frozen=True)
class _Bucket:
    """Parameters of one group with matrices of one size, and their exchange."""

    group: int
    """Index of the parameter group."""
    parameters: list[nn.Parameter]
    rows: int
    columns: int
    exchange: MatrixExchange
    row_exchange: MatrixExchange | None
    """The exchange of a tensor with one value for each row; for NorMuon."""


class MuonOptimizer(BatchScaledAdamW):
    """Muon for the groups of matrices, AdamW for the others.

    State: `momentum_buffer` like the parameter; for NorMuon also `row_mean_square`, (R, 1) or (E, R, 1). That of every
    parameter exists from the start, so that a checkpoint before the first step has it.
    """

    second_moments = None  # type: ignore[assignment]
    """It has none of the matrices."""

    def __init__(
        self,
        keys: MuonKeys,
        matrix_groups: list[dict[str, Any]],
        other_groups: list[dict[str, Any]],
        matrices: Sequence[MatrixParameter],
        options: dict[str, Any],
    ) -> None:
        """`options` are those of AdamW. Raises ValueError for rows that do not divide into the merged matrices."""
        self.keys, self._on_muon = keys, {id(matrix.parameter) for matrix in matrices}
        super().__init__([*matrix_groups, *other_groups], options, keys.reference_batch_tokens, keys.moment_dtype)
        self.momentum, self.normuon_beta2 = keys.momentum, keys.normuon_beta2
        self._world_size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        self._rank = dist.get_rank() if self._world_size > 1 else 0
        for group in self.param_groups:
            for parameter in group["params"]:
                self._create_state(parameter)
        self._buckets = self._make_buckets(len(matrix_groups), matrices)

    def set_batch_tokens(self, batch_tokens: int) -> None:
        """Set the decay factors for a step of `batch_tokens`."""
        super().set_batch_tokens(batch_tokens)
        half_life = self.keys.momentum_half_life_tokens
        self.momentum = self.keys.momentum if half_life is None else 0.5 ** (batch_tokens / half_life)
        self.normuon_beta2 = self.scaled_to_batch(self.keys.normuon_beta2, batch_tokens)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step of AdamW, then one of Muon. On a CUDA device both are skipped where `found_inf` is 1."""
        loss: float | None = super().step(closure)
        keep = self._update_momentum()
        started: tuple[_Bucket, Callable[[Sequence[Tensor]], None]] | None = None
        for bucket in [*self._buckets, None]:
            following = None if bucket is None else (bucket, bucket.exchange.gather(self._directions(bucket)))
            if started is not None:
                self._update(*started, keep)
            started = following
        return loss

    def __setstate__(self, state: dict[str, Any]) -> None:
        torch.optim.Optimizer.__setstate__(self, state)  # Adam's expects `step` in all
        self._restore_moment_dtype()

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        """Collect nothing of a group of Muon, so that AdamW skips it."""
        return False if id(group["params"][0]) in self._on_muon else super()._init_group(group, *lists)

    def _create_state(self, parameter: Tensor) -> None:
        if id(parameter) not in self._on_muon:
            super()._create_state(parameter)
            return
        self.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}
        if self.keys.variant == "normuon":
            self.state[parameter]["row_mean_square"] = _zeros_by_row(parameter)

    def _make_buckets(self, groups: int, matrices: Sequence[MatrixParameter]) -> list[_Bucket]:
        """Assign all matrices to processes, and divide them into buckets of one group and one size."""
        merged = {id(matrix.parameter): matrix.merged for matrix in matrices}
        for name, parameter, parts in matrices:
            if parts < 1 or parameter.shape[-2] % parts:
                raise ValueError(f"{name} has {parameter.shape[-2]} rows, which are not {parts} matrices of equal size")
        parameters = [(group, p) for group in range(groups) for p in self.param_groups[group]["params"]]
        shardings = [sharding_of(parameter) for _, parameter in parameters]
        sizes = [(s.shape[1] // merged[id(p)], s.shape[2]) for (_, p), s in zip(parameters, shardings, strict=True)]

        def cost(index: int) -> float:
            return merged[id(parameters[index][1])] * orthogonalize_flops(*sizes[index], steps=1)

        by_size: dict[tuple[int, int, int], list[list[Unit]]] = defaultdict(list)
        for unit in assign_units(shardings, cost, self._world_size):
            rows, columns = sizes[unit.parameter]
            filled = by_size[parameters[unit.parameter][0], rows, columns]
            if not filled or _elements(filled[-1]) + math.prod(unit.shape) > BUCKET_ELEMENTS * self._world_size:
                filled.append([])
            filled[-1].append(unit)
        return [
            self._bucket(group, rows, columns, units, [p for _, p in parameters], shardings)
            for (group, rows, columns), filled in by_size.items()
            for units in filled
        ]

    def _bucket(
        self,
        group: int,
        rows: int,
        columns: int,
        units: Sequence[Unit],
        parameters: Sequence[nn.Parameter],
        shardings: Sequence[Sharding],
    ) -> _Bucket:
        used = sorted({unit.parameter for unit in units})
        number = {index: position for position, index in enumerate(used)}
        units = [Unit(number[unit.parameter], unit.box, unit.owner) for unit in units]
        exchange = MatrixExchange(units, [shardings[index] for index in used], self._rank, self._world_size)
        row_exchange = None
        if self.keys.variant == "normuon":
            by_row = [sharding_of(self.state[parameters[index]]["row_mean_square"]) for index in used]
            row_units = [Unit(unit.parameter, (*unit.box[:2], (0, 1)), unit.owner) for unit in units]
            row_exchange = MatrixExchange(row_units, by_row, self._rank, self._world_size)
        return _Bucket(group, [parameters[index] for index in used], rows, columns, exchange, row_exchange)

    def _update_momentum(self) -> Tensor | None:
        """Decay weights and momentum, and add the gradients. Returns the factor on updates, if the device decides it.

        It is 0 where `found_inf` is 1. Weights and momentum then stay as they are, and gradients become 0.
        """
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        keep = None if found_inf is None else 1 - found_inf
        for group in self.param_groups:
            parameters = [p for p in group["params"] if id(p) in self._on_muon and p.grad is not None]
            if not parameters:
                continue
            weights, gradients = _locals(parameters), _locals([p.grad for p in parameters])
            momenta = _locals([self.state[p]["momentum_buffer"] for p in parameters])
            decay = group["lr"] * group["weight_decay"]
            if found_inf is None or keep is None:
                torch._foreach_lerp_(momenta, gradients, 1 - self.momentum)
                if decay:
                    torch._foreach_mul_(weights, 1 - decay)
                continue
            for gradient in gradients:
                gradient.masked_fill_(found_inf.bool(), 0)
            torch._foreach_mul_(momenta, self.momentum + (1 - self.momentum) * found_inf)
            torch._foreach_add_(momenta, gradients, alpha=1 - self.momentum)
            if decay:
                torch._foreach_mul_(weights, 1 - decay * keep)
        return keep

    def _directions(self, bucket: _Bucket) -> list[Tensor]:
        """Return the shards of what is orthogonalized, (E, R, C) each, in the dtype of the computation."""
        directions = []
        for parameter in bucket.parameters:
            momentum = local_tensor(self.state[parameter]["momentum_buffer"])
            if parameter.grad is None:  # zeros: it stays, and the exchange is the same at every step
                direction = torch.zeros_like(momentum)
            else:  # Nesterov's momentum
                direction = torch.lerp(local_tensor(parameter.grad), momentum, self.momentum)
            directions.append(_stacked(direction).to(self._dtype_of(parameter)))
        return directions

    def _update(self, bucket: _Bucket, finish_gather: Callable[[Sequence[Tensor]], None], keep: Tensor | None) -> None:
        """Orthogonalize the matrices of this process, and subtract the updates of all from the local shards."""
        weights = [_stacked(local_tensor(parameter)) for parameter in bucket.parameters]
        owned, dtype = bucket.exchange.owned, self._dtype_of(bucket.parameters[0])
        x_KRC = weights[0].new_empty(_elements(owned) // (bucket.rows * bucket.columns), bucket.rows, bucket.columns)
        x_KRC = x_KRC.to(dtype)
        finish_gather(_unit_views(x_KRC, owned))
        if len(x_KRC):
            x_KRC = orthogonalize(x_KRC, self.keys.coefficients).contiguous()
        if bucket.row_exchange is not None:
            x_KRC = self._normalize_rows(bucket, bucket.row_exchange, x_KRC, keep)
        if keep is not None:
            x_KRC = x_KRC * keep.to(dtype)
        shards, updates = bucket.exchange.scatter(_unit_views(x_KRC, owned), weights)
        if shards:
            lr = self.param_groups[bucket.group]["lr"] * update_scale(self.keys.lr_scale, bucket.rows, bucket.columns)
            torch._foreach_add_(shards, updates, alpha=-lr)

    def _normalize_rows(self, bucket: _Bucket, exchange: MatrixExchange, x_KRC: Tensor, keep: Tensor | None) -> Tensor:
        """Divide the rows by the root of their mean squares over steps, and keep the norm of each matrix (NorMuon).

        The mean squares are sharded as the rows are, so that checkpoints are independent of the layout.
        """
        averages = [_stacked(local_tensor(self.state[p]["row_mean_square"])) for p in bucket.parameters]
        # without a gradient they stay, as the weight and the momentum do
        averages = [a.clone() if p.grad is None else a for a, p in zip(averages, bucket.parameters, strict=True)]
        average_KR1 = averages[0].new_empty(len(x_KRC), bucket.rows, 1)
        views = _unit_views(average_KR1, exchange.owned)
        exchange.gather(averages)(views)
        square_KR1 = x_KRC.to(average_KR1.dtype).square().mean(-1, keepdim=True)
        weight = (1 - self.normuon_beta2) if keep is None else (1 - self.normuon_beta2) * keep
        average_KR1 += weight * (square_KR1 - average_KR1)
        shards, values = exchange.scatter(views, averages)
        if shards:
            torch._foreach_copy_(shards, values)
        factor_KR1 = 1 / (average_KR1.sqrt() + NORMUON_EPS)
        # the squared norms of a matrix before and after, divided by its columns
        before_K11, after_K11 = square_KR1.sum(1, keepdim=True), (square_KR1 * factor_KR1**2).sum(1, keepdim=True)
        factor_KR1 = factor_KR1 * (before_K11 / after_K11.clamp(min=torch.finfo(after_K11.dtype).tiny)).sqrt()
        return x_KRC * factor_KR1.to(x_KRC.dtype)

    def _dtype_of(self, parameter: nn.Parameter) -> torch.dtype:
        chosen = self.keys.compute_dtype
        if chosen == "auto":
            return torch.bfloat16 if parameter.is_cuda else parameter.dtype
        return torch.bfloat16 if chosen == "bf16" else torch.float32


def update_scale(lr_scale: LRScale, rows: int, columns: int) -> float:
    """Return the factor on the update of a matrix, whose singular values are near 1."""
    if lr_scale == "spectral":
        return math.sqrt(max(1.0, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))


def _locals(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [local_tensor(tensor) for tensor in tensors if tensor is not None]


def _stacked(tensor: Tensor) -> Tensor:
    """Return a view (E, R, C) of a shard of a matrix or of a stack of matrices."""
    return tensor if tensor.ndim == 3 else tensor.unsqueeze(0)


def _elements(units: Sequence[Unit]) -> int:
    return sum(math.prod(unit.shape) for unit in units)


def _unit_views(x_KRC: Tensor, units: Sequence[Unit]) -> list[Tensor]:
    """Return a view of each unit, (matrices of the parameter, its rows, C): merged matrices are adjacent rows."""
    sizes = [math.prod(unit.shape) for unit in units]
    parts = x_KRC.view(-1).split(sizes)
    return [part.view(unit.shape) for part, unit in zip(parts, units, strict=True)]


def _zeros_by_row(parameter: Tensor) -> Tensor:
    """Return zeros with one value for each row of `parameter`, sharded as the rows are."""
    shape = (*parameter.shape[:-1], 1)
    if not hasattr(parameter, "device_mesh"):
        return parameter.new_zeros(shape)
    from torch.distributed.tensor import DTensor, Replicate

    last = parameter.ndim - 1
    mesh: Any = parameter.device_mesh
    placements = [Replicate() if getattr(p, "dim", None) == last else p for p in parameter.placements]  # type: ignore[attr-defined]
    rows = local_tensor(parameter).shape[:-1]
    local = torch.zeros(*rows, 1, dtype=parameter.dtype, device=parameter.device)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)
