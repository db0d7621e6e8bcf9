"""How fast settings of thresholds are measured: raydet's search beside NMS and the COCO API anew for each setting.

Candidates are made up: 250 images with seven objects of 80 classes, and 1,000 candidates an image about them. Both
measure mAP@0.50:0.95 on all images, on one core; the naive way is timed on a few settings, and gives the same numbers.

    python benchmarks/tune_nms.py                       # half a minute
    python benchmarks/tune_nms.py --images 50 --naive 2
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from raydet.data.index import Index, make_index
from raydet.evaluation.coco import detected
from raydet.postprocess import PostPrediction
from raydet.tuning.candidates import CandidateSet
from raydet.tuning.thresholds import Search, Setting, groups

CLASSES, OBJECTS, CANDIDATES, SIDE = 80, 7, 1000, 640
DEFAULT = Setting(0.001, 0.65, 1000, 300, multi_label=True, class_agnostic=False)


def make(images: int, file: Path) -> Index:
    """Write candidates, and return the index of their images."""
    rng = np.random.default_rng(0)
    size = np.exp(rng.normal(4, 0.8, (images, OBJECTS, 2))).clip(8, 500)
    corner = rng.random((images, OBJECTS, 2)) * (SIDE - size)
    labels = rng.integers(0, CLASSES, (images, OBJECTS))
    boxes = np.concatenate([corner, corner + size], axis=2)
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("boxes", "scores", "labels", "points")}
    for image in range(images):
        owner = rng.integers(0, OBJECTS, CANDIDATES)
        away = rng.exponential(0.1, CANDIDATES)
        sides = np.tile(size[image, owner], 2)
        near = boxes[image, owner] + rng.normal(0, 1, (CANDIDATES, 4)) * away[:, None] * sides
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        mistaken = rng.random(CANDIDATES) < 0.3
        label = np.where(mistaken, rng.integers(0, CLASSES, CANDIDATES), labels[image, owner])
        score = (np.exp(-6 * away) * rng.beta(4, 1, CANDIDATES) * np.where(mistaken, 0.3, 1)).clip(0.0011, 1)
        order = np.argsort(-score)
        columns["boxes"].append(near[order].astype(np.float32).ravel())
        columns["scores"].append(score[order].astype(np.float32))
        columns["labels"].append(label[order].astype(np.int32))
        columns["points"].append(np.arange(CANDIDATES, dtype=np.int32) // 2)
    pq.write_table(
        pa.table({"row": np.arange(images), **{name: pa.array(value) for name, value in columns.items()}}), file
    )
    return make_index(
        [(image + 1, f"{image}.jpg", SIDE, SIDE) for image in range(images)],
        boxes.reshape(-1, 4),
        labels=labels.ravel(),
        crowd=np.zeros(labels.size, bool),
        area=size.prod(axis=2).ravel(),
        image_of_box=np.repeat(np.arange(images), OBJECTS),
        root="/",
        class_names=[str(label) for label in range(CLASSES)],
        category_ids=range(1, CLASSES + 1),
    )


def naive(candidates: CandidateSet, setting: Setting) -> float:
    """Measure a setting as one would by hand: NMS of every image, then the COCO API."""
    from pycocotools.coco import COCO  # type: ignore[import-untyped]
    from pycocotools.cocoeval import COCOeval  # type: ignore[import-untyped]

    callback = PostPrediction(
        setting.score, setting.iou, setting.max_detections, setting.class_agnostic, True, setting.nms_top_k
    )
    parts = []
    for row, found in enumerate(candidates):
        keep = found.scores > setting.score
        rows = callback.suppress(type(found)(*(part[keep] for part in found))).numpy()
        parts.append(np.column_stack((np.full(len(rows), row), rows)))
    boxes = detected(np.concatenate(parts))
    index = candidates.index
    owner, (corners, labels, _, area) = index.objects()
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "info": {},
            "images": [{"id": int(image)} for image in index.image_ids],
            "categories": [{"id": category} for category in index.category_ids],
            "annotations": [
                {
                    "id": number,
                    "image_id": int(index.image_ids[owner[number - 1]]),
                    "category_id": int(labels[number - 1]) + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": float(area[number - 1]),
                    "iscrowd": 0,
                }
                for number, (x1, y1, x2, y2) in enumerate(corners.tolist(), start=1)
            ],
        }
        coco.createIndex()
        results = coco.loadRes(
            np.column_stack((index.image_ids[boxes.image], boxes.xywh, np.asarray(boxes.score), boxes.label + 1))
        )
        evaluation = COCOeval(coco, results, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0])


def main() -> None:
    """Print settings a second of both, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=250)
    parser.add_argument("--settings", type=int, default=200)
    parser.add_argument("--naive", type=int, default=5, help="settings that the naive way is timed on")
    options = parser.parse_args()
    torch.set_num_threads(1)
    import torchvision.ops  # noqa: F401 - both use it

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "candidates.parquet")
        index = make(options.images, file)
        candidates = CandidateSet(file.read_bytes(), str(file), index, (SIDE, SIDE), "pad_bottom_right")
    search = Search(candidates)
    rows = np.arange(options.images)
    began = time.perf_counter()
    values = {
        setting: search.value(setting, rows) for group in groups(options.settings, DEFAULT, 0) for setting in group
    }
    mine = len(values) / (time.perf_counter() - began)
    chosen = [setting for setting in values if setting.multi_label][: options.naive]
    began = time.perf_counter()
    theirs = [naive(candidates, setting) for setting in chosen]
    slow = len(chosen) / (time.perf_counter() - began)
    largest = max(abs(values[setting] - value) for setting, value in zip(chosen, theirs, strict=True))
    print(f"raydet  {mine:7.2f} settings/s   naive {slow:6.3f} settings/s   ratio {mine / slow:.0f}")
    print(f"largest difference of mAP@0.50:0.95: {largest:.1e}")


if __name__ == "__main__":
    main()
