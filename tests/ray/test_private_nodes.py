"""Nodes that share no files, and a bucket: what raydet does on a cluster from cluster/aws.yaml, on one machine."""

import json
import os
import shutil
import time

import pytest

from benchmarks.private_nodes import PRIVATE, PrivateNodes, why_not
from raydet.recipe import load

pytestmark = pytest.mark.timeout(600)
LONG_S = 400


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """In place of the other files' cluster in this process: here it is not needed."""


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    """Three nodes: A, the head without CPUs, B and C."""
    if not os.environ.get("RAYDET_PRIVATE_NODES"):
        pytest.skip("takes ten minutes and more: set RAYDET_PRIVATE_NODES=1")
    if reason := why_not():
        pytest.fail(reason)
    with PrivateNodes(tmp_path_factory.mktemp("nodes"), jobs=True) as cluster:
        cluster.start("A", "B", "C")
        yield cluster


@pytest.fixture(scope="module")
def settings(shapes):
    return [
        f"data.root={shapes}",
        "data.image_size=96",
        "data.chunk_size=16",
        "train.batch_size=8",
        "track.log_every=1",
        "track.average_best=false",
        "eval.every=1",
        "scale.cpus_per_worker=1",
    ]


@pytest.fixture(scope="module")
def run(nodes, settings):
    """A run in the bucket with validations beside the training, and the folder of its files."""
    overrides = [f"storage={nodes.uri('runs')}", "name=a", "train.epochs=2", "scale.num_workers=2", *settings]
    nodes.done(nodes.raydet("train", "demo", *overrides, "scale.async_validation=true"), LONG_S)
    return nodes.bucket / "runs/a"


def lines(folder):
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_until(there, process, timeout_s=LONG_S):
    deadline = time.monotonic() + timeout_s
    while not there():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_validations_run_beside_the_training(run):
    log = (run / "log.txt").read_text()
    assert log.count("is validated on") == 2
    assert "warning" not in log
    assert sum("val/mAP@0.50:0.95" in line for line in lines(run)) == 2
    for config in run.glob("checkpoint_*/config.json"):
        assert "val/mAP@0.50:0.95" in json.loads(config.read_text())["metrics"]


def test_tune_nms(run, nodes):
    """Its ranks are on two nodes; what they find gets to the driver, and from there to the trials and the bucket."""
    command = ["tune-nms", nodes.uri("runs/a"), "--trials", "8", "scale.num_workers=2"]
    said = nodes.done(nodes.raydet(*command), LONG_S)
    assert "candidates of 24 images" in said
    (folder,) = {path.parent for path in run.glob("checkpoint_*/tune_nms.json")}
    assert (folder / "tune_nms.png").exists()
    assert len(list(folder.glob("candidates-*.parquet"))) == 1


def test_batch_predict(run, nodes, shapes):
    command = ["batch-predict", nodes.uri("runs/a"), str(shapes / "val"), nodes.uri("found"), "--shard-images", "8"]
    assert "24 images" in nodes.done(nodes.raydet(*command), LONG_S)
    assert len(list((nodes.bucket / "found").glob("part-*.parquet"))) == 3


def test_evaluate(run, nodes):
    said = nodes.done(nodes.raydet("evaluate", nodes.uri("runs/a")), LONG_S)
    assert "s3://bucket/runs/a/" in said, "it says where the result is"
    assert list(run.glob("evaluation/metrics.json"))


def test_a_path_that_a_node_does_not_see_is_named_with_the_node(nodes, settings):
    path = f"{PRIVATE}/only/runs"
    nodes.done(nodes.popen("mkdir", "-p", path), 60)
    process = nodes.raydet("train", "demo", f"storage={path}", "name=b", *settings)
    said, _ = process.communicate(timeout=LONG_S)
    assert process.returncode == 2, said
    assert f"error: storage: {path}" in said
    assert "is not on the node" in said
    assert "step" not in said


def test_a_node_is_killed_and_replaced_by_an_empty_one(nodes, settings):
    options = ["name=killed", "train.epochs=8", "scale.num_workers=4", "track.checkpoint_steps=2", *settings]
    process = nodes.raydet("train", "demo", f"storage={nodes.uri('runs')}", *options)
    run = nodes.bucket / "runs/killed"
    wait_until(lambda: list(run.glob("checkpoint_*/config.json")) and len(lines(run)) > 4, process)
    nodes.kill("C")
    nodes.start("C")
    nodes.done(process, LONG_S)
    steps = [line["step"] for line in lines(run) if "train/loss" in line]
    assert steps == list(range(1, 41))
    assert "resumed after step" in (run / "log.txt").read_text()


def test_a_job_that_sweeps_goes_on_on_another_cluster(nodes, shapes, settings):
    """Driver and cluster are killed when a trial has a checkpoint; the new cluster's disks are empty."""
    shutil.copytree(shapes, nodes.bucket / "shapes")
    overrides = [
        f"storage={nodes.uri('runs')}",
        "name=s",
        "train.epochs=3",
        "scale.num_workers=1",
        "tune.space={train.lr: {grid: [0.01, 0.02]}, loss.iou_weight: {grid: [2.5, 5.0]}}",
        "tune.search=grid",
        "tune.stop=none",
        "tune.concurrent=2",
        *settings,
        f"data.root={nodes.uri('shapes')}",
    ]
    folder = nodes.bucket / "runs/s-tune"
    process = nodes.submit("tune", "demo", *overrides)
    wait_until(lambda: list(folder.glob("trial_*/checkpoint_*/config.json")), process)
    nodes.kill("A", "B", "C")
    started = {path.parent.parent.name for path in folder.glob("trial_*/checkpoint_*/config.json")}
    nodes.start("A", "B", "C")
    said = nodes.done(nodes.submit("tune", "demo", *overrides), LONG_S)
    assert "going on with the sweep in s3://bucket/runs/s-tune" in said
    trials = json.loads((folder / "trials.json").read_text())
    assert [trial["state"] for trial in trials] == ["finished"] * 4
    assert len({json.dumps(trial["values"]) for trial in trials}) == 4
    for trial in trials:
        assert [line["step"] for line in lines(folder / trial["name"]) if "train/loss" in line] == list(range(1, 16))
    for name in started:
        assert "resumed after step" in (folder / name / "log.txt").read_text()
    assert not (folder / "ray").exists()
    best = load(folder / "best_recipe.yaml")
    assert best.train.lr == trials[0]["values"]["train.lr"]


def test_nodes_keep_no_copies_of_runs(nodes, run):
    for name in nodes.nodes:
        found = nodes.done(nodes.popen("bash", "-c", f"ls {PRIVATE}/tmp", node=name), 60)
        assert "raydet-run-" not in found
