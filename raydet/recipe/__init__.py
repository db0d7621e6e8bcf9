"""The recipe: every setting of a training, its default, unit and meaning, in one typed tree.

A recipe is a YAML file, a shipped one or the user's own, with `section.key=value` overrides on top. It holds only what
differs from the defaults; unknown keys are refused. `describe` writes the whole recipe, each key under its meaning.

A new setting is a field of its section, with a default and a description. No shipped recipe has to name it.
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
    DFineLoss,
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
    "DFineLoss",
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
