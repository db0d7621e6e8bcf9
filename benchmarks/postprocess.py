"""How fast the callbacks turn a model's decoded output into detections: images/s at usual settings.

The output is made up, like that of a trained model: 8,400 points of a 640 px image with 30 objects; the points around
an object predict its box and class and, with low scores, two classes that resemble it, and those elsewhere nothing.
"eval" takes all classes of a point above a low score (0.001; PP-YOLOE and YOLO-NAS 0.01), "deploy" its best above 0.25.
Candidates are those of an image before `nms_top_k`; Matrix NMS takes but the best class of a point.

    python benchmarks/postprocess.py                           # half a minute on two CPU cores
    python benchmarks/postprocess.py --device cuda --batch 32
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raydet.boxes import cxcywh_to_xyxy
from raydet.outputs import anchor_cells
from raydet.postprocess import (
    PostPrediction,
    PPYoloEPostPredictionCallback,
    SSDPostPredictCallback,
    YoloXPostPredictionCallback,
)

SIZE, STRIDES, CLASSES, OBJECTS = 640, (8, 16, 32), 80, 30
SIMILAR = (1.0, 0.05, 0.01)  # score of an object's class, and of others that it resembles
WARM_UP = 2


class Case(NamedTuple):
    """A row of the table."""

    name: str
    callback: PostPrediction
    outputs: Any


def make_predictions(batch: int) -> tuple[Tensor, Tensor]:
    """Return boxes [B, 8400, 4] cxcywh in pixels and scores [B, 8400, 80], about those of a trained model."""
    sizes = [(SIZE // stride, SIZE // stride) for stride in STRIDES]
    cells, strides = anchor_cells(sizes, STRIDES, torch.device("cpu"))
    points, count = (cells + 0.5) * strides, len(cells)
    boxes, scores = torch.empty(batch, count, 4), torch.empty(batch, count, CLASSES)
    for image in range(batch):
        side = (60 * torch.randn(OBJECTS, 1).exp()).clamp(8, 500)
        aspect = (0.4 * torch.randn(OBJECTS, 1)).exp()
        objects = torch.cat((SIZE * torch.rand(OBJECTS, 2), side * aspect, side / aspect), dim=1)
        # How well a point sees an object: from near its centre, and on the level that is for its size.
        away = (points[:, None] - objects[:, :2]).square().sum(-1).sqrt() / strides
        misfit = (side.T / (5 * strides)).log2()
        seen, owner = torch.exp(-(away**2) - 2 * misfit**2).max(1)
        noise = torch.randn(count, 4) * (1.1 - seen[:, None]) / 8
        own = objects[owner]
        boxes[image] = torch.cat((own[:, :2] + noise[:, :2] * own[:, 2:], own[:, 2:] * noise[:, 2:].exp()), dim=1)
        scores[image] = (torch.randn(count, CLASSES) - 12).sigmoid()
        best = seen * torch.rand(OBJECTS).sqrt()[owner]
        for likeness, label in zip(SIMILAR, torch.randint(CLASSES, (len(SIMILAR), OBJECTS)), strict=True):
            scores[image, torch.arange(count), label[owner]] += likeness * best
    return boxes, scores.clamp(max=1)


def cases(boxes: Tensor, scores: Tensor) -> Iterator[Case]:
    """Yield each callback at each of its settings, with the output in its family's form."""
    top = scores.amax(-1, keepdim=True)
    families: tuple[tuple[str, type[PostPrediction], Any, float, bool], ...] = (
        ("SSD", SSDPostPredictCallback, torch.cat((boxes, top, scores), dim=-1), 0.001, True),
        ("YOLOX", YoloXPostPredictionCallback, torch.cat((boxes, top, scores / top), dim=-1), 0.001, True),
        ("PP-YOLOE", PPYoloEPostPredictionCallback, (cxcywh_to_xyxy(boxes), scores), 0.01, False),
    )
    for family, kind, decoded, low, has_matrix in families:
        for use, conf, multi in (("eval", low, True), ("deploy", 0.25, False)):
            shared = {"conf": conf, "multi_label_per_box": multi}
            for most in (None, 1000):
                name = f"{family} | {use} | iterative | {most or 'all'}"
                yield Case(name, kind.of(**shared, nms_top_k=most), (decoded, None))
            if has_matrix:
                callback = kind.of(**shared, nms_type="matrix")
                yield Case(f"{family} | {use} | matrix | {callback.max_predictions}", callback, (decoded, None))


def candidates(scores: Tensor, callback: PostPrediction) -> float:
    """Return how many candidates of an image a callback finds, in the mean."""
    multi = callback.multi_label_per_box and getattr(callback, "nms_type", "iterative") == "iterative"
    found = (scores if multi else scores.amax(-1)) > callback.conf
    return found.sum().item() / len(scores)


def images_per_s(case: Case, batch: int, device: torch.device, repeats: int) -> float:
    """Return the speed, by the median of some calls after a warm-up."""
    times = []
    for _ in range(WARM_UP + repeats):
        began = time.perf_counter()
        case.callback(case.outputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return batch / statistics.median(times[WARM_UP:])


def main() -> None:
    """Run and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=10, help="(default: %(default)s)")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    boxes, scores = (part.to(device) for part in make_predictions(arguments.batch))
    rows = []
    for case in cases(boxes, scores):
        count = candidates(scores, case.callback)
        detections = statistics.mean(map(len, case.callback(case.outputs)))
        speed = images_per_s(case, arguments.batch, device, arguments.repeats)
        rows.append(f"| {case.name} | {count:.0f} | {detections:.0f} | {speed:.0f} |")
        print(f"{case.name}: {speed:.0f} images/s", file=sys.stderr, flush=True)
    print(f"Batches of {arguments.batch} on {arguments.device}, median of {arguments.repeats}.\n")
    print("| callback | settings | NMS | NMS of | candidates an image | detections an image | images/s |")
    print("|---|---|---|---|---|---|---|", *rows, sep="\n")


if __name__ == "__main__":
    main()
