"""The snippets of SuperGradients' page on detection, as they are typed there, but for the paths of imports."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from raydet import models
from raydet.data import DetectionDataset, loader, register_dataset
from raydet.data.transform_list import TransformList
from raydet.errors import RaydetError
from raydet.losses import YoloXDetectionLoss, YoloXFastDetectionLoss
from raydet.metrics import DetectionMetrics
from raydet.models.published import PUBLISHED, published
from raydet.outputs import shapes
from raydet.postprocess import YoloXPostPredictionCallback
from raydet.recipe import Augment
from raydet.recipe import load as load_recipe
from raydet.supergradients import dataloaders
from raydet.tracking import DetectionVisualizationCallback, ExtremeBatchDetectionVisualizationCallback
from raydet.visualization import DetectionVisualization


@pytest.fixture
def mirror(shared, tmp_path, monkeypatch):
    """A folder with yolox_nano in place of the host; the file is not Megvii's, so the table gets its sum."""
    file = shared / "weights/yolox_nano/yolox_nano_coco.pth"
    (tmp_path / "yolox_nano.pth").symlink_to(file)
    monkeypatch.setenv("RAYDET_WEIGHTS", str(tmp_path))
    weights = replace(published("yolox_n"), sha256=hashlib.sha256(file.read_bytes()).hexdigest())
    monkeypatch.setitem(PUBLISHED, "yolox_n", weights)


def test_a_pretrained_model(mirror):
    model = models.get("yolox_n", pretrained_weights="coco", num_classes=80)
    assert model.num_classes == 80


def test_data_loaders_and_a_loss(shared):
    data_dir = str(shared / "data/coco_mini")
    train = dataloaders.get(
        name="coco2017_train",
        dataset_params={"data_dir": data_dir, "input_dim": [64, 64]},
        dataloader_params={"num_workers": 2, "batch_size": 2},
    )
    imgs, targets = next(iter(train))
    assert (imgs.shape, targets.shape[1]) == ((2, 3, 64, 64), 6)
    model = models.get("yolox_n", num_classes=80)
    loss, _ = YoloXDetectionLoss(num_classes=80, strides=[8, 16, 32])(model.train()(imgs.float()), targets)
    assert torch.isfinite(loss)
    val = dataloaders.get(
        name="coco2017_val", dataset_params={"data_dir": data_dir}, dataloader_params={"num_workers": 2}
    )
    assert val.split == "val"
    assert len(val.index) == 254
    imgs, targets = next(iter(val))
    assert imgs.shape[1:] == (3, 640, 640)
    assert targets[:, 2:].max() > 1


def test_a_list_of_transforms_decides_the_augmentation_of_a_data_loader(shapes):
    """What it does not name is off, as there; one's own come last."""
    listed = [{"DetectionHorizontalFlip": {"prob": 1.0}}, {f"{__name__}:Darken": {"by": 4}}, "DetectionStandardize"]
    params = {"data_dir": str(shapes), "input_dim": [64, 64], "transforms": listed}
    imgs, targets = next(iter(dataloaders.get("demo_train", params, {"batch_size": 4})))
    off = ("mosaic", "mixup", "degrees", "translate", "shear", "rotate90", "hsv", "zoom_out", "iou_crop", "photometric")
    settings = [f"data.root={shapes}", "data.image_size=64", "augment.scale=[1, 1]", "augment.horizontal_flip=1"]
    settings += [f"augment.{name}=0" for name in (*off, "vertical_flip", "channel_swap")]
    straight, expected = next(iter(loader("demo_train", settings, batch_size=4)))
    torch.testing.assert_close(targets, expected)
    assert len(targets)
    assert (imgs.int() - straight.int() // 4).abs().max() <= 1
    with pytest.raises(RaydetError, match="transforms: DetectionFlip has no meaning here"):
        dataloaders.get("demo_train", {**params, "transforms": ["DetectionFlip"]})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset_params": {"data_dirs": "x"}}, "dataset_params.data_dirs has no meaning here; did you mean data_dir"),
        ({"dataloader_params": {"shuffle": True}}, "dataloader_params.shuffle has no meaning here"),
    ],
)
def test_what_means_nothing_is_refused_by_name(arguments, message):
    with pytest.raises(RaydetError, match=message):
        dataloaders.get("coco2017_train", **arguments)


def test_a_batch_is_drawn(tmp_path):
    imgs = torch.full((2, 3, 64, 64), 90.0)
    preds = [torch.tensor([[5.0, 5.0, 30.0, 30.0, 0.9, 1.0]]), torch.zeros(0, 6)]
    targets = torch.tensor([[0.0, 1.0, 20.0, 20.0, 20.0, 20.0]])
    DetectionVisualization.visualize_batch(
        imgs,
        preds,
        targets,
        batch_name="train",
        class_names=["cat", "dog"],
        checkpoint_dir=tmp_path,
        gt_alpha=0.5,
        undo_preprocessing_func=lambda x: x.permute(0, 2, 3, 1).numpy().astype("uint8"),
    )
    assert sorted(file.name for file in tmp_path.iterdir()) == ["train_0.jpg", "train_1.jpg"]


def test_targets_that_are_fractions_are_not_drawn_as_pixels():
    with pytest.raises(RaydetError, match='target_units="normalized"'):
        DetectionVisualization.visualize_batch(
            torch.zeros(1, 3, 64, 64), None, torch.tensor([[0, 0, 0.5, 0.5, 0.2, 0.2]]), "train", ["cat"]
        )


# ---- models: outputs by mode, tracing, exporting

OUTPUTS = [
    ("yolox_n", "[2x1x8x8x8, 2x1x4x4x8, 2x1x2x2x8]", "2x84x8"),
    ("ppyoloe_s", "[2x84x3, 2x84x68, 84x4, 84x2, [4, 16, 64], 84x1]", "[2x84x4, 2x84x3]"),
    ("yolo_nas_s", "[2x84x3, 2x84x68, 84x4, 84x2, [64, 16, 4], 84x1]", "[2x84x4, 2x84x3]"),
    ("ssd_lite_mobilenet_v2", "[2x4x144, 2x4x144]", "2x144x8"),
    (
        "dfine_n",
        "[3x2x20x3, 3x2x20x4, 3x2x20x132, 2x20x3, 2x20x4, 2x20x3, 2x20x4, 33, 1, 0, [64, 64]]",
        "[2x20x4, 2x20x3]",
    ),
]
NAMES = [name for name, *_ in OUTPUTS]


@pytest.fixture(scope="module")
def zoo():
    """The smallest model of each family, for 3 classes and images of 64 pixels."""
    torch.manual_seed(0)
    return {name: models.get(name, num_classes=3, image_size=(64, 64)) for name in NAMES}


@pytest.mark.parametrize(("name", "raw", "decoded"), OUTPUTS, ids=NAMES)
def test_outputs_by_mode(zoo, name, raw, decoded):
    """In training the raw outputs, which the loss takes; in evaluation (decoded, raw)."""
    images = torch.zeros(2, 3, 64, 64)
    assert shapes(zoo[name].train()(images)) == raw
    assert shapes(zoo[name].eval()(images)) == f"[{decoded}, {raw}]"


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_traced_and_exported(zoo, name):
    model = zoo[name].eval()
    images = torch.rand(1, 3, 64, 64) * 255
    with torch.no_grad():
        expected = _tensors(model(images)[0])
        traced = torch.jit.trace(model, images, check_trace=False)
        exported = torch.export.export(model, (images,)).module()
        for again in (traced(images), exported(images)):
            for found, wanted in zip(_tensors(again), expected, strict=False):
                torch.testing.assert_close(found, wanted)


def _tensors(outputs):
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    return [each for part in outputs for each in _tensors(part)] if isinstance(outputs, list | tuple) else []


# ---- losses, metrics, callbacks


class Heavier(YoloXDetectionLoss):
    """A loss of one's own, as on the page: a subclass that changes one term."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.iou_weight *= 2


@pytest.mark.parametrize(
    ("loss", "factor"),
    [
        (YoloXDetectionLoss(num_classes=3, iou_weight=10.0), 2),
        (YoloXFastDetectionLoss(num_classes=3, iou_weight=5.0, dynamic_ks_bias=1.1), None),
        (Heavier(num_classes=3), 2),
    ],
    ids=["weight", "fast", "subclass"],
)
def test_weights_and_subclasses_of_losses(zoo, loss, factor):
    targets = torch.tensor([[0, 1, 20.0, 20, 16, 16], [1, 2, 40.0, 30, 24, 20]])
    outputs = zoo["yolox_n"].train()(torch.zeros(2, 3, 64, 64))
    plain, plain_parts = YoloXDetectionLoss(num_classes=3)(outputs, targets)
    total, parts = loss(outputs, targets)
    assert loss.component_names[0] == "iou"
    assert torch.isfinite(total)
    if factor is not None:
        assert (total - plain).item() == pytest.approx(5.0 * (factor - 1) * plain_parts[0].item(), rel=1e-4)
        assert parts[0].item() == plain_parts[0].item(), "what is logged has no weight"


def test_detection_metrics_with_a_range_and_thresholds(zoo):
    metrics = DetectionMetrics(
        num_cls=3,
        post_prediction_callback=YoloXPostPredictionCallback(conf=0.1, iou=0.65),
        normalize_targets=True,
        iou_thres=(0.5, 0.95),
        score_thres=0.1,
        top_k_predictions=300,
        calc_best_score_thresholds=True,
        include_classwise_ap=True,
        class_names=["cat", "dog", "cow"],
    )
    outputs = zoo["yolox_n"].eval()(torch.zeros(2, 3, 64, 64))
    metrics.update(outputs, torch.tensor([[0, 1, 20.0, 20, 16, 16]]), device="cpu", inputs=torch.zeros(2, 3, 64, 64))
    found = metrics.compute()
    assert {"Precision@0.50:0.95", "Recall@0.50:0.95", "mAP@0.50:0.95", "F1@0.50:0.95"} <= found.keys()
    assert any("dog" in key for key in found)


def test_callbacks_are_settings():
    settings = [
        ExtremeBatchDetectionVisualizationCallback(
            loss_to_monitor="YoloXDetectionLoss/iou", max=True, freq=1, enable_on_train_loader=True, max_images=8
        ),
        ExtremeBatchDetectionVisualizationCallback(metric="mAP@0.50:0.95", max=False),
    ]
    dumped = [each.model_dump() for each in settings]
    recipe = load_recipe("coco2017_yolox_s", [f"track.extreme_batches={json.dumps(dumped)}"])
    assert recipe.track.extreme_batches == settings
    assert DetectionVisualizationCallback(phase="valid", batch_idx=0, freq=1).phase == "valid"


# ---- a data set of one's own


class Darken:
    """A transform of one's own."""

    def __init__(self, by=2):
        self.by = by

    def __call__(self, sample, rng):
        return replace(sample, image=sample.image // self.by)


class Boxes(DetectionDataset):
    """The class of the page: its transforms go to the base class."""

    def __init__(self, data_dir, samples_dir, input_dim, transforms):
        self.samples = sorted(Path(data_dir, samples_dir).iterdir())
        super().__init__(data_dir, "XYXY_LABEL", all_classes_list=["shape"], input_dim=input_dim, transforms=transforms)

    def _setup_data_source(self):
        return len(self.samples)

    def _load_annotation(self, sample_id):
        target = [[8, 8, 24, 24, 0]]
        return {"img_path": str(self.samples[sample_id]), "target": target, "initial_img_shape": (64, 64)}


@pytest.fixture
def boxes(tmp_path, monkeypatch):
    """The folder of a registered data set of this class."""
    monkeypatch.setattr("raydet.data.own.REGISTERED", {})
    register_dataset("boxes_of_the_page")(Boxes)
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        cv2.imwrite(str(tmp_path / split / "one.png"), np.full((64, 64, 3), 100, np.uint8))
    return tmp_path


def settings_of(root, transforms):
    params = {split: {"samples_dir": split, "transforms": listed} for split, listed in transforms.items()}
    return [
        "data.format=boxes_of_the_page",
        f"data.root={root}",
        "data.image_size=64",
        *(f"data.{split}_params={json.dumps(given)}" for split, given in params.items()),
    ]


FIT = [{"DetectionPaddedRescale": {"input_dim": [64, 64]}}, "DetectionStandardize"]


def test_dataset_params_reach_the_class_and_its_transforms_the_images(boxes):
    transforms = {"train": [{"DetectionHorizontalFlip": {"prob": 1.0}}, {f"{__name__}:Darken": {"by": 4}}, *FIT]}
    overrides = settings_of(boxes, {**transforms, "val": FIT})
    images, targets = next(iter(loader("demo", overrides, split="train", batch_size=1)))
    assert (images == 25).all()
    assert targets.tolist() == [[0, 0, 48, 16, 16, 16]]
    images, targets = next(iter(loader("demo", overrides, split="val", batch_size=1)))
    assert (images == 100).all()
    assert targets.tolist() == [[0, 0, 16, 16, 16, 16]]


def test_transforms_that_only_fit_images_leave_the_augmentation_to_the_recipe(boxes):
    overrides = settings_of(boxes, {"train": FIT})
    off = ["augment.horizontal_flip=1", "augment.hsv=0", "augment.mosaic=0", "augment.scale=[1, 1]"]
    _, targets = next(iter(loader("demo", [*overrides, *off], split="train", batch_size=1)))
    assert targets.tolist() == [[0, 0, 48, 16, 16, 16]]


@pytest.mark.parametrize(
    ("listed", "augment"),
    [
        ([{"DetectionMosaic": {"prob": 1.0, "input_dim": [640, 640]}}], {"mosaic": 1.0}),
        (
            [{"DetectionRandomAffine": {"degrees": 10.0, "translate": 0.1, "scales": [0.1, 2], "shear": 2.0}}],
            {"degrees": 10.0, "translate": 0.1, "scale": (0.1, 2), "shear": 2.0},
        ),
        (
            [{"DetectionRandomAffine": {"translate": [0.25, 0.75], "scales": 0.5}}],
            {"degrees": 10.0, "translate": 0.25, "scale": (0.5, 1.5), "shear": 10.0},
        ),
        ([{"DetectionMixup": {"prob": 0.5, "mixup_scale": [0.5, 1.5]}}], {"mixup": 0.5, "mixup_scale": (0.5, 1.5)}),
        (
            [{"DetectionHSV": {"prob": 0.5, "hgain": 5, "sgain": 30, "vgain": 20}}],
            {"hsv": 0.5, "hue": 5, "saturation": 30, "value": 20},
        ),
        (
            [{"DetectionVerticalFlip": {"prob": 0.5}}, {"DetectionRGB2BGR": {"prob": 0.25}}],
            {"vertical_flip": 0.5, "channel_swap": 0.25},
        ),
        (["DetectionRandomRotate90"], {"rotate90": 0.375}),
    ],
)
def test_the_names_of_transforms_mean_settings_of_augment(listed, augment):
    """What such a list does not name is off."""
    found = TransformList.read(listed).augment
    assert augment.items() <= found.items()
    assert {value for key, value in found.items() if key not in augment} <= {0.0, (1.0, 1.0)}
    Augment.model_validate(dict(found))


def test_a_list_turns_off_every_augmentation_there_is():
    strengths = {"mixup_scale", "hue", "saturation", "value"}
    others = {"close_epochs", "multiscale", "multiscale_every", "multiscale_repeats", "transforms"}
    off = TransformList.read([{"DetectionHorizontalFlip": {"prob": 0}}]).augment
    assert off.keys() == Augment.model_fields.keys() - strengths - others


@pytest.mark.parametrize(
    ("transforms", "message"),
    [
        (["DetectionMosaik"], "DetectionMosaik has no meaning here; did you mean DetectionMosaic"),
        ([{"DetectionMosaic": {"probability": 1.0}}], r"DetectionMosaic: .* takes no probability"),
        ([{"DetectionHorizontalFlip": {}}], "DetectionHorizontalFlip: .*prob is missing"),
        ([{"DetectionRandomAffine": {"degrees": [0, 10]}}], r"degrees \[0, 10\]: the middle of the two must be 0"),
        ([object()], "object cannot be called"),
        (["nowhere:Flip"], "cannot import nowhere"),
    ],
)
def test_a_transform_without_a_meaning_is_refused_by_name(transforms, message):
    with pytest.raises(RaydetError, match=f"transforms: .*{message}"):
        TransformList.read(transforms)


def test_an_argument_that_the_class_does_not_take_is_refused_by_name(boxes):
    overrides = [*settings_of(boxes, {}), "data.train_params={folder: train}"]
    with pytest.raises(RaydetError, match=r"boxes_of_the_page: Boxes.* takes no folder"):
        loader("demo", overrides)
