"""All settings as one tree: the recipe, how it is written, and in what two of them differ."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from raydet.recipe.data import Augment, Data
from raydet.recipe.section import Section
from raydet.recipe.track import Track
from raydet.recipe.training import Eval, Loss, Model, Scale, Train, YoloXFastDetectionLoss
from raydet.recipe.tune import Tune
from raydet.yaml_text import write


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError("the folder of the run would lie outside storage")
    if name and not path.name:
        raise ValueError("the folder of the run would be storage itself")
    return name


class Recipe(Section):
    """All settings of a training."""

    name: Annotated[str, AfterValidator(_inside)] = Field(
        "", description="name of the run: its folder below storage; empty: the name of the recipe"
    )
    storage: str = Field("runs", description="folder of all runs: s3://…, gs://… or a path that all nodes share")
    seed: int = Field(
        0, ge=0, description="seed of the initial weights, the order of the images and their augmentation"
    )
    model: Model = Model()
    data: Data = Data()
    augment: Augment = Augment()
    loss: Loss = YoloXFastDetectionLoss()
    train: Train = Train()
    eval: Eval = Eval()
    scale: Scale = Scale()
    track: Track = Track()
    tune: Tune = Tune()


def describe(recipe: Recipe) -> str:
    """Return the recipe as YAML, each key under its description."""
    lines: list[str] = []
    for name, field in Recipe.model_fields.items():
        value = getattr(recipe, name)
        if isinstance(value, Section):
            lines += ["", f"# {value.__doc__}", f"{name}:"]
            fields = type(value).model_fields
            for key, inner in value.model_dump(mode="json").items():
                described = fields[key].description if key in fields else "argument of the class"
                lines += _entry(key, inner, described or "", indent="  ")
        else:
            lines += _entry(name, value, field.description or "", indent="")
    return "\n".join(lines) + "\n"


def differences(ours: Recipe, theirs: Recipe) -> list[str]:
    """Return a line for each setting in which two recipes differ, but for those that do not change the result.

    The name is none of these: it is that of the folder, which may have been renamed.
    """
    mine, other = flat(ours.model_dump(mode="json")), flat(theirs.model_dump(mode="json"))
    harmless = ("scale.", "track.", "tune.", "data.root", "storage", "name")
    return [
        f"{key}: {other.get(key, 'absent')} there, {mine.get(key, 'absent')} here"
        for key in {**mine, **other}  # another loss has other arguments
        if not key.startswith(harmless) and mine.get(key) != other.get(key)
    ]


def _entry(key: str, value: Any, description: str, indent: str) -> list[str]:
    comment = textwrap.wrap(description, width=100, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
    return [*comment, f"{indent}{key}: {write(value)}"]


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a tree of settings as `section.key` → value."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found
