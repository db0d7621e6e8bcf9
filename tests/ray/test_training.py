"""Training on Ray: one and two workers, interrupted, resumed, refused."""

import json
import time

import pytest
import torch
from safetensors.torch import load_file

import raydet
from raydet.errors import RaydetError


def train(demo, *overrides, **arguments):
    said = []
    options = [*demo, "scale.cpus_per_worker=1", *overrides]
    result = raydet.train("demo", overrides=options, say=said.append, **arguments)
    return result, said


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same_weights(ours, theirs):
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (ours, theirs))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def options(shapes, tmp_path_factory):
    storage = tmp_path_factory.mktemp("runs")
    return [
        f"data.root={shapes}",
        f"storage={storage}",
        "data.image_size=96",
        "data.chunk_size=16",
        "train.batch_size=8",
        "train.epochs=2",
        "eval.every=1",
        "track.log_every=2",
        "scale.cpus_per_worker=1",
    ]


@pytest.fixture(scope="module")
def two_workers(options):
    said = []
    overrides = [*options, "name=two", "scale.num_workers=2"]
    return raydet.train("demo", overrides=overrides, say=said.append), said


def test_two_workers_leave_a_run(two_workers):
    result, said = two_workers
    for name in ("recipe.yaml", "environment.json", "metrics.jsonl", "log.txt", "summary.json"):
        assert (result.folder / name).is_file(), name
    assert sorted(path.name for path in result.folder.glob("checkpoint_0*")) == [
        "checkpoint_000001",
        "checkpoint_000002",
    ]
    assert any("2 worker(s) on cpu" in line for line in said)
    assert any("step 10/10" in line and "images/s" in line for line in said)
    lines = metrics_of(result.folder)
    assert [line["step"] for line in lines if "train/loss" in line] == [2, 4, 5, 6, 8, 10]
    assert [line["step"] for line in lines if "val/mAP@0.50:0.95" in line] == [5, 10]
    assert result.metrics["val/mAP@0.50:0.95"] == lines[-1]["val/mAP@0.50:0.95"]


def test_a_finished_run_says_so_and_does_nothing(two_workers, options):
    began = time.monotonic()
    again = raydet.train("demo", overrides=[*options, "name=two", "scale.num_workers=1"], say=print)
    assert again.finished_before
    assert again.metrics == two_workers[0].metrics
    assert time.monotonic() - began < 3


def test_another_recipe_under_the_same_name_is_refused(two_workers, options):
    with pytest.raises(RaydetError, match=r"train\.lr: 0\.\d+ there, 0\.5 here"):
        raydet.train("demo", overrides=[*options, "name=two", "train.lr=0.5"])


def test_evaluation_by_one_worker_is_the_validation_by_two(two_workers):
    metrics = raydet.evaluate(two_workers[0].folder, overrides=["scale.num_workers=1"], say=lambda text: None)
    assert {f"val/{name}": value for name, value in metrics.items()} == pytest.approx(two_workers[0].metrics, abs=1e-6)


def test_one_worker_on_ray_trains_exactly_what_the_debugger_does(demo):
    on_ray, _ = train(demo, "name=a", "train.epochs=1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the worker has: PyTorch's convolutions depend on it
    try:
        local, _ = train(demo, "name=b", "train.epochs=1", debug=True, device="cpu")
    finally:
        torch.set_num_threads(threads)
    assert same_weights(on_ray.checkpoint, local.checkpoint)
    assert on_ray.metrics == local.metrics


def test_a_broken_image_stops_the_run_at_once_and_is_named(demo, shapes, tmp_path):
    name = next((shapes / "train").glob("*.jpg")).name
    images = tmp_path / "images"
    images.mkdir()
    for path in (shapes / "train").glob("*.jpg"):
        (images / path.name).write_bytes(path.read_bytes() if path.name != name else b"no image")
    began = time.monotonic()
    with pytest.raises(RaydetError, match=rf"{name} is not an image that can be decoded \(8 bytes\)$") as error:
        train(demo, f"data.train_images={images}")
    assert "\n" not in str(error.value)
    assert time.monotonic() - began < 60
