"""MLflow."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from components.errors import first_line
from components.metrics.tensorboard import scalars
from components.metrics.writer import Row, RunInfo, Writer, require_library
from components.storage.address import refuse_password

_RUN_TAG = "powertrain.run"
_MAX_PARAM_LENGTH, _PARAMS_PER_REQUEST = 6000, 100
"""Limits of the MLflow server."""


@dataclass(kw_only=True)
class MLflow(Writer):
    """Sends the metrics to MLflow, under the tags of TensorBoard; a resumed run continues the same run there."""

    tracking_uri: str
    """Where runs are tracked: the address of a server, or `sqlite:///...` or `file:///...` with an absolute path."""
    experiment: str
    """The experiment of the run; created if it does not exist."""

    def __post_init__(self) -> None:
        require_library("mlflow")
        remedy = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        refuse_password(self.tracking_uri, "tracking_uri", remedy=remedy)

    def open(self, run: RunInfo) -> None:
        """Raises OSError if the server or directory cannot be reached."""
        from mlflow import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it logs each table that it creates
        self._total_tokens, self._tokens, self._is_running = run.total_tokens, 0, False
        with _mlflow_errors_as_os_errors():
            self._client = MlflowClient(tracking_uri=self.tracking_uri)
            found = self._client.get_experiment_by_name(self.experiment)
            experiment = self._client.create_experiment(self.experiment) if found is None else found.experiment_id
            runs = self._client.search_runs([experiment], f"tags.`{_RUN_TAG}` = '{run.id}'")
            if runs:
                self._id = runs[0].info.run_id
                return
            tags = {_RUN_TAG: run.id, **{f"environment.{key}": str(value) for key, value in run.environment.items()}}
            self._id = self._client.create_run(experiment, run_name=run.name, tags=tags).info.run_id
            self._log_params(run.hyperparameters)

    def _log_params(self, values: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(key, str(value)[:_MAX_PARAM_LENGTH]) for key, value in values.items()]
        for at in range(0, len(params), _PARAMS_PER_REQUEST):
            self._client.log_batch(self._id, params=params[at : at + _PARAMS_PER_REQUEST])

    def write(self, row: Row) -> None:
        """Raises OSError if the server or directory cannot be reached."""
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        metrics = [Metric(tag, value, now, row["step"]) for tag, value in scalars(row)]
        with _mlflow_errors_as_os_errors():
            if not self._is_running:
                self._client.update_run(self._id, status="RUNNING")
                self._is_running = True
            self._client.log_batch(self._id, metrics=metrics)
        self._tokens = max(self._tokens, row.get("tokens", 0))

    def close(self) -> None:
        if not self._is_running:  # nothing was left to train
            return
        status = "FINISHED" if self._tokens >= self._total_tokens else "KILLED"
        with _mlflow_errors_as_os_errors():
            self._client.set_terminated(self._id, status=status)


@contextmanager
def _mlflow_errors_as_os_errors() -> Iterator[None]:
    """Raise ValueError for what MLflow refuses, and OSError for its other errors, which may pass."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        refused = error.error_code in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "PERMISSION_DENIED", "UNAUTHENTICATED")
        raise (ValueError if refused else OSError)(first_line(error)) from error
