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
        description="detector: ssd_lite_mobilenet_v2, yolox_{n,t,s,m,l,x}, ppyoloe_{s,m,l,x}, yolo_nas_{s,m,l} or "
        "dfine_{n,s,m,l,x}; "
        "or a function of your own, package.module:function, which is called with num_classes and "
        "returns a raydet.models.Detector",
    )
    num_classes: int | None = Field(None, ge=1, description="number of classes; null: as many as the data set has")
    weights: str | None = Field(
        None,
        description="file or URI of weights to start from: a checkpoint of raydet, or a file with the names of "
        "Megvii's YOLOX, of SuperGradients or of D-FINE; coco: the published weights of the model; imagenet: those of "
        "its backbone; null: random weights",
    )


class YoloXDetectionLoss(Section):
    """The loss, and the arguments of its class."""

    name: Literal["YoloXDetectionLoss"] = Field("YoloXDetectionLoss", description="loss of the YOLOX paper")
    iou_weight: float = Field(5.0, ge=0, description="weight of the box term")
    obj_weight: float = Field(1.0, ge=0, description="weight of the objectness term")
    cls_weight: float = Field(1.0, ge=0, description="weight of the classification term")
    cls_pos_weight: float | list[float] | None = Field(
        None,
        description="weight of the positives in the classification term: one number, or one for each class; null: 1",
    )
    use_l1: bool = Field(False, description="add an L1 term on the raw box outputs")
    l1_last_epochs: int = Field(
        0, ge=0, description="number of last epochs with the L1 term; 0: use_l1 decides for all epochs"
    )
    iou_type: Literal["iou", "giou"] = Field("iou", description="box term: iou (1 - IoU²) or giou (1 - GIoU)")
    center_sampling_radius: float = Field(
        2.5,
        gt=0,
        description="distance from an object's centre, in strides, within which anchor points are candidates for "
        "it, also outside its box",
    )


class YoloXFastDetectionLoss(YoloXDetectionLoss):
    """The loss, and the arguments of its class."""

    name: Literal["YoloXFastDetectionLoss"] = Field(  # type: ignore[assignment]
        "YoloXFastDetectionLoss",
        description="loss of YOLOX in SuperGradients' variant; YoloXDetectionLoss is that of the paper",
    )
    dynamic_ks_bias: float = Field(
        1.1, gt=0, description="factor on the number of anchor points that are assigned to an object"
    )
    obj_loss_fix: bool = Field(
        False, description="divide the objectness term by the number of all anchor points instead of the assigned ones"
    )


class PPYoloELoss(Section):
    """The loss, and the arguments of its class."""

    name: Literal["PPYoloELoss"] = Field("PPYoloELoss", description="loss of PP-YOLOE and YOLO-NAS")
    classification_loss_weight: float = Field(1.0, ge=0, description="weight of the classification term")
    iou_loss_weight: float = Field(2.5, ge=0, description="weight of the GIoU term")
    dfl_loss_weight: float = Field(0.5, ge=0, description="weight of the distribution focal loss")
    use_varifocal_loss: bool = Field(
        True, description="classification term: true: varifocal loss, false: quality focal loss"
    )
    use_static_assigner: bool = Field(
        False, description="assignment of anchor points to objects: true: ATSS, false: the task-aligned assigner"
    )
    static_assigner_end_epoch: int | None = Field(
        None,
        ge=0,
        description="number of first epochs with ATSS, after which the task-aligned assigner takes over; null: "
        "use_static_assigner decides for all epochs",
    )


class SSDLoss(Section):
    """The loss, and the arguments of its class."""

    name: Literal["SSDLoss"] = Field("SSDLoss", description="loss of SSD")
    alpha: float = Field(
        1.0, ge=0, le=2, description="weight of the classification term; the weight of the box term is 2 - alpha"
    )
    iou_thresh: float = Field(
        0.5, gt=0, lt=1, description="lowest IoU of a default box and the object that it is matched with"
    )
    neg_pos_ratio: float = Field(3.0, ge=0, description="number of background boxes for each matched box")


class DFineLoss(Section):
    """The loss, and the arguments of its class."""

    name: Literal["DFineLoss"] = Field("DFineLoss", description="loss of D-FINE")
    classification: Literal["vfl", "mal"] = Field(
        "vfl", description="classification term: vfl (varifocal loss) or mal (matchability-aware loss, of DEIM)"
    )
    vfl_weight: float = Field(1.0, ge=0, description="weight of the classification term")
    bbox_weight: float = Field(5.0, ge=0, description="weight of the L1 term")
    giou_weight: float = Field(2.0, ge=0, description="weight of the GIoU term")
    fgl_weight: float = Field(0.15, ge=0, description="weight of the fine-grained localization loss")
    ddf_weight: float = Field(1.5, ge=0, description="weight of the decoupled distillation focal loss")
    mal_gamma: float = Field(1.5, gt=0, description="exponent of the IoU and of the score, with classification: mal")
    mal_alpha: float | None = Field(
        None, gt=0, description="factor on the term of the other classes, with classification: mal; null: 1"
    )
    giou_by_iou: bool = Field(False, description="multiply the GIoU term of a box by its IoU")


class OwnLoss(Section):
    """The loss, yours, and the arguments of its class."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(
        description="loss of your own, package.module:Class, which is called with the other keys of this section"
    )


LOSSES: dict[str, type[Section]] = {
    kind.__name__: kind for kind in (YoloXFastDetectionLoss, YoloXDetectionLoss, PPYoloELoss, SSDLoss, DFineLoss)
}


def loss_kind(value: Any) -> str | None:
    """Return the name of the class that checks a section `loss`; None: it names no loss."""
    name = value.get("name") if isinstance(value, Mapping) else getattr(value, "name", None)
    if name is None and isinstance(value, Mapping):
        return YoloXFastDetectionLoss.__name__
    name = str(name)
    return "OwnLoss" if is_own(name) else name if name in LOSSES else None


Loss = Annotated[
    Annotated[YoloXFastDetectionLoss, Tag("YoloXFastDetectionLoss")]
    | Annotated[YoloXDetectionLoss, Tag("YoloXDetectionLoss")]
    | Annotated[PPYoloELoss, Tag("PPYoloELoss")]
    | Annotated[SSDLoss, Tag("SSDLoss")]
    | Annotated[DFineLoss, Tag("DFineLoss")]
    | Annotated[OwnLoss, Tag("OwnLoss")],
    Discriminator(
        loss_kind,
        custom_error_type="no_such_loss",
        custom_error_message=f"name should be {', '.join(LOSSES)} or package.module:Class",
    ),
]


class Train(Section):
    """Optimization."""

    epochs: int = Field(300, ge=1, description="number of passes over the training images")
    batch_size: int = Field(
        128, ge=1, description="number of images in a step, over all workers together; each worker gets an equal share"
    )
    micro_batch_size: int | None = Field(
        None,
        ge=1,
        description="largest batch of one forward pass on a worker; larger batches are split and their gradients "
        "accumulated, which is equivalent except for batch norm; null: batches are not split",
    )
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="optimizer: sgd (with Nesterov momentum) or adamw")
    lr: float = Field(0.02, gt=0, description="highest learning rate, for this batch_size")
    backbone_lr: float = Field(
        1.0,
        ge=0,
        description="factor on the learning rate of the backbone; 0 freezes it, including its batch norm statistics",
    )
    neck_lr: float = Field(
        1.0,
        ge=0,
        description="factor on the learning rate of the neck; 0 freezes it, including its batch norm statistics",
    )
    head_lr: float = Field(
        1.0,
        ge=0,
        description="factor on the learning rate of the head; 0 freezes it, including its batch norm statistics",
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum of SGD")
    weight_decay: float = Field(5e-4, ge=0, description="weight decay of all weights except biases and norms")
    decay_all: bool = Field(False, description="apply weight decay to biases and norms as well")
    decay_backbone: bool = Field(False, description="apply weight decay to the biases and norms of the backbone")
    decay_biases: bool = Field(False, description="apply weight decay to biases, except those of norms")
    clip_grad_norm: float | None = Field(
        None,
        gt=0,
        description="largest norm of the gradient of all weights together; a longer gradient is scaled down to it; "
        "null: no clipping",
    )
    schedule: Literal["cosine", "step", "constant"] = Field(
        "cosine",
        description="learning rate between warmup and cooldown: cosine (falls to final_lr), step (is multiplied by "
        "lr_gamma at each of lr_milestones) or constant",
    )
    lr_milestones: list[float] = Field([], description="epochs at which the learning rate falls, with schedule: step")
    lr_gamma: float = Field(
        0.1, gt=0, le=1, description="factor on the learning rate at each milestone, with schedule: step"
    )
    warmup_epochs: float = Field(
        5.0, ge=0, description="number of first epochs in which the learning rate rises linearly from 0"
    )
    warmup_steps: int = Field(
        0, ge=0, description="length of the warmup in steps instead of epochs; 0: warmup_epochs decides"
    )
    cooldown_epochs: float = Field(15.0, ge=0, description="number of last epochs with the lowest learning rate")
    final_lr: float = Field(0.05, ge=0, le=1, description="lowest learning rate, as a fraction of lr")
    ema_decay: float = Field(
        0.9999, ge=0, lt=1, description="decay of the exponential moving average (EMA) of the weights"
    )
    ema_rise: Literal["exp", "threshold", "constant"] = Field(
        "exp",
        description="how the decay of the EMA rises to ema_decay: exp (ema_decay · (1 - exp(-ema_ramp · share of "
        "the run))), threshold (no more than (1 + step) / (10 + step)) or constant",
    )
    ema_ramp: float = Field(15.0, gt=0, description="speed at which the decay of the EMA rises, with ema_rise: exp")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto",
        description="number format of the forward pass: bf16, fp16 (with loss scaling) or fp32; auto: bf16 on GPUs "
        "that have it, fp16 on GPUs that do not (T4, V100), fp32 on CPUs",
    )
    compile: bool = Field(
        False, description="compile the model with torch.compile: some minutes at the start, then faster steps"
    )
    sync_bn: bool = Field(False, description="compute batch norm statistics over the images of all workers, on GPUs")
    max_bad_steps: int = Field(
        5,
        ge=1,
        description="number of consecutive steps with a loss or gradient that is not finite, after which the run "
        "stops; each such step is skipped",
    )

    @model_validator(mode="before")
    @classmethod
    def _one_warmup(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("warmup_steps") and given.setdefault("warmup_epochs", 0.0):
            raise ValueError("warmup_epochs and warmup_steps are both set: set the other to 0")
        return given


class Eval(Section):
    """Validation: what counts as a detection."""

    every: int = Field(
        1, ge=1, description="number of epochs from one validation to the next; the last epoch always has one"
    )
    watch: str = Field("mAP@0.50:0.95", description="metric that decides which checkpoints are best, such as mAP@0.50")
    patience: int | None = Field(
        None,
        ge=1,
        description="number of validations without an improvement of watch, after which the training stops; null: "
        "train all epochs",
    )
    min_delta: float = Field(0.0, ge=0, description="smallest improvement of watch that counts for patience")
    batch_size: int = Field(16, ge=1, description="number of images in a validation batch of one worker")
    score: float = Field(0.001, ge=0, lt=1, description="lowest score of a detection")
    iou: float = Field(
        0.65,
        gt=0,
        le=1,
        description="IoU threshold of NMS: of two boxes that overlap more, only the one with the higher score stays",
    )
    nms_top_k: int | None = Field(
        None, ge=1, description="largest number of boxes of an image that enter NMS, best scores first; null: all"
    )
    max_detections: int = Field(
        300, ge=1, description="largest number of detections in an image after NMS, best scores first"
    )
    max_dets: int = Field(
        100,
        gt=10,
        description="largest number of detections of each class in an image that the metrics count, best scores "
        "first; COCO's number is 100",
    )
    multi_label: bool = Field(
        False,
        description="let one box be detected as several classes; false: as its best class only",
    )
    class_agnostic: bool = Field(
        False, description="run NMS across classes: overlapping boxes of different classes suppress each other"
    )


class Scale(Section):
    """Resources. They do not change which samples a step has; batch norm sees those of its own worker."""

    num_workers: Annotated[int, Field(ge=1)] | Annotated[tuple[Count, Count], BeforeValidator(in_order)] = Field(
        1,
        description="number of Ray Train workers, one GPU each where GPUs are used; [fewest, most]: as many as the "
        "cluster has room for, also when nodes come or go",
    )
    gpu: bool | None = Field(None, description="train on GPUs; null: if the cluster has any")
    gpu_share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="fraction of a GPU that a single worker takes; below 1, trials of a sweep share GPUs",
    )
    cpus_per_worker: int | None = Field(
        None,
        ge=1,
        description="number of CPUs of a worker; null: 1 with a GPU, else an equal share of this machine's CPUs",
    )
    data_tasks: int | None = Field(
        None,
        ge=1,
        description="number of Ray Data tasks at once; null: three for every two CPUs that the workers leave",
    )
    data_label: Label | None = Field(
        None,
        description="label of the nodes that run the data tasks, such as raydet=data, as given to ray start "
        "--labels; null: any node, those of the workers first",
    )
    workers_per_stream: int | None = Field(
        None,
        ge=1,
        description="largest number of workers that a stream of samples feeds; null: the workers of a node, or of "
        "several nodes where one trains on less than 64 images a step",
    )
    worker_resources: dict[str, Factor] = Field(
        {},
        description="further resources that each worker takes, which decide on which nodes it runs, such as "
        "{accelerator_type:H100: 0.001}",
    )
    max_failures: int = Field(3, ge=0, description="number of times that lost workers are replaced")
    hang_minutes: float = Field(
        30.0,
        gt=0,
        description="minutes without a step after which a worker is replaced; its stack is kept in the folder of "
        "the run",
    )
    async_validation: bool = Field(
        False,
        description="validate on a GPU, or CPUs, set apart for it, while the training goes on; false: validate on "
        "the workers",
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
