"""A sweep of two loss weights: killed, resumed, one trial stopped early, and what it leaves."""

import json
import os
import subprocess
import sys
import time

import pytest

import raydet
from raydet.recipe import load


@pytest.fixture
def another_cluster(cluster):
    """A cluster that someone else starts on the same machine: Ray asks the last one where it is not told which."""
    script = (
        "import ray; ray.init(address='local', num_cpus=1, include_dashboard=False); print('up', flush=True); input()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-c", script], text=True, **pipes) as process:
        assert "up" in process.stdout.readline()
        yield
        process.stdin.close()


@pytest.mark.timeout(400)
def test_a_sweep_of_two_loss_weights(cluster, another_cluster, shared, tmp_path):
    import ray
    from ray.util.state import list_actors

    overrides = [
        "name=weights",
        f"storage={tmp_path}/runs",
        f"data.root={shared}/data/coco_mini",
        f"model.weights={shared}/weights/yolox_nano/yolox_nano_coco.pth",
        "data.max_num_samples=16",
        "data.image_size=160",
        "data.chunk_size=16",
        "augment.mosaic=0",
        "augment.mixup=0",
        "augment.multiscale=null",
        "loss.name=tests.ray.witness:Witness",
        "loss.l1_last_epochs=0",
        "train.batch_size=8",
        "train.epochs=2",
        "train.optimizer=adamw",
        "train.lr=0.0003",
        "train.warmup_epochs=0",
        "train.cooldown_epochs=0",
        "track.average_best=false",
        "scale.num_workers=1",
        "scale.cpus_per_worker=1",
        "tune.space={loss.iou_weight: {grid: [1000.0, 1.0]}, loss.cls_weight: {grid: [1.0, 3.0]}}",
        "tune.search=grid",
        "tune.reduction_factor=2",
        "tune.concurrent=2",
    ]
    folder = tmp_path / "runs" / "weights-tune"

    # The driver of a first start is killed as soon as a trial has measured something.
    command = [sys.executable, "-m", "raydet.cli", "tune", "yolox_n_finetune", *overrides]
    here = ray.get_runtime_context().gcs_address
    environment = {**os.environ, "RAY_ADDRESS": here}
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    while not any("val/" in path.read_text() for path in folder.glob("trial_*/metrics.jsonl")):
        assert first.poll() is None
        time.sleep(0.2)
    first.kill()
    first.wait()
    started = {path.parent for path in folder.glob("trial_*/witness.json")}  # workers have found the loss
    assert started
    deadline = time.monotonic() + 60
    while list_actors(here, filters=[("class_name", "=", "RayTrainWorker"), ("state", "=", "ALIVE")]):
        assert time.monotonic() < deadline, "its workers end by themselves"
        time.sleep(0.2)

    said = []
    sweep = raydet.tune("yolox_n_finetune", overrides=overrides, say=said.append)
    assert f"going on with the sweep in {folder}" in said
    assert not any("after epoch 0" in line for line in said)
    assert started <= {folder / trial.name for trial in sweep.trials}
    tried = [(trial.values["loss.iou_weight"], trial.values["loss.cls_weight"]) for trial in sweep.trials]
    assert sorted(tried) == [(1, 1), (1, 3), (1000, 1), (1000, 3)]
    for trial in sweep.trials:
        assert json.loads((folder / trial.name / "witness.json").read_text()) == trial.values
        recipe = load(folder / trial.name / "recipe.yaml")
        weights = {"loss.iou_weight": recipe.loss.iou_weight, "loss.cls_weight": recipe.loss.cls_weight}
        assert weights == trial.values
        assert recipe.track.wandb_group == "weights-tune"
    values = [trial.value for trial in sweep.trials]
    assert len(set(values)) == 4
    assert values == sorted(values, reverse=True)
    assert {trial.state for trial in sweep.trials} == {"finished", "stopped early"}

    # All that the trials had is free again.
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
        assert time.monotonic() < deadline, ray.available_resources()
        time.sleep(0.2)
    states = {group["state"] for group in ray.util.placement_group_table().values()}
    assert states <= {"REMOVED"}
    assert not (folder / "ray").exists()

    # The recipe of the best is a training of its own, with the same result.
    best = raydet.train(sweep.recipe, say=lambda line: None)
    metrics = [json.loads(line) for line in (best.folder / "metrics.jsonl").read_text().splitlines()]
    assert max(line.get("val/mAP@0.50:0.95", 0) for line in metrics) == sweep.trials[0].value

    again = raydet.tune("yolox_n_finetune", overrides=overrides, say=said.append)
    assert again.finished_before
    assert again.trials == sweep.trials
