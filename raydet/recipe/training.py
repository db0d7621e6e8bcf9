"""The sections of what is trained and how: model, loss, train, eval and scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from raydet.plugins import is_own
from raydet.recipe.section import Count, Factor, Label, Section, in_order


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


LOSSES: dict[str, type[Section]] = {
    kind.__name__: kind for kind in (YoloXFastDetectionLoss, YoloXDetectionLoss, PPYoloELoss, SSDLoss)
}


def loss_kind(value: Any) -> str | None:
    """Return the name of the class that checks a section `loss`; None: it names no loss."""
    name = value.get("name") if isinstance(value, Mapping) else getattr(value, "name", None)
    if name is None and isinstance(value, Mapping):
        return YoloXFastDetectionLoss.__name__
    return "OwnLoss" if is_own(str(name)) else name if name in LOSSES else None


Loss = Annotated[
    Annotated[YoloXFastDetectionLoss, Tag("YoloXFastDetectionLoss")]
    | Annotated[YoloXDetectionLoss, Tag("YoloXDetectionLoss")]
    | Annotated[PPYoloELoss, Tag("PPYoloELoss")]
    | Annotated[SSDLoss, Tag("SSDLoss")]
    | Annotated[OwnLoss, Tag("OwnLoss")],
    Discriminator(
        loss_kind,
        custom_error_type="no_such_loss",
        custom_error_message=f"name should be {', '.join(LOSSES)} or package.module:Class",
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

    num_workers: Annotated[int, Field(ge=1)] | Annotated[tuple[Count, Count], BeforeValidator(in_order)] = Field(
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
