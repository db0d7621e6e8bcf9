"""The recipe: every setting of a training, its default, unit and meaning, in one typed tree.

A recipe is YAML, by a shipped name or a path, and `section.key=value` overrides on top; unknown keys are refused.
"""

from raydet.recipe.data import Augment, Data, OwnTransform
from raydet.recipe.loading import keys_given, load, override, shipped
from raydet.recipe.section import Section
from raydet.recipe.track import (
    DetectionVisualizationCallback,
    ExtremeBatchDetectionVisualizationCallback,
    Pictures,
    Track,
)
from raydet.recipe.training import (
    LOSSES,
    Eval,
    Model,
    OwnLoss,
    PPYoloELoss,
    Scale,
    SSDLoss,
    Train,
    YoloXDetectionLoss,
    YoloXFastDetectionLoss,
)
from raydet.recipe.tree import Recipe, describe, differences
from raydet.recipe.tune import Space, Tune

__all__ = [
    "LOSSES",
    "Augment",
    "Data",
    "DetectionVisualizationCallback",
    "Eval",
    "ExtremeBatchDetectionVisualizationCallback",
    "Model",
    "OwnLoss",
    "OwnTransform",
    "PPYoloELoss",
    "Pictures",
    "Recipe",
    "SSDLoss",
    "Scale",
    "Section",
    "Space",
    "Track",
    "Train",
    "Tune",
    "YoloXDetectionLoss",
    "YoloXFastDetectionLoss",
    "describe",
    "differences",
    "keys_given",
    "load",
    "override",
    "shipped",
]
