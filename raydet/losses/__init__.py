"""Losses of the detectors: `loss, components = criterion(outputs, targets)`."""

from raydet.losses.base import DetectionLoss, Terms
from raydet.losses.ppyoloe import PPYoloELoss
from raydet.losses.ssd import SSDLoss
from raydet.losses.yolox import YoloXDetectionLoss, YoloXFastDetectionLoss

__all__ = ["DetectionLoss", "PPYoloELoss", "SSDLoss", "Terms", "YoloXDetectionLoss", "YoloXFastDetectionLoss"]
