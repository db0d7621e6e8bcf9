import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from raydet import models
from raydet.errors import RaydetError
from raydet.models.blocks import Conv, DepthwiseConv

PARAMETERS = {
    "yolox_n": 912_159,
    "yolox_t": 5_055_855,
    "yolox_s": 8_968_255,
    "yolox_m": 25_326_495,
    "yolox_l": 54_208_895,
    "yolox_x": 99_071_455,
}


@pytest.fixture(scope="module")
def nano():
    torch.manual_seed(0)
    return models.get("yolox_n", 5)


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_parameters_as_published(name, count):
    with torch.device("meta"):
        model = models.get(name, 80)
    assert sum(p.numel() for p in model.parameters()) == count
    assert type(model) is models.FAMILIES[name].models[name]


@pytest.mark.parametrize(("height", "width"), [(64, 64), (32, 96), (160, 128)])
def test_outputs_by_mode(nano, height, width):
    images = torch.rand(2, 3, height, width) * 255
    raw = nano.train()(images)
    assert [tuple(m.shape) for m in raw] == [(2, 1, height // s, width // s, 10) for s in (8, 16, 32)]
    with torch.no_grad():
        decoded, maps = nano.eval()(images)
    points = sum(height // s * width // s for s in (8, 16, 32))
    assert decoded.shape == (2, points, 10)
    assert isinstance(maps, list)
    assert (decoded[..., 2:] >= 0).all()
    assert (decoded[..., 4:] <= 1).all()
    # The first point of each level: its offset from cell 0, its size as a power of e, in strides.
    first = 0
    for level, stride in zip(maps, (8, 16, 32), strict=True):
        corner = level[0, 0, 0, 0]
        expected = torch.cat((corner[:2] * stride, corner[2:4].exp() * stride, corner[4:].sigmoid()))
        torch.testing.assert_close(decoded[0, first], expected)
        first += level.shape[2] * level.shape[3]


@pytest.mark.parametrize("size", [(63, 64), (64, 48), (100, 100)])
def test_other_sizes_are_refused(nano, size):
    with pytest.raises(ValueError, match=f"images of {size[0]}x{size[1]} pixels: both sides must be multiples of 32"):
        nano(torch.zeros(1, 3, *size))


def test_a_fresh_model_expects_background(nano):
    with torch.no_grad():
        decoded, _ = models.get("yolox_n", 5).eval()(torch.zeros(1, 3, 64, 64))
    torch.testing.assert_close(decoded[..., 4:].mean(), torch.tensor(0.01), atol=2e-3, rtol=0)


def test_only_the_nano_is_depthwise():
    for name in ("yolox_n", "yolox_t"):
        kinds = {type(module) for module in models.get(name, 2).modules()}
        assert (DepthwiseConv in kinds) == (name == "yolox_n")
        assert Conv in kinds


def test_weights_come_back(nano, tmp_path):
    save_file(nano.state_dict(), tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        again = models.get("yolox_n", 5, weights=path)
        assert all(torch.equal(a, b) for a, b in zip(nano.parameters(), again.parameters(), strict=True))


def test_another_class_count_replaces_the_prediction_layers_and_says_so(nano, tmp_path, caplog):
    save_file(nano.state_dict(), tmp_path / "model.safetensors")
    other = models.get("yolox_n", 3, weights=tmp_path)
    assert "is for 5 classes: the class prediction layers for 3 classes start afresh" in caplog.text
    assert len(caplog.records) == 1
    ours, theirs = other.state_dict(), nano.state_dict()
    for name, tensor in theirs.items():
        if name.endswith("num_batches_tracked"):
            continue
        assert ("cls_preds" in name) != (tensor.shape == ours[name].shape and torch.equal(tensor, ours[name])), name


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("coco", "raydet downloads none.*github.com/Megvii-BaseDetection/YOLOX.*Apache-2.0.*weights=PATH"),
        ("none.pth", "neither a weights file nor a checkpoint folder"),
    ],
)
def test_names_of_downloads_are_refused_and_taught(weights, message):
    with pytest.raises(RaydetError, match=message):
        models.get("yolox_n", weights=weights)


def test_weights_of_another_model_are_refused(nano, tmp_path):
    save_file(nano.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(RaydetError, match=r"is not of a YoloX_T: \d+ tensors do not fit, such as backbone"):
        models.get("yolox_t", 5, weights=tmp_path)


def test_files_that_are_no_weights_are_refused(tmp_path):
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(RaydetError, match=r"text\.pth is not a checkpoint that can be loaded safely"):
        models.get("yolox_n", weights=tmp_path / "text.pth")
    torch.save({"model": {"layer.weight": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(RaydetError, match=r"tensors like layer\.weight are of no model known here"):
        models.get("yolox_n", weights=tmp_path / "other.pth")
    torch.save({"model": [1, 2]}, tmp_path / "list.pth")
    with pytest.raises(RaydetError, match="holds no tensors by name"):
        models.get("yolox_n", weights=tmp_path / "list.pth")


def test_damaged_safetensors_are_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(RaydetError, match=r"model\.safetensors is damaged"):
        models.get("yolox_n", weights=tmp_path)


def test_numbers_of_numpy_beside_the_weights_are_read(shared, tmp_path):
    """YOLOX's own trainer writes its best AP as one."""
    content = torch.load(shared / "weights/yolox_nano/yolox_nano_coco.pth", weights_only=True)
    torch.save({"model": content.get("model", content), "best_ap": np.float64(0.3)}, tmp_path / "best.pth")
    assert models.get("yolox_n", weights=tmp_path / "best.pth").num_classes == 80


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(RaydetError, match="no model is named 'yolox-s'; did you mean yolox_s"):
        models.get("yolox-s")
