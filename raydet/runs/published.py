"""Published weights as a checkpoint, so that all that takes a checkpoint takes a model's name."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raydet import models
from raydet.models.download import fetch, is_published
from raydet.models.published import published
from raydet.recipe import load
from raydet.runs import checkpoint


@contextmanager
def published_checkpoint(model: str) -> Iterator[Path]:
    """Give the folder of a checkpoint with the published COCO weights of a model; it is gone afterwards.

    Input size and thresholds are those of the recipe coco2017_{model}.

    Raises:
        RaydetError: the weights cannot be had, or are not those that were published.
    """
    recipe = load(f"coco2017_{model}")
    ids, names = coco_classes()
    detector = models.get(model, len(names), fetch(published(model)), recipe.data.image_size)
    config = checkpoint.Config(
        model=model,
        class_names=names,
        category_ids=ids,
        image_size=recipe.data.image_size,
        preprocessing=models.family_of(model).preprocessing,
        thresholds=recipe.eval,
        licence=published(model).licence,
    )
    with tempfile.TemporaryDirectory(prefix=f"{model}-") as folder:
        for name, content in checkpoint.pack(config, detector, None, checkpoint.Progress(), 0, {}).items():
            (Path(folder) / name).write_bytes(content)
        yield Path(folder)


def own_recipe(path: str | Path, recipe: str | None) -> str | None:
    """Return the recipe that is given; without one, for the name of a model with published weights, its COCO recipe."""
    return f"coco2017_{path}" if recipe is None and is_published(path) else recipe


def coco_classes() -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return the ids and the names of COCO's 80 classes, in COCO's order."""
    from torchvision.models.detection import SSDLite320_MobileNet_V3_Large_Weights as Known

    names = Known.COCO_V1.meta["categories"]  # by COCO's ids, 0 to 90, with gaps
    ids = tuple(number for number, name in enumerate(names) if name not in ("__background__", "N/A"))
    return ids, tuple(names[number] for number in ids)
