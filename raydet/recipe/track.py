"""The section track: what is written and shown while a training runs."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from raydet.recipe.section import Section


class Pictures(Section):
    """Batches of an epoch to draw, ground truth and detections."""

    freq: int = Field(
        1, ge=1, description="number of epochs from one set of pictures to the next; the last epoch always has one"
    )
    max_images: int | None = Field(16, ge=1, description="largest number of images of a batch to draw; null: all")
    gt_alpha: float | None = Field(
        None,
        gt=0,
        le=1,
        description="opacity of the ground truth, drawn over the detections; null: it is drawn beside them",
    )
    score: float = Field(0.25, ge=0, lt=1, description="lowest score of a detection that is drawn")

    @model_serializer(mode="wrap")
    def _what_is_set(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields, always = type(self).model_fields, ("phase", "batch_idx")
        return {key: value for key, value in handler(self).items() if key in always or value != fields[key].default}


class ExtremeBatchDetectionVisualizationCallback(Pictures):
    """The batch of an epoch with the lowest or highest metric or component of the loss, and the images likewise."""

    metric: str | None = Field(
        None, description="metric by which batches are compared, such as mAP@0.50; the lowest is worst"
    )
    loss_to_monitor: str | None = Field(
        None,
        description="component of the loss by which batches are compared instead: LossClass/component, such as "
        "PPYoloELoss/loss_cls",
    )
    max: bool = Field(False, description="draw the batch with the highest value; false: the batch with the lowest")
    enable_on_train_loader: bool = Field(False, description="draw the worst or best of the training batches")
    enable_on_valid_loader: bool = Field(True, description="draw the worst or best of the validation batches")
    images: int = Field(
        8,
        ge=0,
        description="number of images to draw as well, those with the lowest or highest value among all batches; 0:"
        " only the batch",
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

    phase: Literal["train", "valid"] = Field(
        "train", description="which batches: train (training) or valid (validation)"
    )
    batch_idx: int = Field(0, ge=0, description="number of the batch in the epoch, from 0")


class Track(Section):
    """What is written and shown during a training."""

    log_every: int = Field(20, ge=1, description="number of steps from one progress line to the next")
    keep_checkpoints: int = Field(
        3, ge=1, description="number of checkpoints to keep, the best by eval.watch; the last two are kept as well"
    )
    average_best: bool = Field(
        True,
        description="average the weights of the best checkpoints at the end, and save the result as one more "
        "checkpoint",
    )
    checkpoint_steps: int | None = Field(
        None,
        ge=1,
        description="number of steps from one checkpoint within an epoch to the next; null: checkpoint_minutes "
        "alone decides",
    )
    checkpoint_minutes: float | None = Field(
        30.0,
        gt=0,
        description="minutes from one checkpoint within an epoch to the next; null: checkpoint_steps alone decides",
    )
    extreme_batches: list[ExtremeBatchDetectionVisualizationCallback] = Field(
        [
            ExtremeBatchDetectionVisualizationCallback(metric="mAP@0.50:0.95"),
            ExtremeBatchDetectionVisualizationCallback(metric="mAP@0.50:0.95", max=True),
        ],
        description="worst and best batches and images of an epoch to draw: a list of {metric: …} or "
        "{loss_to_monitor: PPYoloELoss/loss_cls}, with max, freq, max_images, images, gt_alpha, score, "
        "enable_on_train_loader and enable_on_valid_loader as options",
    )
    visualize: list[DetectionVisualizationCallback] = Field(
        [DetectionVisualizationCallback()],
        description="batches of an epoch to draw: a list of {phase: …, batch_idx: …}, with freq, max_images, "
        "gt_alpha and score as options",
    )
    wandb: bool = Field(
        False,
        description="send metrics, pictures and the recipe to Weights & Biases as well; its key and mode come from "
        "the environment: WANDB_API_KEY, WANDB_MODE=offline",
    )
    wandb_project: str = Field("raydet", description="project at Weights & Biases")
    wandb_group: str | None = Field(
        None,
        description="group at Weights & Biases, whose runs are shown as one; null: the trials of a sweep form a group",
    )
    wandb_checkpoints: bool = Field(
        False, description="send the best checkpoint to Weights & Biases as well, as an artifact"
    )
    tensorboard: bool = Field(
        False, description="write metrics and pictures for TensorBoard as well, in the folder tensorboard/ of the run"
    )
    mlflow: bool = Field(
        False,
        description="send metrics, pictures and the recipe to an MLflow tracking server as well; its address and key "
        "come from the environment: MLFLOW_TRACKING_URI, MLFLOW_TRACKING_TOKEN",
    )
    mlflow_experiment: str = Field("raydet", description="experiment at MLflow")
