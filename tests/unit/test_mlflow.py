"""Runs at a real MLflow tracking server, which has an environment of its own: it wants older packages than the pins."""

import importlib.metadata
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from mlflow import MlflowClient

import raydet
from raydet.recipe import load
from raydet.tracking.mlflow import MLflowRun


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Address of a server, which other processes find in the environment as well."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    package = f"mlflow=={importlib.metadata.version('mlflow-skinny')}"
    uv = [Path(sys.executable).parent / "uv", "tool", "run", "--python", sys.executable, "--from", package]
    store = ["--backend-store-uri", f"sqlite:///{folder}/runs.db", "--artifacts-destination", str(folder / "files")]
    command = [*uv, "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1", *store]
    address = f"http://127.0.0.1:{port}"
    with (folder / "log").open("w") as log, pytest.MonkeyPatch.context() as patch:
        alone = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # no workers for jobs: it starts sooner
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder, env=alone)
        patch.setenv("MLFLOW_TRACKING_URI", address)
        try:
            while not answers(address):
                if process.poll() is not None:
                    printed = (folder / "log").read_text()
                    assert "Failed to fetch" in printed, printed
                    pytest.skip("PyPI, which has the server, cannot be reached")
                time.sleep(0.5)
            yield address
        finally:
            process.terminate()
            process.wait(30)


def answers(address):
    try:
        return urllib.request.urlopen(f"{address}/health", timeout=5).status == 200
    except (OSError, urllib.error.URLError):
        return False


@pytest.fixture(scope="module")
def run(server, shapes, tmp_path_factory):
    """Folder of a run of two epochs that went there, and its entry."""
    storage = tmp_path_factory.mktemp("tracked")
    wanted = ["track.mlflow=true", "track.mlflow_experiment=birds", "data.image_size=96", "train.epochs=2"]
    overrides = [f"data.root={shapes}", f"storage={storage}", *wanted]
    folder = raydet.train("demo", overrides=overrides, debug=True, device="cpu", say=print).folder
    client = MlflowClient()
    (entry,) = client.search_runs([client.get_experiment_by_name("birds").experiment_id])
    return folder, entry


def test_recipe_and_name_are_there_and_the_run_is_finished(run):
    _, entry = run
    assert (entry.info.run_name, entry.info.status) == ("demo-debug", "FINISHED")
    parameters = entry.data.params
    assert (parameters["train.epochs"], parameters["loss.iou_weight"]) == ("2", "5.0")
    assert (parameters["model.name"], parameters["model.weights"]) == ("yolox_n", "null")


def test_metrics_are_those_of_the_run_s_folder(run):
    folder, entry = run
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    expected = {}
    for line in lines:
        for key in line.keys() - {"step"}:
            expected.setdefault(re.sub("[@=]", "_", key), []).append((line["step"], pytest.approx(line[key])))
    client = MlflowClient()
    for key, values in expected.items():
        history = client.get_metric_history(entry.info.run_id, key)
        assert sorted((metric.step, metric.value) for metric in history) == sorted(values, key=lambda v: v[0]), key
    assert "val/mAP_0.50:0.95" in expected


def test_pictures_are_there_at_their_step(run):
    _, entry = run
    paths = [file.path for file in MlflowClient().list_artifacts(entry.info.run_id, "images")]
    names = {re.match(r"images/(.*)\+step\+\d+\+", path)[1].replace("~", "/") for path in paths}
    assert names == {
        "train/batch_0",
        *(f"valid/{end}_mAP_0.50_0.95_{what}" for end in ("min", "max") for what in ("batch", "images")),
    }


def test_a_run_that_is_resumed_goes_on_there(server, tmp_path):
    recipe = load("demo", ["track.mlflow_experiment=resumed", "name=mine"])
    for step, failed in ((1, True), (2, False)):
        tracker = MLflowRun(recipe, tmp_path, pytest.fail)
        tracker.metrics({"step": step, "train/loss": 1.0 / step, "val/AP@0.50:0.95_犬": 0.5})
        tracker.finish(failed=failed)
        client = MlflowClient()
        (entry,) = client.search_runs([client.get_experiment_by_name("resumed").experiment_id])
        assert entry.info.status == ("FAILED" if failed else "FINISHED")
    assert [metric.step for metric in client.get_metric_history(entry.info.run_id, "train/loss")] == [1, 2]
    assert entry.data.metrics["val/AP_0.50:0.95_犬"] == 0.5


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", ""])
def test_a_server_that_cannot_be_reached_is_said_once_and_stops_nothing(address, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    said = []
    tracker = MLflowRun(load("demo"), tmp_path, said.append)
    tracker.metrics({"step": 1, "train/loss": 1.0})
    tracker.pictures("a", [], [], {"step": 1, "epoch": 1})
    tracker.finish(failed=False)
    (line,) = said
    assert line.startswith("warning: MLflow failed, the training goes on without: ")
    assert ("MLFLOW_TRACKING_URI" in line) == (not address)


def test_a_client_that_is_not_installed_is_named_with_its_package(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = []
    MLflowRun(load("demo"), tmp_path, said.append)
    assert said == [
        "warning: MLflow failed, the training goes on without: RaydetError: its client is not installed: "
        "pip install 'raydet[mlflow]'"
    ]
