"""The tensors of a run, as a checkpoint holds them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from components.checkpoint.ranks import Ranks
from components.checkpoint.reading import load_tensors, tensor_names


class TrainingTensors:
    """The tensors of a run as one nested dict: model and optimizer by parameter name, and this rank's random state."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, world: Ranks) -> None:
        self.model = model
        self.optimizer = optimizer
        self.world = world

    def collect(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

        return {
            "model": get_model_state_dict(self.model),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer),
            "random": {str(self.world.rank): _random_state()},
        }

    def restore(self, checkpoint: Path) -> None:
        """Load model, the optimizer's state and, where the checkpoint has this rank's, the random state.

        The options of the parameter groups, which a checkpoint holds as well, stay those of the recipe: it may have
        changed, and an optimizer may have set them for one step's batch.

        On more ranks than the checkpoint was written by, the new ranks keep the random state the seed gave them.
        """
        from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict

        tensors = self.collect()
        if not any(name.startswith(f"random.{self.world.rank}.") for name in tensor_names(checkpoint)):
            del tensors["random"]
        load_tensors(checkpoint, tensors, no_dist=self.world.size == 1)
        options = [{key: group[key] for key in group if key != "params"} for group in self.optimizer.param_groups]
        set_model_state_dict(self.model, tensors["model"])
        set_optimizer_state_dict(self.model, self.optimizer, tensors["optimizer"])
        for group, own in zip(self.optimizer.param_groups, options, strict=True):
            group.update(own)
        if "random" in tensors:
            _restore_random_state(tensors["random"][str(self.world.rank)])


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(state: Mapping[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
