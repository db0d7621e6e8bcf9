"""Validation: a model's detections on the images of an index, measured in original pixels."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raydet.boxes import place
from raydet.data.batch import Batch
from raydet.data.index import Index
from raydet.metrics import CocoEvaluation
from raydet.models import Preprocessing
from raydet.recipe import Eval

PROGRESS_EVERY_S = 10.0


def post_prediction(model: Any, thresholds: Eval) -> Callable[[Any], list[Tensor]]:
    """Return the model's post-prediction callback with the thresholds of a recipe."""
    callback: Callable[[Any], list[Tensor]] = model.get_post_prediction_callback(
        conf=thresholds.score,
        iou=thresholds.iou,
        max_predictions=thresholds.max_detections,
        multi_label_per_box=thresholds.multi_label,
        class_agnostic_nms=thresholds.class_agnostic,
        nms_top_k=thresholds.nms_top_k,
    )
    return callback


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    index: Index,
    preprocessing: Preprocessing,
    thresholds: Eval,
    device: torch.device,
    say: Callable[[str], Any],
) -> dict[str, float]:
    """Detect in this rank's images and measure over all ranks.

    Args:
        model: in evaluation mode, on `device`.
        batches: this rank's images; every image of the index is in exactly one rank's.
        index: ground truth.
        preprocessing: from pixels to the model's input.
        thresholds: what counts as a detection.
        device: of the model.
        say: takes a line of progress now and then.

    Returns:
        The metrics by name on rank 0, nothing on the others.
    """
    callback = post_prediction(model, thresholds)
    evaluation = CocoEvaluation(index)
    ranks = dist.get_world_size() if _distributed() else 1
    done, began = 0, time.monotonic()
    due = began + PROGRESS_EVERY_S
    for batch in batches:
        images = preprocessing(batch.images.to(device, non_blocking=True))
        height, width = images.shape[-2:]
        detections = []
        rows = batch.rows.tolist()
        for row, found in zip(rows, callback(model(images)), strict=True):
            rows_found = found.cpu().numpy()
            rows_found[:, :4] = place(*index.size(row), (height, width), preprocessing.resize).undo(rows_found[:, :4])
            detections.append(rows_found)
        evaluation.update(rows, detections)
        done = min(done + ranks * len(rows), len(index))
        if (now := time.monotonic()) > due:
            say(f"validated {done} of {len(index)} images, {done / (now - began):.1f} images/s")
            due = now + PROGRESS_EVERY_S
    shards = _gather(evaluation.to_bytes())
    if shards is None:
        return {}
    evaluation.merge_bytes(shards)
    return evaluation.compute()


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _gather(shard: bytes) -> list[bytes] | None:
    """Return every rank's bytes on rank 0, None elsewhere."""
    if not _distributed():
        return [shard]
    shards: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(shard, shards)
    return shards
