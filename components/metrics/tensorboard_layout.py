"""What TensorBoard shows beside the scalars: charts in a fixed order, the recipe as text, and hyperparameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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


def startup_summaries(run: RunInfo) -> Iterator[Summary]:
    """Yield what is written once, at the start of a run."""
    from torch.utils.tensorboard import summary

    yield summary.custom_scalars(
        {section: {title: ["Multiline", tags] for title, tags in charts.items()} for section, charts in CHARTS.items()}
    )
    yield summary.text("recipe", f"```toml\n{run.recipe}\n```")
    yield summary.text("environment", _table(run.environment))
    experiment, session_start, _ = _hyperparameter_summaries(run)
    yield from (experiment, session_start)


def end_summary(run: RunInfo) -> Summary:
    """Return what marks the end of the run in the HParams tab."""
    return _hyperparameter_summaries(run)[2]


def _hyperparameter_summaries(run: RunInfo) -> tuple[Summary, Summary, Summary]:
    from torch.utils.tensorboard import summary

    values = {
        key: value if isinstance(value, (int, float, str, bool)) else str(value)
        for key, value in run.hyperparameters.items()
    }
    experiment, start, end = summary.hparams(values, dict.fromkeys(FINAL_METRICS, 0.0))
    return experiment, start, end


def _table(values: Mapping[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in values.items())])
