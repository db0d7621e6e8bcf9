import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from raydet import models, predict
from raydet.errors import RaydetError
from raydet.models import Preprocessing
from raydet.predict import Predictor, image_files, pick_device, predict_files
from raydet.recipe import Eval
from raydet.training.checkpoint import Config

NAMES = ("person", *(f"class {number}" for number in range(1, 80)))
CONFIG = Config(
    "yolox_n", NAMES, tuple(range(1, 81)), (416, 416), Preprocessing((0.0,) * 3, (1.0,) * 3), Eval(score=0.25)
)


@pytest.fixture(scope="module")
def predictor(shared):
    weights = shared / "weights/yolox_nano/yolox_nano_coco.pth"
    return Predictor(models.get("yolox_n", 80, weights=weights), CONFIG, torch.device("cpu"))


@pytest.fixture(scope="module")
def photo(shared):
    """A photograph with people, and their boxes."""
    content = json.loads((shared / "data/coco_mini/annotations/instances_val2017.json").read_text())
    people = [a for a in content["annotations"] if a["category_id"] == 1 and not a["iscrowd"] and a["area"] > 40000]
    image_id = people[0]["image_id"]
    name = next(image["file_name"] for image in content["images"] if image["id"] == image_id)
    boxes = np.array([a["bbox"] for a in people if a["image_id"] == image_id])
    return shared / "data/coco_mini/val2017" / name, np.concatenate((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), axis=1)


def iou(a, b):
    low, high = np.maximum(a[:2], b[:2]), np.minimum(a[2:], b[2:])
    inter = np.prod((high - low).clip(0))
    return inter / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - inter)


def test_people_are_found_where_they_are(predictor, photo):
    path, boxes = photo
    found = predictor.predict([cv2.imread(str(path))])[0]
    assert found.names[0] in NAMES
    assert (np.diff(found.scores) <= 0).all()
    assert found.scores.min() >= 0.25
    people = found.boxes[found.labels == 0]
    assert max(iou(mine, boxes[0]) for mine in people) > 0.7


def test_images_of_any_size_share_a_batch(predictor, photo):
    image = cv2.imread(str(photo[0]))
    tall = cv2.resize(image, None, fx=0.5, fy=0.8)
    together, alone = predictor.predict([image, tall]), [predictor.predict([one])[0] for one in (image, tall)]
    for ours, theirs in zip(together, alone, strict=True):
        np.testing.assert_allclose(ours.boxes, theirs.boxes, atol=1e-2)
        assert ours.names == theirs.names


def test_score_replaces_the_checkpoint_s(predictor, photo):
    image = cv2.imread(str(photo[0]))
    few, many = predictor.predict([image], 0.6)[0], predictor.predict([image], 0.05)[0]
    assert 0 < len(few.scores) < len(many.scores)
    assert few.scores.min() >= 0.6


def test_coco_results_have_the_data_set_s_category_ids(predictor, photo):
    found = predictor.predict([cv2.imread(str(photo[0]))])[0]
    shifted = Predictor(
        predictor.model, replace(CONFIG, category_ids=tuple(range(101, 181))), predictor.device
    ).to_coco(found, 7)
    assert [entry["category_id"] - 101 for entry in shifted] == found.labels.tolist()
    assert {entry["image_id"] for entry in shifted} == {7}
    x, y, width, height = shifted[0]["bbox"]
    np.testing.assert_allclose([x, y, x + width, y + height], found.boxes[0], atol=2e-3)


def test_files_are_found_below_a_folder(tmp_path, predictor):
    (tmp_path / "inner").mkdir()
    for name in ("b.PNG", "inner/a.jpg"):
        cv2.imwrite(str(tmp_path / name), np.zeros((20, 30, 3), np.uint8))
    (tmp_path / "notes.txt").write_text("")
    files = image_files(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in files] == ["b.PNG", "inner/a.jpg"]
    assert [path for path, *_ in predict_files(predictor, files, None, batch_size=1)] == files
    assert image_files(tmp_path / "b.PNG") == [tmp_path / "b.PNG"]


def test_missing_images_and_devices_are_named(tmp_path):
    with pytest.raises(RaydetError, match="no such file or folder"):
        image_files(tmp_path / "none")
    with pytest.raises(RaydetError, match=r"no images in it \(\.jpg"):
        image_files(tmp_path)
    with pytest.raises(RaydetError, match="device 'gpu7'"):
        pick_device("gpu7")
    with pytest.raises(RaydetError, match="neither a checkpoint"):
        predict.load(tmp_path)
