"""What the sections of a recipe have in common: the base class, and the types of their values."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Section(BaseModel):
    """A section of the recipe: frozen, and without keys that nobody reads."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def in_order(value: Any) -> Any:
    """Refuse a range whose first number is larger than its second."""
    if isinstance(value, list | tuple) and len(value) == 2 and value[0] > value[1]:
        raise ValueError("the first of the two must not be larger than the second")
    return value


Factor = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]
Side = Annotated[int, Field(gt=0, multiple_of=32)]
Label = Annotated[str, Field(pattern=r"^[^=]+=[^=]+$")]
Range = Annotated[tuple[Factor, Factor], BeforeValidator(in_order)]
