"""The snippets of SuperGradients' page on detection, as they are typed there, but for the paths of imports."""

import hashlib
from dataclasses import replace

import pytest
import torch

from raydet import models
from raydet.data import DetectionDataset
from raydet.errors import RaydetError
from raydet.losses import YoloXDetectionLoss
from raydet.models.published import PUBLISHED, published
from raydet.supergradients import dataloaders
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


class Boxes(DetectionDataset):
    def __init__(self, data_dir, transforms):
        super().__init__(data_dir, "XYXY_LABEL", all_classes_list=["shape"], transforms=transforms)

    def _setup_data_source(self):
        return 1

    def _load_annotation(self, sample_id):
        return {"img_path": "one.jpg", "target": [[1, 2, 3, 4, 0]], "initial_img_shape": (10, 10)}


def test_a_data_set_with_transforms_that_only_fit_images(tmp_path):
    (tmp_path / "one.jpg").touch()
    index = Boxes(tmp_path, [{"DetectionPaddedRescale": {"input_dim": [640, 640]}}, "DetectionStandardize"]).index()
    assert len(index) == 1


@pytest.mark.parametrize(
    ("transforms", "message"),
    [
        ([{"DetectionMosaic": {"prob": 1.0}}], "DetectionMosaic belongs into the recipe: augment.mosaic"),
        (["DetectionMixup"], "DetectionMixup belongs into the recipe: augment.mixup"),
        ([object()], "object belongs into the recipe: augment.transforms"),
    ],
)
def test_augmentation_of_a_data_set_is_sent_to_the_recipe(tmp_path, transforms, message):
    with pytest.raises(RaydetError, match=message):
        Boxes(tmp_path, transforms)
