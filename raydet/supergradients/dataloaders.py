"""SuperGradients' `dataloaders.get`: its names and parameters, for `raydet.data.loader`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raydet.data.pipeline import Loader, loader
from raydet.data.transform_list import TransformList
from raydet.errors import RaydetError, did_you_mean
from raydet.yaml_text import write as write_yaml

# Parameters of SuperGradients' data sets → keys of a recipe; {} is the split.
_DATASET = {
    "data_dir": "data.root",
    "subdir": "data.{}_images",
    "json_file": "data.{}_annotations",
    "input_dim": "data.image_size",
    "max_num_samples": "data.max_num_samples",
    "class_inclusion_list": "data.class_inclusion_list",
    "ignore_empty_annotations": "data.ignore_empty_annotations",
}
# Parameters of PyTorch's DataLoader that change how its batches are made, not what is in them.
_WITHOUT_MEANING = ("num_workers", "persistent_workers", "pin_memory", "prefetch_factor")


def get(
    name: str,
    dataset_params: Mapping[str, Any] | None = None,
    dataloader_params: Mapping[str, Any] | None = None,
) -> Loader:
    """Return the batches that a training or a validation would get, made in this process.

    Args:
        name: name such as coco2017_train, coco2017_val or coco2017_train_ppyoloe.
        dataset_params: data_dir, subdir, json_file, input_dim, max_num_samples, class_inclusion_list,
            ignore_empty_annotations and transforms, with SuperGradients' meanings.
        dataloader_params: batch_size; num_workers, persistent_workers, pin_memory and prefetch_factor are taken, and
            change nothing, as the batches are made in this process.

    Returns:
        An iterable of (images, targets): images uint8 [B, 3, H, W] BGR; targets float32 [N, 6]: image in the batch,
        class, cx, cy, w, h in pixels.

    Raises:
        RaydetError: a parameter has no meaning here, or see `raydet.data.loader`.
    """
    dataset, loading = dict(dataset_params or {}), dict(dataloader_params or {})
    for given, key, known in (
        (dataset, "dataset_params", [*_DATASET, "transforms"]),
        (loading, "dataloader_params", ["batch_size", *_WITHOUT_MEANING]),
    ):
        for each in given:
            if each not in known:
                raise RaydetError(
                    f"{key}.{each} has no meaning here{did_you_mean(each, known)} (known: {', '.join(known)}); see "
                    "docs/from_supergradients.md"
                )
    if "json_file" in dataset:  # SuperGradients looks for it in this folder
        dataset["json_file"] = f"annotations/{dataset['json_file']}"
    transforms = TransformList.read(dataset.pop("transforms", None) or ())
    split = "val" if "_val" in name else "train"
    overrides = [f"{_DATASET[each].format(split)}={write_yaml(value)}" for each, value in dataset.items()]
    overrides += [f"augment.{key}={write_yaml(value)}" for key, value in transforms.augment.items()]
    return loader(name, overrides, batch_size=loading.get("batch_size"), transforms=transforms.own)
