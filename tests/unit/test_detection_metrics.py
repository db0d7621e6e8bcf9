"""DetectionMetrics: the interface that SuperGradients' users know, with COCO's numbers."""

import json
import socket

import numpy as np
import pytest
import torch
from torch.multiprocessing import spawn

from raydet.errors import RaydetError
from raydet.evaluation.coco import TWELVE
from raydet.metrics import DetectionMetrics, DetectionMetrics_050, DetectionMetrics_050_095, DetectionMetrics_075
from tests.unit.test_metrics import evaluated, official, random_set

NAMES = ("a", "b", "c")


def batch_of(index, detections):
    """What `update` takes: detections, targets and crowds in pixels."""
    given = [torch.tensor(found, dtype=torch.float64) for found in detections]
    rows, (boxes, labels, crowd, _) = index.objects()
    centre, size = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    targets = torch.tensor(np.column_stack((rows, labels, centre, size)))
    return given, targets[~crowd], targets[crowd]


def updated(metrics, index, detections):
    given, targets, crowds = batch_of(index, detections)
    metrics.update(given, targets, crowd_targets=crowds)
    return metrics


@pytest.fixture(scope="module")
def example():
    return random_set(4)


def test_map_and_classes_are_those_of_coco(example):
    """Of objects of the areas of their boxes, which is all that targets say of them."""
    found = updated(DetectionMetrics(3, include_classwise_ap=True, class_names=NAMES), *example).compute()
    expected = evaluated(*example).compute()
    for name in ("mAP@0.50:0.95", "mAP@0.50", "mAP@0.75", "AR@0.50:0.95_max=100"):
        assert found[name] == pytest.approx(expected[name], abs=1e-12)
    for name in NAMES:
        assert found[f"AP@0.50:0.95_{name}"] == pytest.approx(expected.get(f"AP@0.50:0.95_{name}", 0), abs=1e-12)
    assert 0 <= found["Best_score_threshold_a"] <= 1


@pytest.mark.parametrize(
    ("metric", "at"),
    [
        (DetectionMetrics(3), "0.50:0.95"),
        (DetectionMetrics(3, iou_thres=[0.6, 0.8]), "0.60:0.80"),
        (DetectionMetrics(3, iou_thres=(0.5, 0.5)), "0.50"),
        (DetectionMetrics(3, iou_thres=0.65), "0.65"),
        (DetectionMetrics_050(3), "0.50"),
        (DetectionMetrics_075(3), "0.75"),
        (DetectionMetrics_050_095(3), "0.50:0.95"),
    ],
)
def test_results_are_named_by_their_iou_thresholds(example, metric, at):
    found = updated(metric, *example).compute()
    own = [f"Precision@{at}", f"Recall@{at}", f"mAP@{at}", f"F1@{at}", "Best_score_threshold"]
    assert set(own) <= set(found) <= {*TWELVE, *own}


@pytest.mark.parametrize(("top_k", "column"), [(1, "AR@0.50:0.95_max=1"), (10, "AR@0.50:0.95_max=10")])
def test_only_the_best_of_each_class_and_image_count(top_k, column):
    index, detections = random_set(12, false_alarms=30)
    found = updated(DetectionMetrics(3, top_k_predictions=top_k, score_thres=0.0), index, detections).compute()
    assert found["Recall@0.50:0.95"] == pytest.approx(official(index, detections)[0][list(TWELVE).index(column)])


def test_normalised_targets_are_shares_of_the_inputs_sides(example):
    given, targets, crowds = batch_of(*example)
    sides, inputs = torch.tensor([1, 1, 400, 200, 400, 200]), torch.zeros(len(given), 3, 200, 400)
    expected = DetectionMetrics(3)
    expected.update(given, targets, crowd_targets=crowds)
    for metrics in (DetectionMetrics(3, target_units="normalized"), DetectionMetrics(3, normalize_targets=False)):
        with pytest.raises(ValueError, match="need inputs="):
            metrics.update(given, targets / sides)
        metrics.reset()
        metrics.update(given, targets / sides, None, inputs, crowds / sides)
        assert metrics.compute() == pytest.approx(expected.compute(), abs=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"iou_thres": 50}, "above 0 and up to 1"),
        ({"iou_thres": [0.5, 0.6, 0.7]}, "a number or"),
        ({"target_units": "percent"}, "'pixels' or 'normalized'"),
        ({"target_units": "pixels", "normalize_targets": False}, "means normalized"),
        ({"class_names": ["a"]}, "1 names for 3 classes"),
    ],
)
def test_arguments_that_cannot_be_right(arguments, message):
    with pytest.raises(ValueError, match=message):
        DetectionMetrics(3, **arguments)


@pytest.mark.parametrize(
    ("target", "message"), [((1, 0), "images 1 to 1; there are 1"), ((0, 3), "classes 3 to 3; there are 3")]
)
def test_a_target_of_no_image_or_class(target, message):
    with pytest.raises(ValueError, match=message):
        DetectionMetrics(3).update([torch.empty(0, 6)], torch.tensor([[*target, 5, 5, 2, 2]]))


def test_no_objects_and_no_detections(example):
    metrics = DetectionMetrics(3)
    metrics.update([torch.empty(0, 6)], torch.empty(0, 6))
    with pytest.raises(RaydetError, match="no objects"):
        metrics.compute()
    metrics.update([torch.empty(0, 6)], torch.tensor([[0, 1, 5, 5, 2, 2]]))
    assert set(metrics.compute().values()) == {0.0}


def test_batches_and_merged_metrics_are_as_one_batch(example):
    index, detections = example
    expected = updated(DetectionMetrics(3), index, detections).compute()
    parts = []
    for rows in ([0], list(range(1, len(index)))):
        parts.append(updated(DetectionMetrics(3), index.take(np.array(rows)), [detections[row] for row in rows]))
    whole = DetectionMetrics(3)
    whole.merge(parts)
    assert whole.compute() == expected


def _rank(rank, port, folder, index, detections):
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    rows = list(range(rank, len(index), 2))
    metrics = updated(DetectionMetrics(3), index.take(np.array(rows)), [detections[row] for row in rows])
    (folder / f"{rank}.json").write_text(json.dumps(metrics.compute()))
    torch.distributed.destroy_process_group()


def test_ranks_get_the_numbers_of_all(tmp_path, example):
    index, detections = example
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(_rank, (port, tmp_path, index, detections), nprocs=2)
    expected = updated(DetectionMetrics(3), index, detections).compute()
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == pytest.approx(expected, abs=1e-12)
