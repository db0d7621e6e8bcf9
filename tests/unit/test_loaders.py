"""The loader for looking at data outside a training."""

import numpy as np
import pytest
import torch

import raydet.data
from raydet.boxes import cxcywh_to_xyxy
from raydet.data.transforms import Normalize, Standardize
from raydet.errors import RaydetError


@pytest.fixture
def loader(shapes):
    return lambda source="demo", *overrides, **options: raydet.data.loader(
        source, [f"data.root={shapes}", "data.image_size=64", *overrides], batch_size=8, **options
    )


def test_images_and_targets(loader):
    images, targets = next(iter(loader()))
    assert (images.shape, images.dtype) == ((8, 3, 64, 64), torch.uint8)
    assert targets.shape[1] == 6
    assert set(targets[:, 0].tolist()) <= set(range(8))
    corners = cxcywh_to_xyxy(targets[:, 2:])
    assert (corners > -1e-3).all()
    assert (corners < 64 + 1e-3).all()


@pytest.mark.parametrize(("split", "images", "batches"), [("train", 40, 5), ("val", 24, 3)])
def test_an_epoch_has_every_image(loader, split, images, batches):
    mine = loader(split=split)
    assert len(mine) == batches == len(list(mine))
    assert sum(len(each) for each, _ in mine) == images == len(mine.index)


@pytest.mark.parametrize("epoch", [0, 1])
def test_fewer_images_than_a_batch_are_repeated_as_in_training(shapes, caplog, epoch):
    overrides = [f"data.root={shapes}", "data.image_size=64", "data.max_num_samples=3"]
    mine = raydet.data.loader("demo", overrides, batch_size=8, epoch=epoch)
    ((images, targets),) = list(mine)
    assert (len(mine), len(images)) == (1, 8)
    assert set(targets[:, 0].tolist()) <= set(range(8))
    rows = mine.samples.rows(8 * epoch, 8 * epoch + 8)  # those of the steps of a training
    assert set(rows.tolist()) == {0, 1, 2}
    assert "a batch takes 8 images, but there are 3: it repeats them" in caplog.text


def test_validation_ends_with_what_is_left(shapes):
    sizes = [len(images) for images, _ in raydet.data.loader("demo_val", [f"data.root={shapes}"], batch_size=10)]
    assert sizes == [10, 10, 4]


@pytest.mark.parametrize(
    ("source", "split"),
    [
        ("demo", "train"),
        ("demo_val", "val"),
        ("coco2017_train", "train"),
        ("coco2017_val_ppyoloe", "val"),
        ("coco2017_train_yolo_nas", "train"),
        ("coco2017_val_ssd_lite_mobilenet_v2", "val"),
    ],
)
def test_names(loader, source, split):
    assert loader(source).split == split
    assert next(iter(loader(source)))[0].shape[2:] == (64, 64)


def test_an_unknown_name_is_refused(loader):
    with pytest.raises(RaydetError, match="neither a recipe of raydet"):
        loader("nothing_train")


def test_epochs_differ_and_repeat(loader):
    first, again, second = (next(iter(loader(epoch=epoch)))[0] for epoch in (0, 0, 1))
    assert (first == again).all()
    assert (first != second).any()


def test_target_formats_and_transforms(loader):
    images, targets = next(iter(loader("demo_val")))
    options = {
        "target_format": "NORMALIZED_XYXY_LABEL",
        "transforms": [Standardize(), Normalize((0.5,) * 3, (0.5,) * 3)],
    }
    floats, normalized = next(iter(loader("demo_val", **options)))
    torch.testing.assert_close(floats, images / 255 * 2 - 1)
    np.testing.assert_allclose(normalized[:, 1:5] * 64, cxcywh_to_xyxy(targets[:, 2:]), atol=1e-3)
    assert normalized[:, 5].tolist() == targets[:, 1].tolist()
    assert normalized[:, 0].tolist() == targets[:, 0].tolist()
