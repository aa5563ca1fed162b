"""The processes of a launch: their number, from the environment, and their start on this node."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from components.errors import InputError
from components.protocol_defaults import with_defaults
from recipes.config.errors import PROJECT
from recipes.errors import UsageError
from recipes.process_environment import enable_flight_recorder
from recipes.recipe import CheckpointDefaults, RunDefaults, complete_recipe

if TYPE_CHECKING:
    from components.distributed.node import NodeSpec


@dataclass(frozen=True)
class WorldShape:
    """The number of processes of a launch."""

    per_node: int
    nodes: int
    min_nodes: int = 0
    """The smallest number of nodes that an elastic run continues with; 0: `nodes`."""

    @property
    def is_elastic(self) -> bool:
        """Whether nodes may leave and join."""
        return self.min_nodes > 0

    @property
    def world_size(self) -> int:
        return self.per_node * self.nodes


def resolve_world_shape(environment: Mapping[str, str], recipe: object = None, gpus: int | None = None) -> WorldShape:
    """Return the world shape that the environment asks for.

    Without NPROC or NGPU it is one process per GPU, or one process for a `recipe` on the CPU. `gpus` is the number of
    GPUs; by default those visible to this process. Raises UsageError.
    """
    per_node = environment.get("NPROC") or environment.get("NGPU")
    if per_node is None:
        if complete_recipe(recipe).device == "cpu":
            gpus = 0
        if gpus is None:
            import torch

            gpus = torch.cuda.device_count()
        per_node = str(max(1, gpus))
    given = environment.get("NNODES") or "1"
    smallest, elastic, nodes = given.partition(":")
    nodes = nodes if elastic else smallest
    for name, whole, value in (("NPROC", per_node, per_node), ("NNODES", given, smallest), ("NNODES", given, nodes)):
        if not value.isdigit() or int(value) < 1:
            form = ", or two such as 2:4" if name == "NNODES" else ""
            raise UsageError(f"{name}={whole}: expected a whole number >= 1{form}")
    if int(smallest) > int(nodes):
        raise UsageError(f"NNODES={smallest}:{nodes}: the smallest number of nodes is above the largest")
    return WorldShape(int(per_node), int(nodes), int(smallest) if elastic else 0)


def worker_world_shape(environment: Mapping[str, str]) -> WorldShape:
    """Return the world shape of the run to which this worker process belongs."""
    world_size = int(environment["WORLD_SIZE"])
    per_node = int(environment.get("LOCAL_WORLD_SIZE") or world_size)
    return WorldShape(per_node, world_size // per_node) if world_size % per_node == 0 else WorldShape(world_size, 1)


def needs_launcher(recipe: object, shape: WorldShape, environment: Mapping[str, str]) -> bool:
    """Return whether a launcher starts the run, also of one process if it is to be restarted after a failure."""
    restarts = _hang_timeout(recipe) is not None or "MAX_RESTARTS" in environment
    return shape.world_size > 1 or shape.is_elastic or restarts


def launch_recipe(recipe: object, shape: WorldShape, arguments: Sequence[str]) -> int:
    """Start `recipe` by `launch_workers`, with the environment variables and the directory that its workers need."""
    complete = complete_recipe(recipe)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // shape.per_node)))
    if complete.device != "cpu" and complete.run is not None:
        enable_flight_recorder(os.environ, complete.run.directory)
    with ExitStack() as cleanup:
        if with_defaults(complete.checkpoint, CheckpointDefaults).in_memory_interval_steps is not None:
            from components.checkpoint.host_memory import make_host_memory_directory

            cleanup.enter_context(make_host_memory_directory())
        return launch_workers(shape, os.environ, arguments, hang_timeout_seconds=_hang_timeout(recipe))


def _hang_timeout(recipe: object) -> float | None:
    return with_defaults(complete_recipe(recipe).run, RunDefaults).hang_timeout_seconds


def read_node(shape: WorldShape, environment: Mapping[str, str], hang_timeout_seconds: float | None) -> NodeSpec:
    """Return this node of the launch, as the environment describes it. Raises UsageError."""
    from components.distributed.membership import Patience  # not at the top: it imports torch
    from components.distributed.node import NodeSpec

    numbers = {}
    defaults = {"NODE_RANK": "0", "MASTER_PORT": "29500", "MAX_RESTARTS": "10" if shape.is_elastic else "0"}
    defaults |= {"NODE_TIMEOUT": "15", "JOIN_AFTER": "60"}
    for name, default in defaults.items():
        value = environment.get(name) or default
        if not value.isdigit():
            raise UsageError(f"{name}={value}: expected a whole number >= 0")
        numbers[name] = int(value)
    if numbers["NODE_TIMEOUT"] < 5:
        raise UsageError(f"NODE_TIMEOUT={numbers['NODE_TIMEOUT']}: expected at least 5 seconds")
    if numbers["NODE_RANK"] >= shape.nodes and not shape.is_elastic:
        raise UsageError(
            f"NODE_RANK={numbers['NODE_RANK']}: expected 0 to {shape.nodes - 1}, because NNODES={shape.nodes}"
        )
    if shape.nodes > 1 and not environment.get("MASTER_ADDR"):
        raise UsageError(f"NNODES={shape.nodes} needs MASTER_ADDR: the host name of node 0")
    return NodeSpec(
        processes=shape.per_node,
        nodes=shape.nodes,
        min_nodes=shape.min_nodes,
        rank=None if shape.is_elastic and not environment.get("NODE_RANK") else numbers["NODE_RANK"],
        address=environment.get("MASTER_ADDR") or "127.0.0.1",
        port=numbers["MASTER_PORT"],
        max_restarts=numbers["MAX_RESTARTS"],
        hang_timeout_seconds=hang_timeout_seconds,
        patience=Patience(lost_after=numbers["NODE_TIMEOUT"], join_after=numbers["JOIN_AFTER"]),
    )


def launch_workers(
    shape: WorldShape,
    environment: Mapping[str, str],
    arguments: Sequence[str],
    *,
    hang_timeout_seconds: float | None = None,
) -> int:
    """Start this command line in every worker process of this node. Returns the exit status. Raises UsageError."""
    from components.distributed.launcher import run_workers

    node = read_node(shape, environment, hang_timeout_seconds)
    try:
        return run_workers([sys.executable, "-u", str(PROJECT / "recipes" / "__main__.py"), *arguments], node)
    except OSError as error:
        raise UsageError(f"cannot start the worker processes: {error}") from error


def check_layouts(parallel: Any, shape: WorldShape) -> None:
    """Raise InputError if [parallel] does not fit the processes, with any number of nodes of an elastic run."""
    for nodes in range(shape.min_nodes or shape.nodes, shape.nodes + 1):
        try:
            parallel.mesh_shape(shape.per_node * nodes, shape.per_node)
        except InputError as error:
            if not shape.min_nodes:
                raise
            counts = f"NNODES={shape.min_nodes}:{shape.nodes}"
            raise InputError(error.key, f"{error.message}; {counts} may mean {nodes} nodes") from None


def is_worker() -> bool:
    """Return whether this process is a worker of a run, not the launcher."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ
