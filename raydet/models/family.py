"""What a family of detectors binds together, and the detector they all are."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from raydet.boxes import Resize
from raydet.losses import DetectionLoss
from raydet.models.blocks import fold_norms, reparametrise
from raydet.postprocess import PostPrediction


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a model's input: how it is fitted in, and (pixel - mean) / std with pixels 0 … 255.

    Attributes:
        mean: mean of each channel, in the order of `channels`.
        std: standard deviation of each channel, in the order of `channels`.
        channels: order of the channels that the model expects; images come as BGR.
        resize: how an image is fitted into the input, see `raydet.boxes.place`.
    """

    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    channels: Literal["BGR", "RGB"] = "BGR"
    resize: Resize = "pad_bottom_right"

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] BGR → float32 in channels-last memory, faster for convolutions, on the same device."""
        pixels = images.to(torch.float32, memory_format=torch.channels_last)
        if self.channels == "RGB":
            pixels = pixels.flip(1)
        if any(self.mean) or self.std != (1.0, 1.0, 1.0):
            pixels = (pixels - _constants(self.mean, pixels.device)).div_(_constants(self.std, pixels.device))
        return pixels


def _constants(values: Sequence[float], device: torch.device) -> Tensor:
    """Values [C, 1, 1], filled in on the device: a copy to it would be waited for."""
    return torch.cat([torch.full((1, 1, 1), value, device=device) for value in values])


class Detector(nn.Module):
    """A detector: backbone, neck, head.

    Args:
        backbone: images [B, 3, H, W] → feature maps; its `out_channels` are their channels.
        neck: feature maps → feature maps.
        head: feature maps → output: in training mode what its family's loss takes, in evaluation mode
            (decoded, raw outputs). Its `num_classes` are those it tells apart, its layers for them are named
            `cls_preds`, an output a class in their order, and `post_prediction` is the class of its callback. A
            `background`, where it has one, is the number of classes before these; then a class may have several
            outputs.
        preprocessing: how an image becomes the input; None: as in the head's family.

    Attributes:
        licence: licence of the weights that were loaded into it; empty: none were.
    """

    def __init__(
        self, backbone: nn.Module, neck: nn.Module, head: nn.Module, preprocessing: Preprocessing | None = None
    ):
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.head = head
        self.preprocessing = preprocessing
        self.licence = ""

    @property
    def num_classes(self) -> int:
        """Classes that the head tells apart."""
        return int(self.head.num_classes)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Any:
        """Detect in preprocessed images, float [B, 3, H, W].

        Raises:
            ValueError: the model cannot take this size.
        """
        self.check_size(images.shape[-2], images.shape[-1])
        return self.head(self.neck(self.backbone(images)))

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError where a side is not a multiple of 32, the coarsest stride."""
        if height % 32 or width % 32:
            raise ValueError(f"images of {height}x{width} pixels: both sides must be multiples of 32")

    def get_post_prediction_callback(self, **settings: Any) -> PostPrediction:
        """Return what turns an evaluation output into detections [n, 6] = x1, y1, x2, y2, score, class an image.

        Args:
            **settings: conf, iou, nms_top_k, max_predictions, multi_label_per_box, class_agnostic_nms; the callback
                of the head's family has their meanings and defaults.
        """
        callback: PostPrediction = self.head.post_prediction.of(**settings)  # type: ignore[union-attr, operator]
        return callback

    def fuse(self) -> Detector:
        """Return a copy for deployment: one convolution for blocks of several branches, and norms folded into them.

        It computes the same in evaluation mode, faster, and cannot be trained. Norms of your own parts are folded where
        they follow a convolution in a `raydet.models.blocks.Conv` or an `nn.Sequential`.
        """
        dtype = next(self.parameters()).dtype
        fused = copy.deepcopy(self).eval().double()  # so that kernels are rounded once
        reparametrise(fused)
        fold_norms(fused)
        return fused.to(dtype).requires_grad_(False)


@dataclass(frozen=True)
class Adapter:
    """Where another project's names of a family's tensors are translated.

    Attributes:
        source: the project and model, for messages.
        licence: licence of the weights that the project publishes.
        mark: a pattern that only names of this project and family have.
        renames: patterns and their replacements, applied in turn to each name.
        unused: a pattern of names that are no part of the model.
        convert: tensors whose values change too: our name → function.
        only: what the names of the model's tensors begin with that the files hold; the others stay as they are.
    """

    source: str
    licence: str
    mark: str
    renames: tuple[tuple[str, str], ...]
    unused: str | None = None
    convert: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    only: str = ""

    def knows(self, names: Mapping[str, Any]) -> bool:
        """Are these tensors under the names of this project and family?"""
        return any(re.search(self.mark, name) for name in names)

    def translate(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors under our names."""
        ours = {}
        for theirs, tensor in tensors.items():
            if self.unused and re.search(self.unused, theirs):
                continue
            name = theirs
            for pattern, replacement in self.renames:
                name = re.sub(pattern, replacement, name)
            ours[name] = self.convert[name](tensor) if name in self.convert else tensor
        return ours


def _class_count(model: Detector) -> dict[str, Any]:
    return {"num_classes": model.num_classes}


@dataclass(frozen=True)
class Family:
    """Detectors that share a head, a loss, a post-prediction callback (the head's) and a preprocessing.

    Attributes:
        name: name of the family, for messages.
        models: name → constructor, called with `num_classes`, and `image_size` where `fixed_size`.
        head: class of the head, by which detectors that users compose are known.
        losses: classes that take this family's training output, the recipes' first.
        preprocessing: how an image becomes the input that the weights expect.
        adapters: projects whose checkpoints can be loaded.
        recipe: shipped recipe to begin with on a data set of one's own.
        fixed_size: is a model built for one image size?
        has_queries: does a model take `num_queries`, and need no NMS?
        loss_arguments: what the losses must know of a model.
    """

    name: str
    models: Mapping[str, Callable[..., Detector]]
    head: type[nn.Module]
    losses: tuple[type[DetectionLoss], ...]
    preprocessing: Preprocessing
    adapters: tuple[Adapter, ...]
    recipe: str
    fixed_size: bool = False
    has_queries: bool = False
    loss_arguments: Callable[[Any], dict[str, Any]] = _class_count
