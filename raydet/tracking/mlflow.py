"""A run at an MLflow tracking server: recipe, metrics and pictures.

The environment gives the server's address and the key, as MLflow documents them: MLFLOW_TRACKING_URI,
MLFLOW_TRACKING_TOKEN and so on. What fails there is said once, and stops no training.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from raydet.errors import RaydetError
from raydet.recipe import Recipe
from raydet.recipe.tree import flat
from raydet.visualization import Shown, sheet

_ID = "mlflow_id"  # file in the run's folder
_PARAMETERS, _METRICS = 100, 1000  # largest numbers that a server takes at once
# A server that is away is given up within a minute; by default MLflow's client tries for four.
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


class MLflowRun:
    """A run, which a training that is resumed goes on with.

    Args:
        recipe: the settings.
        folder: folder of the run.
        say: takes a line when MLflow fails.
    """

    def __init__(self, recipe: Recipe, folder: Path, say: Callable[[str], Any]):
        self._say, self._recipe, self._note = say, recipe, folder / _ID
        self._client: Any = None
        self._id = ""
        self._try(self._start)

    def metrics(self, values: Mapping[str, float]) -> None:
        """Send a line of metrics.jsonl."""
        if self._client is not None:
            self._try(lambda: self._send(values))

    def pictures(self, name: str, images: Sequence[Shown], class_names: Sequence[str], at: Mapping[str, float]) -> None:
        """Send images with their boxes, as one picture."""
        if self._client is not None:
            picture = sheet(images, class_names)[..., ::-1]  # as RGB
            key = re.sub(r"[^\w\-./ ]", "_", name, flags=re.ASCII)
            self._try(lambda: self._client.log_image(self._id, picture, key=key, step=int(at["step"])))

    def finish(self, *, failed: bool) -> None:
        """End the run."""
        if self._client is not None:
            self._try(lambda: self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED"))

    def _start(self) -> None:
        for name, value in _PATIENCE.items():
            os.environ.setdefault(name, value)
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            raise RaydetError("MLFLOW_TRACKING_URI is not set; it is the server's address")
        if importlib.util.find_spec("mlflow") is None:
            raise RaydetError("its client is not installed: pip install 'raydet[mlflow]'")
        from mlflow import MlflowClient
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        client, experiment = MlflowClient(), self._recipe.track.mlflow_experiment
        if self._note.is_file():
            self._id = self._note.read_text()
            client.update_run(self._id, status="RUNNING")
        else:
            if client.get_experiment_by_name(experiment) is None:
                with contextlib.suppress(MlflowException):  # another trial of the sweep has made it
                    client.create_experiment(experiment)
            found: Any = client.get_experiment_by_name(experiment)
            self._id = client.create_run(found.experiment_id, run_name=self._recipe.name).info.run_id
            settings = flat(self._recipe.model_dump(mode="json"))
            parameters = [Param(key, v if isinstance(v, str) else json.dumps(v)) for key, v in settings.items()]
            for first in range(0, len(parameters), _PARAMETERS):
                client.log_batch(self._id, params=parameters[first : first + _PARAMETERS])
            self._note.write_text(self._id)
        self._client = client

    def _send(self, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now, step = int(1000 * time.time()), int(values["step"])
        sent = [Metric(re.sub(r"[^\w\-./ :]", "_", key), v, now, step) for key, v in values.items() if key != "step"]
        for first in range(0, len(sent), _METRICS):
            self._client.log_batch(self._id, metrics=sent[first : first + _METRICS])

    def _try(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # whatever it is, the training is worth more
            self._client = None
            self._say(f"warning: MLflow failed, the training goes on without: {type(error).__name__}: {error}")
