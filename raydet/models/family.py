"""What a family of detectors binds together, and the detector they all are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class Detector(nn.Module):
    """A detector: backbone, neck, head.

    Args:
        backbone: images [B, 3, H, W] → feature maps.
        neck: feature maps → feature maps.
        head: feature maps → the family's output, in training mode what its loss takes, in evaluation mode
            (decoded, raw outputs).
        num_classes: of the head.
    """

    def __init__(self, backbone: nn.Module, neck: nn.Module, head: nn.Module, num_classes: int):
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.head = head
        self.num_classes = num_classes

    def forward(self, images: Tensor) -> Any:
        """Detect in preprocessed images, float [B, 3, H, W].

        Raises:
            ValueError: a side is not a multiple of 32, the coarsest stride.
        """
        height, width = images.shape[-2:]
        if height % 32 or width % 32:
            raise ValueError(f"images of {height}x{width} pixels: both sides must be multiples of 32")
        return self.head(self.neck(self.backbone(images)))

    def get_post_prediction_callback(self, **settings: Any) -> Callable[[Any], list[Tensor]]:
        """Return what turns an evaluation output into detections [n, 6] = x1, y1, x2, y2, score, class an image."""
        raise NotImplementedError(f"{type(self).__name__} does not say how its output becomes detections")


@dataclass(frozen=True)
class Preprocessing:
    """How pixels become a model's input: (pixel - mean) / std, channels in B, G, R order, pixels 0 … 255."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] → float32 in channels-last memory, the faster one for convolutions, on the same device."""
        pixels = images.to(torch.float32, memory_format=torch.channels_last)
        if any(self.mean) or self.std != (1.0, 1.0, 1.0):
            mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (self.mean, self.std))
            pixels = (pixels - mean) / std
        return pixels


@dataclass(frozen=True)
class Family:
    """Detectors that share a loss, a post-prediction callback (their method) and a preprocessing.

    Attributes:
        name: for messages.
        models: name → constructor, called with `num_classes`.
        losses: classes that take this family's training output; called with `num_classes` and their own settings.
        preprocessing: what the weights expect.
    """

    name: str
    models: Mapping[str, Callable[[int], Detector]]
    losses: tuple[type[nn.Module], ...]
    preprocessing: Preprocessing
