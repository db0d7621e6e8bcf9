"""Where a run can be watched beside its own folder, and the pictures that it draws."""

from raydet.recipe import DetectionVisualizationCallback, ExtremeBatchDetectionVisualizationCallback

__all__ = ["DetectionVisualizationCallback", "ExtremeBatchDetectionVisualizationCallback"]
