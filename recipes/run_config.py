"""[run] and [training]: the identity of a run, and how it trains."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field

from components.activation_checkpointing import ACMode
from components.distributed.fsdp import GradSyncMode
from components.errors import InputError
from components.float8 import Float8
from components.paths import expand_home
from components.precision import Precision
from components.units import Count, PositiveCount, Tokens
from models.compilation import missing_for_gpu

_LONGEST_NAME = 200
"""Maximum bytes of a run's name, below the limit of 255 of most file systems."""


def default_cache_dir() -> Path:
    """Return the cache directory of the user. Raises ValueError without a home directory, as in some containers."""
    return expand_home("~/.cache/powertrain")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """[run]: the name, directory, device and seed of a run."""

    name: str = "run"
    """Name of the run; its directory is runs/<name> in the current directory."""
    dir: Path | None = None
    """The run directory, instead of runs/<name>."""
    cache_dir: Path = field(default_factory=default_cache_dir)
    """Cache of tokenized data and compiled kernels, shared by all runs."""
    if_exists: Literal["refuse", "replace"] = "refuse"
    """If the run directory already holds a run: stop with an error, or replace the old run."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0  # torch takes 64 bits, and each rank adds its rank
    """Seed of the initial weights, the sample order and all other randomness."""
    deterministic: bool = False
    """Use deterministic algorithms of torch; slower on GPUs. A single CPU process is always deterministic."""
    init_from: Path | None = None
    """A Hugging Face directory or a checkpoint with initial weights; unset: random weights. Ignored when a run is
    resumed."""
    average: str | None = None
    """Name of the average of the weights to take from the checkpoint `init_from`; unset: those of its last step."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """The device; auto: CUDA if there is a GPU."""
    max_minutes: Annotated[float, Field(gt=0)] | None = None
    """Minutes after the launch at which the run saves and stops, before the time limit of a job queue; allow for one
    step and a checkpoint. Unset: no limit."""
    hang_timeout_seconds: Annotated[float, Field(gt=0)] | None = None
    """Seconds without progress, after the first step, after which the launcher of several processes writes their Python
    stacks and restarts them as after a failure (MAX_RESTARTS); more than a step, a validation and a save take. Unset:
    only timeouts of collectives end a hang."""

    def __post_init__(self) -> None:
        if self.average is not None and self.init_from is None:
            raise InputError("average", "only valid with init_from; [average.NAME] averages the weights of this run")
        name = self.name
        if not name or name.strip() != name or name[0] in "-.~" or not name.isprintable() or set(name) & set("/\\\"'"):
            raise InputError(
                "name",
                "it is the name of a directory in runs/: it must not be empty, start with '.', '-' or '~', start or "
                "end with a space, or contain a slash, backslash, quote or control character; run.dir takes any path",
            )
        # not os.fsencode: the locale may lack characters that the file system takes
        if (size := len(name.encode("utf-8", "surrogateescape"))) > _LONGEST_NAME:
            raise InputError("name", f"{size} bytes; at most {_LONGEST_NAME} are allowed")

    @property
    def directory(self) -> Path:
        """The run directory, absolute."""
        return self.dir if self.dir is not None else Path("runs").absolute() / self.name


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """[training]: the length of a run, its batches, and how they are computed."""

    total_tokens: Annotated[Tokens, Field(gt=0)]
    """Length of the run in tokens; the step that reaches it is the last."""
    sequence_length: PositiveCount
    """Number of predicted tokens per sample."""
    micro_batch_size: PositiveCount
    """Samples per forward and backward pass of one rank."""
    document_masking: bool = False
    """Let tokens attend only to earlier tokens of their document, with positions counted from its start; false: to all
    earlier tokens of the sequence."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Clip the global gradient norm to this; "none": do not clip."""
    precision: Precision = "auto"
    """Precision of the matrix products; auto: bf16 where the hardware is faster with it."""
    float8: Float8 = "off"
    """Compute the linear layers of the blocks in float8, with a scale for each row ("rowwise") or each tensor
    ("tensorwise"); needs compile and, on a GPU, float8 products, as an H100 has."""
    compile: Literal["auto"] | bool = "auto"
    """Compile every block of the model and the loss with torch.compile; auto: on GPUs, if Triton and a C compiler are
    installed."""
    activation_checkpoint: ACMode = "none"
    """Recompute activations in backward: "full": all blocks, n: every n-th, "selective": only cheap operations."""
    grad_sync: GradSyncMode = "auto"
    """When FSDP gathers weights and reduces gradients: for every micro-batch (least memory), or once per step, with
    both unsharded in between (least traffic); auto: once per step if the memory estimate fits the device."""
    num_workers: Count = 0
    """Worker processes of the data loader; 0: read in the training process, enough for tokenized data."""
    gc_interval_steps: PositiveCount | None = 50
    """Steps between runs of Python's garbage collector, at the same step on every rank; "none": automatic."""

    def compiles(self, device: torch.device) -> bool:
        """Return whether to use torch.compile on `device`. A GPU that is not in this machine has what it needs."""
        if self.compile != "auto":
            return self.compile
        return device.type == "cuda" and not (torch.cuda.is_available() and missing_for_gpu())

    def slow_eager(self, device: torch.device, tp: int) -> str | None:
        """Return why training without torch.compile would be slow here, and a remedy; None if it is not."""
        if device.type != "cuda" or self.compiles(device):
            return None
        if self.compile == "auto":
            return f"the model is not compiled, which makes it slow: install {missing_for_gpu()}"
        for used, what in ((self.activation_checkpoint == "selective", "selective checkpointing"), (tp > 1, "tp")):
            if used:
                slow = f"without torch.compile, {what} takes several times as long to launch, and the GPU waits"
                return f'{slow}; leave training.compile at "auto"'
        return None
