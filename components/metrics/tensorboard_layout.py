"""What TensorBoard shows beside the scalars: charts in a fixed order, the recipe as text, and hyperparameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary

from components.metrics.writer import RunInfo

CHARTS: dict[str, dict[str, list[str]]] = {
    "loss": {
        "training and validation": ["train/loss", r"validation/val_loss.*"],
        "gradient norm": ["train/grad_norm"],
    },
    "batch": {
        "batch size and noise scale, in samples": ["batch/global_batch_size", "batch/noise_scale"],
        "learning rate": ["lr/lr"],
    },
    "throughput": {
        "tokens per second": ["throughput/tokens_per_second"],
        "seconds of a step": ["throughput/step_seconds", "throughput/data_seconds"],
    },
}
"""Title of a section -> title of a chart -> tags, as regular expressions.

The Custom Scalars tab shows them in this order. The Scalars tab sorts groups of tags by name.
"""
FINAL_METRICS = ("train/loss", "validation/val_loss")
"""The metrics in the HParams tab, which shows their last values."""


def run_summaries(run: RunInfo) -> tuple[list[Summary], Summary]:
    """Return what is written once, at the start of a run, and what marks its end in the HParams tab."""
    from torch.utils.tensorboard import summary

    charts = {
        section: {title: ["Multiline", tags] for title, tags in charts.items()} for section, charts in CHARTS.items()
    }
    values = {
        key: value if isinstance(value, (int, float, str, bool)) else str(value)
        for key, value in run.hyperparameters.items()
    }
    experiment, session_start, session_end = summary.hparams(values, dict.fromkeys(FINAL_METRICS, 0.0))
    texts = [
        summary.text("recipe", f"```toml\n{run.recipe}\n```"),
        summary.text("environment", _table(run.environment)),
    ]
    return [summary.custom_scalars(charts), *texts, experiment, session_start], session_end


def _table(values: Mapping[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in values.items())])
