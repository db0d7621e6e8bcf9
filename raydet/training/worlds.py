"""The two worlds that a job runs in: this very process, for debugging, or a worker of Ray Train."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, NoReturn

import torch

from raydet.data.batch import Batch, local_eval_batches, local_train_batches
from raydet.data.samples import Samples
from raydet.data.stream import DataTasks, eval_batches, train_batches
from raydet.outputs import shapes
from raydet.runs.folder import run_address
from raydet.runs.log import RunLog, warnings_said
from raydet.runs.mirror import worker_folder
from raydet.tracking import tracked
from raydet.training.beside import RayValidation, Resources
from raydet.training.job import Job, Run, ValidationBeside


class LocalWorld:
    """A single process without Ray: nothing runs beside the caller's thread, so that a breakpoint stops everywhere."""

    rank, size = 0, 1
    validate = None  # a debugger sees each validation in its turn

    def __init__(self, job: Job, train_stream: Samples | None, val_stream: Samples, device: torch.device):
        self.device = device
        self._job = job
        self._folder = job.folder
        self._train, self._val = train_stream, val_stream

    def train_batches(self, start: int, stop: int) -> Generator[Batch, None, None]:
        """See World."""
        assert self._train is not None
        return local_train_batches(self._train, start, stop, self._job.recipe.train.batch_size)

    def val_batches(self) -> Callable[[], Iterator[Batch]]:
        """See World."""
        return lambda: local_eval_batches(self._val, self._job.recipe.eval.batch_size)

    def report(self, metrics: dict[str, float]) -> None:
        """See World. Nobody else watches."""

    def beat(self) -> None:
        """See World. A debugger may stop as long as it likes."""

    def ranks_to_lose(self) -> int:
        """See World."""
        return 0

    def leave(self) -> NoReturn:
        """See World. There is no other node to go on with."""
        raise AssertionError

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


@dataclass(frozen=True)
class Handed:
    """What the driver hands to each worker; the references are to values in Ray's object store.

    Attributes:
        loop: what a worker does with its run; its value on rank 0 returns to the driver.
        job: reference to the job.
        samples: references to the samples of each split.
        data: the Ray Data tasks that make samples.
        resources: what a validation beside the training takes of the cluster.
    """

    loop: Callable[[Run], Any]
    job: Any
    samples: Mapping[str, Any]
    data: DataTasks
    resources: Resources


class RayWorld:
    """A worker of a Ray Train run."""

    def __init__(self, handed: Handed, job: Job, beat: Callable[[], None]):
        import ray
        import ray.train
        import ray.train.torch
        import torch.distributed as dist

        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.size: int = context.get_world_size()
        self.device: torch.device = ray.train.torch.get_device()
        self.beat = beat
        self.handed = handed
        self._job = job
        self._samples: dict[str, Samples] = {split: ray.get(samples) for split, samples in handed.samples.items()}
        self.nodes = [""] * self.size
        dist.all_gather_object(self.nodes, ray.get_runtime_context().get_node_id())

    def share(self, value: Any) -> Any:
        """Return rank 0's value on every rank."""
        from ray.train.collective import broadcast_from_rank_zero

        return broadcast_from_rank_zero(value)

    def train_batches(self, start: int, stop: int) -> Generator[Batch, None, None]:
        """See World."""
        return train_batches(
            self.handed.samples["train"],
            self._samples["train"],
            start,
            stop,
            self._job.batch_size(self.size) // self.size,
            self,
            tasks=self.handed.data,
            pin_memory=self.device.type == "cuda",
        )

    def val_batches(self) -> Callable[[], Iterator[Batch]]:
        """See World."""
        return eval_batches(
            self.handed.samples["val"],
            self._samples["val"],
            self._job.recipe.eval.batch_size,
            self,
            tasks=self.handed.data,
            pin_memory=self.device.type == "cuda",
        )

    def report(self, metrics: dict[str, float]) -> None:
        """See World."""
        import ray.train

        ray.train.report(metrics)

    def ranks_to_lose(self) -> int:
        """See World."""
        from ray.train.v2._internal.execution.context import get_train_context

        # Ray Train tells each worker. Its public ray.train.get_preemption_info makes all ranks wait for each other.
        notice = get_train_context().preemption_context.preemption_info
        return 0 if notice is None else len(notice.preempted_ranks)

    def leave(self) -> NoReturn:
        """See World."""
        from ray.exceptions import RayActorError

        # Ray Train starts the workers anew at once, and does not count this among `scale.max_failures`.
        raise RayActorError(error_msg="a node of the training is about to be taken away", preempted=True)

    def validate(self, weights: bytes, epoch: int, step: int) -> ValidationBeside:
        """See World."""
        handed = self.handed
        return RayValidation(handed.job, handed.samples["val"], handed.data, handed.resources, weights, epoch, step)

    def paths(self, rows: Iterable[int]) -> list[str]:
        """See World."""
        return [self._samples["train"].index.path(row) for row in rows]


def worker(handed: Handed) -> bytes:
    """Run a job in a worker of Ray Train, and return what its loop returns, pickled.

    The result goes through Ray Train's controller, which would import torch to unpickle it.
    """
    from ray import cloudpickle

    return bytes(cloudpickle.dumps(_run(handed)))


def _run(handed: Handed) -> Any:
    import ray
    import ray.train

    job: Job = ray.get(handed.job)
    with contextlib.ExitStack() as stack:
        if job.criterion is None:  # an evaluation, which writes nothing that lasts
            if not job.folder.is_dir():  # it is on the driver's node
                job = replace(job, folder=Path(stack.enter_context(TemporaryDirectory(prefix="raydet-"))))
            log = RunLog(job.folder)
            stack.enter_context(warnings_said(log.say))
            return handed.loop(Run(job, RayWorld(handed, job, beat=lambda: None), log))
        rank = ray.train.get_context().get_world_rank()
        if (address := run_address(job.recipe)) is not None:
            job = replace(job, folder=stack.enter_context(worker_folder(address, rank)))
        log = RunLog(job.folder)
        stack.enter_context(warnings_said(log.say))
        stacks = job.folder / f"hang_rank_{rank}.txt"
        watchdog = stack.enter_context(Watchdog(60 * job.recipe.scale.hang_minutes, stacks, log.say))
        world = RayWorld(handed, job, watchdog.beat)
        from raydet.tracking.ray_metrics import RayMetrics

        figures = [RayMetrics(job.recipe.name, job.batch_size(world.size))] if rank == 0 else []
        stack.enter_context(tracked(job.recipe, job.folder, log, rank, figures))
        return handed.loop(Run(job, world, log))


EXIT_CODE = 70  # exit code of a process that the watchdog has ended


class Watchdog:
    """A context manager whose thread ends the process where nothing has been done for too long.

    A collective operation waits for ranks that hang for ever, a data task for a file server that does not answer; Ray
    takes both for work.

    Args:
        seconds: longest time without a sign of life.
        report: file for the stacks of all threads, which say where it hangs.
        say: takes a line on that.
    """

    def __init__(self, seconds: float, report: Path, say: Callable[[str], Any]):
        self._seconds, self._report, self._say = seconds, report, say
        self._seen = time.monotonic()
        self._ended = threading.Event()

    def __enter__(self) -> Watchdog:
        self.beat()
        threading.Thread(target=self._watch, name="raydet-watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._ended.set()

    def beat(self) -> None:
        """Give a sign of life."""
        self._seen = time.monotonic()

    def _watch(self) -> None:
        while (left := self._seen + self._seconds - time.monotonic()) > 0:
            if self._ended.wait(left):
                return
        try:
            with self._report.open("a") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            self._say(
                f"warning: a worker has done nothing for {self._seconds:.0f} s (scale.hang_minutes) and ends itself; "
                f"{self._report} says where it hung"
            )
        finally:
            os._exit(EXIT_CODE)  # nothing else ends a thread that waits in a collective operation
