"""TensorBoard: the numbers of metrics.jsonl, grouped under the names people look for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

GROUPS = {
    "train": ("loss", "grad_norm", "epoch"),
    "lr": ("lr",),
    "batch": (
        "global_batch_size",
        "requested_batch_size",
        "micro_batches",
        "noise_scale",
        "norm_test",
        "gradient_noise",
        "gradient_signal",
        "gradient_noise_smoothed",
        "gradient_signal_smoothed",
    ),
    "experts": ("load_balancing_loss", "router_z_loss", "router_entropy", "expert_load_max", "expert_load_min"),
    "throughput": ("tokens_per_second", "step_seconds", "data_seconds", "mfu", "memory_bytes"),
    "validation": ("val_loss", "val_perplexity", "val_bits_per_byte"),
}

_TAGS = {name: f"{group}/{name}" for group, names in GROUPS.items() for name in names}


class TensorBoard:
    """Writes rows as scalars over steps; a resumed run hides what the interrupted one wrote after the checkpoint."""

    def __init__(self, directory: Path, *, after_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter  # a second of imports that a run without it need not pay

        self._writer = SummaryWriter(str(directory), purge_step=after_step + 1 if after_step else None)

    def write(self, row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            if name in _TAGS and isinstance(value, (int, float)) and math.isfinite(value):
                self._writer.add_scalar(_TAGS[name], value, row["step"])

    def close(self) -> None:
        self._writer.close()
