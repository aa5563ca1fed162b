"""Metrics: a row for each step or validation, passed to every writer. recipes/step_metrics.py makes the row.

logger.py              [metrics]: opens the writers, and passes every row to all of them
writer.py              the interface of a writer, and what it may use of the run
background.py          runs a writer in a thread that reads metrics.jsonl
jsonl.py               writer and reader of metrics.jsonl
console.py             log lines, log.txt and the progress bar
tensorboard.py         writer for TensorBoard, and TAG_GROUPS
tensorboard_events.py  TensorBoard's event files
tensorboard_layout.py  TensorBoard's charts, recipe text and hyperparameters
wandb.py               writer for Weights & Biases
wandb_offline.py       which steps the offline files of Weights & Biases have
mlflow.py              writer for MLflow
trackio.py             writer for trackio
append_only_file.py    whole records on a disk that may be full
"""

from components.metrics.console import Console
from components.metrics.jsonl import JsonLines
from components.metrics.mlflow import MLflow
from components.metrics.tensorboard import TensorBoard
from components.metrics.trackio import Trackio
from components.metrics.wandb import WandB

__all__ = ["Console", "JsonLines", "MLflow", "TensorBoard", "Trackio", "WandB"]
