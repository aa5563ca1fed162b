"""The tensors of a run, as a checkpoint holds them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from components.checkpoint.load import load_tensors, tensor_index
from components.interfaces import WorldComm

_CHECKED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class StateTensors:
    """The tensors of a run as one nested dict: model and optimizer by parameter name, and this rank's random state."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, world: WorldComm) -> None:
        self.model = model
        self.optimizer = optimizer
        self.world = world

    def collect(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

        return {
            "model": get_model_state_dict(self.model),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer),
            "random": {str(self.world.rank): self._random_state()},
        }

    def not_finite(self) -> list[str]:
        """Names of parameters and optimizer states of which this rank holds a number that is NaN or infinite.

        Only its own shards are looked at, once each and without a copy. Buffers are left out, where minus infinity may
        well be meant (a mask), and so are the scalars of an optimizer, such as its count of steps.
        """
        named = {
            f"{name}{suffix}": tensor.to_local() if hasattr(tensor, "to_local") else tensor
            for name, parameter in self.model.named_parameters()
            for suffix, tensor in [("", parameter.detach()), *_states(self.optimizer.state.get(parameter, {}))]
        }
        named = {name: tensor for name, tensor in named.items() if tensor.dtype in _CHECKED and tensor.numel()}
        if not named:
            return []
        # Both pass NaN on, so a tensor is finite if and only if they are: ten times as fast as isfinite on a CPU. One
        # stack for all, and so one wait for the device.
        bounds = torch.stack([torch.stack(tensor.aminmax()).double() for tensor in named.values()])
        finite = bounds.isfinite().all(dim=1).tolist()
        return [name for name, is_finite in zip(named, finite, strict=True) if not is_finite]

    def restore(self, checkpoint: Path) -> None:
        """Load model, the optimizer's state and, as far as the checkpoint has this rank's, the random state.

        The options of the parameter groups, which a checkpoint holds as well, stay those of the recipe: it may have
        changed, and an optimizer may have set them for one step's batch.

        On more ranks than the checkpoint was written by, or on GPUs if it was on none, what is new keeps the random
        state that the seed gave it.
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
        # torch invents a state for every parameter, and one that has had no gradient yet has none
        state = tensors["optimizer"]["state"]
        idle = {
            name: state.pop(name)
            for name in list(state)
            if not any(f"optimizer.state.{name}.{key}" in stored for key in state[name])
        }
        load_tensors(checkpoint, tensors, no_dist=self.world.size == 1, index=index)
        state.update(idle)
        options = [{key: group[key] for key in group if key != "params"} for group in self.optimizer.param_groups]
        set_model_state_dict(self.model, tensors["model"])
        set_optimizer_state_dict(self.model, self.optimizer, tensors["optimizer"])
        for group, own in zip(self.optimizer.param_groups, options, strict=True):
            group.update(own)
        for name in idle:
            self.optimizer.state.pop(self.model.get_parameter(name), None)
        _restore_random_state(random)

    def _random_state(self) -> dict[str, torch.Tensor]:
        state = {"cpu": torch.get_rng_state()}
        if any(parameter.is_cuda for parameter in self.model.parameters()):
            state["cuda"] = torch.cuda.get_rng_state()
        return state


def _states(state: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of an optimizer's state of one parameter, scalars left out, each with what its name ends in."""
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and value.ndim:
            yield f" ({key})", value


def _restore_random_state(state: Mapping[str, torch.Tensor]) -> None:
    if "cpu" in state:
        torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
