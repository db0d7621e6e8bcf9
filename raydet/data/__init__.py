"""Data sets: every format becomes an index, and the index becomes a stream of augmented batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from raydet.data.dataset import COCODetectionDataset, DetectionDataset, register_dataset
    from raydet.data.index import Index
    from raydet.data.loaders import loader
    from raydet.data.records import index_of_records
    from raydet.data.target_format import TargetFormat
    from raydet.data.transforms import Sample

_HOMES = {
    "Index": "index",
    "Sample": "transforms",
    "TargetFormat": "target_format",
    "index_of_records": "records",
    "loader": "loaders",
}


def __getattr__(name: str) -> Any:
    """Import on first use: the data tasks do without most of it, and without torch."""
    if name not in __all__:
        raise AttributeError(f"module 'raydet.data' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"raydet.data.{_HOMES.get(name, 'dataset')}"), name)
