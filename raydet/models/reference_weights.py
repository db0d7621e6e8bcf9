"""Checkpoints of the projects that the detectors come from, and raydet's own.

A file holds tensors by name, alone or under a key such as "model" or "ema_net"; each family knows how to translate the
names of its reference projects (`Family.adapters`).
"""

from __future__ import annotations

import io
import json
import logging
import zipfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raydet.errors import RaydetError
from raydet.models.family import Adapter, Detector

logger = logging.getLogger(__name__)

_WHERE_TO_GET = (
    "{weights!r} is neither a weights file nor a checkpoint folder, and raydet downloads none. For YOLOX on COCO, get "
    "the .pth of your model from the releases of github.com/Megvii-BaseDetection/YOLOX (yolox_nano.pth for yolox_n, "
    "yolox_tiny.pth for yolox_t, yolox_s.pth …; licence Apache-2.0); checkpoints of super-gradients are read too. Pass "
    "the path, or a URI such as s3://bucket/yolox_s.pth: model.weights=PATH, or "
    "raydet.models.get(name, num_classes, weights=PATH)"
)

# Where trainers keep the tensors in their files, the moving average first.
_KEYS = ("ema_net", "net", "model", "state_dict")


class _Foreign:
    """Stands for what a trainer pickled beside the tensors, such as its settings: it takes all and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Foreign:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, value: Any) -> None: ...

    def extend(self, values: Any) -> None: ...


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


def read_weights(weights: str | Path, adapters: Sequence[Adapter], own: Collection[str]) -> Weights:
    """Read a checkpoint and translate the names of its tensors.

    Args:
        weights: path or URI of a weights file, or path of a checkpoint folder.
        adapters: of all families; which one fits is seen from the names.
        own: names of the model's tensors; a file that has the same is raydet's.

    Raises:
        RaydetError: there is no such file, it cannot be read safely, or its names are of no known project.
    """
    path = Path(weights)
    if path.is_dir():
        path = path / "model.safetensors"
    source = str(weights) if is_uri(weights) else str(path)
    if not is_uri(weights) and not path.is_file():
        raise RaydetError(_WHERE_TO_GET.format(weights=str(weights)))
    tensors = _tensors(source, _read(source))
    if set(own) <= set(tensors):
        return Weights(tensors, "raydet", _own_licence(source))
    for adapter in adapters:
        if adapter.knows(tensors):
            return Weights(adapter.translate(tensors), adapter.source, adapter.licence)
    if all(any(name.startswith(part) for name in tensors) for part in ("backbone.", "head.")):
        return Weights(tensors, "raydet", _own_licence(source))
    raise RaydetError(
        f"{weights}: tensors like {next(iter(tensors), '(none)')} are of no model known here; raydet reads its own "
        f"checkpoints, and {', '.join(adapter.source for adapter in adapters)}"
    )


def load_weights(model: Detector, weights: str | Path, adapters: Sequence[Adapter], strict: bool = False) -> Weights:
    """Load a checkpoint into a model; prediction layers of another class count stay as they are, with a warning.

    The licence of the weights is kept as the model's.

    Args:
        model: to load into.
        weights: path or URI.
        adapters: see `read_weights`.
        strict: refuse other class counts too.

    Raises:
        RaydetError: tensors are missing, left over or of another shape; the message names some.
    """
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    read = read_weights(weights, adapters, own)
    given = {name: tensor for name, tensor in read.tensors.items() if not name.endswith("num_batches_tracked")}
    shapes = {name: (given[name].shape, own[name].shape) for name in own if name in given}
    differ = {name: pair for name, pair in shapes.items() if pair[0] != pair[1]}
    replaced = [name for name, (a, b) in differ.items() if ".cls_preds." in name and a[1:] == b[1:]]
    wrong = [f"{name} {list(given[name].shape)}" for name in given if name not in own]
    wrong += [f"{name} is missing" for name in own if name not in given]
    wrong += [f"{name} {list(a)} instead of {list(b)}" for name, (a, b) in differ.items() if name not in replaced]
    if wrong:
        raise RaydetError(
            f"{weights} (a checkpoint of {read.source}) is not of a {type(model).__name__}: "
            f"{len(wrong)} tensors do not fit, such as {'; '.join(wrong[:3])}"
        )
    if replaced and strict:
        raise RaydetError(f"{weights} is not for the {model.num_classes} classes of the data: train it on them first")
    if replaced:
        logger.warning(
            "%s is for other classes: the layers that predict the %d classes here start afresh",
            weights,
            model.num_classes,
        )
    if "non-commercial" in read.licence:
        logger.warning("%s: %s", weights, read.licence)
    model.load_state_dict({name: tensor for name, tensor in given.items() if name not in replaced}, strict=False)
    model.licence = read.licence
    return read


def is_uri(weights: str | Path) -> bool:
    """Is this a URI, such as s3://bucket/yolox_s.pth, and no path?"""
    return "://" in str(weights)


def _read(source: str) -> bytes:
    """Read a path or URI whole."""
    from pyarrow import fs

    try:
        if not is_uri(source):
            return Path(source).read_bytes()
        filesystem, path = fs.FileSystem.from_uri(source)
        with filesystem.open_input_stream(path) as stream:
            content: bytes = stream.read()
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise RaydetError(f"{source} cannot be read: {reason}") from None
    return content


def _tensors(source: str, file: bytes) -> dict[str, Tensor]:
    if source.partition("?")[0].endswith(".safetensors"):
        from safetensors.torch import load

        try:
            tensors: dict[str, Tensor] = load(file)
        except Exception as error:  # safetensors has its own, outside the usual tree
            raise RaydetError(f"{source} is damaged: {error}") from None
        return tensors
    try:
        # Only tensors are made; a class or function of any other name is never imported, let alone called.
        is_zip = zipfile.is_zipfile(io.BytesIO(file))  # of older files torch cannot say what else is in them
        names = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(file)) if is_zip else []
        with torch.serialization.safe_globals([(_Foreign, name) for name in names]):
            content: Any = torch.load(io.BytesIO(file), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its unpickler meets
        reason = str(error).strip().partition("\n")[0]
        raise RaydetError(f"{source} is not a checkpoint that can be loaded safely: {reason}") from None
    if isinstance(content, Mapping):
        content = next((content[key] for key in _KEYS if isinstance(content.get(key), Mapping)), content)
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise RaydetError(f"{source} holds no tensors by name")
    return {str(name).removeprefix("module."): tensor for name, tensor in content.items()}


def _own_licence(source: str) -> str:
    file, question, query = source.partition("?")
    folder = file.rpartition("/")[0]
    try:
        return str(json.loads(_read(f"{folder}/config.json{question}{query}" if folder else "config.json"))["licence"])
    except (RaydetError, ValueError, KeyError, TypeError):
        return "unknown: the checkpoint's config.json is not beside it"
