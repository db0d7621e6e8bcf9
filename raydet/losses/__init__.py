"""Losses of the detectors: `loss, components = criterion(outputs, targets)`."""

from raydet.losses.yolox import YoloXDetectionLoss, YoloXFastDetectionLoss

__all__ = ["YoloXDetectionLoss", "YoloXFastDetectionLoss"]
