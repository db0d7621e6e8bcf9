"""Validation: a model's detections in the images of an index, measured in the pixels of the original images."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import nn

from raydet.boxes import Placement, place
from raydet.data.batch import Batch
from raydet.devices import gathered, memory_suffices
from raydet.evaluation.coco import CocoEvaluation
from raydet.predict.predictor import post_prediction
from raydet.runs.log import Recorder, RunLog
from raydet.training.job import Job, Run, noting_errors

PROGRESS_EVERY_S = 10.0

Post = TypeVar("Post")


class Follower(Protocol):
    """Follows a validation on one rank, as those do who draw pictures of it."""

    def batch(self, batch: Batch, outputs: Any) -> None:
        """Look at a batch and at what the model makes of it."""
        ...

    def image(self, row: int, boxes: npt.NDArray[np.floating]) -> None:
        """Look at the detections in an image: [n, 6] = xyxy in its pixels, score, class."""
        ...

    def finish(self, evaluation: CocoEvaluation) -> None:
        """Look at the evaluation of all images of this rank; all ranks call it."""
        ...


@dataclass(frozen=True)
class Validation:
    """What a validation needs on one rank.

    Attributes:
        job: says which images there are, what the model expects, and what counts as a detection.
        rank: number of this rank.
        device: the device of the model.
        batches: yields this rank's images each time it is called; every image is in exactly one rank's share.
        log: takes lines of progress, on rank 0.
        beat: gives a sign of life.
    """

    job: Job
    rank: int
    device: torch.device
    batches: Callable[[], Iterator[Batch]]
    log: RunLog | Recorder
    beat: Callable[[], Any]

    @classmethod
    def of(cls, run: Run) -> Validation:
        """Return the validation of a run."""
        world = run.world
        return cls(run.job, world.rank, world.device, world.val_batches(), run.log, world.beat)

    def evaluate(self, model: nn.Module, follower: Follower | None = None) -> CocoEvaluation | None:
        """Detect in this rank's images, and gather what all ranks have found.

        Args:
            model: the model, in evaluation mode, on the device.
            follower: looks at batches, images and the evaluation.

        Returns:
            The evaluation of all images on rank 0, None on the other ranks.
        """
        evaluation = CocoEvaluation(self.job.val_index, self.job.recipe.eval.max_dets)
        callback = post_prediction(model, self.job.recipe.eval)
        look = [] if follower is None else [follower.batch]
        for row, placement, found in self.outputs(model, callback, *look):
            boxes = found.cpu().numpy()
            boxes[:, :4] = placement.undo(boxes[:, :4])
            evaluation.update([row], [boxes])
            if follower is not None:
                follower.image(row, boxes)
        if follower is not None:
            follower.finish(evaluation)
        shards = gathered(evaluation.to_bytes())
        self.beat()
        if shards is None:
            return None
        evaluation.merge_bytes(shards)
        return evaluation

    @torch.no_grad()
    def outputs(
        self,
        model: nn.Module,
        callback: Callable[[Any], list[Post]],
        look: Callable[[Batch, Any], Any] = lambda batch, outputs: None,
    ) -> Iterator[tuple[int, Placement, Post]]:
        """Run a model on this rank's images.

        Args:
            model: the model, in evaluation mode, on the device.
            callback: makes something for each image from the output of the model.
            look: called with each batch and the output of the model.

        Yields:
            For each image: its row in the index, where it lies in the input of the model, what the callback made of it.
        """
        index, preprocessing = self.job.val_index, self.job.config.preprocessing
        ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        done, began = 0, time.monotonic()
        due = began + PROGRESS_EVERY_S
        for batch in noting_errors(self.batches(), self.job.recipe.data, self.beat):
            rows = batch.rows.tolist()
            with memory_suffices(f"{len(rows)} images of a validation at once", "lower eval.batch_size"):
                images = preprocessing(batch.images.to(self.device, non_blocking=True))
                outputs = model(images)
                look(batch, outputs)
                found_in = callback(outputs)
            size = images.shape[-2], images.shape[-1]
            for row, found in zip(rows, found_in, strict=True):
                yield row, place(*index.size(row), size, preprocessing.resize), found
            done = min(done + ranks * len(rows), len(index))
            if (now := time.monotonic()) > due:
                if self.rank == 0:
                    self.log.say(f"validated {done} of {len(index)} images, {done / (now - began):.1f} images/s")
                due = now + PROGRESS_EVERY_S


def metrics_of(evaluation: CocoEvaluation | None) -> dict[str, float]:
    """Return the metrics of an evaluation as a line of metrics.jsonl names them; None: there are none on this rank."""
    return {} if evaluation is None else {f"val/{name}": value for name, value in evaluation.compute().items()}
