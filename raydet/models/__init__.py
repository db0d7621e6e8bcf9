"""The detectors, by name."""

from __future__ import annotations

from pathlib import Path

from raydet.errors import RaydetError, did_you_mean
from raydet.models import yolox
from raydet.models.family import Detector, Family, Preprocessing
from raydet.models.reference_weights import load_weights
from raydet.models.yolox import YoloX_L, YoloX_M, YoloX_N, YoloX_S, YoloX_T, YoloX_X

__all__ = [
    "FAMILIES",
    "Detector",
    "Family",
    "Preprocessing",
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

FAMILIES: dict[str, Family] = {name: family for family in (yolox.FAMILY,) for name in family.models}


def family_of(name: str) -> Family:
    """Return the family of a model's name.

    Raises:
        RaydetError: no model has this name.
    """
    if name not in FAMILIES:
        raise RaydetError(f"no model is named {name!r}{did_you_mean(name, FAMILIES)} (known: {', '.join(FAMILIES)})")
    return FAMILIES[name]


def get(name: str, num_classes: int = 80, weights: str | Path | None = None) -> Detector:
    """Build a detector.

    Args:
        name: yolox_n, yolox_t, yolox_s, yolox_m, yolox_l or yolox_x.
        num_classes: of the prediction layers.
        weights: path of a checkpoint, of raydet or under Megvii's names. Prediction layers for another class count
            start afresh, and a warning says so. Nothing is ever downloaded.

    Raises:
        RaydetError: no such model, no such file, or a file of another model.
    """
    model = family_of(name).models[name](num_classes)
    if weights is not None:
        load_weights(model, weights)
    return model
