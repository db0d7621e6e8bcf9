import json

import cv2
import numpy as np
import pytest

from raydet.data.coco import load_coco
from raydet.data.synthetic import CLASSES, make_dataset


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = make_dataset(tmp_path_factory.mktemp("set"), train=200, val=1, seed=3)
    return load_coco(folder / "annotations/instances_train.json", folder / "train")


def test_the_same_seed_gives_the_same_files(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_dataset(tmp_path / name, train=3, val=2, seed=seed)
    contents = {
        name: [path.read_bytes() for path in sorted((tmp_path / name).rglob("*")) if path.is_file()] for name in "abc"
    }
    assert len(contents["a"]) == 7
    assert contents["a"] == contents["b"]
    assert all(ours != theirs for ours, theirs in zip(contents["a"], contents["c"], strict=True))
    assert not list(tmp_path.rglob("*.partial"))


def test_it_has_what_makes_detection_hard(index):
    objects = [index.annotations(row) for row in range(len(index))]
    counts = np.array([len(found.labels) for found in objects])
    boxes = np.concatenate([found.boxes for found in objects])
    sides = (boxes[:, 2:] - boxes[:, :2]).max(1)
    assert index.class_names == CLASSES
    assert 0.01 < (counts == 0).mean() < 0.2, "some pictures without objects"
    assert np.percentile(sides, 99) / np.percentile(sides, 1) > 6, "many sizes"
    shares = np.bincount(np.concatenate([found.labels for found in objects]), minlength=len(CLASSES)) / counts.sum()
    assert shares.min() > 0.5 / len(CLASSES), "every class often"
    overlapping = sum(
        bool((np.minimum(a[2:], b[2:]) > np.maximum(a[:2], b[:2])).all())
        for found in objects
        for number, a in enumerate(found.boxes)
        for b in found.boxes[:number]
    )
    assert overlapping > 20


def test_boxes_lie_in_the_picture(index):
    for row in range(len(index)):
        width, height = index.size(row)
        assert cv2.imread(index.path(row)).shape == (height, width, 3)
        boxes = index.annotations(row).boxes
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, 2] <= width).all()
        assert (boxes[:, 3] <= height).all()
        assert (index.annotations(row).area <= np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)).all()


def test_pycocotools_reads_it(tmp_path):
    from pycocotools.coco import COCO

    make_dataset(tmp_path, train=4, val=2)
    path = tmp_path / "annotations/instances_train.json"
    assert len(COCO(str(path)).getImgIds()) == len(json.loads(path.read_text())["images"]) == 4
