"""Which GPUs each of several runs at a time has, and how many processes that makes of a run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from recipes.cli import resolve_world_shape

VISIBLE = "CUDA_VISIBLE_DEVICES"


def visible() -> list[str]:
    """The GPUs this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get(VISIBLE)
    if named is not None:
        return [device.strip() for device in named.split(",") if device.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def shares(devices: Sequence[str], runs: int) -> list[Mapping[str, str]]:
    """What the environment of each of `runs` runs has besides: equally many of the devices, and none in two.

    With fewer devices than runs, some have one in common; a single device, or none, needs no word.
    """
    if len(devices) < 2 or runs < 2:
        return [{} for _ in range(runs)]
    each = len(devices) // runs
    if not each:
        return [{VISIBLE: devices[run % len(devices)]} for run in range(runs)]
    return [{VISIBLE: ",".join(devices[run * each : (run + 1) * each])} for run in range(runs)]


def processes_of_a_run(runs: int, recipe: object) -> int:
    """How many processes the launcher will start for the `recipe` of one of `runs` at a time. Raises UsageError."""
    share = shares(devices := visible(), runs)[0]
    gpus = len(share[VISIBLE].split(",")) if share else len(devices)
    return resolve_world_shape(os.environ, recipe, gpus).world_size
