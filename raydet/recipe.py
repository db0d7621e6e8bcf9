"""The recipe: every setting of a training, its default, unit and meaning, in one typed tree.

A recipe is YAML, by a shipped name or a path, and `section.key=value` overrides on top; unknown keys are refused.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    ValidationError,
    model_serializer,
    model_validator,
)

from raydet.errors import RaydetError, did_you_mean
from raydet.plugins import accepts, is_own, locate
from raydet.yaml_text import read as read_yaml
from raydet.yaml_text import write as write_yaml


def _image_size(value: Any) -> Any:
    sides = [value, value] if isinstance(value, int) else value
    if isinstance(sides, list | tuple) and any(isinstance(side, int) and (side <= 0 or side % 32) for side in sides):
        raise ValueError("each side must be a positive multiple of 32")
    return sides


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError("the folder of the run would lie outside storage")
    if name and not path.name:
        raise ValueError("the folder of the run would be storage itself")
    return name


class Section(BaseModel):
    """A section of the recipe: frozen, and without keys that nobody reads."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Model(Section):
    """The detector."""

    name: str = Field(
        "yolox_s",
        description="ssd_lite_mobilenet_v2, yolox_{n,t,s,m,l,x}, ppyoloe_{s,m,l,x}, yolo_nas_{s,m,l}, or "
        "package.module:function, yours, which is called with num_classes and returns a raydet.models.Detector",
    )
    num_classes: int | None = Field(None, ge=1, description="classes; null: as many as the data has")
    weights: str | None = Field(
        None,
        description="weights to start from, path or URI: a raydet checkpoint, or a file under Megvii's or "
        "super-gradients' names; null: from scratch",
    )


class Data(Section):
    """The images and their annotations."""

    format: str = Field(
        "auto",
        description="coco (instances_*.json), voc (Pascal VOC's XML), yolo (a txt an image), shards (raydet ingest's), "
        "the name of a @register_dataset, or package.module:Class, yours; auto: seen from what root holds",
    )
    root: str = Field(
        "data/coco", description="folder that the other paths of this section start from: a path, s3://… or gs://…"
    )
    train_annotations: str | None = Field(
        None,
        description="what to train on: coco: the annotation file; voc: the list of names, such as "
        "ImageSets/Main/train.txt, or a folder of XML files; yolo: the folder or list of images; null: where the "
        "format has it",
    )
    train_images: str | None = Field(None, description="folder of its images; null: where the format has it")
    val_annotations: str | None = Field(None, description="what to validate on, as train_annotations")
    val_images: str | None = Field(None, description="folder of its images; null: where the format has it")
    class_inclusion_list: list[str] | None = Field(
        None, description="classes to keep, numbered in this order; objects of others are left out; null: all"
    )
    max_num_samples: int | None = Field(None, ge=1, description="the first so many images of each split; null: all")
    ignore_empty_annotations: bool = Field(
        False, description="do not train on images without objects; validation always has every image"
    )
    difficult: Literal["keep", "ignore", "drop"] = Field(
        "keep",
        description="objects that VOC calls difficult: keep as any other, ignore as COCO's crowds (not trained on, no "
        "miss when not found), or drop",
    )
    on_error: Literal["raise", "skip"] = Field(
        "raise", description="a record or image that cannot be used: stop and name it, or leave it out and count it"
    )
    max_errors: int = Field(100, ge=0, description="with on_error: skip, the most that are left out before it stops")
    max_pixels: int = Field(
        178_956_970,
        ge=1,
        description="pixels of the largest image that is decoded; the default is Pillow's limit. A larger image is a "
        "record that cannot be used: a small file may decode to more than the memory holds",
    )
    shuffle_window: int = Field(
        4096,
        ge=1,
        description="of format: shards: shards are shuffled, then the images within so many neighbours; other formats "
        "shuffle all images",
    )
    image_size: Annotated[tuple[int, int], BeforeValidator(_image_size)] = Field(
        (640, 640),
        description="pixels, one number or [height, width], multiples of 32; images are fitted in as the model expects",
    )
    chunk_size: int = Field(
        64, ge=1, description="samples that a Ray Data task makes; a worker's batch should divide it"
    )


class OwnTransform(BaseModel):
    """A transform of the user's own: `name`, and the arguments of its class."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str


def _range(value: Any) -> Any:
    if isinstance(value, list | tuple) and len(value) == 2 and value[0] > value[1]:
        raise ValueError("the first of the two must not be larger than the second")
    return value


Factor = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]
Side = Annotated[int, Field(gt=0, multiple_of=32)]
Label = Annotated[str, Field(pattern=r"^[^=]+=[^=]+$")]
Range = Annotated[tuple[Factor, Factor], BeforeValidator(_range)]


class Augment(Section):
    """Random changes to training images."""

    mosaic: float = Field(0.0, ge=0, le=1, description="probability of four images as one, about a random point")
    degrees: float = Field(0.0, ge=0, le=180, description="affine: largest rotation")
    translate: float = Field(0.0, ge=0, le=1, description="affine: largest shift, as a share of the image's sides")
    scale: Range = Field((1.0, 1.0), description="affine: lowest and highest factor of size")
    shear: float = Field(0.0, ge=0, lt=90, description="affine: largest shear, in degrees")
    mixup: float = Field(0.0, ge=0, le=1, description="probability of the mean with another image")
    mixup_scale: Range = Field((0.5, 1.5), description="lowest and highest factor of the other image's size")
    close_epochs: int = Field(0, ge=0, description="epochs at the end without mosaic, affine and mixup")
    horizontal_flip: float = Field(0.5, ge=0, le=1, description="probability of mirroring left and right")
    vertical_flip: float = Field(0.0, ge=0, le=1, description="probability of mirroring top and bottom")
    rotate90: float = Field(
        0.0, ge=0, le=1, description="probability of a turn by 90, 180 or 270 degrees; for square inputs"
    )
    hsv: float = Field(1.0, ge=0, le=1, description="probability of shifting hue, saturation and value")
    hue: int = Field(5, ge=0, le=75, description="largest shift of hue, in units of 2 degrees")
    saturation: int = Field(30, ge=0, le=255, description="largest shift of saturation, of 255")
    value: int = Field(30, ge=0, le=255, description="largest shift of value, of 255")
    channel_swap: float = Field(0.0, ge=0, le=1, description="probability of exchanging blue and red")
    transforms: list[OwnTransform] = Field(
        [],
        description="yours, applied to the pixels last: {name: package.module:Class, and its arguments}; called with a "
        "raydet.data.Sample and a numpy generator, it returns a Sample of the same size",
    )
    multiscale: Annotated[tuple[Side, Side] | None, BeforeValidator(_range)] = Field(
        None, description="lowest and highest side in pixels that batches are resized to; null: data.image_size"
    )
    multiscale_every: int = Field(1, ge=1, description="steps from one such size to the next")


class YoloXDetectionLoss(Section):
    """The loss, and the arguments of its class."""

    name: Literal["YoloXDetectionLoss"] = Field("YoloXDetectionLoss", description="the loss of the YOLOX paper")
    iou_weight: float = Field(5.0, ge=0, description="weight of the box term")
    obj_weight: float = Field(1.0, ge=0, description="weight of the objectness term")
    cls_weight: float = Field(1.0, ge=0, description="weight of the class term")
    cls_pos_weight: float | list[float] | None = Field(
        None, description="weight of the positives in the class term, one number or one a class; null: 1"
    )
    use_l1: bool = Field(False, description="add an L1 term on the raw boxes")
    l1_last_epochs: int = Field(0, ge=0, description="add it in so many epochs at the end")
    iou_type: Literal["iou", "giou"] = Field("iou", description="box term: iou (1 - IoU²) or giou (1 - GIoU)")
    center_sampling_radius: float = Field(
        2.5, gt=0, description="points this near an object's centre, in strides, may learn it"
    )


class YoloXFastDetectionLoss(YoloXDetectionLoss):
    """The loss, and the arguments of its class."""

    name: Literal["YoloXFastDetectionLoss"] = Field(  # type: ignore[assignment]
        "YoloXFastDetectionLoss", description="SuperGradients' variant; YoloXDetectionLoss is that of the YOLOX paper"
    )
    dynamic_ks_bias: float = Field(1.1, gt=0, description="factor on the number of points that an object takes")
    obj_loss_fix: bool = Field(False, description="divide the objectness term by the number of all anchor points")


class PPYoloELoss(Section):
    """The loss, and the arguments of its class."""

    name: Literal["PPYoloELoss"] = Field("PPYoloELoss", description="the loss of PP-YOLOE and YOLO-NAS")
    classification_loss_weight: float = Field(1.0, ge=0, description="weight of the class term")
    iou_loss_weight: float = Field(2.5, ge=0, description="weight of the GIoU term")
    dfl_loss_weight: float = Field(0.5, ge=0, description="weight of the distribution focal term")
    use_varifocal_loss: bool = Field(True, description="class term: varifocal, else quality focal loss")
    use_static_assigner: bool = Field(False, description="assign points by ATSS, else task-aligned")
    static_assigner_end_epoch: int | None = Field(
        None, ge=0, description="by ATSS in so many epochs, then task-aligned; null: use_static_assigner says for all"
    )


class SSDLoss(Section):
    """The loss, and the arguments of its class."""

    name: Literal["SSDLoss"] = Field("SSDLoss", description="the loss of SSD")
    alpha: float = Field(1.0, ge=0, le=2, description="weight of the class term; that of the box term is 2 - alpha")
    iou_thresh: float = Field(0.5, gt=0, lt=1, description="lowest IoU of a default box with its object")
    neg_pos_ratio: float = Field(3.0, ge=0, description="background boxes for each one with an object")


class OwnLoss(Section):
    """The loss, yours, and the arguments of its class."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(description="package.module:Class; called with the arguments here and those of its base class")


_LOSSES: dict[str, type[Section]] = {
    kind.__name__: kind for kind in (YoloXFastDetectionLoss, YoloXDetectionLoss, PPYoloELoss, SSDLoss)
}


def _loss_kind(value: Any) -> str | None:
    name = value.get("name") if isinstance(value, Mapping) else getattr(value, "name", None)
    if name is None and isinstance(value, Mapping):
        return YoloXFastDetectionLoss.__name__
    return "OwnLoss" if is_own(str(name)) else name if name in _LOSSES else None


Loss = Annotated[
    Annotated[YoloXFastDetectionLoss, Tag("YoloXFastDetectionLoss")]
    | Annotated[YoloXDetectionLoss, Tag("YoloXDetectionLoss")]
    | Annotated[PPYoloELoss, Tag("PPYoloELoss")]
    | Annotated[SSDLoss, Tag("SSDLoss")]
    | Annotated[OwnLoss, Tag("OwnLoss")],
    Discriminator(
        _loss_kind,
        custom_error_type="no_such_loss",
        custom_error_message=f"name should be {', '.join(_LOSSES)} or package.module:Class",
    ),
]


class Train(Section):
    """Optimization."""

    epochs: int = Field(300, ge=1, description="passes over the training images")
    batch_size: int = Field(128, ge=1, description="images a step over all workers, which share them equally")
    micro_batch_size: int | None = Field(
        None,
        ge=1,
        description="the most images that a worker takes at once: a larger share of a step is made in parts, whose "
        "gradients add up to those of the whole, but for the norms; null: all",
    )
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="sgd, with Nesterov's momentum, or adamw")
    lr: float = Field(0.02, gt=0, description="highest learning rate, for this batch size")
    backbone_lr: float = Field(1.0, ge=0, description="factor on it for the backbone; 0 freezes it, its norms too")
    neck_lr: float = Field(1.0, ge=0, description="the same for the neck")
    head_lr: float = Field(1.0, ge=0, description="the same for the head")
    momentum: float = Field(0.9, ge=0, lt=1, description="of SGD")
    weight_decay: float = Field(5e-4, ge=0, description="of kernels")
    decay_all: bool = Field(False, description="weight decay of biases and norms too")
    clip_grad_norm: float | None = Field(None, gt=0, description="longest gradient, of all weights as one; null: any")
    schedule: Literal["cosine", "step", "constant"] = Field(
        "cosine",
        description="of the learning rate between warm-up and cooldown: cosine (to final_lr), step (times lr_gamma at "
        "each of lr_milestones) or constant",
    )
    lr_milestones: list[float] = Field([], description="of schedule: step, in epochs")
    lr_gamma: float = Field(0.1, gt=0, le=1, description="of schedule: step")
    warmup_epochs: float = Field(5.0, ge=0, description="epochs in which the learning rate rises linearly from 0")
    warmup_steps: int = Field(0, ge=0, description="the same in steps; 0: warmup_epochs says")
    cooldown_epochs: float = Field(15.0, ge=0, description="epochs at the end with the lowest learning rate")
    final_lr: float = Field(0.05, ge=0, le=1, description="lowest learning rate, as a share of the highest")
    ema_decay: float = Field(0.9999, ge=0, lt=1, description="of the moving average of the weights")
    ema_rise: Literal["exp", "threshold", "constant"] = Field(
        "exp",
        description="how the decay rises to that: exp (decay · (1 - exp(-ema_ramp · share of the run))), "
        "threshold (no more than (1 + step) / (10 + step)) or constant",
    )
    ema_ramp: float = Field(15.0, gt=0, description="of ema_rise: exp")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto",
        description="number format of the model's forward pass; auto: on a GPU bf16, or fp16 where the GPU has no bf16 "
        "of its own (T4, V100), on a CPU fp32; fp16 scales the loss",
    )
    compile: bool = Field(False, description="torch.compile the model: minutes at the start, faster steps")
    sync_bn: bool = Field(False, description="norms over the images of all workers, on GPUs")
    max_bad_steps: int = Field(
        5,
        ge=1,
        description="steps in a row whose loss or gradient is not finite, after which it stops; each is skipped",
    )

    @model_validator(mode="before")
    @classmethod
    def _one_warmup(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("warmup_steps") and given.setdefault("warmup_epochs", 0.0):
            raise ValueError("warmup_epochs and warmup_steps are both set: set the other to 0")
        return given


class Eval(Section):
    """Validation: what counts as a detection."""

    every: int = Field(1, ge=1, description="epochs from one validation to the next; the last epoch always has one")
    watch: str = Field("mAP@0.50:0.95", description="metric by which checkpoints are best, such as mAP@0.50")
    patience: int | None = Field(
        None, ge=1, description="stop after so many validations without a better watch; null: train all epochs"
    )
    min_delta: float = Field(0.0, ge=0, description="with patience: what counts as better")
    batch_size: int = Field(16, ge=1, description="images a step and worker")
    score: float = Field(0.001, ge=0, lt=1, description="lowest score of a detection")
    iou: float = Field(0.65, gt=0, le=1, description="NMS: of two boxes that overlap more, the better stays")
    nms_top_k: int | None = Field(None, ge=1, description="the best so many of an image enter NMS; null: all")
    max_detections: int = Field(300, ge=1, description="of an image, after NMS")
    max_dets: int = Field(
        100, gt=10, description="metrics count the best so many detections of each class in an image; COCO: 100"
    )
    multi_label: bool = Field(False, description="a box may be detected as several classes, else as its best")
    class_agnostic: bool = Field(False, description="NMS across classes")


class Scale(Section):
    """Resources. Each step has the same samples whatever these are; a norm sees those of its own worker."""

    num_workers: Annotated[int, Field(ge=1)] | Annotated[tuple[Count, Count], BeforeValidator(_range)] = Field(
        1,
        description="Ray Train workers, one GPU each where GPUs are used; [fewest, most]: as many as there is "
        "room for, also when nodes come or go",
    )
    gpu: bool | None = Field(None, description="train on GPUs; null: if the cluster has any")
    gpu_share: float = Field(
        1.0, gt=0, le=1, description="of a GPU for a single worker: below 1, trials of a sweep share GPUs"
    )
    cpus_per_worker: int | None = Field(
        None, ge=1, description="CPUs of a worker; null: 1 with a GPU, else an equal share of this machine's"
    )
    data_tasks: int | None = Field(
        None, ge=1, description="Ray Data tasks at once; null: three for every two CPUs that the workers leave"
    )
    data_label: Label | None = Field(
        None,
        description="nodes whose CPUs run the data tasks, such as raydet=data, a label of `ray start --labels`; "
        "null: any",
    )
    worker_resources: dict[str, Factor] = Field(
        {}, description="more that each worker takes, by which its nodes are chosen: {accelerator_type:H100: 0.001}"
    )
    max_failures: int = Field(3, ge=0, description="times that lost workers are replaced")
    hang_minutes: float = Field(
        30.0,
        gt=0,
        description="a worker that makes no step for so long is replaced, its stack kept in the run's folder",
    )
    async_validation: bool = Field(
        False, description="validate on a GPU, or CPUs, of its own, while the training goes on; else on the workers"
    )

    @model_validator(mode="after")
    def _shares_alone(self) -> Scale:
        if self.gpu_share < 1 and self.workers[1] > 1:
            raise ValueError("gpu_share below 1 needs num_workers: 1, as workers that exchange gradients need own GPUs")
        return self

    @property
    def workers(self) -> tuple[int, int]:
        """Fewest and most workers."""
        return (self.num_workers,) * 2 if isinstance(self.num_workers, int) else self.num_workers


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


class Space(Section):
    """What a sweep tries for a setting: one of these kinds."""

    grid: list[Any] | None = Field(None, min_length=1)
    choice: list[Any] | None = Field(None, min_length=1)
    uniform: Annotated[tuple[float, float] | None, BeforeValidator(_range)] = None
    loguniform: Annotated[tuple[Factor, Factor] | None, BeforeValidator(_range)] = None
    integer: Annotated[tuple[int, int] | None, BeforeValidator(_range)] = None

    @model_validator(mode="after")
    def _one_kind(self) -> Space:
        if len(self.model_fields_set) != 1 or self.values is None:
            raise ValueError(f"it should be one of {', '.join(type(self).model_fields)}, with a list of values")
        return self

    @model_serializer(mode="wrap")
    def _only_it(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {self.kind: handler(self)[self.kind]}

    @property
    def kind(self) -> str:
        """Its name."""
        (kind,) = self.model_fields_set
        return kind

    @property
    def values(self) -> Any:
        """All values, or the lowest and the highest."""
        return getattr(self, self.kind)


def _by_key(value: Any, prefix: str = "") -> Any:
    """Name the settings of a space by their whole keys, whether it has `loss.iou_weight:` or `loss: {iou_weight:`."""
    if not isinstance(value, Mapping):
        return value
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        is_section = isinstance(inner, Mapping) and all(isinstance(deeper, Mapping) for deeper in inner.values())
        flat |= _by_key(inner, f"{prefix}{key}.") if is_section else {f"{prefix}{key}": inner}
    return flat


class Tune(Section):
    """A sweep over settings, by raydet tune; eval.watch says which trial is best."""

    space: Annotated[dict[str, Space], BeforeValidator(_by_key)] = Field(
        {},
        description="what to try for which key of this recipe: {grid: [a, b]} all, {choice: [a, b]} any, "
        "{uniform: [low, high]}, {loguniform: [low, high]} or {integer: [low, high]}; such as "
        "loss.iou_weight: {loguniform: [1, 10]}",
    )
    search: Literal["random", "grid", "optuna"] = Field(
        "random",
        description="how values are chosen: at random, by grid (each combination once) or by Optuna's TPE, which "
        "learns from earlier trials (pip install 'raydet[tune]')",
    )
    trials: int = Field(16, ge=1, description="of search: random (for each combination of grid keys) and optuna")
    stop: Literal["asha", "hyperband", "median", "none"] = Field(
        "asha",
        description="trials that are behind end early: asha, hyperband (several asha with later and later first cuts) "
        "or median (worse than the others' mean so far)",
    )
    grace_epochs: int = Field(1, ge=1, description="epochs that no trial ends before")
    reduction_factor: float = Field(3.0, gt=1, description="of asha and hyperband: one in so many trials goes on")
    concurrent: int | None = Field(
        None, ge=1, description="trials at once, each with the workers of scale; null: as there is room for"
    )
    hours: float | None = Field(None, gt=0, description="time after which no trial goes on; null: any")


class Recipe(Section):
    """All settings of a training."""

    name: Annotated[str, AfterValidator(_inside)] = Field(
        "", description="of the run: its folder below `storage`; empty: the recipe's own name"
    )
    storage: str = Field("runs", description="folder of the runs: one that all nodes share, s3://… or gs://…")
    seed: int = Field(0, ge=0, description="of the weights, the order of the images and their augmentation")
    model: Model = Model()
    data: Data = Data()
    augment: Augment = Augment()
    loss: Loss = YoloXFastDetectionLoss()
    train: Train = Train()
    eval: Eval = Eval()
    scale: Scale = Scale()
    track: Track = Track()
    tune: Tune = Tune()

    @model_validator(mode="after")
    def _validation_finds_checkpoints(self) -> Recipe:
        if self.scale.async_validation and "://" in self.storage:
            raise ValueError("scale.async_validation needs a storage that all nodes share as a folder")
        return self


def shipped() -> dict[str, Path]:
    """Return the recipes that come with raydet: name → file."""
    folder = Path(str(files("raydet") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load(recipe: str | Path | Recipe, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        recipe: a shipped name, the path of a YAML file, or a recipe.
        overrides: `section.key=value`, values as in YAML; those of settings that are text as they are typed.

    Raises:
        RaydetError: there is no such recipe, or a key or value in it is wrong; the message names it.
    """
    if isinstance(overrides, str):
        raise RaydetError(f"overrides: {overrides!r} is one text, not a list: [{overrides!r}]")
    if isinstance(recipe, Recipe):
        tree, source = recipe.model_dump(mode="json"), "recipe"
    else:
        path = shipped().get(str(recipe)) or Path(recipe)
        if not path.is_file():
            raise RaydetError(
                f"{recipe} is neither a recipe of raydet{did_you_mean(str(recipe), shipped())} nor a YAML file "
                "(raydet recipes lists the former)"
            )
        tree, source = _read(path), f"recipe {recipe}"
        tree["name"] = tree.get("name") or path.stem
    # Another loss first: it decides which arguments there are.
    for text in sorted(overrides, key=lambda text: not text.startswith("loss.name=")):
        if text.startswith("loss.name="):
            tree["loss"] = _whole_loss(tree.get("loss", {}))
        _override(tree, text)
    return _validate(tree, source)


def keys_given(overrides: Iterable[str]) -> frozenset[str]:
    """Return the keys that overrides set.

    Raises:
        RaydetError: one is no override.
    """
    tree: dict[str, Any] = {}
    for text in overrides:
        _override(tree, text)
    return frozenset(_flat(tree))


def override(key: str, value: Any) -> str:
    """Return `key=value` as `load` takes it."""
    return f"{key}={write_yaml(value)}"


def describe(recipe: Recipe) -> str:
    """Return the recipe as YAML, each key under its description."""
    lines: list[str] = []
    for name, field in Recipe.model_fields.items():
        value = getattr(recipe, name)
        if isinstance(value, Section):
            lines += ["", f"# {value.__doc__}", f"{name}:"]
            fields = type(value).model_fields
            for key, inner in value.model_dump(mode="json").items():
                described = fields[key].description if key in fields else "argument of the class"
                lines += _entry(key, inner, described or "", indent="  ")
        else:
            lines += _entry(name, value, field.description or "", indent="")
    return "\n".join(lines) + "\n"


def differences(ours: Recipe, theirs: Recipe) -> list[str]:
    """Return a line for each setting in which two recipes differ, but for those that do not change the result.

    The name is none of these: it is that of the folder, which may have been renamed.
    """
    mine, other = _flat(ours.model_dump(mode="json")), _flat(theirs.model_dump(mode="json"))
    harmless = ("scale.", "track.", "tune.", "data.root", "storage", "name")
    return [
        f"{key}: {other.get(key, 'absent')} there, {mine.get(key, 'absent')} here"
        for key in {**mine, **other}  # another loss has other arguments
        if not key.startswith(harmless) and mine.get(key) != other.get(key)
    ]


def _entry(key: str, value: Any, description: str, indent: str) -> list[str]:
    comment = textwrap.wrap(description, width=100, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
    return [*comment, f"{indent}{key}: {write_yaml(value)}"]


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = read_yaml(path.read_text(), _texts() | _lists_of_texts())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RaydetError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise RaydetError(f"recipe {path} holds no settings: it should be `section:` with `key: value` below")
    if "names" in tree or isinstance(tree.get("train"), str | list):
        raise RaydetError(f"{path} describes a data set and is no recipe: name its folder, {path.absolute().parent}")
    return tree


def _override(tree: dict[str, Any], given: str) -> None:
    key, equals, text = given.partition("=")
    if not equals or not key:
        raise RaydetError(f"{given!r} is not an override: write section.key=value, such as train.epochs=10")
    *sections, last = key.strip().split(".")
    for depth, section in enumerate(sections, 1):
        inner = tree.setdefault(section, {})
        if not isinstance(inner, dict) or ".".join(sections[:depth]) in _values():
            raise RaydetError(f"{key}: no such setting; {section} is a value, not a section")
        tree = inner
    try:
        words = _texts() | _lists_of_texts()
        tree[last] = _as_typed(text) if key.strip() in _texts() else read_yaml(text, words, key.strip())
    except yaml.YAMLError:
        raise RaydetError(f"{given!r}: the value is not YAML; quote it") from None
    if key.strip() == "loss.name":
        _drop_strange_arguments(tree, str(tree[last]))


def _as_typed(text: str) -> str | None:
    """Return the value of a setting that is text: what was typed, but for `null`, nothing, and what is in quotes."""
    text = text.strip()
    if text.startswith(("'", '"')):
        with suppress(yaml.YAMLError):
            value = yaml.safe_load(text)
            return value if isinstance(value, str) else text
    return None if text.lower() in ("", "~", "null") else text


def _whole_loss(loss: Any) -> Any:
    """Add the defaults of a loss of raydet's: another loss keeps the arguments that both have, also at the default."""
    kind = _LOSSES.get(_loss_kind(loss) or "")
    return {**kind().model_dump(mode="json"), **loss} if kind and isinstance(loss, Mapping) else loss


def _drop_strange_arguments(loss: dict[str, Any], name: str) -> None:
    """Of another loss' arguments in the recipe, leave those that this one has too."""
    if is_own(name):
        kind = locate(name, "loss.name")
        strange = [key for key in loss if key != "name" and not accepts(kind, key)]
    else:
        known = _LOSSES[name].model_fields if name in _LOSSES else loss
        strange = [key for key in loss if key not in known]
    for key in strange:
        del loss[key]


def _validate(tree: Mapping[str, Any], source: str) -> Recipe:
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        problems = []
        for problem in error.errors():
            key = ".".join(str(part) for part in problem["loc"] if part not in (*_LOSSES, "OwnLoss"))
            if problem["type"] == "extra_forbidden":
                other = "; it is an argument of another loss" if key in _keys() else did_you_mean(key, _keys())
                problems.append(f"{key}: no such setting{other}")
            elif problem["type"] == "no_such_loss":
                given = problem["input"].get("name") if isinstance(problem["input"], Mapping) else problem["input"]
                problems.append(f"{key}.{problem['msg']}, not {given!r}")
            else:
                # What is wrong with several settings of a section at once has all of the section for its input.
                whole = problem["type"] == "value_error" and isinstance(problem["input"], Mapping | Section)
                given = "" if whole else f", not {problem['input']!r}"
                problems.append(f"{key}{': ' * bool(key)}{problem['msg']}{given}")
        raise RaydetError(f"{source}: {'; '.join(problems)}") from None


def _texts() -> frozenset[str]:
    """Return the settings that are text: there 2017 and no are words."""
    return _settings_of((str, str | None))


def _lists_of_texts() -> frozenset[str]:
    """Return the settings that are lists of text."""
    return _settings_of((list[str] | None,))


@cache
def _settings_of(kinds: tuple[Any, ...]) -> frozenset[str]:
    """Return the settings of some types."""
    sections: dict[str, type[Section]] = {"": Recipe, "loss.": OwnLoss}
    sections |= {f"{name}.": type(value) for name, value in Recipe() if isinstance(value, Section) and name != "loss"}
    return frozenset(
        prefix + key
        for prefix, section in sections.items()
        for key, field in section.model_fields.items()
        if field.annotation in kinds
    )


@cache
def _values() -> tuple[str, ...]:
    """Return the settings that have a value, and nothing below."""
    losses = [f"loss.{key}" for kind in _LOSSES.values() for key in kind.model_fields]
    return (*_flat(Recipe().model_dump()), *losses)


def _keys() -> tuple[str, ...]:
    return (*Recipe.model_fields, *_values())


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
