"""Validation: a model's detections on the images of an index, measured in original pixels."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from raydet.boxes import Placement, place
from raydet.data.batch import Batch
from raydet.data.index import Index
from raydet.devices import gathered, memory_suffices
from raydet.evaluation.coco import CocoEvaluation
from raydet.models import Preprocessing
from raydet.predict.predictor import post_prediction
from raydet.recipe import Eval
from raydet.training.extremes import ValPictures

PROGRESS_EVERY_S = 10.0


Post = TypeVar("Post")


@torch.no_grad()
def run(
    model: nn.Module,
    batches: Iterable[Batch],
    index: Index,
    preprocessing: Preprocessing,
    callback: Callable[[Any], list[Post]],
    device: torch.device,
    say: Callable[[str], Any],
    look: Callable[[Batch, Any], Any] = lambda batch, outputs: None,
) -> Iterator[tuple[int, Placement, Post]]:
    """Run a model on this rank's images.

    Args:
        model: in evaluation mode, on `device`.
        batches: this rank's images; every image of the index is in exactly one rank's.
        index: of the images.
        preprocessing: from pixels to the model's input.
        callback: what to make of the model's output, for each image.
        device: of the model.
        say: takes a line of progress now and then.
        look: called with each batch and the model's output.

    Yields:
        For each image its row, where it is in the model's input, and what the callback made.
    """
    ranks = dist.get_world_size() if _distributed() else 1
    done, began = 0, time.monotonic()
    due = began + PROGRESS_EVERY_S
    for batch in batches:
        rows = batch.rows.tolist()
        with memory_suffices(f"{len(rows)} images of a validation at once", "lower eval.batch_size"):
            images = preprocessing(batch.images.to(device, non_blocking=True))
            outputs = model(images)
            look(batch, outputs)
            found_in = callback(outputs)
        size = images.shape[-2], images.shape[-1]
        for row, found in zip(rows, found_in, strict=True):
            yield row, place(*index.size(row), size, preprocessing.resize), found
        done = min(done + ranks * len(rows), len(index))
        if (now := time.monotonic()) > due:
            say(f"validated {done} of {len(index)} images, {done / (now - began):.1f} images/s")
            due = now + PROGRESS_EVERY_S


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    index: Index,
    preprocessing: Preprocessing,
    thresholds: Eval,
    device: torch.device,
    say: Callable[[str], Any],
    pictures: ValPictures | None = None,
    beat: Callable[[], Any] = lambda: None,
) -> bytes | None:
    """Detect in this rank's images, and gather what all ranks found.

    Args:
        model, batches, index, preprocessing, device, say: see `run`.
        thresholds: what counts as a detection.
        pictures: to be drawn.
        beat: called between the parts of the work that follows the last batch, as a sign of life.

    Returns:
        The state of a CocoEvaluation on rank 0, None on the others.
    """
    evaluation = CocoEvaluation(index, thresholds.max_dets)
    callback = post_prediction(model, thresholds)
    look = [] if pictures is None else [pictures.batch]
    for row, placement, found in run(model, batches, index, preprocessing, callback, device, say, *look):
        boxes = found.cpu().numpy()
        boxes[:, :4] = placement.undo(boxes[:, :4])
        evaluation.update([row], [boxes])
        if pictures is not None:
            pictures.image(row, boxes)
    if pictures is not None:
        pictures.finish(evaluation, beat)
    shards = gathered(evaluation.to_bytes())
    beat()
    if shards is None:
        return None
    evaluation.merge_bytes(shards)
    return evaluation.to_bytes()


def metrics_of(index: Index, state: bytes | None) -> dict[str, float]:
    """Return the metrics of what `evaluate` gave; none on the ranks that it gave nothing."""
    return {} if state is None else restored(index, state).compute()


def restored(index: Index, state: bytes) -> CocoEvaluation:
    """Return the evaluation that `evaluate` gave the state of."""
    evaluation = CocoEvaluation(index)
    evaluation.merge_bytes([state])
    return evaluation


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
