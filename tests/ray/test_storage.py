"""A run in an object store, a local S3 server: stopped, gone on with by a machine that knows nothing of it, used."""

import json

import pytest

import raydet
from raydet.errors import RaydetError
from raydet.runs.folder import STOP
from raydet.runs.mirror import opened
from raydet.store import Store
from tests.command import raydet as command
from tests.s3 import serve


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """Make this process one on a machine without a cache."""
    with pytest.MonkeyPatch.context() as patch:

        def forget():
            patch.setenv("RAYDET_CACHE", str(tmp_path_factory.mktemp("cache")))

        forget()
        yield forget


@pytest.fixture(scope="module")
def run(s3, fresh, shapes):
    """The address of a run of two workers that was stopped in its first epoch and gone on with, and what was said."""
    overrides = [
        f"data.root={shapes}",
        f"storage={s3.uri('runs')}",
        "name=a",
        "data.image_size=96",
        "data.chunk_size=16",
        "train.batch_size=8",
        "train.epochs=16",
        "eval.every=8",
        "track.log_every=1",
        "scale.num_workers=2",
        "scale.cpus_per_worker=1",
    ]
    said = []

    def say(text):
        said.append(text)
        if "step 3/" in text:  # the way from here to rank 0 is the store
            Store(s3.uri("runs/a")).write(STOP, b"")

    with pytest.raises(KeyboardInterrupt):
        raydet.train("demo", overrides=overrides, say=say)
    fresh()
    again = []
    result = raydet.train("demo", overrides=overrides, say=again.append)
    return s3.uri("runs/a"), said, again, result, overrides


def steps(store):
    lines = [json.loads(line) for line in store.text("metrics.jsonl").splitlines()]
    return [line["step"] for line in lines if "train/loss" in line]


def test_it_goes_on_where_it_was(run):
    address, said, again, _, _ = run
    stopped = max(int(line.split("step ")[1].split("/")[0]) for line in said if " step " in line and "/80" in line)
    assert 3 <= stopped < 80
    assert any(f"resumed after step {stopped}" in line for line in again), again
    assert steps(Store(address)) == list(range(1, 81))


def test_the_store_holds_the_whole_run(run):
    address, _, _, result, _ = run
    files = Store(address).files(recursive=True)
    for name in ("recipe.yaml", "log.txt", "metrics.jsonl", "summary.json", "report.html", "images/metrics.png"):
        assert name in files
    assert STOP not in files
    checkpoints = {name.split("/")[0] for name in files if name.endswith("model.safetensors")}
    assert checkpoints == {name.split("/")[0] for name in files if name.endswith("config.json")}
    assert result.checkpoint.name in checkpoints
    assert not any("ray/" in name or ".partial" in name for name in files)


def test_a_finished_run_says_so_elsewhere(run, fresh):
    *_, result, overrides = run
    fresh()
    again = raydet.train("demo", overrides=overrides, say=print)
    assert again.finished_before
    assert again.metrics == result.metrics
    assert (again.checkpoint / "model.safetensors").is_file()


def test_it_is_evaluated_from_there(run, fresh):
    address, *_, result, _ = run
    fresh()
    found = raydet.evaluate(address, debug=True, device="cpu", say=print)
    assert {f"val/{name}": value for name, value in found.items()} == pytest.approx(result.metrics, abs=1e-6)


def test_it_predicts_from_there(run, fresh, shapes, tmp_path):
    address, *_, result, _ = run
    fresh()
    done = command("predict", address, shapes / "val", "--out", tmp_path / "found", "--score", "0.01")
    assert done.returncode == 0, done.stderr
    with opened(f"{address.partition('?')[0]}/{result.checkpoint.name}?{address.partition('?')[2]}") as folder:
        image = next((shapes / "val").glob("*.jpg"))
        ours = raydet.load(folder, "cpu").predict(image, conf=0.01).to_coco()
    every = json.loads((tmp_path / "found/detections.json").read_text())
    theirs = [entry for entry in every if entry["image_id"] == int(image.stem)]
    assert ours
    assert [entry["score"] for entry in theirs] == pytest.approx([entry["score"] for entry in ours], abs=1e-4)


def test_another_recipe_is_refused(run, fresh):
    *_, overrides = run
    fresh()
    with pytest.raises(RaydetError, match=r"a run with other settings \(train.lr"):
        raydet.train("demo", overrides=[*overrides, "train.lr=0.5"])


def test_a_report_is_written_anew_and_brought_there(run, fresh):
    address, *_ = run
    Store(address).delete("report.html")
    fresh()
    assert command("report", address).returncode == 0
    assert b"<html" in Store(address).read("report.html")
