"""A data set as batches of tensors, for looking at it outside a training."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from raydet.boxes import Resize, cxcywh_to_xyxy
from raydet.data.batch import Batch, local_eval_batches, local_train_batches
from raydet.data.distort import PhotometricDistort, ZoomedLetterbox
from raydet.data.formats import load_index, own_transforms
from raydet.data.index import Index
from raydet.data.own import TargetFormat
from raydet.data.problems import Problems
from raydet.data.samples import Samples
from raydet.data.transforms import (
    HSV,
    ChannelSwap,
    Composition,
    HorizontalFlip,
    Letterbox,
    Mixup,
    Mosaic,
    RandomAffine,
    Rotate90,
    Sample,
    SampleTransform,
    Transform,
    VerticalFlip,
)
from raydet.errors import RaydetError
from raydet.plugins import call, locate
from raydet.recipe import OwnTransform, Recipe, load, shipped


def train_samples(recipe: Recipe, index: Index, resize: Resize) -> Samples:
    """Return the training stream's samples.

    Raises:
        RaydetError: a transform of the user's own cannot be made.
    """
    size, data, listed = recipe.data.image_size, recipe.data, own_transforms(recipe.data)
    augment = recipe.augment.model_copy(update=listed.augment)
    if listed.augment:
        told = ", ".join(f"{key} {value}" for key, value in listed.augment.items() if value not in (0, (1.0, 1.0)))
        logger.warning("augmentation is that of the data set's transforms, not the recipe's: %s", told)
    if augment.rotate90 and size[0] != size[1]:
        raise RaydetError(f"augment.rotate90 needs a square data.image_size, not {size[0]}x{size[1]}")
    plain = Letterbox(size, resize)
    alone = ZoomedLetterbox(size, resize, augment.zoom_out, augment.iou_crop)
    flips: tuple[Transform, ...] = (
        HorizontalFlip(augment.horizontal_flip),
        VerticalFlip(augment.vertical_flip),
        Rotate90(augment.rotate90),
    )
    colours: tuple[Transform, ...] = (
        HSV(augment.hsv, augment.hue, augment.saturation, augment.value),
        ChannelSwap(augment.channel_swap),
    )
    distort: tuple[Transform, ...] = (PhotometricDistort(augment.photometric),) if augment.photometric else ()
    affine = RandomAffine(size, augment.degrees, augment.translate, augment.scale, augment.shear)
    mixup = Mixup(augment.mixup, size, augment.mixup_scale)
    transforms: list[Transform | Composition]
    if augment.mosaic:
        transforms = [Mosaic(augment.mosaic, alone), affine, mixup, *flips]
    else:  # flips first: the padding stays on the side where validation has it
        transforms = [*flips, alone, *([affine] if affine != RandomAffine(size) else []), mixup]
    return Samples(
        index,
        (*transforms, *distort, *colours),
        size,
        data.chunk_size,
        recipe.seed,
        close_at=(recipe.train.epochs - augment.close_epochs) * len(index) if augment.close_epochs else None,
        closed=(*flips, plain, *colours),
        own=(*listed.own, *(_own_transform(entry) for entry in augment.transforms)),
        window=data.shuffle_window,
        on_error=data.on_error,
    )


def val_samples(recipe: Recipe, index: Index, resize: Resize) -> Samples:
    """Return the validation stream's samples."""
    size, data = recipe.data.image_size, recipe.data
    chunk = recipe.eval.batch_size  # a task makes a batch: the ranks end at about the same time
    return Samples(index, (Letterbox(size, resize),), size, chunk, shuffle=False, on_error=data.on_error)


def _own_transform(entry: OwnTransform) -> SampleTransform:
    key = f"augment.transforms: {entry.name}"
    transform: SampleTransform = call(locate(entry.name, key), key, **(entry.model_extra or {}))
    if not callable(transform):
        raise RaydetError(f"{key}: its instances must be callable, with a sample and a generator")
    return transform


logger = logging.getLogger(__name__)

Split = Literal["train", "val"]

# What SuperGradients' names of data loaders end with → a recipe with that family's preprocessing and augmentation.
_MODELS = {"": "yolox_s", "yolox": "yolox_s", "ppyoloe": "ppyoloe_s", "yolo_nas": "yolo_nas_s"}


@dataclass(frozen=True)
class Loader:
    """Batches (images, targets): one epoch each time it is iterated, the same each time; see `loader`.

    Attributes:
        samples: the stream that training or validation would have.
        split: "train" or "val".
        batch_size: number of images in a batch; the last batch of "val" may have fewer. A batch of "train" repeats
            images where the split has fewer.
        epoch: epoch whose order and augmentation "train" has.
        transforms: transforms that are applied to each sample.
        target_format: columns 1 to 5 of the targets.
    """

    samples: Samples
    split: Split
    batch_size: int
    epoch: int
    transforms: tuple[SampleTransform, ...]
    target_format: TargetFormat

    @property
    def index(self) -> Index:
        """Images and annotations."""
        return self.samples.index

    def __len__(self) -> int:
        images = len(self.index)
        return max(1, images // self.batch_size) if self.split == "train" else -(-images // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.split == "train":
            # From the first multiple of the batch on: chunks are cut at fixed positions.
            start = -(-self.epoch * len(self.index) // self.batch_size) * self.batch_size
            batches: Iterator[Batch] = local_train_batches(
                self.samples, start, start + len(self) * self.batch_size, self.batch_size
            )
        else:
            batches = local_eval_batches(self.samples, self.batch_size)
        for batch in batches:
            yield self._finish(batch)

    def _finish(self, batch: Batch) -> tuple[Tensor, Tensor]:
        if not self.transforms and self.target_format == TargetFormat.LABEL_CXCYWH:
            return batch.images, batch.targets
        height, width = batch.images.shape[2:]
        images, targets = [], []
        for number, (image, position) in enumerate(zip(batch.images, batch.positions.tolist(), strict=True)):
            mine = batch.targets[batch.targets[:, 0] == number].numpy()
            sample = Sample(image.permute(1, 2, 0).numpy(), cxcywh_to_xyxy(mine[:, 2:]), mine[:, 1].astype(np.int32))
            rng = np.random.default_rng((self.samples.seed, position))
            for transform in self.transforms:
                sample = transform(sample, rng)
            columns = self.target_format.from_xyxy(sample.boxes, sample.labels, width, height)
            images.append(torch.from_numpy(sample.image).permute(2, 0, 1))
            targets.append(np.insert(columns.astype(np.float32), 0, number, axis=1))
        return torch.stack(images), torch.from_numpy(np.concatenate(targets))


def loader(
    source: str | Path | Recipe,
    overrides: Sequence[str] = (),
    *,
    split: Split | None = None,
    batch_size: int | None = None,
    epoch: int = 0,
    transforms: Sequence[SampleTransform] = (),
    target_format: str | TargetFormat = TargetFormat.LABEL_CXCYWH,
) -> Loader:
    """Return the batches that a training or a validation would get, made in this process.

        images, targets = next(iter(raydet.data.loader("coco2017_train", ["data.root=/data/coco"])))

    Args:
        source: a recipe, its name or path; or a recipe's name and `_train` or `_val`, as `demo_val`; or SuperGradients'
            names, as `coco2017_train` and `coco2017_val_ppyoloe`.
        overrides: `section.key=value`.
        split: "train" or "val"; None: as the name says, or else "train".
        batch_size: number of images in a batch; None: the recipe's `train.batch_size` or `eval.batch_size`.
        epoch: epoch of the training; each has its own order and augmentation.
        transforms: transforms that are applied to each sample, such as `Standardize` and `Normalize`.
        target_format: format of the targets, see `TargetFormat`.

    Returns:
        An iterable of (images, targets): images uint8 [B, 3, H, W] BGR unless `transforms` change that; targets float32
        [N, 6]: image in the batch, then `target_format`, by default class, cx, cy, w, h in pixels.

    Raises:
        RaydetError: there is no such recipe, or its data cannot be read.
    """
    named = re.fullmatch(r"(.+?)_(train|val)_?(.*)", source) if isinstance(source, str) else None
    if named and source not in shipped():
        prefix, ending, family = named.groups()
        source = prefix if prefix in shipped() else f"{prefix}_{_MODELS.get(family, family)}"
        split = split or ("train" if ending == "train" else "val")
    split = split or "train"
    recipe = load(source, overrides)
    from raydet.models import family_of

    index = load_index(recipe.data, split, Problems(recipe.data.on_error, recipe.data.max_errors))
    resize = family_of(recipe.model.name).preprocessing.resize
    samples = (train_samples if split == "train" else val_samples)(recipe, index, resize)
    size = batch_size or (recipe.train if split == "train" else recipe.eval).batch_size
    if split == "val":
        samples = replace(samples, chunk_size=size)
    elif size > len(index):
        logger.warning("a batch takes %d images, but there are %d: it repeats them; lower batch_size", size, len(index))
    return Loader(samples, split, size, epoch, tuple(transforms), TargetFormat(target_format))
