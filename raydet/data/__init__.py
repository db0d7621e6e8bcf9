"""Data sets: every format becomes an index, and the index becomes a stream of augmented batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raydet.data.index import Index
    from raydet.data.own import COCODetectionDataset, DetectionDataset, TargetFormat, index_of_records, register_dataset
    from raydet.data.pipeline import loader
    from raydet.data.transforms import Sample

__all__ = [
    "COCODetectionDataset",
    "DetectionDataset",
    "Index",
    "Sample",
    "TargetFormat",
    "index_of_records",
    "loader",
    "register_dataset",
]

_HOMES = {"Index": "index", "Sample": "transforms", "loader": "pipeline"}


def __getattr__(name: str) -> Any:
    """Import on first use: the data tasks do without most of it, and without torch."""
    if name not in __all__:
        raise AttributeError(f"module 'raydet.data' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"raydet.data.{_HOMES.get(name, 'own')}"), name)
