"""The detectors, by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from raydet.errors import RaydetError, did_you_mean
from raydet.models import dfine, ppyoloe, reference_weights, ssd, yolo_nas, yolox
from raydet.models.dfine import DFine_L, DFine_M, DFine_N, DFine_S, DFine_X
from raydet.models.family import Detector, Family, Preprocessing
from raydet.models.ppyoloe import PPYoloE_L, PPYoloE_M, PPYoloE_S, PPYoloE_X
from raydet.models.reference_weights import Weights
from raydet.models.ssd import SSDLiteMobileNetV2
from raydet.models.yolo_nas import YoloNAS_L, YoloNAS_M, YoloNAS_S
from raydet.models.yolox import YoloX_L, YoloX_M, YoloX_N, YoloX_S, YoloX_T, YoloX_X, YoloXHead, YoloXPAN

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "FAMILIES",
    "DFine_L",
    "DFine_M",
    "DFine_N",
    "DFine_S",
    "DFine_X",
    "Detector",
    "Family",
    "PPYoloE_L",
    "PPYoloE_M",
    "PPYoloE_S",
    "PPYoloE_X",
    "Preprocessing",
    "SSDLiteMobileNetV2",
    "YoloNAS_L",
    "YoloNAS_M",
    "YoloNAS_S",
    "YoloXHead",
    "YoloXPAN",
    "YoloX_L",
    "YoloX_M",
    "YoloX_N",
    "YoloX_S",
    "YoloX_T",
    "YoloX_X",
    "family_of",
    "get",
    "load_weights",
]

FAMILIES: tuple[Family, ...] = (ssd.FAMILY, yolox.FAMILY, ppyoloe.FAMILY, yolo_nas.FAMILY, dfine.FAMILY)
_BY_NAME: dict[str, Family] = {name: family for family in FAMILIES for name in family.models}


def family_of(model: str | nn.Module) -> Family:
    """Return the family of a model's name, or of a model by its head.

    Raises:
        RaydetError: there is none.
    """
    if isinstance(model, str):
        if model not in _BY_NAME:
            known = ", ".join(_BY_NAME)
            raise RaydetError(f"no model is named {model!r}{did_you_mean(model, _BY_NAME)} (known: {known})")
        return _BY_NAME[model]
    head = getattr(model, "head", None)
    for family in FAMILIES:
        if isinstance(head, family.head):
            return family
    heads = ", ".join(family.head.__name__ for family in FAMILIES)
    raise RaydetError(f"{type(model).__name__} has none of the heads that raydet has losses for: {heads}")


def get(
    name: str,
    num_classes: int = 80,
    weights: str | Path | None = None,
    image_size: tuple[int, int] | None = None,
    *,
    pretrained_weights: Literal["coco"] | None = None,
    num_queries: int | None = None,
) -> Detector:
    """Build a detector.

    Args:
        name: name of the model, such as yolox_s, ppyoloe_s, yolo_nas_s or ssd_lite_mobilenet_v2.
        num_classes: number of classes that the prediction layers tell apart.
        weights: path or URI of a checkpoint of raydet, or of a file with the names of Megvii's YOLOX or of
            SuperGradients. Prediction layers for another number of classes start afresh, and a warning says so.
            "coco", or a model's name: the published COCO weights, downloaded once. "imagenet": those of the backbone
            alone. None: random weights.
        image_size: (height, width) in pixels, for a model that is built for one size (SSD); None: its usual size.
        pretrained_weights: SuperGradients' name for `weights="coco"`.
        num_queries: most boxes of an image, for D-FINE; None: 300.

    Raises:
        RaydetError: no such model, no such file, or a file of another model; `weights` and `pretrained_weights`; or
            `num_queries` of a model without queries.
    """
    if pretrained_weights not in (None, "coco"):
        raise RaydetError(
            f"pretrained_weights: {pretrained_weights!r} is not 'coco'; weights='imagenet' are those of the backbone"
        )
    if pretrained_weights is not None and weights is not None:
        raise RaydetError("weights and pretrained_weights are both given: choose one")
    family = family_of(name)
    settings: dict[str, Any] = {}
    if family.fixed_size and image_size is not None:
        settings["image_size"] = image_size
    if num_queries is not None:
        if not family.has_queries:
            raise RaydetError(f"num_queries is {num_queries}: {family.name} has no queries")
        settings["num_queries"] = num_queries
    model = family.models[name](num_classes, **settings)
    if weights is not None or pretrained_weights is not None:
        from raydet.models.download import fetch, local_weights
        from raydet.models.published import published

        load_weights(model, fetch(published(name)) if weights is None else local_weights(weights, name))
    return model


def load_weights(
    model: Detector, weights: str | Path, strict: bool = False, class_names: Sequence[str] | None = None
) -> Weights:
    """Load a checkpoint of any known project into a model: see `raydet.models.reference_weights.load_weights`."""
    adapters = [adapter for family in FAMILIES for adapter in family.adapters]
    return reference_weights.load_weights(model, weights, adapters, strict, class_names)
