"""MLflow: a run as one of its runs, wherever MLFLOW_TRACKING_URI says."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from cluster.errors import UserError
from pipeline.follow.follow import Point, Remote

_MOST_METRICS, _MOST_PARAMS = 1000, 100  # of a request
_LONGEST = 5000  # characters of a value
_ENDS = {"completed": "FINISHED", "failed": "FAILED"}  # of the others somebody wanted the end: KILLED


class Mlflow:
    """Args: experiment, by its name; made if there is none."""

    def __init__(self, experiment: str) -> None:
        try:
            import mlflow
        except ImportError as error:
            raise UserError(
                f"following to MLflow needs MLflow: pip install 'seer-pipeline[mlflow]' ({error})"
            ) from None
        self._mlflow = mlflow
        self._uri = str(mlflow.get_tracking_uri())
        self._client = self._asked(mlflow.MlflowClient)
        self._experiment, self._id = experiment, ""

    @property
    def place(self) -> str:
        return f"MLflow at {self._uri}, experiment {self._experiment}"

    def new_id(self, name: str) -> str:
        def made() -> str:
            found = self._client.get_experiment_by_name(self._experiment)
            number = (
                self._client.create_experiment(self._experiment) if found is None else found.experiment_id
            )
            return str(self._client.create_run(number, run_name=name).info.run_id)

        return str(self._asked(made))

    def open(self, remote: Remote) -> None:
        self._id = remote.id
        self._asked(lambda: self._client.update_run(remote.id, status="RUNNING"))
        for key, value in remote.facts.items():
            self._tag(key, value)

    def recipe(self, values: dict[str, Any]) -> None:
        known = self._asked(lambda: self._client.get_run(self._id)).data.params
        values = {key: str(value)[:_LONGEST] for key, value in values.items()}
        fresh = [self._mlflow.entities.Param(key, value) for key, value in values.items() if key not in known]
        for start in range(0, len(fresh), _MOST_PARAMS):
            self._log(params=fresh[start : start + _MOST_PARAMS])
        for key, value in values.items():
            if known.get(key, value) != value:  # a parameter is for good there
                self._tag(f"changed {key}", value)

    def send(self, points: Sequence[Point]) -> None:
        metrics = [
            self._mlflow.entities.Metric(key, value, round(1000 * point.time), point.step)
            for point in points
            for key, value in point.values.items()
            if math.isfinite(value)
        ]
        for start in range(0, len(metrics), _MOST_METRICS):
            self._log(metrics=metrics[start : start + _MOST_METRICS])

    def end(self, state: str, why: str) -> None:
        self._tag("state", state)
        self._tag("why", why[:_LONGEST])
        self._asked(lambda: self._client.set_terminated(self._id, status=_ENDS.get(state, "KILLED")))

    def close(self) -> None:
        """Each request was answered."""

    def _log(self, **some: list[Any]) -> None:
        self._asked(lambda: self._client.log_batch(self._id, **some))

    def _tag(self, key: str, value: str) -> None:
        self._asked(lambda: self._client.set_tag(self._id, key, value))

    def _asked(self, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except (self._mlflow.MlflowException, OSError, ImportError) as error:
            raise UserError(
                f"MLflow at {self._uri} does not take this: {' '.join(str(error).split())}; once that is "
                "mended, the same command goes on where it stopped"
            ) from error
