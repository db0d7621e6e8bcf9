"""How fast COCO's numbers are: raydet's beside those of hotcoco and of the COCO API, on the same made-up detections.

A validation set like COCO's: 5,000 images, 36,700 objects of 80 classes, 500,000 detections of which some are right.
raydet's time is that of all numbers from the detections on: COCO's twelve, AP of each class, precision, recall, F1 and
the best thresholds. The peers' time is that of `evaluate` and `accumulate`: their reading of the boxes is not counted.

    python benchmarks/metrics.py                       # a minute or two, nearly all of them the COCO API's
    python benchmarks/metrics.py --images 500 --boxes 3670 --detections 50000
    python benchmarks/metrics.py --grow 1000 2000 4000 8000

The last shows how a validation's time grows with its images: that of the metrics, and that of the measures by which the
pictures of the worst and the best batch and images are chosen. Times are those of the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import statistics
import time

for variable in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS"):
    os.environ[variable] = "1"  # one core for both; read when the libraries are loaded

import numpy as np  # noqa: E402
import torch  # noqa: E402

from raydet.boxes import xywh_to_xyxy  # noqa: E402
from raydet.data.index import make_index  # noqa: E402
from raydet.evaluation.coco import MAIN_METRIC, TWELVE, CocoEvaluation  # noqa: E402
from raydet.evaluation.measures import Measured  # noqa: E402
from raydet.metrics import DetectionMetrics  # noqa: E402

CLASSES, BATCH, SIDE = 80, 32, 640
BOXES, DETECTIONS = 7.34, 100  # an image


def make(images: int, boxes: int, detections: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return objects [boxes, 7] and detections [n, 7]: image, left, top, width, height, score or crowd, class."""
    rng = np.random.default_rng(seed)
    share = np.arange(1, CLASSES + 1) ** -0.9
    share /= share.sum()

    def placed(count: int) -> np.ndarray:
        size = np.exp(rng.normal(4, 1, (count, 2))).clip(4, 600)
        return np.hstack([rng.random((count, 2)) * (SIDE - size), size])

    truth = np.column_stack(
        [
            rng.integers(0, images, boxes),
            placed(boxes),
            rng.random(boxes) < 0.01,
            rng.choice(CLASSES, boxes, p=share),
        ]
    )
    near = truth[rng.integers(0, boxes, detections * 2 // 5)].copy()
    near[:, 1:3] += rng.normal(0, 0.12, (len(near), 2)) * near[:, 3:5]
    near[:, 3:5] *= np.exp(rng.normal(0, 0.15, (len(near), 2)))
    near[:, 5] = rng.beta(2, 3, len(near))
    mistaken = rng.random(len(near)) < 0.15
    near[mistaken, 6] = rng.choice(CLASSES, mistaken.sum(), p=share)
    count = detections - len(near)
    far = np.column_stack(
        [
            rng.integers(0, images, count),
            placed(count),
            rng.beta(0.5, 8, count),
            rng.choice(CLASSES, count, p=share),
        ]
    )
    return truth, np.concatenate([near, far])


def ours(truth: np.ndarray, found: np.ndarray, images: int) -> tuple[float, dict[str, float]]:
    """Return the seconds of DetectionMetrics, `update` and `compute`, and the numbers."""
    by_image = {}
    for name, unsorted in (("truth", truth), ("found", found)):
        rows = unsorted[np.argsort(unsorted[:, 0], kind="stable")]
        by_image[name] = np.split(rows, np.searchsorted(rows[:, 0], np.arange(1, images)))
    batches = []
    for first in range(0, images, BATCH):
        detections = [
            torch.from_numpy(np.column_stack([rows[:, 1:3], rows[:, 1:3] + rows[:, 3:5], rows[:, 5:]]))
            for rows in by_image["found"][first : first + BATCH]
        ]
        objects = np.concatenate(by_image["truth"][first : first + BATCH])
        targets = np.column_stack(
            [objects[:, 0] - first, objects[:, 6], objects[:, 1:3] + objects[:, 3:5] / 2, objects[:, 3:5]]
        )
        crowd = objects[:, 5] > 0
        batches.append((detections, torch.from_numpy(targets[~crowd]), torch.from_numpy(targets[crowd])))
    metrics = DetectionMetrics(CLASSES, include_classwise_ap=True)
    began = time.process_time()
    for boxes, given, crowds in batches:
        metrics.update(boxes, given, crowd_targets=crowds)
    numbers = metrics.compute()
    return time.process_time() - began, numbers


def hotcoco_alone(evaluation: CocoEvaluation) -> float:
    """Return the seconds that hotcoco takes to evaluate and accumulate."""
    coco = evaluation.coco()
    began = time.process_time()
    coco.evaluate()
    coco.accumulate()
    return time.process_time() - began


def official(truth: np.ndarray, found: np.ndarray, images: int) -> tuple[float, np.ndarray]:
    """Return the seconds that the COCO API takes to evaluate and accumulate, and its twelve numbers."""
    from pycocotools.coco import COCO  # type: ignore[import-untyped]
    from pycocotools.cocoeval import COCOeval  # type: ignore[import-untyped]

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "info": {},
            "images": [{"id": image} for image in range(images)],
            "categories": [{"id": label + 1, "name": str(label)} for label in range(CLASSES)],
            "annotations": [
                {
                    "id": number,
                    "image_id": int(row[0]),
                    "bbox": row[1:5].tolist(),
                    "area": row[3] * row[4],
                    "iscrowd": int(row[5]),
                    "category_id": int(row[6]) + 1,
                }
                for number, row in enumerate(truth, start=1)
            ],
        }
        coco.createIndex()
        rows = found.copy()
        rows[:, 6] += 1
        results = coco.loadRes(rows)
        began = time.process_time()
        evaluation = COCOeval(coco, results, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        seconds = time.process_time() - began
        evaluation.summarize()
    return seconds, evaluation.stats


def evaluated(truth: np.ndarray, found: np.ndarray, images: int) -> CocoEvaluation:
    """Return a validation that was given the detections."""
    index = make_index(
        [(image, f"{image}.jpg", SIDE, SIDE) for image in range(images)],
        xywh_to_xyxy(truth[:, 1:5]),
        labels=truth[:, 6].astype(int),
        crowd=truth[:, 5] > 0,
        area=truth[:, 3] * truth[:, 4],
        image_of_box=truth[:, 0].astype(int),
        root="/",
        class_names=[str(label) for label in range(CLASSES)],
        category_ids=range(CLASSES),
    )
    found = found[np.argsort(found[:, 0], kind="stable")]
    rows = np.column_stack((xywh_to_xyxy(found[:, 1:5]), found[:, 5:]))
    evaluation = CocoEvaluation(index)
    evaluation.update(range(images), np.split(rows, np.searchsorted(found[:, 0], np.arange(1, images))))
    return evaluation


def grow(images: int) -> str:
    """Return a line of the table of times over images."""
    evaluation = evaluated(*make(images, round(BOXES * images), DETECTIONS * images), images)
    began = time.process_time()
    value = evaluation.compute()[MAIN_METRIC]
    measured = time.process_time()
    whole = Measured(evaluation.truth, evaluation.found, [str(label) for label in range(CLASSES)])
    for group in (np.arange(images) // BATCH, np.arange(images)):
        whole.measure(MAIN_METRIC, group)
    chosen = time.process_time() - measured
    return f"| {images} | {measured - began:.2f} | {chosen:.2f} | {value:.6f} |"


def main() -> None:
    """Print a table of both, or of times over images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--boxes", type=int, default=36700)
    parser.add_argument("--detections", type=int, default=500_000)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each (default: %(default)s)")
    parser.add_argument("--grow", type=int, nargs="+", metavar="IMAGES", help="show times over images instead")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.grow:
        print("| images | metrics s | pictures s | mAP@0.50:0.95 |\n|---|---|---|---|")
        for images in options.grow:
            print(grow(images), flush=True)
        return
    truth, found = make(options.images, options.boxes, options.detections)
    evaluation = evaluated(truth, found, options.images)
    names = ("raydet, a validation", "raydet, DetectionMetrics", "hotcoco")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(options.repeats):
        began = time.process_time()
        evaluation.compute()
        seconds["raydet, a validation"].append(time.process_time() - began)
        took, numbers = ours(truth, found, options.images)
        seconds["raydet, DetectionMetrics"].append(took)
        seconds["hotcoco"].append(hotcoco_alone(evaluation))
    api, stats = official(truth, found, options.images)
    largest = max(abs(numbers[name] - value) for name, value in zip(TWELVE, stats, strict=True))
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        print(
            f"{name:26} {middle[name]:6.2f} s ({min(values):.2f} to {max(values):.2f})"
            f"   {middle[name] / middle['hotcoco']:5.2f} times hotcoco"
        )
    print(f"{'COCO API':26} {api:6.2f} s")
    print(f"largest difference of the twelve numbers: {largest:.1e}   mAP@0.50:0.95 {stats[0]:.6f}")


if __name__ == "__main__":
    main()
