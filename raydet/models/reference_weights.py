"""Checkpoints of the projects that the detectors come from, under our names.

| names of | file | licence |
|---|---|---|
| Megvii's YOLOX | `yolox_*.pth`: {"model": tensors}, or the tensors alone | Apache-2.0 |
| raydet | a checkpoint folder, or its `model.safetensors` | that of the weights it began with |
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raydet.errors import RaydetError

logger = logging.getLogger(__name__)

_WHERE_TO_GET = (
    "{weights!r} is neither a weights file nor a checkpoint folder, and raydet downloads none. For YOLOX on COCO, get "
    "the .pth of your model from the releases of github.com/Megvii-BaseDetection/YOLOX (yolox_nano.pth for yolox_n, "
    "yolox_tiny.pth for yolox_t, yolox_s.pth …; licence Apache-2.0), and pass its path: model.weights=PATH, or "
    "raydet.models.get(name, num_classes, weights=PATH)"
)

# Megvii's names → ours, each on the start of a name; the rest of our names are theirs.
_MEGVII = (
    (re.compile(r"^backbone\.((?:lateral|reduce|bu)_conv\d|C3_[pn]\d)\."), r"neck.\1."),
    (re.compile(r"^backbone\.backbone\.stem\.conv\."), "backbone.stem."),
    (re.compile(r"^backbone\.backbone\."), "backbone."),
)


# YOLOX's own trainer keeps its best AP as a NumPy number beside the weights.
_scalar = np.float64(0).__reduce__()[0]
_NUMPY_NUMBERS: list[Any] = [
    np.dtype,
    type(np.dtype(np.float64)),
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]


@dataclass(frozen=True)
class Weights:
    """Tensors under our names.

    Attributes:
        tensors: name → tensor.
        source: whose names the file had, for messages.
        licence: of these weights, as far as it is known.
    """

    tensors: dict[str, Tensor]
    source: str
    licence: str


def read_weights(weights: str | Path) -> Weights:
    """Read a checkpoint and rename its tensors.

    Raises:
        RaydetError: there is no such file, it cannot be read safely, or its names are of no known project.
    """
    path = Path(weights)
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise RaydetError(_WHERE_TO_GET.format(weights=str(weights)))
    tensors = _tensors(path)
    if any(name.startswith("backbone.backbone.") for name in tensors):
        return Weights(_from_megvii(tensors), "Megvii's YOLOX", "Apache-2.0 (Megvii YOLOX)")
    if any(name.startswith("head.") for name in tensors) and any(name.startswith("backbone.") for name in tensors):
        return Weights(tensors, "raydet", _own_licence(path.parent / "config.json"))
    raise RaydetError(
        f"{path}: tensors like {next(iter(tensors), '(none)')} are of no model known here; "
        "raydet reads its own checkpoints and those of Megvii's YOLOX"
    )


def load_weights(model: nn.Module, weights: str | Path, strict: bool = False) -> Weights:
    """Load a checkpoint into a model; prediction layers of another class count stay as they are, with a warning.

    Args:
        model: to load into.
        weights: path.
        strict: refuse other class counts too.

    Raises:
        RaydetError: tensors are missing, left over or of another shape; the message names some.
    """
    read = read_weights(weights)
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    given = {name: tensor for name, tensor in read.tensors.items() if not name.endswith("num_batches_tracked")}
    replaced = [name for name in own if "cls_preds" in name and name in given and own[name].shape != given[name].shape]
    wrong = [f"{name} {list(given[name].shape)}" for name in given if name not in own]
    wrong += [f"{name} is missing" for name in own if name not in given]
    wrong += [
        f"{name} {list(given[name].shape)} instead of {list(own[name].shape)}"
        for name in own
        if name in given and name not in replaced and own[name].shape != given[name].shape
    ]
    if wrong:
        raise RaydetError(
            f"{weights} is not of a {type(model).__name__}: {len(wrong)} tensors do not fit, such as "
            + "; ".join(wrong[:3])
        )
    if replaced and strict:
        count, wanted = len(given[replaced[0]]), len(own[replaced[0]])
        raise RaydetError(f"{weights} detects {count} classes, the data has {wanted}: train it on them first")
    if replaced:
        logger.warning(
            "%s is for %d classes: the class prediction layers for %d classes start afresh",
            weights,
            len(given[replaced[0]]),
            len(own[replaced[0]]),
        )
    model.load_state_dict({name: tensor for name, tensor in given.items() if name not in replaced}, strict=False)
    return read


def _tensors(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        try:
            tensors: dict[str, Tensor] = load_file(path)
        except Exception as error:  # safetensors has its own, outside the usual tree
            raise RaydetError(f"{path} is damaged: {error}") from None
        return tensors
    try:
        with torch.serialization.safe_globals(_NUMPY_NUMBERS):
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its unpickler meets
        reason = str(error).strip().partition("\n")[0]
        raise RaydetError(f"{path} is not a checkpoint that can be loaded safely: {reason}") from None
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise RaydetError(f"{path} holds no tensors by name")
    return {str(name).removeprefix("module."): tensor for name, tensor in content.items()}


def _own_licence(config: Path) -> str:
    try:
        return str(json.loads(config.read_text())["licence"])
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown: the checkpoint's config.json is not beside it"


def _from_megvii(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    def ours(name: str) -> str:
        for pattern, replacement in _MEGVII:
            name = pattern.sub(replacement, name)
        return name

    stem = "backbone.backbone.stem.conv.conv.weight"
    return {ours(name): _focus_as_convolution(tensor) if name == stem else tensor for name, tensor in tensors.items()}


def _focus_as_convolution(kernel: Tensor) -> Tensor:
    """[C, 12, 3, 3] over the four slices of Focus → [C, 3, 6, 6] of stride 2 over the pixels, the same function."""
    if kernel.shape[1:] != (12, 3, 3):
        raise RaydetError(f"the stem of this YOLOX is {list(kernel.shape)}, not a Focus of [C, 12, 3, 3]")
    pixels = kernel.new_empty(len(kernel), 3, 6, 6)
    for slot, (row, column) in enumerate(((0, 0), (1, 0), (0, 1), (1, 1))):
        pixels[:, :, row::2, column::2] = kernel[:, 3 * slot : 3 * slot + 3]
    return pixels
