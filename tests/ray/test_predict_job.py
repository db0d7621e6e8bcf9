"""Detection in a folder on Ray: killed and resumed, each image is there once, as predict finds it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch

import raydet
from raydet import models
from raydet.errors import RaydetError
from raydet.models import family_of
from raydet.predict.on_ray import batch_predict
from raydet.recipe import Eval
from raydet.runs.checkpoint import Config, Progress, pack, write
from tests.command import raydet as command
from tests.s3 import serve

ROOT = Path(__file__).parents[2]
IMAGES, BROKEN = 100, "photo_042.jpg"


@pytest.fixture(scope="module")
def checkpoint(shapes_index, tmp_path_factory):
    """A small model that has learnt nothing, and finds something everywhere."""
    torch.manual_seed(0)
    model = models.get("yolox_n", 5)
    names, ids = shapes_index.class_names, shapes_index.category_ids
    config = Config("yolox_n", names, ids, (96, 96), family_of("yolox_n").preprocessing, Eval(max_detections=5))
    folder = tmp_path_factory.mktemp("run") / "checkpoint_000001"
    write(folder, pack(config, model, None, Progress(), 1, {}))
    return folder


@pytest.fixture(scope="module")
def photos(shapes, tmp_path_factory):
    """A hundred images in two folders, one of them cut off."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    sources = sorted((shapes / "train").glob("*.jpg"))
    for number in range(IMAGES):
        content = sources[number % len(sources)].read_bytes()
        (folder / ("more" if number >= 60 else "") / f"photo_{number:03d}.jpg").write_bytes(content)
    (folder / BROKEN).write_bytes((folder / BROKEN).read_bytes()[:300])
    return folder


def rows_of(out):
    return [row for path in sorted(out.glob("part-*.parquet")) for row in pq.read_table(path).to_pylist()]


def names_of(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.jpg"))


def parts(out):
    return {path.name: path.stat().st_mtime_ns for path in out.glob("part-*.parquet")}


@pytest.fixture(scope="module")
def resumed(checkpoint, photos, tmp_path_factory):
    """Detections of a job whose driver was killed, and which was submitted again; the parts of the first, its lines."""
    out = tmp_path_factory.mktemp("job") / "found"
    job = [sys.executable, ROOT / "jobs/predict.py", checkpoint, photos, out, "--score", "0", "--shard-images", "5"]
    environment = {
        **os.environ,
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        "PYTHONPATH": str(ROOT),
    }
    first = subprocess.Popen([*job, "--actors", "1", "--batch-size", "1"], env=environment)
    try:
        while len(parts(out)) < 3:
            assert first.poll() is None
            time.sleep(0.01)
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    time.sleep(3)  # its actor ends by itself
    before = parts(out)
    second = subprocess.run(
        [*job, "--actors", "2", "--format", "coco"], env=environment, capture_output=True, text=True, check=False
    )
    assert second.returncode == 0, second.stderr
    return out, before, second.stdout


def test_each_image_is_detected_in_once(resumed, photos):
    out, before, _ = resumed
    assert 3 <= len(before) < IMAGES / 5, "the first was killed part-way"
    assert parts(out).items() > before.items(), "what was done is not done again"
    assert [row["file"] for row in rows_of(out)] == names_of(photos)


def test_progress_and_result_are_said(resumed):
    out, before, printed = resumed
    assert f"{5 * len(before)} of 100 images are done already" in printed
    ended = rf"100 images, {IMAGES - 5 * len(before)} in .* s; 1 could not be read: errors.json; detections: {out}\n$"
    assert re.search(ended, printed)


def test_a_broken_file_is_recorded_and_stops_nothing(resumed, photos):
    out, _, _ = resumed
    (broken,) = [row for row in rows_of(out) if row["error"]]
    assert broken["file"] == BROKEN
    assert broken["boxes"] == []
    (error,) = json.loads((out / "errors.json").read_text())
    assert error == {"file": BROKEN, "error": broken["error"]}
    assert f"{photos}/{BROKEN} is not an image" in error["error"]


def test_what_is_found_is_what_predict_finds(resumed, checkpoint, photos):
    out, _, _ = resumed
    rows = {row["file"]: row for row in rows_of(out)}
    found = raydet.load(checkpoint, "cpu").predict(photos, conf=0)
    assert len(found) == IMAGES - 1
    results = json.loads((out / "detections.json").read_text())
    numbers = {name: number for number, name in enumerate(names_of(photos), start=1)}
    for expected in found:
        name = Path(expected.picture.name).relative_to(photos).as_posix()
        row, entries = rows[name], [entry for entry in results if entry["file_name"] == name]
        assert (row["height"], row["width"]) == expected.image.shape[:2]
        np.testing.assert_allclose(row["scores"], expected.scores, atol=1e-4)
        np.testing.assert_allclose(sorted(row["boxes"]), sorted(expected.boxes.tolist()), atol=0.1)
        assert sorted(row["names"]) == sorted(expected.names)
        assert {entry["image_id"] for entry in entries} == {numbers[name]}
        assert sorted(e["category_id"] for e in entries) == sorted(e["category_id"] for e in expected.to_coco())


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (["--score", "0.1"], "score: 0.0 there, 0.1 here"),
        (["--iou", "0.5"], "iou: 0.65 there, 0.5 here"),
        (["--shard-images", "6"], "shard_images: 5 there, 6 here"),
        ("one image less", "images: 100 there, 99 here"),
    ],
    ids=str,
)
def test_something_else_in_the_folder_is_refused(resumed, checkpoint, photos, tmp_path, change, difference):
    out, _, _ = resumed
    if isinstance(change, str):
        photos = shutil.copytree(photos, tmp_path / "photos")
        (photos / BROKEN).unlink()
        change = []
    given = ["--score", "0", "--shard-images", "5", *change]
    done = command("batch-predict", checkpoint, photos, out, *given)
    assert done.returncode == 2
    assert f"{out} holds detections of other images or settings (" in done.stderr
    assert difference in done.stderr


def test_the_same_again_does_nothing(resumed, checkpoint, photos):
    out, _, _ = resumed
    before = parts(out)
    done = command("batch-predict", checkpoint, photos, out, "--score", "0", "--shard-images", "5")
    assert "100 images, all were done before; 1 could not be read" in done.stdout
    assert parts(out) == before


def test_from_a_bucket_to_a_bucket(checkpoint, photos, tmp_path):
    with serve(tmp_path) as s3:
        shutil.copytree(photos / "more", s3.folder / "more")
        said = []
        given = {"conf": 0.0, "shard_images": 25, "actors": 1, "say": said.append}
        summary = batch_predict(checkpoint, s3.uri("more"), s3.uri("found"), **given)
    assert (summary.images, summary.done, summary.failed) == (40, 40, 0)
    assert [row["file"] for row in rows_of(s3.folder / "found")] == names_of(photos / "more")
    assert not (s3.folder / "found/errors.json").exists()


def test_what_is_hidden_is_no_image_and_what_is_left_out_is_said(checkpoint, photos, tmp_path):
    for name in (".ipynb_checkpoints/a.jpg", "@eaDir/a.jpg", "._a.jpg", "caf\udce9.jpg"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(photos / "photo_000.jpg", tmp_path / "in" / name)
    (tmp_path / "in/notes.heic").touch()
    said = []
    with pytest.raises(RaydetError, match=r"in: no images in it \(\.jpg, "):
        batch_predict(checkpoint, str(tmp_path / "in"), str(tmp_path / "out"), say=said.append)
    assert re.search(r"^warning: .*caf\\xe9\.jpg: the name is not UTF-8", said[0])
    assert said[1].startswith("warning: left out: 1 file that is no image raydet decodes, such as notes.heic: ")


def test_a_folder_of_other_files_is_refused(checkpoint, photos, tmp_path):
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(RaydetError, match=r"holds other files, such as mine\.json"):
        batch_predict(checkpoint, str(photos), str(tmp_path))
    with pytest.raises(RaydetError, match="no images in it"):
        batch_predict(checkpoint, str(tmp_path), str(tmp_path / "out"))
    with pytest.raises(RaydetError, match="--format csv: it is parquet or coco"):
        batch_predict(checkpoint, str(photos), str(tmp_path / "out"), form="csv")
