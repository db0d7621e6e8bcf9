"""The section tune: a sweep over settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from raydet.recipe.section import Factor, Section, in_order


class Space(Section):
    """What a sweep tries for a setting: one of these kinds."""

    grid: list[Any] | None = Field(None, min_length=1)
    choice: list[Any] | None = Field(None, min_length=1)
    uniform: Annotated[tuple[float, float] | None, BeforeValidator(in_order)] = None
    loguniform: Annotated[tuple[Factor, Factor] | None, BeforeValidator(in_order)] = None
    integer: Annotated[tuple[int, int] | None, BeforeValidator(in_order)] = None

    @model_validator(mode="after")
    def _one_kind(self) -> Space:
        if len(self.model_fields_set) != 1 or self.values is None:
            raise ValueError(f"it should be one of {', '.join(type(self).model_fields)}, with a list of values")
        return self

    @model_serializer(mode="wrap")
    def _only_it(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {self.kind: handler(self)[self.kind]}

    @property
    def kind(self) -> str:
        """Name of the kind."""
        (kind,) = self.model_fields_set
        return kind

    @property
    def values(self) -> Any:
        """All values, or the lowest and the highest."""
        return getattr(self, self.kind)


def _by_key(value: Any, prefix: str = "") -> Any:
    """Name the settings of a space by their whole keys, whether it has `loss.iou_weight:` or `loss: {iou_weight:`."""
    if not isinstance(value, Mapping):
        return value
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        is_section = isinstance(inner, Mapping) and all(isinstance(deeper, Mapping) for deeper in inner.values())
        flat |= _by_key(inner, f"{prefix}{key}.") if is_section else {f"{prefix}{key}": inner}
    return flat


class Tune(Section):
    """A sweep over settings, by raydet tune; eval.watch decides which trial is best."""

    space: Annotated[dict[str, Space], BeforeValidator(_by_key)] = Field(
        {},
        description="what to try for which key of this recipe: {grid: [a, b]} tries all, {choice: [a, b]} draws "
        "one, {uniform: [low, high]}, {loguniform: [low, high]} and {integer: [low, high]} draw a "
        "number; such as loss.iou_weight: {loguniform: [1, 10]}",
    )
    search: Literal["random", "grid", "optuna"] = Field(
        "random",
        description="how values are chosen: random, grid (each combination once) or optuna (Optuna's TPE, which "
        "learns from earlier trials; pip install 'raydet[tune]')",
    )
    trials: int = Field(
        16,
        ge=1,
        description="number of trials, with search: optuna or random; with random, for each combination of the grid"
        " keys",
    )
    stop: Literal["asha", "hyperband", "median", "none"] = Field(
        "asha",
        description="rule that ends trials early because they are behind: asha, hyperband (several asha with later "
        "and later first cuts), median (worse than the mean of the others so far) or none",
    )
    grace_epochs: int = Field(1, ge=1, description="number of epochs before which no trial is ended")
    reduction_factor: float = Field(
        3.0, gt=1, description="one in this many trials goes on at each cut, with stop: asha or hyperband"
    )
    concurrent: int | None = Field(
        None,
        ge=1,
        description="number of trials at once, each with the workers of scale; null: as many as there is room for",
    )
    hours: float | None = Field(
        None, gt=0, description="hours after which the sweep ends all its trials; null: no limit"
    )
