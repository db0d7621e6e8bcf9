"""raydet: train, tune and run object detectors on Ray."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raydet.api import evaluate, train
    from raydet.predict.predictor import load
    from raydet.tuning.sweep import tune

__version__ = "0.1.0"
__all__ = ["evaluate", "load", "train", "tune"]

_HOMES = {
    "train": "raydet.api",
    "evaluate": "raydet.api",
    "load": "raydet.predict.predictor",
    "tune": "raydet.tuning.sweep",
}

_MODULES = (
    "data",
    "errors",
    "losses",
    "metrics",
    "models",
    "postprocess",
    "recipe",
    "supergradients",
    "tracking",
    "visualization",
)


def __getattr__(name: str) -> Any:
    """Import on first use: torch takes seconds, and the data tasks and `raydet --help` do without it."""
    if name not in (*_HOMES, *_MODULES):
        raise AttributeError(f"module 'raydet' has no attribute {name!r}")
    from importlib import import_module

    if name in _MODULES:
        return import_module(f"raydet.{name}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted((*globals(), *__all__, *_MODULES))
