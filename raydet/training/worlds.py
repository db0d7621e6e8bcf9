"""What surrounds the worker loop, by where it runs: this very process for debugging, or a worker of Ray Train."""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from raydet.data.batch import Batch, local_eval_batches, local_train_batches
from raydet.data.samples import Samples
from raydet.data.stream import DataTasks, eval_batches, train_batches
from raydet.errors import user_error
from raydet.mirror import worker_folder
from raydet.outputs import shapes
from raydet.predict import pick_device
from raydet.tracking.pictures import ValPictures
from raydet.tracking.trackers import tracked
from raydet.training import checkpoint
from raydet.training.evaluate import evaluate as detect
from raydet.training.evaluate import metrics_of
from raydet.training.keeper import VALIDATED
from raydet.training.loop import Ended, candidates_loop, evaluation_loop, train_loop
from raydet.training.run import Job, RunLog, SayWarnings
from raydet.training.watchdog import Watchdog

_POINTER = "name"


class LocalWorld:
    """A single process without Ray: nothing runs beside the caller's thread, so that a breakpoint stops everywhere."""

    rank, size = 0, 1

    def __init__(self, job: Job, train_stream: Samples | None, val_stream: Samples, device: torch.device):
        self.device = device
        self._job = job
        self._folder = job.folder
        self._train, self._val = train_stream, val_stream

    def train_batches(self, start: int, stop: int) -> Iterator[Batch]:
        """See World."""
        assert self._train is not None
        return local_train_batches(self._train, start, stop, self._job.recipe.train.batch_size)

    def val_batches(self) -> Callable[[], Iterator[Batch]]:
        """See World."""
        return lambda: local_eval_batches(self._val, self._job.recipe.eval.batch_size)

    def report(self, metrics: dict[str, float], awaited: Path | None) -> None:
        """See World. Nobody else watches."""

    def beat(self) -> None:
        """See World. A debugger may stop as long as it likes."""

    def paths(self, rows: Iterable[int]) -> list[str]:
        """See World."""
        assert self._train is not None
        return [self._train.index.path(row) for row in rows]

    def show_first_batch(self, say: Callable[[str], Any]) -> None:
        """Print the shapes of the first batch and of what the model makes of it, and draw it with its boxes."""
        import cv2

        from raydet.boxes import cxcywh_to_xyxy
        from raydet.visualization import draw_boxes, grid

        batch = next(self.train_batches(0, self._job.recipe.train.batch_size))
        model = self._job.model.train()
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        outputs = model(self._job.config.preprocessing(batch.images))
        model.load_state_dict(state)  # the forward pass has moved the norms' statistics
        say(f"images {shapes(batch.images)}  targets {shapes(batch.targets)}  outputs {shapes(outputs)}")
        pictures = []
        for number, image in enumerate(batch.images):
            mine = batch.targets[batch.targets[:, 0] == number]
            boxes, labels = cxcywh_to_xyxy(mine[:, 2:]).numpy(), mine[:, 1].int().tolist()
            pixels = image.permute(1, 2, 0).contiguous().numpy()
            pictures.append(draw_boxes(pixels, boxes, labels, self._job.config.class_names))
        path = self._folder / "images" / "first_batch.png"
        path.parent.mkdir(exist_ok=True)
        cv2.imwrite(str(path), grid(pictures, columns=4, cell=self._job.config.image_size))
        say(f"first batch drawn: {path}")


class RayWorld:
    """A worker of a Ray Train run."""

    def __init__(self, job: Job, sources: dict[str, Any], data_tasks: DataTasks, beat: Callable[[], None]):
        import ray
        import ray.train
        import ray.train.torch

        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.size: int = context.get_world_size()
        self.device: torch.device = ray.train.torch.get_device()
        self._job = job
        self.beat = beat
        self._sources = sources
        self._samples: dict[str, Samples] = {split: ray.get(source) for split, source in sources.items()}
        self._data_tasks = data_tasks

    def share(self, value: Any) -> Any:
        """Return rank 0's value on every rank."""
        from ray.train.collective import broadcast_from_rank_zero

        return broadcast_from_rank_zero(value)

    def train_batches(self, start: int, stop: int) -> Iterator[Batch]:
        """See World."""
        return train_batches(
            self._sources["train"],
            self._samples["train"],
            start,
            stop,
            self._job.batch_size(self.size) // self.size,
            self,
            tasks=self._data_tasks,
            pin_memory=self.device.type == "cuda",
        )

    def val_batches(self) -> Callable[[], Iterator[Batch]]:
        """See World."""
        return eval_batches(
            self._sources["val"],
            self._samples["val"],
            self._job.recipe.eval.batch_size,
            self,
            tasks=self._data_tasks,
            pin_memory=self.device.type == "cuda",
        )

    def report(self, metrics: dict[str, float], awaited: Path | None) -> None:
        """See World."""
        import ray.train

        if awaited is None:
            ray.train.report(metrics)
            return
        # The checkpoint lies where it belongs. What Ray keeps, and gives to the validation, is its name.
        with tempfile.TemporaryDirectory() as pointer:
            Path(pointer, _POINTER).write_text(awaited.name)
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(pointer), validation=True)

    def paths(self, rows: Iterable[int]) -> list[str]:
        """See World."""
        return [self._samples["train"].index.path(row) for row in rows]


def train_worker(given: dict[str, Any]) -> Ended:
    """Run the worker loop in a worker of Ray Train; `given` holds references to the job and the samples."""
    import ray
    import ray.train

    job: Job = ray.get(given["job"])
    rank = ray.train.get_context().get_world_rank()
    with contextlib.ExitStack() as stack:
        if (address := job.recipe.run_address) is not None:
            job = replace(job, folder=stack.enter_context(worker_folder(address, rank)))
        log = _worker_log(job)
        stacks = job.folder / f"hang_rank_{rank}.txt"
        watchdog = stack.enter_context(Watchdog(60 * job.recipe.scale.hang_minutes, stacks, log.say))
        world = RayWorld(job, given["sources"], given["data"], watchdog.beat)
        stack.enter_context(tracked(job, log, world.rank))
        return train_loop(job, world, log)


def evaluation_worker(given: dict[str, Any]) -> bytes | None:
    """Run an evaluation in a worker of Ray Train; arguments as in `train_worker`."""
    return evaluation_loop(*_surroundings(given))


def candidates_worker(given: dict[str, Any]) -> None:
    """Collect candidates in a worker of Ray Train; arguments as in `train_worker`."""
    candidates_loop(*_surroundings(given))


def _surroundings(given: dict[str, Any]) -> tuple[Job, RayWorld, RunLog]:
    import ray

    job: Job = ray.get(given["job"])
    world = RayWorld(job, given["sources"], given["data"], beat=lambda: None)
    return job, world, _worker_log(job)


class _Alone:
    """The only rank of a validation that runs beside the training."""

    rank, size = 0, 1

    def share(self, value: Any) -> Any:
        """See `raydet.data.stream.Ranks`."""
        return value


def validate_elsewhere(pointer: Any, given: dict[str, Any]) -> dict[str, float]:
    """Run in a task of Ray Train's: validate a checkpoint, and leave the result in its folder for rank 0."""
    import ray

    job: Job = ray.get(given["job"])
    with pointer.as_directory() as kept:
        folder = job.folder / Path(kept, _POINTER).read_text()
    began = time.monotonic()
    result: dict[str, Any]
    try:
        content = checkpoint.read_json(folder / checkpoint.CONFIG)
        device = pick_device(None)
        model = checkpoint.load_model(folder, job.config, job.model).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        batches = eval_batches(
            given["sources"]["val"],
            ray.get(given["sources"]["val"]),
            job.recipe.eval.batch_size,
            _Alone(),
            tasks=given["data"],
            pin_memory=device.type == "cuda",
        )()
        log = RunLog(job.folder)
        pictures = ValPictures(job, 0, log, job.criterion.to(device), content["epoch"], content["step"])  # type: ignore[union-attr]
        settings = job.config.preprocessing, job.recipe.eval, device
        found = detect(model, batches, job.val_index, *settings, log.say, pictures)
        metrics = {f"val/{name}": value for name, value in metrics_of(job.val_index, found).items()}
        result = {"metrics": metrics, "step": content["step"], "epoch": content["epoch"]}
    except Exception as error:  # whatever it is, the training waits for an answer
        metrics, result = {}, {"error": f"{type(error).__name__}: {user_error(error) or error}"}
    partial = folder / f"{VALIDATED}.partial"
    partial.write_text(json.dumps({**result, "seconds": time.monotonic() - began}))
    partial.replace(folder / VALIDATED)
    return metrics


def _worker_log(job: Job) -> RunLog:
    log = RunLog(job.folder)
    logging.getLogger("raydet").addHandler(SayWarnings(log))
    return log
