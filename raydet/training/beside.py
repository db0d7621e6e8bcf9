"""Validation on a GPU, or CPUs, of its own: a task of Ray that rank 0 starts and asks for what it has found.

Nothing goes over a disk: the task gets the weights from Ray's object store, and gives back metrics and pictures.
"""

from __future__ import annotations

import queue
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch

from raydet.data.stream import DataTasks, eval_batches
from raydet.devices import pick_device
from raydet.runs.log import Recorder, warnings_said
from raydet.training.extremes import ValPictures
from raydet.training.job import Job, Validated
from raydet.training.validation import Validation, metrics_of


@dataclass(frozen=True)
class Resources:
    """What a validation beside the training takes of the cluster: CPUs, GPUs and custom resources."""

    cpus: int
    gpus: int
    others: Mapping[str, float]


class RayValidation:
    """A validation that runs in a task of Ray.

    Args:
        job: reference to the training.
        samples: reference to the samples of the validation images.
        data: the Ray Data tasks that make them.
        resources: what the validation takes of the cluster.
        weights: model.safetensors of the checkpoint.
        epoch: number of epochs that are done.
        step: number of steps that are done.
    """

    def __init__(
        self, job: Any, samples: Any, data: DataTasks, resources: Resources, weights: bytes, epoch: int, step: int
    ):
        import ray

        task = ray.remote(_validate).options(
            num_returns="streaming",
            num_cpus=resources.cpus,
            num_gpus=resources.gpus,
            resources=dict(resources.others),
            max_retries=0,  # what a task that dies has to say comes at once, and once
            scheduling_strategy="DEFAULT",  # not in what the workers have reserved for themselves
        )
        self._task = task.remote(job, [samples], data, ray.put(weights), epoch, step)

    def poll(self) -> list[str | Validated]:
        """Return what has come since the last call: lines of progress, and at the end the result.

        Raises:
            Exception: the validation has failed, or its process has died.
        """
        import ray

        came: list[str | Validated] = []
        while ray.wait([self._task], timeout=0)[0]:
            try:
                came.append(ray.get(next(self._task)))
            except StopIteration:
                break
        return came

    def cancel(self) -> None:
        """End it."""
        import ray

        ray.cancel(self._task, force=True)


def _validate(
    job: Job, samples: Sequence[Any], data: DataTasks, weights: bytes, epoch: int, step: int
) -> Iterator[str | Validated]:
    """Run in a task of Ray: say how far the validation is, and at the end what it has found."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    yield f"epoch {epoch} is validated on {socket.gethostname()}"
    with warnings_said(lines.put), ThreadPoolExecutor(1) as pool:
        result = pool.submit(_measure, job, samples[0], data, weights, epoch, step, lines.put)
        while not result.done() or not lines.empty():
            with suppress(queue.Empty):
                yield lines.get(timeout=0.5)
        yield result.result()


def _measure(
    job: Job, samples: Any, data: DataTasks, weights: bytes, epoch: int, step: int, say: Callable[[str], Any]
) -> Validated:
    import ray

    began = time.monotonic()
    device, recorder = pick_device(None), Recorder(say)
    job.model.load_state_dict(safetensors.torch.load(weights))
    model = job.model.eval().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    batches = eval_batches(
        samples,
        ray.get(samples),
        job.recipe.eval.batch_size,
        _Alone(ray.get_runtime_context().get_node_id()),
        tasks=data,
        pin_memory=device.type == "cuda",
    )
    assert job.criterion is not None
    validation = Validation(job, _Alone.rank, device, batches, recorder, beat=lambda: None)
    pictures = ValPictures(validation, job.criterion.to(device), epoch, step)
    metrics = metrics_of(validation.evaluate(model, pictures))
    return Validated(metrics, recorder.calls, time.monotonic() - began)


class _Alone:
    """The only rank of a validation that runs beside the training."""

    rank, size = 0, 1

    def __init__(self, node: str):
        self.nodes = (node,)

    def share(self, value: Any) -> Any:
        """See `raydet.data.stream.Ranks`."""
        return value
