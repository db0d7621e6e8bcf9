"""`ray job submit` to a cluster of its own with a dashboard, a job server and tokens.

The scripts of jobs/ differ in one word, which tests/unit/test_cluster_files.py checks.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.unit.test_tracking import records

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SUBMIT_S = 150


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class Server:
    """A Ray head node with a job server; commands run from the project's folder, as README prints them."""

    def __init__(self, folder):
        self.folder = folder
        gcs, dashboard, agent, agent_grpc, client, metrics, environment = free_ports(7)
        self._metrics = f"http://127.0.0.1:{metrics}/metrics"
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY")},
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",  # a job's `python` is that of `ray start`
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
            "RAY_metrics_report_interval_ms": "300",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
            "WANDB_MODE": "offline",
            "RAYDET_CACHE": str(folder / "cache"),
        }
        options = {
            "port": gcs,
            "dashboard-host": "127.0.0.1",
            "dashboard-port": dashboard,
            "dashboard-agent-listen-port": agent,
            "dashboard-agent-grpc-port": agent_grpc,
            "ray-client-server-port": client,
            "metrics-export-port": metrics,
            "runtime-env-agent-port": environment,
            "num-cpus": 5,
            "object-store-memory": 300 * 2**20,
            "temp-dir": folder / "ray",
        }
        command = ["ray", "start", "--head", "--block", *(f"--{name}={value}" for name, value in options.items())]
        with (folder / "head.log").open("w") as log:
            self._head = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        until(self.answers, 60, "the job server answers")

    def ray(self, *arguments):
        return subprocess.run(
            ["ray", *map(str, arguments)],
            env=self.environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=SUBMIT_S,
            check=False,
        )

    def submit(self, name, *arguments, job, wait=True):
        """Submit a job of jobs/ under an id of its own, and follow it to its end or not."""
        given = ["--working-dir", ".", "--runtime-env", "cluster/runtime_env.yaml", "--submission-id", job]
        options = [*given, *(() if wait else ("--no-wait",))]
        return self.ray("job", "submit", *options, "--", "python", f"jobs/{name}.py", *arguments)

    def get(self, path, token=None):
        """Ask the server over HTTP, as a dashboard does; the command `ray job logs` takes a second to start."""
        url = f"{self.environment['RAY_API_SERVER_ADDRESS']}/api/jobs/{path}"
        headers = {"Authorization": f"Bearer {token or self.environment['RAY_AUTH_TOKEN']}"}
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:
            return json.load(answer)

    def answers(self):
        try:
            return self.get("") == []
        except urllib.error.URLError:
            return False

    def logs(self, job):
        return self.get(f"{job}/logs")["logs"] or ""

    def metrics(self):
        """Return what Prometheus would read: name{tags} → value."""
        with urllib.request.urlopen(self._metrics, timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        return dict(line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))

    def stop(self):
        """Stop what this has started and nothing else."""
        self._head.send_signal(signal.SIGTERM)
        try:
            self._head.wait(20)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._head.pid, signal.SIGKILL)


def until(holds, seconds, what):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"{what}: not in {seconds} s"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def server():
    folder = Path(tempfile.mkdtemp(prefix="rj-"))  # the paths of Ray's sockets are short
    server = Server(folder)
    yield server
    server.stop()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def options(shapes, server):
    return [
        f"data.root={shapes}",
        f"storage={server.folder}/runs",
        "data.image_size=96",
        "data.chunk_size=16",
        "train.batch_size=8",
        "eval.every=1",
        "track.log_every=1",
        "scale.cpus_per_worker=1",
        "scale.num_workers=1",
    ]


@pytest.fixture(scope="module")
def trained(server, options):
    """A training that was stopped in the middle of an epoch, and submitted again."""
    training = ["demo", *options, "name=a", "train.epochs=12", "eval.every=6", "track.wandb=true"]
    server.submit("train", *training, job="first", wait=False)
    until(lambda: "step 7/" in server.logs("first"), SUBMIT_S, "the seventh step")
    until(lambda: "ray_raydet_loss" in str(server.metrics()), SUBMIT_S, "the loss among Ray's metrics")
    figures = {name.partition("{")[0]: float(value) for name, value in server.metrics().items() if 'run="a"' in name}
    stop = server.ray("job", "stop", "first")
    assert stop.returncode == 0, stop.stderr
    stopped = server.logs("first")
    again = server.submit("train", *training, job="second")
    return stopped, server.get("first"), again, server.folder / "runs" / "a", figures


def steps_in(log):
    return [int(step) for step in re.findall(r"step (\d+)/60", log)]


def test_a_job_is_stopped_after_its_step_with_a_checkpoint(trained):
    log, info, _, folder, _ = trained
    assert "stopping after this step, with a checkpoint" in log
    assert "what was interrupted goes on when the same command is run again" in log
    step = steps_in(log)[-1]
    assert re.search(rf"stopped after step {step}; the same command goes on from checkpoint_\d{{6}}", log)
    assert info["status"] == "STOPPED"
    assert 7 <= step < 60
    assert not list(folder.glob(".partial*"))


def test_submitted_again_it_goes_on_where_it_was(trained):
    log, _, again, folder, _ = trained
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"resumed after step {steps_in(log)[-1]}" in again.stdout
    assert steps_in(again.stdout) == list(range(steps_in(log)[-1] + 1, 61))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, 61))
    assert (folder / "report.html").is_file()


def test_a_stopped_job_has_ended_its_run_of_weights_and_biases(trained):
    *_, folder, _ = trained
    assert len(list(folder.glob("wandb/offline-run-*"))) == 2
    assert sum(record.HasField("exit") for record in records(folder)) == 2


def test_the_figures_of_a_training_are_metrics_of_the_cluster(trained):
    *_, figures = trained
    names = {"loss", "images_per_second", "data_wait_ratio", "step_seconds"}
    assert figures.keys() == {f"ray_raydet_{name}" for name in names}
    assert figures["ray_raydet_step_seconds"] * figures["ray_raydet_images_per_second"] == pytest.approx(8)
    assert 0 <= figures["ray_raydet_data_wait_ratio"] <= 1
    assert figures["ray_raydet_loss"] > 0


def test_a_mistake_is_a_line_and_an_exit_code(server, options):
    ended = server.submit("train", "demo", *options, "storage=runs", job="mistake")
    assert ended.returncode == 1  # Ray's, of any job that failed
    log = server.logs("mistake")
    assert "error: storage: runs is in the working directory of this job, which Ray deletes" in log
    assert "Traceback" not in log
    assert server.get("mistake")["driver_exit_code"] == 2


def test_strangers_submit_nothing(server):
    with pytest.raises(urllib.error.HTTPError) as error:
        server.get("first", token="wrong" * 8)
    assert error.value.code in (401, 403)
