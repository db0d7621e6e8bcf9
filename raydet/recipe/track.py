"""The section track: what is written and shown while a training runs."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from raydet.recipe.section import Section


class Pictures(Section):
    """Batches of an epoch to draw, ground truth and detections."""

    freq: int = Field(1, ge=1, description="in every so many epochs; the last epoch always has them")
    max_images: int | None = Field(16, ge=1, description="of a batch; null: all")
    gt_alpha: float | None = Field(
        None, gt=0, le=1, description="how strongly the ground truth lies over the detections; null: beside them"
    )
    score: float = Field(0.25, ge=0, lt=1, description="lowest score of a detection that is drawn")

    @model_serializer(mode="wrap")
    def _what_is_set(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields, always = type(self).model_fields, ("phase", "batch_idx")
        return {key: value for key, value in handler(self).items() if key in always or value != fields[key].default}


class ExtremeBatchDetectionVisualizationCallback(Pictures):
    """The batch of an epoch with the lowest or highest metric or component of the loss, and the images likewise."""

    metric: str | None = Field(None, description="of the batch, such as mAP@0.50; the lowest is worst")
    loss_to_monitor: str | None = Field(None, description="in its place: LossClass/component, as PPYoloELoss/loss_cls")
    max: bool = Field(False, description="the batch with the highest, else the lowest")
    enable_on_train_loader: bool = Field(False, description="of the training batches")
    enable_on_valid_loader: bool = Field(True, description="of the validation batches")
    images: int = Field(
        8, ge=0, description="so many images with the lowest or highest too, from all batches; 0: only the batch"
    )

    @model_validator(mode="after")
    def _one_measure(self) -> ExtremeBatchDetectionVisualizationCallback:
        if (self.metric is None) == (self.loss_to_monitor is None):
            raise ValueError("it should have either metric, such as mAP@0.50, or loss_to_monitor")
        return self

    @property
    def measure(self) -> str:
        """Name of what is lowest or highest."""
        return self.metric or self.loss_to_monitor or ""


class DetectionVisualizationCallback(Pictures):
    """Batches of an epoch by their number, training batches as the model gets them."""

    phase: Literal["train", "valid"] = Field("train", description="training or validation batches")
    batch_idx: int = Field(0, ge=0, description="number of the batch in the epoch")


class Track(Section):
    """What is written and shown while it runs."""

    log_every: int = Field(20, ge=1, description="steps from one progress line to the next")
    keep_checkpoints: int = Field(
        3, ge=1, description="checkpoints to keep: so many of the best by eval.watch, and the last two"
    )
    average_best: bool = Field(
        True, description="at the end, average the weights of the best ones, as a checkpoint of its own"
    )
    checkpoint_steps: int | None = Field(
        None, ge=1, description="steps from one checkpoint within an epoch to the next; null: see checkpoint_minutes"
    )
    checkpoint_minutes: float | None = Field(30.0, gt=0, description="the same in minutes; null: none")
    extreme_batches: list[ExtremeBatchDetectionVisualizationCallback] = Field(
        [
            ExtremeBatchDetectionVisualizationCallback(metric="mAP@0.50:0.95"),
            ExtremeBatchDetectionVisualizationCallback(metric="mAP@0.50:0.95", max=True),
        ],
        description="worst and best batches and images of an epoch to draw: metric, or loss_to_monitor: "
        "PPYoloELoss/loss_cls; max, freq, max_images, images, gt_alpha, score, enable_on_train_loader, "
        "enable_on_valid_loader",
    )
    visualize: list[DetectionVisualizationCallback] = Field(
        [DetectionVisualizationCallback()],
        description="batches of an epoch to draw: phase, batch_idx, freq, max_images, gt_alpha, score",
    )
    wandb: bool = Field(
        False,
        description="metrics, pictures and recipe to Weights & Biases too; key and mode are in the environment: "
        "WANDB_API_KEY, WANDB_MODE=offline",
    )
    wandb_project: str = Field("raydet", description="its project there")
    wandb_group: str | None = Field(None, description="runs shown as one; null: the trials of a sweep are")
    wandb_checkpoints: bool = Field(False, description="the best checkpoint there too, as an artifact")
    tensorboard: bool = Field(False, description="metrics and pictures in the run's folder tensorboard/ too")
