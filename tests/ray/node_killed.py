"""Trains on a cluster of three nodes of this machine, of which one makes the samples; kills another, replaces it, and
gives notice that the new one will be taken away. test_faults.py runs it in a process of its own.

python node_killed.py RECIPE [key=value]...

Prints one JSON object: when what happened, in seconds since the start, and on which nodes Ray says that what ran.
"""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from functools import partial

os.environ.update(
    RAY_AUTH_MODE="disabled",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.5",
    RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="20",
    RAY_TRAIN_ENABLE_PREEMPTION_WATCHER="1",
    RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S="0.5",
)

import ray
from ray.cluster_utils import Cluster
from ray.util.state import list_actors, list_tasks

import raydet
from raydet.recipe import load
from raydet.runs.folder import STOP, run_folder
from raydet.training import on_ray

# How soon a cluster sees that a node is gone; by default it takes half a minute.
DETECTION = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 5,
}

NOTICE_S = 100  # from the notice until the node is taken away


def main(recipe: str, *overrides: str) -> None:
    on_ray._RESIZE_EVERY_S = 5.0  # by default it takes half a minute until a new node is noticed
    log = run_folder(load(recipe, overrides)) / "log.txt"
    began = time.monotonic()
    seen: dict[str, float] = {}
    ended: list[object] = []

    def run() -> None:
        try:
            said = partial(print, file=sys.stderr)
            ended.append(raydet.train(recipe, overrides=overrides, say=said).metrics)
        except BaseException as error:
            ended.append(repr(error))

    def wait_for(text: str, times: int = 1) -> None:
        while not (log.exists() and log.read_text().count(text) >= times):
            if not thread.is_alive() or time.monotonic() - began > 400:
                raise SystemExit(f"{text!r} did not come: {ended} {log.read_text()[-3000:] if log.exists() else ''}")
            time.sleep(0.05)
        seen[text] = time.monotonic() - began

    def node(label: str) -> dict[str, object]:
        what = {"labels": {"raydet": "data"}} if label == "data" else {"resources": {"fake_gpu": 1}}
        return {"num_cpus": 2, "object_store_memory": 200 * 2**20, **what}

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    head = {**node("data"), "include_dashboard": True, "dashboard_port": port, "_system_config": DETECTION}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    others = [cluster.add_node(**node("train")) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    cluster.wait_for_nodes()
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    wait_for("step 7/")
    seen["killed"] = time.monotonic() - began
    cluster.remove_node(others[0], allow_graceful=False)
    wait_for("resumed after step")
    lines = log.read_text().count("images/s")
    wait_for("images/s", times=lines + 1)
    seen["again"] = seen.pop("images/s")
    # The workers start anew from the last checkpoint: one of the single worker's, or its steps are repeated by two.
    wait_for("checkpoint: ", times=log.read_text().count("checkpoint: ") + 1)
    leaving = cluster.add_node(**node("train"))
    wait_for("resumed after step", times=2)
    lines = log.read_text().count("images/s")
    wait_for("images/s", times=lines + 5)
    notice = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test", "--node-id", leaving.node_id]
    notice += ["--deadline-remaining-seconds", str(NOTICE_S)]
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", cluster.address, *notice]
    subprocess.run(command, check=True, capture_output=True)
    seen["notice"] = time.monotonic() - began
    wait_for("resumed after step", times=3)
    seen["left"] = time.monotonic() - began
    lines = log.read_text().count("images/s")
    wait_for("images/s", times=lines + 5)
    records = {"filters": [("name", "=", "MapBatches(_make_block)")], "raise_on_missing_output": False}
    tasks = list_tasks(cluster.address, limit=10_000, detail=True, **records)
    actors = list_actors(cluster.address, limit=10_000, detail=True)
    workers = [actor for actor in actors if actor.class_name == "RayTrainWorker"]
    labels = {node["NodeID"]: "data" if node["Labels"].get("raydet") == "data" else "train" for node in ray.nodes()}
    ran_on = {
        "tasks": [labels[task.node_id] for task in tasks if task.node_id],
        "workers": [labels[actor.node_id] for actor in workers if actor.node_id],
    }
    (log.parent / STOP).touch()
    thread.join()
    seen["ended"] = time.monotonic() - began
    print(json.dumps({"seen": seen, "ran_on": ran_on, "ended": str(ended[0]), "log": log.read_text()}))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
