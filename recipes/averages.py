"""The averages of the weights of [average.NAME]: in a run, and in a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from components.checkpoint import load_tensors
from components.checkpoint.load import tensor_index
from components.distributed import fsdp
from components.errors import InputError
from components.local_tensor import local_tensor
from recipes.config.imports import import_path
from recipes.errors import raised_in
from recipes.interfaces import AverageConfig, WeightAverage
from recipes.recipe import complete_recipe

log = logging.getLogger("powertrain")


def count_copies(recipe: Any) -> int:
    """Return the number of float32 copies of the parameters that the averages of `recipe` keep."""
    return sum(config.num_copies for config in complete_recipe(recipe).average.values())


class _Average:
    """One average, and the tensors that it keeps, sharded as the parameters are."""

    def __init__(self, config: AverageConfig, parameters: Mapping[str, Tensor]) -> None:
        self.config = config
        self.copies = [
            {name: torch.zeros_like(parameter.detach(), dtype=torch.float32) for name, parameter in parameters.items()}
            for _ in range(config.num_copies)
        ]
        self.reset()

    def reset(self) -> None:
        """Start again, without an average."""
        local = [local_tensors(copy.values()) for copy in self.copies]
        for tensor in chain.from_iterable(local):
            tensor.zero_()
        self.built: WeightAverage = self.config.build(copies=local)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by their names in a checkpoint, NUMBER.PARAMETER."""
        return {f"{number}.{name}": each for number, copy in enumerate(self.copies) for name, each in copy.items()}

    def identity(self) -> dict[str, Any]:
        """Return what must be equal in a checkpoint for its state to fit."""
        return {"use": import_path(type(self.config)), "num_copies": self.config.num_copies}


class Averages:
    """The averages of a run, by name. Each is updated after every step, saved with every checkpoint, and validated."""

    def __init__(self, model: nn.Module, configs: Mapping[str, AverageConfig]) -> None:
        """`model` is parallelized, and has not run yet."""
        self._model = model
        # FSDP2 replaces the parameters of the modules while they are gathered; these are the shards
        self._parameters = dict(model.named_parameters()) if configs else {}
        self._averages: dict[str, _Average] = {}
        for name, config in configs.items():
            with raised_in(f"average.{name}"):
                self._averages[name] = _Average(config, self._parameters)

    def _weights(self) -> list[Tensor]:
        return local_tensors(self._parameters.values())

    def update(self, *, tokens: int, step_tokens: int) -> None:
        """Update every average after an optimizer step of `step_tokens` tokens, the last of `tokens`."""
        weights = self._weights() if self._averages else []
        for name, average in self._averages.items():
            with torch.no_grad(), raised_in(f"average.{name}"):
                average.built.update(weights, tokens=tokens, step_tokens=step_tokens)

    def started(self) -> list[str]:
        """Return the names of the averages that have started."""
        return [name for name, average in self._averages.items() if average.built.has_started]

    @contextmanager
    def swapped(self, name: str) -> Iterator[None]:
        """Replace the parameters by the average `name` inside this context. Call on every rank.

        The parameters are copied before and restored afterwards. Gathered weights are released on both occasions,
        because the next forward would use them as they are.
        """
        with torch.no_grad():
            saved = [weight.clone() for weight in self._weights()]
        try:
            with torch.no_grad(), raised_in(f"average.{name}"):
                fsdp.reshard(self._model)
                self._averages[name].built.copy_to(self._weights())
            yield
        finally:
            with torch.no_grad():
                fsdp.reshard(self._model)
                torch._foreach_copy_(self._weights(), saved)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return the tensors to save, by the name of the average."""
        return {name: average.tensors() for name, average in self._averages.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return everything except the tensors, as JSON values."""
        return {
            name: {**average.identity(), "state": dict(average.built.state_dict())}
            for name, average in self._averages.items()
        }

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, after the tensors. An average that it lacks starts here."""
        for name, average in self._averages.items():
            state = states.get(name)
            if state is not None and average.identity().items() <= state.items():
                with raised_in(f"average.{name}"):
                    average.built.load_state_dict(state["state"])
                continue
            average.reset()
            log.info(
                f"average {name} starts here: the checkpoint "
                + ("does not have it" if state is None else f"has one of {state['num_copies']} x {state['use']}")
            )
        for name in states.keys() - self._averages.keys():
            log.info(f"average {name} of the checkpoint is dropped: the recipe has no [average.{name}]")


@dataclass(frozen=True)
class StoredAverage:
    """An average in a checkpoint."""

    checkpoint: Path
    name: str
    config: AverageConfig
    state: Mapping[str, Any]

    def load(self, weights: Mapping[str, Tensor], *, no_dist: bool) -> None:
        """Copy the average to those of `weights`, by parameter name, that have one; buffers have none.

        Each rank reads only its shards. Raises ValueError if the checkpoint is damaged.
        """
        index = tensor_index(self.checkpoint, no_dist=no_dist)
        key = f"average.{self.name}"
        last = f"{key}.{self.config.num_copies - 1}"
        averaged = {name: each for name, each in weights.items() if f"{last}.{name}" in index.entries}
        if not any(name.startswith(f"{last}.") for name in index.entries):
            raise ValueError(f"{self.checkpoint} is damaged: it has no tensors {last}")
        average = _Average(self.config, averaged)
        try:
            average.built.load_state_dict(self.state)
            started = average.built.has_started
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{self.checkpoint} is damaged: {key}: {type(error).__name__} {error}") from None
        if not started:
            raise InputError("average", f"{self.name} has not started in {self.checkpoint}; use a later checkpoint")
        load_tensors(self.checkpoint, {"average": {self.name: average.tensors()}}, no_dist=no_dist, index=index)
        with torch.no_grad():
            average.built.copy_to(local_tensors(averaged.values()))


def load_weights(
    checkpoint: Path, weights: Mapping[str, Tensor], average: StoredAverage | None, *, no_dist: bool
) -> None:
    """Fill `weights`, by their names in the model, from `checkpoint`: those of the last step, or of `average`."""
    load_tensors(checkpoint, {"model": weights}, no_dist=no_dist)
    if average is not None:
        average.load(weights, no_dist=no_dist)


def find_average(checkpoint: Path, state: Mapping[str, Any], recipe: Any, name: str | None) -> StoredAverage | None:
    """Return the average `name` of `checkpoint`; None if `name` is None. Reads no tensor.

    `state` is its state.json and `recipe` its recipe. Raises InputError at `average` if it has no such average.
    """
    if name is None:
        return None
    stored, configs = state.get("average", {}), complete_recipe(recipe).average
    if name not in stored or name not in configs:
        names = ", ".join(sorted(stored.keys() & configs.keys())) or "none"
        raise InputError("average", f"{checkpoint} has no average {name!r}; its averages: {names}")
    return StoredAverage(checkpoint, name, configs[name], stored[name]["state"])


def local_tensors(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the shards of this rank, which share their memory with `tensors`."""
    return [local_tensor(each).detach() for each in tensors]
