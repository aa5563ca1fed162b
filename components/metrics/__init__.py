"""Metrics: a row for each step or validation, passed to every writer. recipes/step_metrics.py makes the row.

logger.py            [metrics]: the list of writers; a new writer is added in MetricsConfig.build
jsonl.py             writer and reader of metrics.jsonl
tensorboard.py       writer of TensorBoard event files, and TAG_GROUPS
console.py           log lines, log.txt and the progress bar
append_only_file.py  whole records on a disk that may be full
"""
