"""The sections every recipe shares: what a run is called, and how it trains."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field

from components.activation_checkpointing import ACMode
from components.distributed.fsdp import GradSyncMode
from components.errors import InputError
from components.precision import Precision
from components.units import Count, PositiveCount, Tokens, expand_home

_LONGEST_NAME = 200
"""Bytes of a run's name, below the 255 of most file systems."""


def default_cache_dir() -> Path:
    """The cache of this user. Raises ValueError for a user without a home directory, as in some containers."""
    return expand_home("~/.cache/powertrain")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """[run]: identity and place of a run."""

    name: str = "run"
    """Name of the run; its directory is runs/<name>, where you stand."""
    dir: Path | None = None
    """The run directory itself, in place of runs/<name>."""
    cache_dir: Path = field(default_factory=default_cache_dir)
    """Where prepared data and compiled kernels are kept for other runs."""
    if_exists: Literal["refuse", "replace"] = "refuse"
    """A new run whose directory already holds one: stop, or delete the old run first."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0  # torch takes 64 bits, and each rank adds its number
    """Seed of weights, sample order and everything else that is random."""
    deterministic: bool = False
    """Ask torch for deterministic algorithms; slower on GPUs. A single CPU process is deterministic as it is."""
    init_from: Path | None = None
    """A Hugging Face directory to start from; unset: random weights. Says nothing to a run that is resumed."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto: CUDA if there is a GPU."""
    max_minutes: Annotated[float, Field(gt=0)] | None = None
    """Minutes after the launch at which the run saves and stops, for queues that would kill it: leave room for a step
    and a checkpoint. Unset: no limit."""

    def __post_init__(self) -> None:
        name = self.name
        if not name or name.strip() != name or name[0] in "-.~" or not name.isprintable() or set(name) & set("/\\\"'"):
            raise InputError(
                "name",
                "it becomes a directory in runs/: it may not be empty, begin with '.', '-' or '~', begin or end "
                "with a space, or have a slash, backslash, quote or control character in it; run.dir takes any path",
            )
        # not os.fsencode: the locale may lack characters that the file system takes
        if (size := len(name.encode("utf-8", "surrogateescape"))) > _LONGEST_NAME:
            raise InputError("name", f"{size} bytes; a directory's name has at most {_LONGEST_NAME}")

    @property
    def directory(self) -> Path:
        return self.dir if self.dir is not None else Path("runs").absolute() / self.name


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """[training]: how much to train, and in which pieces."""

    total_tokens: Annotated[Tokens, Field(gt=0)]
    """Length of the run; the step that reaches it is the last."""
    sequence_length: PositiveCount
    """Tokens of one sample that are predicted."""
    micro_batch_size: PositiveCount
    """Samples of one forward and backward pass on one rank."""
    document_masking: bool = False
    """Let a token attend only to earlier tokens of its document, with positions that count from the document's start;
    false: to all earlier tokens of its sequence."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Clip the global gradient norm to this; "none": do not clip."""
    precision: Precision = "auto"
    """Arithmetic of the matrix products; auto: bf16 where the hardware is faster with it."""
    compile: Literal["auto"] | bool = "auto"
    """torch.compile every block of the model, and the loss; auto: on GPUs."""
    activation_checkpoint: ACMode = "none"
    """Compute activations again in backward: of all blocks, of every n-th, or ("selective") only what is cheap."""
    grad_sync: GradSyncMode = "auto"
    """When FSDP gathers weights and reduces gradients: for every micro-batch (least memory), or once per step, with
    both kept whole in between (least traffic); auto: once per step where the memory estimate says that it fits."""
    num_workers: Count = 0
    """Processes that read ahead; 0: read in the training process, enough for prepared tokens."""
    gc_interval_steps: PositiveCount | None = 50
    """Steps between runs of Python's garbage collector, at the same step on every rank; "none": when Python likes."""

    def compiles(self, device: torch.device) -> bool:
        return device.type == "cuda" if self.compile == "auto" else self.compile

    def slow_eager(self, device: torch.device, tp: int) -> str | None:
        """Why not to train without torch.compile as these keys say; None where it may be done."""
        if device.type != "cuda" or self.compiles(device):
            return None
        for used, what in ((self.activation_checkpoint == "selective", "selective checkpointing"), (tp > 1, "tp")):
            if used:
                return f"without compiling, {what} takes several times as long to launch, and the GPU waits"
        return None
