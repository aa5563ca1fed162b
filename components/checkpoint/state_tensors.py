"""StateTensors: the tensors of a run, as a checkpoint stores them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from components.checkpoint.load import load_tensors, tensor_index
from components.interfaces import WorldComm
from components.local_tensor import local_tensor

_FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class StateTensors:
    """Collects and restores model and optimizer state by parameter name, and the random state of this rank."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        world: WorldComm,
        averages: Callable[[], Mapping[str, Mapping[str, torch.Tensor]]] = dict,
    ) -> None:
        """`averages` returns the tensors of each average of the weights, by its name."""
        self.averages = averages
        self.model = model
        self.optimizer = optimizer
        self.world = world

    def collect(self) -> dict[str, Any]:
        """Return the tensors as a nested dict, to save with `CheckpointManager.save`."""
        from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

        return {
            "model": get_model_state_dict(self.model),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer),
            "random": {str(self.world.rank): self._random_state()},
            "average": {name: dict(tensors) for name, tensors in self.averages().items()},
        }

    def find_nonfinite(self) -> list[str]:
        """Return the names of parameters and optimizer states with a NaN or infinite element in the shard of this rank.

        Buffers are not checked, because minus infinity may be intended there (a mask), nor are scalars of the
        optimizer, such as its step count. No tensor is copied.
        """
        named = {
            f"{name}{suffix}": local_tensor(tensor)
            for name, parameter in self.model.named_parameters()
            for suffix, tensor in [("", parameter.detach()), *_states(self.optimizer.state.get(parameter, {}))]
        }
        named = {name: tensor for name, tensor in named.items() if tensor.dtype in _FLOAT_DTYPES and tensor.numel()}
        if not named:
            return []
        # aminmax propagates NaN, so a tensor is finite if and only if its minimum and maximum are: ten times as fast
        # as isfinite on a CPU. bounds is (tensors, 2); one stack means one synchronization with the device.
        bounds = torch.stack([torch.stack(tensor.aminmax()).double() for tensor in named.values()])
        finite = bounds.isfinite().all(dim=1).tolist()
        return [name for name, is_finite in zip(named, finite, strict=True) if not is_finite]

    def restore(self, checkpoint: Path, fetch: Callable[[set[str]], None] | None = None) -> None:
        """Load the model, the optimizer state, averages and the random state of this rank from `checkpoint`.

        `fetch` is called first, with the names of the files that this rank reads.

        An average that the checkpoint does not have, with all its tensors, is left as it is.

        Options of the parameter groups are not restored: those of the recipe may have changed, and an optimizer may
        set them for the batch of one step.

        A random state that the checkpoint does not have (it was saved by fewer ranks, or without GPUs) stays as the
        seed has set it.
        """
        from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict

        tensors = self.collect()
        index = tensor_index(checkpoint, no_dist=self.world.size == 1)
        stored = index.entries
        rank = str(self.world.rank)
        random = tensors.pop("random")[rank]
        random = {name: tensor for name, tensor in random.items() if f"random.{rank}.{name}" in stored}
        if random:
            tensors["random"] = {rank: random}
        tensors["average"] = {
            name: average
            for name, average in tensors["average"].items()
            if all(f"average.{name}.{key}" in stored for key in average)
        }
        # torch creates a state for every parameter; one without a gradient so far has none in the checkpoint
        state = tensors["optimizer"]["state"]
        stateless = {
            name: state.pop(name)
            for name in list(state)
            if not any(f"optimizer.state.{name}.{key}" in stored for key in state[name])
        }
        load_tensors(checkpoint, tensors, no_dist=self.world.size == 1, index=index, fetch=fetch)
        state.update(stateless)
        options = [{key: group[key] for key in group if key != "params"} for group in self.optimizer.param_groups]
        set_model_state_dict(self.model, tensors["model"])
        set_optimizer_state_dict(self.model, self.optimizer, tensors["optimizer"])
        for group, group_options in zip(self.optimizer.param_groups, options, strict=True):
            group.update(group_options)
        for name in stateless:
            self.optimizer.state.pop(self.model.get_parameter(name), None)
        _restore_random_state(random)

    def forward_state(self) -> Callable[[], None]:
        """Return a function that restores what forward passes change from now on: random state and buffers."""
        random, buffers = self._random_state(), [buffer.clone() for buffer in self.model.buffers()]

        def restore() -> None:
            _restore_random_state(random)
            for buffer, before in zip(self.model.buffers(), buffers, strict=True):
                buffer.copy_(before)

        return restore

    def _random_state(self) -> dict[str, torch.Tensor]:
        state = {"cpu": torch.get_rng_state()}
        if any(parameter.is_cuda for parameter in self.model.parameters()):
            state["cuda"] = torch.cuda.get_rng_state()
        return state


def _states(state: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name suffix, tensor) of the optimizer state of one parameter, without scalars."""
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and value.ndim:
            yield f" ({key})", value


def _restore_random_state(state: Mapping[str, torch.Tensor]) -> None:
    if "cpu" in state:
        torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
