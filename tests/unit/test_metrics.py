import contextlib
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from raydet.boxes import xyxy_to_xywh
from raydet.data.index import make_index
from raydet.metrics import _TWELVE, CocoEvaluation

CATEGORIES = (2, 5, 9)


def random_set(seed):
    """An index with crowds and empty images, and detections of it: shifted truth, with ties and false alarms."""
    rng = np.random.default_rng(seed)
    images, boxes, of_image, detections = int(rng.integers(1, 8)), [], [], []
    for image in range(images):
        count = int(rng.integers(0, 6))
        corner, size = rng.integers(0, 100, (count, 2)), rng.integers(1, 120, (count, 2))
        boxes.append(np.hstack([corner, corner + size]).astype(float))
        of_image += [image] * count
        found = boxes[-1][rng.random(count) < 0.8] + rng.integers(-8, 9, (1, 4))
        false = rng.integers(0, 60, (int(rng.integers(0, 4)), 4)).astype(float)
        false[:, 2:] += false[:, :2] + 1
        found = np.vstack([found, false])
        found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
        scores, labels = rng.integers(1, 10, len(found)) / 10, rng.integers(0, 3, len(found))
        detections.append(np.column_stack([found, scores, labels]))
    total = len(of_image)
    index = make_index(
        [(int(image_id), f"{image_id}.jpg", 200, 200) for image_id in rng.permutation(100)[:images]],
        np.vstack([*boxes, np.empty((0, 4))]),
        labels=rng.integers(0, 3, total),
        crowd=rng.random(total) < 0.15,
        area=rng.integers(1, 12000, total).astype(float),
        image_of_box=np.array(of_image, int),
        root="/",
        class_names=("a", "b", "c"),
        category_ids=CATEGORIES,
    )
    return index, detections


def official(index, detections):
    """The COCO API's twelve numbers."""
    annotations, results = [], []
    for row, found in enumerate(detections):
        image_id = int(index.image_ids[row])
        objects = index.annotations(row)
        for box, label, crowd, area in zip(xyxy_to_xywh(objects.boxes).tolist(), *objects[1:], strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": CATEGORIES[label],
                    "bbox": box,
                    "area": float(area),
                    "iscrowd": int(crowd),
                }
            )
        for row_of_six in found:
            box = xyxy_to_xywh(row_of_six[:4]).tolist()
            category = CATEGORIES[int(row_of_six[5])]
            results.append({"image_id": image_id, "category_id": category, "bbox": box, "score": row_of_six[4]})
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "info": {},
            "images": [{"id": int(image_id)} for image_id in index.image_ids],
            "annotations": annotations,
            "categories": [{"id": category, "name": str(category)} for category in CATEGORIES],
        }
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


def check(metrics, expected):
    for name, value in zip(_TWELVE, expected, strict=True):
        if value == -1:
            assert name not in metrics
        else:
            assert metrics[name] == pytest.approx(value, abs=1e-12), name


@given(st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_the_twelve_numbers_are_the_coco_api_s(seed):
    index, detections = random_set(seed)
    if not sum(map(len, detections)):
        return
    evaluation = CocoEvaluation(index)
    evaluation.update(range(len(index)), detections)
    check(evaluation.compute(), official(index, detections))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shards", [2, 3])
def test_shards_merge_to_the_same_numbers(seed, shards):
    index, detections = random_set(seed)
    whole = CocoEvaluation(index)
    whole.update(range(len(index)), detections)
    states = []
    for shard in range(shards):
        part = CocoEvaluation(index)
        for row in reversed(range(shard, len(index), shards)):  # one by one, backwards
            part.update([row], [detections[row]])
        states.append(part.to_bytes())
    merged = CocoEvaluation(index)
    merged.merge_bytes(states)
    assert merged.compute() == whole.compute()


def test_classes_without_truth_are_left_out_and_the_rest_averages_to_map():
    index, detections = random_set(4)
    evaluation = CocoEvaluation(index)
    evaluation.update(range(len(index)), detections)
    metrics = evaluation.compute()
    classes = [value for name, value in metrics.items() if name.startswith("AP@0.50:0.95_")]
    present = {
        index.class_names[label]
        for row in range(len(index))
        for label in index.annotations(row).labels[~index.annotations(row).crowd]
    }
    assert {name.rpartition("_")[2] for name in metrics if name.startswith("AP@")} == present
    assert np.mean(classes) == pytest.approx(metrics["mAP@0.50:0.95"])


def test_no_detections_is_zero():
    index, _ = random_set(4)
    evaluation = CocoEvaluation(index)
    evaluation.update(range(len(index)), [np.empty((0, 6))] * len(index))
    assert evaluation.compute()["mAP@0.50:0.95"] == 0
