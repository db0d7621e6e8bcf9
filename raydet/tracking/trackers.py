"""Where a training can be watched beside its own folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from raydet.tracking.tensorboard import TensorBoardRun
from raydet.tracking.weights_and_biases import WandbRun
from raydet.training.run import Job, RunLog, Tracker


@contextmanager
def tracked(job: Job, log: RunLog, rank: int) -> Iterator[None]:
    """Send what a training logs within to Weights & Biases and TensorBoard too, as the recipe has it."""
    track, trackers = job.recipe.track, list[Tracker]()
    if rank == 0 and track.wandb:
        trackers.append(WandbRun(job.recipe, job.folder, log.say))
    if rank == 0 and track.tensorboard:
        trackers.append(TensorBoardRun(job.folder, log.say))
    log.trackers = trackers
    failed = True
    try:
        yield
        failed = False
    finally:
        for tracker in trackers:
            tracker.finish(failed=failed)
