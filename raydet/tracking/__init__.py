"""Where a training can be watched beside its own folder, and the settings for the pictures that it draws."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from raydet.recipe import DetectionVisualizationCallback, ExtremeBatchDetectionVisualizationCallback, Recipe
from raydet.runs.log import RunLog, Tracker

__all__ = ["DetectionVisualizationCallback", "ExtremeBatchDetectionVisualizationCallback", "tracked"]


@contextmanager
def tracked(recipe: Recipe, folder: Path, log: RunLog, rank: int, others: Sequence[Tracker] = ()) -> Iterator[None]:
    """Send what a training logs within to the trackers of the recipe, and to `others`."""
    track, trackers = recipe.track, list(others)
    if rank == 0 and track.wandb:
        from raydet.tracking.weights_and_biases import WandbRun

        trackers.append(WandbRun(recipe, folder, log.say))
    if rank == 0 and track.tensorboard:
        from raydet.tracking.tensorboard import TensorBoardRun

        trackers.append(TensorBoardRun(folder, log.say))
    if rank == 0 and track.mlflow:
        from raydet.tracking.mlflow import MLflowRun

        trackers.append(MLflowRun(recipe, folder, log.say))
    log.trackers = trackers
    failed = True
    try:
        yield
        failed = False
    finally:
        for tracker in trackers:
            tracker.finish(failed=failed)
