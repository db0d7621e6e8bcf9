"""Starts trainings and evaluations: on Ray, or in this very process for debugging."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from raydet.cluster import connect
from raydet.data.batch import Batch, local_eval_batches, local_train_batches
from raydet.data.formats import load_index
from raydet.data.index import Index
from raydet.data.problems import Problems
from raydet.data.samples import Samples
from raydet.data.stream import eval_batches, train_batches
from raydet.errors import RaydetError, user_error
from raydet.metrics import MAIN_METRIC
from raydet.outputs import shapes
from raydet.predict import pick_device
from raydet.recipe import Recipe, Scale
from raydet.recipe import load as load_recipe
from raydet.training import checkpoint
from raydet.training.loop import evaluation_loop, train_loop
from raydet.training.prepare import load_evaluated, make_job, open_run, train_samples, val_samples
from raydet.training.run import Job, RunLog, SayWarnings

DEBUG_IMAGES, DEBUG_EPOCHS, DEBUG_BATCH = 64, 2, 8
_DEBUG = "-debug"
_SUMMARY = "summary.json"


@dataclass(frozen=True)
class Result:
    """What a training leaves.

    Attributes:
        folder: of the run.
        checkpoint: the best one, by mAP@0.50:0.95.
        metrics: of the last validation, by name.
        finished_before: the run had been finished already, and nothing was done.
    """

    folder: Path
    checkpoint: Path
    metrics: dict[str, float]
    finished_before: bool = False


def train(
    recipe: str | Path | Recipe,
    *,
    model: nn.Module | None = None,
    loss: nn.Module | None = None,
    train_data: Index | None = None,
    val_data: Index | None = None,
    overrides: Sequence[str] = (),
    debug: bool = False,
    device: str | None = None,
    verbose: bool = False,
    say: Callable[[str], Any] = print,
) -> Result:
    """Train a detector, or go on with a training that was interrupted.

    Args:
        recipe: a recipe, the name of a shipped one, or the path of a YAML file.
        model: a detector of your own in place of the recipe's; a raydet.models.Detector knows its preprocessing, for
            any other module it is that of `model.name`'s family.
        loss: a loss of your own, called as `loss, components = criterion(outputs, targets)`, with `component_names`.
        train_data: an index to train on in place of the recipe's.
        val_data: an index to validate on, likewise.
        overrides: `section.key=value`.
        debug: in this process, without Ray, on the first images, for two epochs.
        device: with `debug`, such as "cuda:1" or "cpu"; None: the first GPU, or without one the CPU.
        verbose: let Ray print what its workers print.
        say: takes each line of progress.

    Raises:
        RaydetError: something in the recipe, the data or the weights cannot work.
    """
    settings = load_recipe(recipe, [*(_debug_overrides(recipe) if debug else ()), *overrides])
    if settings.name.endswith(_DEBUG):
        raise RaydetError(f"name: {settings.name} ends with {_DEBUG}, as runs of the debugger do, which start over")
    if debug:
        settings = settings.model_copy(update={"name": settings.name + _DEBUG})
    problems = {split: Problems(settings.data.on_error, settings.data.max_errors) for split in ("train", "val")}
    train_index = train_data if train_data is not None else load_index(settings.data, "train", problems["train"])
    val_index = val_data if val_data is not None else load_index(settings.data, "val", problems["val"])
    if debug:
        train_index, val_index = train_index.head(DEBUG_IMAGES), val_index.head(DEBUG_IMAGES)
    job = make_job(settings, train_index, val_index, model, loss)
    folder = job.folder
    if debug:
        shutil.rmtree(folder, ignore_errors=True)
    open_run(job)
    if (folder / _SUMMARY).is_file():
        metrics = checkpoint.read_json(folder / _SUMMARY)["metrics"]
        return Result(folder, checkpoint.find(folder), metrics, finished_before=True)

    RunLog(folder, echo=say).left_out(problems)
    resize = job.config.preprocessing.resize
    streams = train_samples(settings, train_index, resize), val_samples(settings, val_index, resize)
    if debug:
        world = LocalWorld(job, *streams, device=pick_device(device))
        world.show_first_batch(say)
        metrics = train_loop(job, world, RunLog(folder, echo=say))
    else:
        metrics = _on_ray(_train_worker, job, streams, verbose, say)
    best = checkpoint.find(folder)
    (folder / _SUMMARY).write_text(json.dumps({"metrics": metrics, "best": best.name}, indent=1))
    return Result(folder, best, metrics)


def evaluate(
    path: str | Path,
    *,
    recipe: str | None = None,
    model: nn.Module | None = None,
    overrides: Sequence[str] = (),
    debug: bool = False,
    device: str | None = None,
    verbose: bool = False,
    say: Callable[[str], Any] = print,
) -> dict[str, float]:
    """Measure a checkpoint, the best of a run, or a weights file on validation data.

    Args:
        path: of the checkpoint folder, run folder or weights file.
        recipe: of the data, the thresholds and, for a weights file, the model; None: that of the run.
        model: a detector of your own, where the checkpoint is of one.
        overrides: `section.key=value`.
        debug: in this process, without Ray.
        device: with `debug`.
        verbose: let Ray print what its workers print.
        say: takes each line of progress.

    Returns:
        The metrics by name, without the prefix `val/`.

    Raises:
        RaydetError: something in the checkpoint, the recipe or the data cannot work.
    """
    path = Path(path).expanduser()
    settings = load_evaluated(path, recipe, overrides)
    val_index = load_index(settings.data, "val")
    source = checkpoint.find(path) if path.is_dir() else path
    say(f"evaluating {source} on {len(val_index)} images")
    if not path.is_dir():
        settings = settings.model_copy(update={"model": settings.model.model_copy(update={"weights": str(path)})})
        job = make_job(settings, None, val_index)
    else:
        config = checkpoint.read_config(source)
        if config.class_names != val_index.class_names:
            raise RaydetError(
                f"{source} detects {len(config.class_names)} classes that are not the {len(val_index.class_names)} "
                "of the data, or are in another order"
            )
        base = make_job(settings, None, val_index, model=checkpoint.load_model(source, config, model))
        job = replace(base, config=config)
    streams = None, val_samples(settings, val_index, job.config.preprocessing.resize)
    storage = Path(settings.storage).expanduser().resolve()
    storage.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=storage, prefix=".evaluation-") as scratch:
        job = replace(job, folder=Path(scratch))
        if debug:
            world = LocalWorld(job, *streams, device=pick_device(device))
            return evaluation_loop(job, world, RunLog(job.folder, echo=say))
        return _on_ray(_evaluation_worker, job, streams, verbose, say)


def _debug_overrides(recipe: str | Path | Recipe) -> list[str]:
    """Return what makes a recipe small enough to step through; the user's overrides go on top."""
    settings = load_recipe(recipe)
    batch = min(DEBUG_BATCH, settings.train.batch_size)
    return [
        f"train.epochs={DEBUG_EPOCHS}",
        f"train.batch_size={batch}",
        f"train.lr={settings.train.lr * batch / settings.train.batch_size}",
        "scale.num_workers=1",
        "track.log_every=1",
    ]


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

    @contextlib.contextmanager
    def checkpoint(self) -> Iterator[Path | None]:
        """See World. Debugging starts over each time."""
        yield None

    def report(self, metrics: dict[str, float], epoch: int, write: Callable[[Path], None]) -> None:
        """See World."""
        partial = Path(tempfile.mkdtemp(dir=self._folder, prefix=".partial"))
        write(partial)
        final = self._folder / _checkpoint_name(epoch)
        shutil.rmtree(final, ignore_errors=True)
        partial.replace(final)
        keep = {final, checkpoint.find(self._folder)}
        for folder in set(self._folder.glob("checkpoint_*")) - keep:
            shutil.rmtree(folder)

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

    def __init__(self, job: Job, sources: dict[str, Any], data_tasks: int | None):
        import ray
        import ray.train
        import ray.train.torch

        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.size: int = context.get_world_size()
        self.device: torch.device = ray.train.torch.get_device()
        self._recipe = job.recipe
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
            self._recipe.train.batch_size // self.size,
            self,
            tasks=self._data_tasks,
            pin_memory=self.device.type == "cuda",
        )

    def val_batches(self) -> Callable[[], Iterator[Batch]]:
        """See World."""
        return eval_batches(
            self._sources["val"],
            self._samples["val"],
            self._recipe.eval.batch_size,
            self,
            tasks=self._data_tasks,
            pin_memory=self.device.type == "cuda",
        )

    @contextlib.contextmanager
    def checkpoint(self) -> Iterator[Path | None]:
        """See World."""
        import ray.train

        latest = ray.train.get_checkpoint()
        if latest is None:
            yield None
            return
        with latest.as_directory() as folder:
            yield Path(folder)

    def report(self, metrics: dict[str, float], epoch: int, write: Callable[[Path], None]) -> None:
        """See World."""
        import ray.train

        with tempfile.TemporaryDirectory() as folder:
            kept = None
            if self.rank == 0:
                write(Path(folder))
                kept = ray.train.Checkpoint.from_directory(folder)
            # Ray asks every checkpoint for its score; -1 is COCO's way to say that nothing was measured.
            metrics = {f"val/{MAIN_METRIC}": -1.0, **metrics}
            ray.train.report(metrics, checkpoint=kept, checkpoint_dir_name=_checkpoint_name(epoch))


def _train_worker(given: dict[str, Any]) -> dict[str, float]:
    import ray

    job: Job = ray.get(given["job"])
    return train_loop(job, RayWorld(job, given["sources"], given["data_tasks"]), _worker_log(job))


def _evaluation_worker(given: dict[str, Any]) -> dict[str, float]:
    import ray

    job: Job = ray.get(given["job"])
    return evaluation_loop(job, RayWorld(job, given["sources"], given["data_tasks"]), _worker_log(job))


def _worker_log(job: Job) -> RunLog:
    log = RunLog(job.folder)
    logging.getLogger("raydet").addHandler(SayWarnings(log))
    return log


def _on_ray(
    worker: Callable[[dict[str, Any]], dict[str, float]],
    job: Job,
    streams: tuple[Samples | None, Samples],
    verbose: bool,
    say: Callable[[str], Any],
) -> dict[str, float]:
    """Run a worker function on a Ray Train worker group; return what rank 0 returns."""
    # Ray Train looks at its workers this often; a report of an epoch waits for the next look.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1.0")
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    scale = job.recipe.scale
    started = connect(scale, verbose)
    gpu, cpus = _resources(scale)
    say(f"starting {scale.num_workers} worker(s) on Ray, each with {'a GPU' if gpu else f'{cpus} CPU(s)'}")
    with contextlib.ExitStack() as stack:
        if started:
            stack.callback(ray.shutdown)
        given = {
            "job": ray.put(job),
            "sources": {
                split: ray.put(samples)
                for split, samples in zip(("train", "val"), streams, strict=True)
                if samples is not None
            },
            "data_tasks": scale.data_tasks,
        }
        stack.enter_context(_relay(job.folder / "log.txt", say))
        trainer = TorchTrainer(
            worker,
            train_loop_config=given,
            # Both kinds of tensors: gradients on the device, shards of an evaluation on the CPU.
            torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpu else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=scale.num_workers, use_gpu=gpu, resources_per_worker={"CPU": cpus, "GPU": int(gpu)}
            ),
            run_config=RunConfig(
                name=job.folder.name,
                storage_path=str(job.folder.parent),
                failure_config=FailureConfig(max_failures=scale.max_failures, controller_failure_limit=3),
                checkpoint_config=CheckpointConfig(
                    num_to_keep=job.recipe.track.keep_checkpoints,
                    checkpoint_score_attribute=f"val/{MAIN_METRIC}",
                ),
                callbacks=[_stop_on_user_error()],
            ),
        )
        try:
            result = trainer.fit()
        except TrainingFailedError as error:
            raise user_error(error) or error from None
    metrics: dict[str, float] = result.return_value
    return metrics


def _resources(scale: Scale) -> tuple[bool, int]:
    """Return whether workers get GPUs, and how many CPUs each.

    Raises:
        RaydetError: the cluster is too small; Ray would wait for ever.
    """
    import ray

    total = ray.cluster_resources()
    gpus, cpus = int(total.get("GPU", 0)), int(total.get("CPU", 0))
    node = max((int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]), default=1)
    gpu = gpus >= scale.num_workers if scale.gpu is None else scale.gpu
    if gpu and gpus < scale.num_workers:
        raise RaydetError(
            f"scale.num_workers is {scale.num_workers}, but there are {gpus} GPUs; or set scale.gpu=false"
        )
    spare = max(1, scale.data_tasks or 1)
    each = scale.cpus_per_worker or (1 if gpu else max(1, min(node, (cpus - spare) // scale.num_workers)))
    if scale.num_workers * each + 1 > cpus:
        raise RaydetError(
            f"{scale.num_workers} workers of {each} CPUs leave no CPU of the cluster's {cpus} for the data tasks: "
            "lower scale.num_workers or scale.cpus_per_worker"
        )
    return gpu, each


def _stop_on_user_error() -> Any:
    """Return a callback of Ray Train that ends a run at once when a worker meets what no new worker would cure."""
    from ray.train import UserCallback

    class StopOnUserError(UserCallback):  # type: ignore[misc]
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            for error in worker_exceptions.values():
                if (mine := user_error(error)) is not None:
                    raise mine

    return StopOnUserError()


@contextlib.contextmanager
def _relay(path: Path, say: Callable[[str], Any]) -> Iterator[None]:
    """Say the lines that the workers append to the run's log.txt."""
    start = path.stat().st_size if path.exists() else 0
    ended = threading.Event()

    def follow() -> None:
        position, rest = start, ""
        while True:
            last = ended.wait(0.5)
            if path.exists():
                with path.open() as file:
                    file.seek(position)
                    *lines, rest = (rest + file.read()).split("\n")
                    position = file.tell()
                for line in lines:
                    say(line)
            if last:
                return

    thread = threading.Thread(target=follow, name="raydet-log", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _checkpoint_name(epoch: int) -> str:
    return f"checkpoint_{epoch:06d}"
