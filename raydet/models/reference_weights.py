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
from raydet.yaml_text import write as write_yaml

logger = logging.getLogger(__name__)

_WHERE_TO_GET = (
    "{weights!r} is neither a weights file nor a checkpoint folder. model.weights=coco, or the name of a model that "
    "`raydet weights` lists, is its published COCO weights, model.weights=imagenet those of its "
    "backbone; else pass a path, or a URI such as s3://bucket/yolox_s.pth"
)

# Where trainers keep the tensors in their files, the moving average first.
_EMBEDDING = ".class_embed."  # in the name of a table with a row a class
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
        source: project whose names the file had, for messages.
        licence: licence of the weights, as far as it is known.
        class_names: name of each class that the weights tell apart; None: unknown, no config.json is beside them.
        only: see `Adapter`.
    """

    tensors: dict[str, Tensor]
    source: str
    licence: str
    class_names: tuple[str, ...] | None = None
    only: str = ""


def read_weights(weights: str | Path, adapters: Sequence[Adapter], own: Collection[str]) -> Weights:
    """Read a checkpoint and translate the names of its tensors.

    Args:
        weights: path or URI of a weights file, or path of a checkpoint folder.
        adapters: adapters of all families; the names of the tensors tell which one fits.
        own: names of the model's tensors; a file that has these names is raydet's.

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
        return Weights(tensors, "raydet", *_own_config(source))
    for adapter in adapters:
        if adapter.knows(tensors):
            return Weights(adapter.translate(tensors), adapter.source, adapter.licence, only=adapter.only)
    if all(any(name.startswith(part) for name in tensors) for part in ("backbone.", "head.")):
        return Weights(tensors, "raydet", *_own_config(source))
    raise RaydetError(
        f"{weights}: tensors like {next(iter(tensors), '(none)')} are of no model known here; raydet reads its own "
        f"checkpoints, and {', '.join(adapter.source for adapter in adapters)}"
    )


def load_weights(
    model: Detector,
    weights: str | Path,
    adapters: Sequence[Adapter],
    strict: bool = False,
    class_names: Sequence[str] | None = None,
) -> Weights:
    """Load a checkpoint into a model.

    Where the names of the classes are known on both sides, the prediction layers keep what the weights know of each
    class by its name, and begin afresh for the others; else they begin afresh where the number of classes differs. A
    warning says so. The licence of the weights is kept as the model's.

    Args:
        model: model to load the weights into.
        weights: path or URI of the weights.
        adapters: see `read_weights`.
        strict: refuse weights with other classes, or with another order or number of classes.
        class_names: name of each class of the model; None: unknown.

    Raises:
        RaydetError: tensors are missing, left over or of another shape; the message names some. Or see `strict`.
    """
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    read = read_weights(weights, adapters, own)
    given = {name: tensor for name, tensor in read.tensors.items() if not name.endswith("num_batches_tracked")}
    shapes = {name: (given[name].shape, own[name].shape) for name in own if name in given}
    differ = {name: pair for name, pair in shapes.items() if pair[0] != pair[1]}
    predictions = [name for name, (a, b) in shapes.items() if _of_classes(name) and a[1:] == b[1:]]
    replaced = [name for name in differ if name in predictions]
    wrong = [f"{name} {list(given[name].shape)}" for name in given if name not in own]
    wrong += [f"{name} is missing" for name in own if name not in given and name.startswith(read.only)]
    wrong += [f"{name} {list(a)} instead of {list(b)}" for name, (a, b) in differ.items() if name not in replaced]
    if wrong:
        raise RaydetError(
            f"{weights} (a checkpoint of {read.source}) is not of a {type(model).__name__}: "
            f"{len(wrong)} tensors do not fit, such as {'; '.join(wrong[:3])}"
        )
    if class_names is not None and read.class_names is not None and tuple(class_names) != read.class_names:
        if strict:
            raise RaydetError(other_classes(str(weights), read.class_names, class_names))
        known = _by_name(model, {name: given[name] for name in predictions}, read.class_names, class_names)
        _say_which(str(weights), [] if known is None else read.class_names, class_names)
        replaced = predictions if known is None else []
        given |= known or {}
    elif replaced and strict:
        raise RaydetError(f"{weights} is not for the {model.num_classes} classes of the data: train it on them first")
    elif replaced:
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


def other_classes(source: str, theirs: Sequence[str], ours: Sequence[str]) -> str:
    """Return a line that says how the classes of a checkpoint differ from those of the data.

    Args:
        source: where the checkpoint comes from.
        theirs: names of the checkpoint's classes.
        ours: names of the data's classes.
    """
    if sorted(theirs) == sorted(ours):
        place = next(number for number, names in enumerate(zip(theirs, ours, strict=True)) if names[0] != names[1])
        return (
            f"{source} detects the same classes in another order than the data has: number {place} is "
            f"{theirs[place]!r} there and {ours[place]!r} here; "
            f"'data.class_inclusion_list={write_yaml(list(theirs))}' puts the data's in that order"
        )
    unknown = [name for name in ours if name not in theirs]
    missing = [name for name in theirs if name not in ours]
    told = [f"{what} {_listed(names)}" for what, names in (("it lacks", unknown), ("the data lacks", missing)) if names]
    return (
        f"{source} detects {len(theirs)} classes that are not the {len(ours)} of the data"
        f"{': ' * bool(told)}{', '.join(told)}"
    )


def _of_classes(name: str) -> bool:
    """Has a tensor of this name rows for the classes?"""
    return ".cls_preds." in name or _EMBEDDING in name


def _by_name(
    model: Detector, tensors: Mapping[str, Tensor], theirs: Sequence[str], ours: Sequence[str]
) -> dict[str, Tensor] | None:
    """Return a model's prediction layers with the rows of the classes that weights know; None: they know none of them.

    Args:
        model: the model before its weights are loaded.
        tensors: tensors of the weights, by the names of the model's prediction layers.
        theirs: names of the weights' classes.
        ours: names of the model's classes.
    """
    if not set(theirs) & set(ours):
        return None
    background = getattr(model.head, "background", None)
    first = background or 0
    state, found = model.state_dict(), {}
    for name, tensor in tensors.items():
        after = 1 if _EMBEDDING in name else 0  # a row for no class at all
        rows, rest = divmod(len(tensor) - after, first + len(theirs))
        if rest or (background is None and rows != 1):  # a head of one's own: which row is whose is not known
            return None
        shape = (-1, rows, *tensor.shape[1:])
        given = tensor[: len(tensor) - after].reshape(shape)
        whole = state[name].clone()
        whole[len(whole) - after :] = tensor[len(tensor) - after :].to(whole)
        mixed = whole[: len(whole) - after].reshape(shape)
        mixed[:first] = given[:first].to(mixed)
        for number, each in enumerate(ours):
            if each in theirs:
                mixed[first + number] = given[first + theirs.index(each)].to(mixed)
        found[name] = whole
    return found


def _say_which(weights: str, theirs: Sequence[str], ours: Sequence[str]) -> None:
    """Warn of what the prediction layers know; `theirs`: the names of the classes whose rows are kept."""
    unknown = [name for name in ours if name not in theirs]
    if not unknown:
        logger.warning(
            "%s has its classes in another order: its prediction layers are put in that of the data", weights
        )
    elif len(unknown) == len(ours):
        logger.warning(
            "%s is for other classes: the layers that predict the %d classes here start afresh: %s",
            weights,
            len(ours),
            _listed(unknown),
        )
    else:
        logger.warning(
            "%s does not know %s: the prediction layers start afresh for these classes, and keep the others by name",
            weights,
            _listed(unknown),
        )


def _listed(names: Sequence[str]) -> str:
    most = 20
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


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
        is_zip = zipfile.is_zipfile(io.BytesIO(file))  # for older files torch cannot say what else is in them
        names = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(file)) if is_zip else []
        with torch.serialization.safe_globals([(_Foreign, name) for name in names]):
            content: Any = torch.load(io.BytesIO(file), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its unpickler meets
        reason = str(error).strip().partition("\n")[0]
        raise RaydetError(f"{source} is not a checkpoint that can be loaded safely: {reason}") from None
    if isinstance(content, Mapping):
        average = content.get("ema")
        if isinstance(average, Mapping) and isinstance(average.get("module"), Mapping):
            content = average["module"]
        content = next((content[key] for key in _KEYS if isinstance(content.get(key), Mapping)), content)
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise RaydetError(f"{source} holds no tensors by name")
    return {str(name).removeprefix("module."): tensor for name, tensor in content.items()}


def _own_config(source: str) -> tuple[str, tuple[str, ...] | None]:
    """Return the licence and the names of the classes that the config.json beside a checkpoint's weights says."""
    file, question, query = source.partition("?")
    folder = file.rpartition("/")[0]
    try:
        content = json.loads(_read(f"{folder}/config.json{question}{query}" if folder else "config.json"))
        licence = str(content["licence"])
    except (RaydetError, ValueError, KeyError, TypeError):
        return "unknown: the checkpoint's config.json is not beside it", None
    try:
        return licence, tuple(str(entry["name"]) for entry in content["classes"])
    except (KeyError, TypeError):
        return licence, None
