"""What an evaluation leaves: metrics.json, detections.json (COCO's results), pictures of curves and of detections."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from torch import nn

from raydet.data.index import Index
from raydet.data.render import decode
from raydet.errors import RaydetError
from raydet.evaluation.coco import IOUS, RECALLS, CocoEvaluation
from raydet.evaluation.matching import counts, match
from raydet.predict.predictor import Detections, load
from raydet.store import Store
from raydet.visualization import draw_boxes, grid, resized

if TYPE_CHECKING:
    from matplotlib.axes import Axes

METRICS, DETECTIONS = "metrics.json", "detections.json"
PICTURES = ("precision_recall", "classes", "confusion", "errors", "calibration")
# The picture of detections: number of images, lowest score, side of an image in pixels.
_SHOWN, _SHOWN_SCORE, _CELL = 6, 0.3, 360
_CLASSES_SHOWN = 30  # the best and the worst of more
_BLUE, _GREY, _RED = "#0072B2", "#999999", "#D55E00"
_ERRORS = {
    "Cls": "wrong class",
    "Loc": "poor box",
    "Both": "both",
    "Dupe": "duplicate",
    "Bkg": "background",
    "Miss": "missed",
}


def write_evaluation(folder: str | Path, evaluation: CocoEvaluation, metrics: Mapping[str, float]) -> None:
    """Write metrics.json, detections.json and the pictures to a folder, here or in an object store.

    Raises:
        RaydetError: the folder cannot be made or written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    store = Store(folder)
    store.write(METRICS, (json.dumps(metrics, indent=1) + "\n").encode())
    store.write(DETECTIONS, json.dumps(evaluation.results()).encode())
    draw = (_precision_recall, _classes, _confusion, _errors, _calibration)
    coco = evaluation.coco()
    for name, function in zip(PICTURES, draw, strict=True):
        figure = Figure(figsize=(9, 7), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        function(figure.subplots(), evaluation, coco, metrics)
        picture = io.BytesIO()
        figure.savefig(picture, format="png")
        store.write(f"{name}.png", picture.getvalue())


def _precision_recall(axes: Axes, evaluation: CocoEvaluation, coco: Any, metrics: Mapping[str, float]) -> None:
    precision = np.asarray(coco.eval["precision"])[:, :, :, 0, -1]
    for level in (0, 5, 9):
        curve = precision[level][:, (precision[level] > -1).all(axis=0)].mean(axis=1)
        axes.plot(RECALLS, curve, label=f"IoU {IOUS[level]:.2f}: AP {curve.mean():.3f}")
    # The true curve too, at each score: the mean of the classes that have objects.
    matches = match(evaluation.truth, evaluation.found, precision.shape[2], np.array([0.5]), evaluation.max_dets)
    thresholds = np.linspace(0, 1, 1001)
    right, wrong = counts(matches, thresholds)
    seen = (right + wrong).sum(axis=(0, 1)) > 0
    total = right.sum(axis=(0, 1))
    axes.plot(
        total[seen] / matches.objects.sum(),
        total[seen] / (total + wrong.sum(axis=(0, 1)))[seen],
        "--",
        color=_GREY,
        label="all classes as one, IoU 0.50, not interpolated",
    )
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02), title="precision and recall")
    axes.legend()


def _classes(axes: Axes, evaluation: CocoEvaluation, coco: Any, metrics: Mapping[str, float]) -> None:
    prefix = "AP@0.50:0.95_"
    classes = sorted((value, name.removeprefix(prefix)) for name, value in metrics.items() if name.startswith(prefix))
    shown = classes
    if len(classes) > _CLASSES_SHOWN:
        shown = classes[: _CLASSES_SHOWN // 2] + classes[-_CLASSES_SHOWN // 2 :]
    axes.barh(range(len(shown)), [value for value, _ in shown], color=_BLUE)
    axes.set_yticks(range(len(shown)), [name for _, name in shown], parse_math=False)
    for place, (value, _) in enumerate(shown):
        axes.text(value, place, f" {value:.3f}", va="center", fontsize=8)
    part = f" (the best and the worst of {len(classes)})" if shown != classes else ""
    axes.set(xlim=(0, 1), xlabel="AP@0.50:0.95", title=f"AP of the classes{part}")


def _confusion(axes: Axes, evaluation: CocoEvaluation, coco: Any, metrics: Mapping[str, float]) -> None:
    threshold = metrics["Best_score_threshold"]
    found = coco.confusion_matrix(iou_thr=0.5, min_score=threshold)
    shares, names = np.asarray(found["normalized"]), [*found["cat_names"], "none"]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    size = max(3, min(10, 240 // len(names)))
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=size, parse_math=False)
    axes.set_yticks(range(len(names)), names, fontsize=size, parse_math=False)
    if len(names) <= 20:
        for (row, column), count in np.ndenumerate(np.asarray(found["matrix"])):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=size)
    axes.set(xlabel="detected as", ylabel="object", title=f"confusion at IoU 0.50 and scores from {threshold:.2f}")


def _errors(axes: Axes, evaluation: CocoEvaluation, coco: Any, metrics: Mapping[str, float]) -> None:
    found = coco.tide_errors()
    losses = [found["delta_ap"][key] for key in _ERRORS]
    axes.bar(range(len(_ERRORS)), losses, color=_RED)
    axes.set_xticks(range(len(_ERRORS)), [f"{name}\n{found['counts'][key]}" for key, name in _ERRORS.items()])
    for place, loss in enumerate(losses):
        axes.text(place, loss, f"{loss:.3f}", ha="center", va="bottom")
    axes.set(ylabel="AP@0.50 that each kind costs", title=f"errors as TIDE has them, of AP@0.50 {found['ap_base']:.3f}")


def _calibration(axes: Axes, evaluation: CocoEvaluation, coco: Any, metrics: Mapping[str, float]) -> None:
    found = coco.calibration(n_bins=20, iou_threshold=0.5)
    bins = [entry for entry in found["bins"] if entry["count"]]
    axes.plot([0, 1], [0, 1], ":", color=_GREY, label="as good as it says")
    axes.bar(
        [(entry["bin_lower"] + entry["bin_upper"]) / 2 for entry in bins],
        [entry["avg_accuracy"] for entry in bins],
        width=0.045,
        color=_BLUE,
        label="detections that are right at IoU 0.50",
    )
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="score", ylabel="share", title=f"calibration: error {found['ece']:.3f}")
    axes.legend()


def draw_validation(folder: Path, index: Index, model: nn.Module) -> None:
    """Draw the best checkpoint's detections on validation images beside the ground truth.

    The images are spread over the index; detections below a score of 0.3 are left out.

    Args:
        folder: folder of the run.
        index: index of the images.
        model: gets the checkpoint's weights.
    """
    predictor = load(folder, model=model)
    pictures = []
    count = min(_SHOWN, len(index))
    for row in (number * len(index) // count for number in range(count)):
        try:
            image = decode(index.read(row), index.path(row), index.size(row))
        except RaydetError:  # left out, as the log says
            continue
        scale = min(_CELL / side for side in image.shape[:2])
        shown = resized(image, scale, cv2.INTER_AREA)
        truth = index.annotations(row)
        found = predictor.predict(image[:, :, ::-1], _SHOWN_SCORE)
        assert isinstance(found, Detections)
        pictures += [
            draw_boxes(shown, truth.boxes * scale, truth.labels.tolist(), index.class_names),
            draw_boxes(
                shown, found.boxes * scale, found.labels.tolist(), predictor.config.class_names, found.scores.tolist()
            ),
        ]
    path = folder / "images" / "validation.jpg"
    path.parent.mkdir(exist_ok=True)
    cv2.imwrite(str(path), grid(pictures, columns=4, cell=(_CELL, _CELL)))
