"""Runs a job on a worker group of Ray Train."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from raydet.cluster import alive_nodes, check_seen, connect, data_nodes, label_selector, worker_nodes, workers_on
from raydet.data.samples import Samples
from raydet.data.stream import DataTasks
from raydet.errors import RaydetError, user_error
from raydet.reports.terminal import LiveTable, follow
from raydet.runs.folder import STOP, run_address
from raydet.training.beside import Resources
from raydet.training.controller import after_failures, make_trainer
from raydet.training.job import Job, Run
from raydet.training.worlds import Handed, worker

_NOTHING = contextlib.nullcontext()
# How soon workers are added for nodes that have come; it costs the steps since the last checkpoint.
_RESIZE_EVERY_S = 30.0


def on_ray(
    loop: Callable[[Run], Any],
    job: Job,
    streams: tuple[Samples | None, Samples],
    verbose: bool,
    say: Callable[[str], Any],
    table: LiveTable | None = None,
    callbacks: Sequence[Any] = (),
    beside: contextlib.AbstractContextManager[None] = _NOTHING,
) -> Any:
    """Run a job on the workers that its recipe asks for.

    Args:
        loop: what each worker does with its run.
        job: the training or the evaluation.
        streams: the samples to train on, None in an evaluation, and those to validate on.
        verbose: let Ray print what its workers print.
        say: takes each line of progress.
        table: shows the progress in the terminal.
        callbacks: callbacks of Ray Train.
        beside: entered while the workers run.

    Returns:
        What the loop returns on rank 0.

    Raises:
        RaydetError: the cluster does not have what the recipe asks for, or the loop has raised it.
        KeyboardInterrupt: it was interrupted twice.
    """
    scale = job.recipe.scale
    hang_s = int(60 * scale.hang_minutes)
    # Ray Train looks at its workers this often; a report waits for the next look.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1.0")
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(hang_s)
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    fewest, most = scale.workers
    started = connect(scale, verbose)
    with contextlib.ExitStack() as stack:
        if started:
            stack.callback(ray.shutdown)
        gpu, cpus, coming = workers_on(scale)
        if job.recipe.train.sync_bn and not gpu and most > 1 and job.criterion is not None:
            raise RaydetError("train.sync_bn: torch has norms over several workers on GPUs only; set it to false")
        count = f"{most}" if fewest == most else f"{fewest} to {most}"
        say(f"starting {count} worker(s) on Ray, each with {'a GPU' if gpu else f'{cpus} CPU(s)'}")
        if coming:
            say("waiting for nodes that the cluster's autoscaler starts, up to half an hour")
            os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "1800")
        _check_paths(job, streams)
        handed = Handed(
            loop=loop,
            job=ray.put(job),
            samples={
                split: ray.put(samples)
                for split, samples in zip(("train", "val"), streams, strict=True)
                if samples is not None
            },
            data=DataTasks(scale.data_tasks, label_selector(scale.data_label), scale.workers_per_stream),
            resources=Resources(cpus, int(gpu), scale.worker_resources),
        )
        # Ray's notes on the run: of no use to another start, which goes on from the run's own checkpoints.
        notes = job.folder / "ray"
        shutil.rmtree(notes, ignore_errors=True)
        stack.callback(shutil.rmtree, notes, ignore_errors=True)
        if table is not None:
            stack.enter_context(table)
        stack.enter_context(follow(job.folder, say, table))
        stack.enter_context(beside)
        trainer = make_trainer(
            partial(worker, handed),
            # Both kinds of tensors: gradients on the device, shards of an evaluation on the CPU.
            backend="cpu:gloo,cuda:nccl" if gpu else "gloo",
            timeout_s=hang_s + 60,
            alone=started,
            scaling_config=ScalingConfig(
                num_workers=most if fewest == most else (fewest, most),
                elastic_resize_monitor_interval_s=_RESIZE_EVERY_S,
                use_gpu=gpu,
                resources_per_worker={"CPU": cpus, "GPU": gpu * scale.gpu_share, **scale.worker_resources},
            ),
            run_config=RunConfig(
                name=notes.name,
                storage_path=str(job.folder),
                failure_config=FailureConfig(max_failures=scale.max_failures, controller_failure_limit=3),
                callbacks=[after_failures(), *callbacks],
            ),
        )
        return pickle.loads(_fit(trainer, job.folder / STOP, say))


def _check_paths(job: Job, streams: Sequence[Samples | None]) -> None:
    """Raise RaydetError if a node does not have a local path that it will need."""
    scale, nodes = job.recipe.scale, alive_nodes()
    if job.criterion is not None and run_address(job.recipe) is None:
        check_seen("storage", str(job.folder), worker_nodes(scale, nodes), "recipe.yaml")
    for samples in filter(None, streams):
        index = samples.index
        image = "" if int(index.shards[0]) >= 0 else index.table["path"][0].as_py()
        check_seen("data.root", index.root, data_nodes(scale, nodes), image)


def _fit(trainer: Any, stop: Path, say: Callable[[str], Any]) -> Any:
    """Wait for a Ray Train run, and return what rank 0 returns.

    It runs in another thread: interrupted in the main thread, Ray would end the workers at once.

    Args:
        trainer: trainer of the run.
        stop: file that tells the workers to end after the step.
        say: takes a line on that.
    """
    from ray.train.v2.api.exceptions import TrainingFailedError

    results: list[Any] = []
    ended = threading.Event()  # not the thread's own end: a join that is interrupted takes the thread for ended

    def run() -> None:
        try:
            results.append(trainer.fit())
        except BaseException as error:  # raised again below, whatever it is
            results.append(error)
        finally:
            ended.set()

    with interrupted_by_sigterm():
        threading.Thread(target=run, name="raydet-fit", daemon=True).start()
        while not ended.is_set():
            try:
                ended.wait(0.5)
            except KeyboardInterrupt:
                if stop.exists():
                    raise
                stop.touch()
                say("stopping after this step, with a checkpoint; once more stops at once")
    (result,) = results
    if isinstance(result, TrainingFailedError):
        raise user_error(result) or result from None
    if isinstance(result, BaseException):
        raise result
    return result.return_value


@contextlib.contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """Take SIGTERM, by which job servers and batch systems end a job, for Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    earlier = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)
