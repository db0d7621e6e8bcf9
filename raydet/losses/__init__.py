"""Losses of the detectors: `loss, components = criterion(outputs, targets)`."""

from raydet.losses.base import DetectionLoss, Terms
from raydet.losses.dfine import DFineLoss
from raydet.losses.ppyoloe import PPYoloELoss
from raydet.losses.ssd import SSDLoss
from raydet.losses.yolox import YoloXDetectionLoss, YoloXFastDetectionLoss

__all__ = [
    "DFineLoss",
    "DetectionLoss",
    "PPYoloELoss",
    "SSDLoss",
    "Terms",
    "YoloXDetectionLoss",
    "YoloXFastDetectionLoss",
]
