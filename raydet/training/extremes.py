"""Pictures of a training's batches: the worst and the best of each epoch, and some as the model gets them.

A training batch is that of a step, of all ranks. It is measured by what the step has read back anyway; detections are
made of the very outputs that the loss saw, of those batches alone that are drawn or whose metric is asked for. A
validation batch is one rank's; all are measured at the end, by the matches of all images at once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from raydet.boxes import cxcywh_to_xyxy, xyxy_to_xywh
from raydet.data.batch import Batch
from raydet.data.render import decode
from raydet.devices import everyone, gathered
from raydet.errors import RaydetError
from raydet.evaluation import measures
from raydet.evaluation.coco import CocoEvaluation, detected
from raydet.evaluation.matching import BoxTable
from raydet.losses.base import PartialLoss, alone, has_terms
from raydet.postprocess import PostPrediction
from raydet.recipe import DetectionVisualizationCallback, ExtremeBatchDetectionVisualizationCallback, Pictures, Recipe
from raydet.runs.log import Recorder, RunLog
from raydet.training.job import Job, Run, World
from raydet.training.step import Outcome
from raydet.training.validation import Validation
from raydet.visualization import Shown

Array = npt.NDArray[Any]
Extreme = ExtremeBatchDetectionVisualizationCallback
Numbered = DetectionVisualizationCallback

_KEY = "track.extreme_batches"
_LONGEST = 1024  # pixels: side of an original image when it travels to rank 0


def check_pictures(recipe: Recipe, criterion: nn.Module, model: nn.Module, class_names: Sequence[str]) -> None:
    """Raise RaydetError where the recipe asks for pictures by a measure that there is not."""
    components = [f"{type(criterion).__name__}/{name}" for name in criterion.component_names]  # type: ignore[union-attr]
    for entry in recipe.track.extreme_batches:
        if entry.metric is not None:
            measures.check(entry.metric, class_names, _KEY, recipe.eval.max_dets)
            if entry.enable_on_train_loader and _decoder(model) is None:
                raise RaydetError(
                    f"{_KEY}: {entry.metric} of training batches needs a head with a method `decode`, which makes the "
                    "output in evaluation mode of that in training"
                )
        elif entry.loss_to_monitor not in components:
            raise RaydetError(f"{_KEY}: there is no {entry.loss_to_monitor}, only {', '.join(components)}")


class TrainPictures:
    """Draws the training batches that the recipe asks for; all ranks have one.

    Args:
        run: the training on this rank; its log gets the pictures, on rank 0.
        criterion: the loss.
        callback: the post-prediction of the model.
    """

    def __init__(self, run: Run, criterion: nn.Module, callback: PostPrediction):
        track = run.job.recipe.track
        self._job, self._world, self._log, self._callback = run.job, run.world, run.log, callback
        self._decode = _decoder(run.job.model)
        self._components: list[str] = [f"{type(criterion).__name__}/{name}" for name in criterion.component_names]  # type: ignore[union-attr]
        self._extreme = [_Kept(entry) for entry in track.extreme_batches if entry.enable_on_train_loader]
        self._numbered: dict[Numbered, tuple[int, list[Shown]] | None] = {
            entry: None for entry in track.visualize if entry.phase == "train"
        }
        self._seconds = 0.0

    def need_outputs(self, position: int) -> bool:
        """Return whether the step that begins at a position is to keep its outputs."""
        return bool(self._extreme_at(position) or self._numbered_at(position))

    def step(self, position: int, number: int, batch: Batch, outcome: Outcome, size: tuple[int, int]) -> None:
        """Look at a step.

        Args:
            position: position in the stream at which the step began.
            number: number of the step.
            batch: batch of this rank.
            outcome: outcome of the step.
            size: (height, width) of the images that the model got.
        """
        extreme, numbered = self._extreme_at(position), self._numbered_at(position)
        if not outcome.finite or not (extreme or numbered):
            return
        began = time.monotonic()
        seen = _Seen(self._job, batch, outcome, size, self._decode, self._callback, self._world)
        for chosen in numbered:
            self._numbered[chosen] = number, seen.shown(chosen, self._first(chosen))
        for kept in extreme:
            entry = kept.entry
            if entry.metric is not None:
                value, values = seen.metric(entry.metric)
            else:
                value, values = seen.loss(self._components.index(entry.measure))
            if kept.is_more_extreme(value, kept.value):
                kept.value, kept.step, kept.batch = value, number, seen.shown(entry, self._first(entry))
            best = kept.candidates(values)
            kept.add(zip(values[best].tolist(), seen.shown(entry, best, values), strict=True))
        self._seconds += time.monotonic() - began

    def epoch_ends(self, epoch: int, step: int) -> None:
        """Draw what was most extreme in the epoch that ends after a step; all ranks call it."""
        if not (self._extreme or self._numbered):
            return
        began = time.monotonic()
        names = self._job.config.class_names
        for number, kept in enumerate(self._extreme):
            if kept.step:
                ranks = gathered((kept.batch, kept.images))
                if ranks is not None:
                    batch = [shown for pictures, _ in ranks for shown in pictures]
                    images = _most_extreme(kept.entry, [image for _, part in ranks for image in part])
                    _publish(self._log, "train", kept.entry, names, batch, images, kept.value, kept.step, epoch)
                self._extreme[number] = _Kept(kept.entry)
        for entry, shown in self._numbered.items():
            if shown is not None:
                parts = gathered(shown[1])
                if parts is not None:
                    _publish_numbered(self._log, entry, names, [one for part in parts for one in part], shown[0], epoch)
                self._numbered[entry] = None
        if self._world.rank == 0:
            seconds = self._seconds + time.monotonic() - began
            self._log.metrics(step=step, epoch=epoch, **{"perf/train_pictures_s": seconds})
        self._seconds = 0.0

    def _first(self, entry: Pictures) -> range:
        """Return which images of this rank's batch are shown."""
        size = self._job.batch_size(self._world.size) // self._world.size
        return range(size if entry.max_images is None else min(size, -(-entry.max_images // self._world.size)))

    def _extreme_at(self, position: int) -> list[_Kept]:
        epoch = position // self._job.train_images + 1
        return [kept for kept in self._extreme if _due(kept.entry, epoch, self._job)]

    def _numbered_at(self, position: int) -> list[Numbered]:
        epoch, within = divmod(position, self._job.train_images)
        number = within // self._job.batch_size(self._world.size)
        return [entry for entry in self._numbered if entry.batch_idx == number and _due(entry, epoch + 1, self._job)]


class ValPictures:
    """Draws the validation batches and images that the recipe asks for; all ranks have one.

    Args:
        validation: what is followed; its log gets the pictures, on rank 0.
        criterion: the loss, on the device of the model.
        epoch: number of epochs that are done.
        step: number of steps that are done.
    """

    def __init__(self, validation: Validation, criterion: nn.Module, epoch: int, step: int):
        job = validation.job
        track = job.recipe.track
        self._job, self._rank, self._log, self._beat = job, validation.rank, validation.log, validation.beat
        self._epoch, self._step = epoch, step
        self._criterion = criterion
        self._components = [f"{type(criterion).__name__}/{name}" for name in criterion.component_names]  # type: ignore[union-attr]
        on_valid = [entry for entry in track.extreme_batches if entry.enable_on_valid_loader]
        self._extreme = [entry for entry in on_valid if _due(entry, epoch, job)]
        self._numbered = [entry for entry in track.visualize if entry.phase == "valid" and _due(entry, epoch, job)]
        self._needs_loss = any(entry.metric is None for entry in self._extreme)
        self._batches: list[list[int]] = []  # rows of each batch
        self._losses: list[tuple[Array, Array]] = []  # components [C], and shares of the images [B, K]
        self._found: dict[int, Array] = {}
        self._seconds = 0.0

    def batch(self, batch: Batch, outputs: Any) -> None:
        """Look at a batch and what the model makes of it."""
        self._batches.append(batch.rows.tolist())
        if self._needs_loss:
            began = time.monotonic()
            self._losses.append(_loss_alone(self._criterion, outputs, batch))
            self._seconds += time.monotonic() - began

    def image(self, row: int, boxes: Array) -> None:
        """Look at the detections in an image, [n, 6] in its pixels."""
        self._found[row] = boxes

    def finish(self, evaluation: CocoEvaluation) -> None:
        """Draw, with a sign of life after each measure and each picture; all ranks call it.

        Args:
            evaluation: the evaluation of this rank's images.
        """
        if not (self._extreme or self._numbered):
            return
        began = time.monotonic()
        names = self._job.config.class_names
        measured = self._measured(evaluation)
        candidates = everyone([self._candidates(entry, *measured[entry.measure]) for entry in self._extreme])
        chosen = [self._chosen(entry, [rank[n] for rank in candidates]) for n, entry in enumerate(self._extreme)]
        ranks = gathered(chosen)
        if ranks is None:
            return
        for number, entry in enumerate(self._extreme):
            parts = [rank[number] for rank in ranks]
            batch = [shown for _, pictures, _ in parts for shown in pictures]
            images = _most_extreme(entry, [image for _, _, part in parts for image in part])
            _publish(self._log, "valid", entry, names, batch, images, parts[0][0], self._step, self._epoch)
            self._beat()
        for chosen_batch in self._numbered:
            rows = self._batches[chosen_batch.batch_idx] if chosen_batch.batch_idx < len(self._batches) else []
            shown = self._shown(chosen_batch, rows[: chosen_batch.max_images])
            _publish_numbered(self._log, chosen_batch, names, shown, self._step, self._epoch)
        seconds = self._seconds + time.monotonic() - began
        self._log.metrics(step=self._step, epoch=self._epoch, **{"perf/val_pictures_s": seconds})

    def _measured(self, evaluation: CocoEvaluation) -> dict[str, tuple[Array, Array]]:
        """Return each measure that is asked for, of this rank's batches and of their images."""
        names = self._job.config.class_names
        whole = measures.Measured(evaluation.truth, evaluation.found, names, evaluation.max_dets)
        rows = np.array([row for batch in self._batches for row in batch], int)
        of_row = np.zeros(rows.max(initial=-1) + 1, int)
        sizes = [len(batch) for batch in self._batches]
        found = {}
        for name in {entry.metric: None for entry in self._extreme if entry.metric is not None}:
            of_row[rows] = np.repeat(np.arange(len(sizes)), sizes)
            of_batches = whole.measure(name, of_row)
            of_row[rows] = np.arange(len(rows))
            found[name] = of_batches, whole.measure(name, of_row)
            self._beat()
        for name in {entry.measure: None for entry in self._extreme if entry.metric is None}:
            component = self._components.index(name)
            of_batches = np.array([components[component] for components, _ in self._losses])
            of_images = [np.empty(0), *(_of_term(shares, component) for _, shares in self._losses)]
            found[name] = of_batches, np.concatenate(of_images)
        return found

    def _candidates(
        self, entry: Extreme, of_batches: Array, of_images: Array
    ) -> tuple[list[tuple[float, int]], list[tuple[float, int]]]:
        """Return this rank's most extreme batch, as its value and number, and images, as their values and rows."""
        rows = [row for batch in self._batches for row in batch]
        batches = list(zip(of_batches.tolist(), range(len(self._batches)), strict=True))
        images = list(zip(of_images.tolist(), rows, strict=True))
        images.sort(key=lambda image: -len(self._job.val_index.annotations(image[1]).labels))  # first among equals
        return _most_extreme(entry, batches, 1), _most_extreme(entry, images)

    def _chosen(self, entry: Extreme, ranks: list[Any]) -> tuple[float, list[Shown], list[tuple[float, Shown]]]:
        """Return the value of the most extreme batch of all ranks, and of that and of the images what this rank has."""
        batches = [(value, rank, number) for rank, (batch, _) in enumerate(ranks) for value, number in batch]
        images = [(value, rank, row) for rank, (_, part) in enumerate(ranks) for value, row in part]
        value, rows = math.nan, []
        for value, rank, number in _most_extreme(entry, batches, 1):  # noqa: B007 - there is one at most
            rows = self._batches[number] if rank == self._rank else []
        mine = [(value, row) for value, rank, row in _most_extreme(entry, images) if rank == self._rank]
        pictures = [(each, shown) for each, row in mine for shown in self._shown(entry, [row], each)]
        return value, self._shown(entry, rows[: entry.max_images]), pictures

    def _shown(self, entry: Pictures, rows: Iterable[int], value: float | None = None) -> list[Shown]:
        """Return pictures of original images; those that cannot be read are left out, as the log says."""
        index, pictures = self._job.val_index, []
        for row in rows:
            self._beat()
            try:
                image = decode(index.read(row), index.path(row), index.size(row))
            except RaydetError:
                continue
            objects = index.annotations(row)
            caption = Path(index.path(row)).name + ("" if value is None else f"  {value:.3f}")
            shown = _picture(image, (objects.boxes, objects.labels), self._found[row], entry, caption)
            pictures.append(shown.scaled(min(1.0, _LONGEST / max(image.shape))))
        return pictures


@dataclass
class _Kept:
    """The most extreme training batch and images of an epoch so far, on one rank."""

    entry: Extreme
    value: float = math.nan
    step: int = 0
    batch: list[Shown] = field(default_factory=list)
    images: list[tuple[float, Shown]] = field(default_factory=list)

    def is_more_extreme(self, value: float, than: float) -> bool:
        return not math.isnan(value) and (math.isnan(than) or (value > than if self.entry.max else value < than))

    def candidates(self, values: Array) -> list[int]:
        """Return which images of a batch are among the most extreme ones of the epoch so far."""
        last = self.images[-1][0] if len(self.images) == self.entry.images > 0 else math.nan
        best = _most_extreme(self.entry, list(zip(values.tolist(), range(len(values)), strict=True)))
        return [number for value, number in best if self.is_more_extreme(value, last)]

    def add(self, images: Iterable[tuple[float, Shown]]) -> None:
        self.images = _most_extreme(self.entry, [*self.images, *images])


class _Seen:
    """A training batch of this rank after its step; its detections are made when they are first asked for."""

    def __init__(
        self,
        job: Job,
        batch: Batch,
        outcome: Outcome,
        size: tuple[int, int],
        decoder: Callable[[Any], Any] | None,
        callback: PostPrediction,
        world: World,
    ):
        self._job, self._batch, self._outcome, self._decoder = job, batch, outcome, decoder
        self._callback, self._world = callback, world
        height, width = batch.images.shape[-2:]
        self._to_batch = np.array((width / size[1], height / size[0]) * 2)
        targets = batch.targets.numpy().astype(np.float64)
        self._truth = np.column_stack((targets[:, 0], cxcywh_to_xyxy(targets[:, 2:]), targets[:, 1]))

    @cached_property
    def _found(self) -> list[Array] | None:
        """Detections [n, 6] in each image, in pixels of the batch; None where the head is not raydet's."""
        if self._decoder is None:
            return None
        found: list[Array] = []
        with torch.no_grad():
            for outputs in self._outcome.outputs:
                for boxes in self._callback(self._decoder(outputs)):
                    rows = boxes.double().cpu().numpy()
                    rows[:, :4] *= self._to_batch
                    found.append(rows)
        return found

    def loss(self, component: int) -> tuple[float, Array]:
        """Return a component of the batch's loss, and each image's weighted share in it times the images."""
        value, shares = float(self._outcome.components[component]), self._outcome.shares
        if shares is None:  # the terms of a user's own loss are not known
            return value, np.full(len(self._batch.images), math.nan)
        return value, _of_term(shares.numpy(), component) * len(shares) * self._world.size

    @cached_property
    def _both(self) -> tuple[measures.Measured, measures.Measured]:
        """This rank's images, and the batch of all ranks."""
        assert self._found is not None
        images = len(self._batch.images)
        found = np.concatenate([np.column_stack((np.full(len(rows), n), rows)) for n, rows in enumerate(self._found)])
        mine = _measurable(self._truth, found, self._job)
        if self._world.size == 1:
            return mine, mine
        parts = everyone((self._truth, found))
        for rank, both in enumerate(parts):
            for rows in both:
                rows[:, 0] += rank * images
        truth, found = (np.concatenate(both) for both in zip(*parts, strict=True))
        return mine, _measurable(truth, found, self._job)

    def metric(self, name: str) -> tuple[float, Array]:
        """Return a metric of the batch of all ranks, and of each image of this one."""
        images = len(self._batch.images)
        mine, batch = self._both
        of_batch = batch.measure(name, np.zeros(images * self._world.size, int))
        return float(of_batch[0]), mine.measure(name, np.arange(images))

    def shown(self, entry: Pictures, which: Iterable[int], values: Array | None = None) -> list[Shown]:
        """Return pictures of some images."""
        numbers = list(which)
        paths = self._world.paths(self._batch.rows[numbers].tolist())
        pictures = []
        for number, path in zip(numbers, paths, strict=True):
            image = np.ascontiguousarray(self._batch.images[number].permute(1, 2, 0).numpy())
            mine = self._truth[self._truth[:, 0] == number]
            found = None if self._found is None else self._found[number]
            caption = Path(path).name + ("" if values is None else f"  {values[number]:.3f}")
            pictures.append(_picture(image, (mine[:, 1:5], mine[:, 5].astype(int)), found, entry, caption))
        return pictures


def _due(entry: Pictures, epoch: int, job: Job) -> bool:
    return epoch % entry.freq == 0 or epoch >= job.recipe.train.epochs


def _decoder(model: nn.Module) -> Callable[[Any], Any] | None:
    decoder: Callable[[Any], Any] | None = getattr(getattr(model, "head", None), "decode", None)
    return decoder


def _most_extreme(entry: Extreme, candidates: list[Any], count: int | None = None) -> list[Any]:
    """Return the most extreme of tuples that begin with their value; of equals the first; those without are none."""
    known = [candidate for candidate in candidates if not math.isnan(candidate[0])]
    known.sort(key=lambda candidate: -candidate[0] if entry.max else candidate[0])
    return known[: entry.images if count is None else count]


def _of_term(shares: Array, component: int) -> Array:
    """Return the images' shares [B] of shares by term [B, K]: those of the component's term, or of the whole loss."""
    of_images: Array = shares[:, component] if component < shares.shape[1] else shares.sum(1)
    return of_images


def _loss_alone(criterion: nn.Module, outputs: Any, batch: Batch) -> tuple[Array, Array]:
    """Return the components [C] of a batch's loss on this rank, and the images' shares [B, K] times the images."""
    with alone(), torch.no_grad():
        if has_terms(criterion):
            whole = PartialLoss(criterion)
            whole.add(outputs, batch.targets)
            components, shares = whole.finish()[2], whole.shares() * len(batch.images)
        else:
            components = criterion(outputs, batch.targets)[1]
            shares = torch.full((len(batch.images), 1), math.nan)
    return components.float().cpu().numpy(), shares.float().cpu().numpy()


def _measurable(truth: Array, found: Array, job: Job) -> measures.Measured:
    """Objects [m, 6] = image, xyxy, class, and detections [n, 7] = image, xyxy, score, class."""
    objects = BoxTable(truth[:, 0].astype(int), truth[:, 5].astype(int), xyxy_to_xywh(truth[:, 1:5]))
    return measures.Measured(objects, detected(found), job.config.class_names, job.recipe.eval.max_dets)


def _picture(image: Any, truth: tuple[Array, Array], found: Array | None, entry: Pictures, caption: str) -> Shown:
    if found is None:
        return Shown(image, *truth, caption=caption)
    found = found[found[:, 4] >= entry.score]
    return Shown(image, *truth, found[:, :4], found[:, 5].astype(int), found[:, 4], caption)


def _publish(
    log: RunLog | Recorder,
    phase: str,
    entry: Extreme,
    class_names: Sequence[str],
    batch: Sequence[Shown],
    images: Sequence[tuple[float, Shown]],
    value: float,
    step: int,
    epoch: int,
) -> None:
    """Show the most extreme batch and images of an epoch."""
    most, split = ("highest", "max") if entry.max else ("lowest", "min")
    of = "training" if phase == "train" else "validation"
    for what, title, pictures, number in (
        ("batch", f"{of}: the batch with the {most} {entry.measure}", batch, value),
        ("images", f"{of}: the images with the {most} {entry.measure}", [shown for _, shown in images], None),
    ):
        if pictures:
            name = f"{phase}/{split}_{entry.measure}_{what}"
            log.pictures(name, title, pictures, class_names, entry.gt_alpha, step=step, epoch=epoch, value=number)


def _publish_numbered(
    log: RunLog | Recorder, entry: Numbered, class_names: Sequence[str], batch: Sequence[Shown], step: int, epoch: int
) -> None:
    if batch:
        of = "training: as the model gets it, batch" if entry.phase == "train" else "validation: batch"
        name, title = f"{entry.phase}/batch_{entry.batch_idx}", f"{of} {entry.batch_idx}"
        log.pictures(name, title, batch, class_names, entry.gt_alpha, step=step, epoch=epoch)
