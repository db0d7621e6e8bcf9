"""What an evaluation leaves, and what is read again."""

import json

import cv2
import numpy as np
import pytest

from raydet.errors import RaydetError
from raydet.evaluation.coco import CocoEvaluation, read_results
from raydet.reports.evaluation import DETECTIONS, METRICS, PICTURES, write_evaluation
from tests.unit.test_metrics import CATEGORIES, evaluated, random_set


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder of an evaluation, and what it is of."""
    index, detections = random_set(70)
    evaluation = CocoEvaluation(index)
    evaluation.update(range(len(index)), detections)
    folder = tmp_path_factory.mktemp("evaluation")
    write_evaluation(folder, evaluation, evaluation.compute())
    return folder, index, detections


def test_results_have_the_data_s_own_ids_and_boxes_as_coco_has_them(written):
    folder, index, detections = written
    results = json.loads((folder / DETECTIONS).read_text())
    expected = [
        (int(index.image_ids[row]), CATEGORIES[int(label)], score, [x1, y1, x2 - x1, y2 - y1])
        for row, found in enumerate(detections)
        for x1, y1, x2, y2, score, label in found.tolist()
    ]
    assert sorted((r["image_id"], r["category_id"], r["score"], r["bbox"]) for r in results) == sorted(expected)


def test_results_that_are_read_again_have_the_same_metrics(written):
    folder, index, detections = written
    metrics = read_results(folder / DETECTIONS, index).compute()
    assert metrics == evaluated(index, detections).compute()
    assert metrics == json.loads((folder / METRICS).read_text())


def test_there_are_five_pictures(written):
    folder, _, _ = written
    assert {path.stem for path in folder.glob("*.png")} == set(PICTURES)
    for name in PICTURES:
        assert cv2.imread(str(folder / f"{name}.png")).std() > 10


def test_no_detections_are_an_evaluation_too(written, tmp_path):
    _, index, _ = written
    (tmp_path / "none.json").write_text("[]")
    evaluation = read_results(tmp_path / "none.json", index)
    metrics = evaluation.compute()
    assert metrics["mAP@0.50:0.95"] == 0
    write_evaluation(tmp_path, evaluation, metrics)
    assert json.loads((tmp_path / DETECTIONS).read_text()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 12345}, "the data has no image_id 12345, and 0 others"),
        ({"category_id": 1}, "the data has no category_id 1"),
        ({"bbox": [1, 2, 3]}, "is not COCO's results"),
        ({"score": "high"}, "is not COCO's results"),
        ({"bbox": [1, 2, float("nan"), 4]}, "is not COCO's results"),
        (None, "is not COCO's results"),
    ],
)
def test_results_that_cannot_be_are_named(written, tmp_path, change, message):
    folder, index, _ = written
    entry = json.loads((folder / DETECTIONS).read_text())[0]
    path = tmp_path / "mine.json"
    path.write_text(json.dumps([entry, entry | change] if change is not None else {"annotations": []}))
    with pytest.raises(RaydetError, match=f"mine.json.*{message}"):
        read_results(path, index).compute()


def test_class_and_image_are_found_whatever_the_order_of_the_ids(written):
    folder, index, detections = written
    evaluation = read_results(folder / DETECTIONS, index)
    assert np.array_equal(np.bincount(evaluation.found.image, minlength=len(index)), [len(d) for d in detections])
