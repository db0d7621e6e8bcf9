import logging

import pytest
import torch
from torch import nn

from raydet import losses, models
from raydet.errors import RaydetError
from raydet.models.blocks import Conv, DepthwiseConv, QARepVGG, RepVGG, reparametrise

# Published parameter counts: of the training graph, and with the branches of each block made one.
PARAMETERS = {
    "ssd_lite_mobilenet_v2": (4_711_348, 4_711_348),
    "yolox_n": (912_159, 912_159),
    "yolox_t": (5_055_855, 5_055_855),
    "yolox_s": (8_968_255, 8_968_255),
    "yolox_m": (25_326_495, 25_326_495),
    "yolox_l": (54_208_895, 54_208_895),
    "yolox_x": (99_071_455, 99_071_455),
    "ppyoloe_s": (8_084_588, 7_926_260),
    "ppyoloe_m": (24_134_892, 23_427_492),
    "ppyoloe_l": (54_078_556, 52_198_924),
    "ppyoloe_x": (102_331_484, 98_424_044),
    "yolo_nas_s": (12_878_304, 12_175_888),
    "yolo_nas_m": (33_861_346, 31_906_578),
    "yolo_nas_l": (44_529_448, 41_999_192),
}
SMALL = ["ssd_lite_mobilenet_v2", "yolox_n", "ppyoloe_s", "yolo_nas_s"]
C = 5


@pytest.fixture(scope="module")
def zoo():
    """The smallest model of each family, with norms that have seen something."""
    torch.manual_seed(0)
    made = {name: models.get(name, C) for name in SMALL}
    for model in made.values():
        for _ in range(3):
            model.train()(torch.rand(4, 3, *size_of(model)))
    return made


def size_of(model):
    return model.image_size if hasattr(model, "image_size") else (64, 96)


@pytest.mark.parametrize(("name", "counts"), PARAMETERS.items())
def test_parameters_as_published(name, counts):
    with torch.device("meta"):
        model = models.get(name, 80)
        trained = sum(p.numel() for p in model.parameters())
        reparametrise(model)
    assert (trained, sum(p.numel() for p in model.parameters())) == counts


def test_all_models_are_known_by_name_and_family():
    dfine = {f"dfine_{size}" for size in "nsmlx"}  # see tests/unit/test_dfine.py
    assert {name for family in models.FAMILIES for name in family.models} == set(PARAMETERS) | dfine
    for name in SMALL:
        family = models.family_of(name)
        model = models.get(name, C)
        assert models.family_of(model) is family
        assert type(model) is family.models[name]
        assert model.num_classes == C


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_has_a_part_in_the_output(zoo, name):
    """No placeholders, which DDP would have to look for."""
    model = zoo[name].train()
    raw = [t for t in flatten(model(torch.rand(2, 3, *size_of(model)))) if t.requires_grad]
    sum(t.square().sum() for t in raw).backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    model.zero_grad()
    assert missing == []


def flatten(outputs):
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    return [t for item in outputs if not isinstance(item, int) for t in flatten(item)]


@pytest.mark.parametrize(("height", "width"), [(64, 64), (32, 96), (160, 128)])
@torch.no_grad()
def test_yolox_outputs(zoo, height, width):
    images = torch.rand(2, 3, height, width)
    raw = zoo["yolox_n"].train()(images)
    assert [tuple(m.shape) for m in raw] == [(2, 1, height // s, width // s, 5 + C) for s in (8, 16, 32)]
    decoded, maps = zoo["yolox_n"].eval()(images)
    points = sum(height // s * width // s for s in (8, 16, 32))
    assert decoded.shape == (2, points, 5 + C)
    assert isinstance(maps, list)
    # The first point of each level: its offset from cell 0, its size as a power of e, in strides.
    first = 0
    for level, stride in zip(maps, (8, 16, 32), strict=True):
        corner = level[0, 0, 0, 0]
        expected = torch.cat((corner[:2] * stride, corner[2:4].exp() * stride, corner[4:].sigmoid()))
        torch.testing.assert_close(decoded[0, first], expected)
        first += level.shape[2] * level.shape[3]


@pytest.mark.parametrize(("name", "strides"), [("ppyoloe_s", (32, 16, 8)), ("yolo_nas_s", (8, 16, 32))])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (32, 96), (160, 128)])
@torch.no_grad()
def test_dfl_outputs(zoo, name, strides, height, width):
    images = torch.rand(2, 3, height, width)
    counts = [height // s * width // s for s in strides]
    raw = zoo[name].train()(images)
    (boxes, scores), evaluated = zoo[name].eval()(images)
    for cls, reg, anchors, points, levels, stride in (raw, evaluated):
        assert (cls.shape, reg.shape) == ((2, sum(counts), C), (2, sum(counts), 68))
        assert (anchors.shape, points.shape, stride.shape) == ((sum(counts), 4), (sum(counts), 2), (sum(counts), 1))
        assert levels == counts
        assert stride.unique_consecutive().tolist() == list(strides)
        # The first point is the middle of the first cell; its anchor box is 5 strides wide.
        assert points[0].tolist() == [strides[0] / 2] * 2
        assert (anchors[0, 2:] - anchors[0, :2]).tolist() == [5 * strides[0]] * 2
    assert (boxes.shape, scores.shape) == ((2, sum(counts), 4), (2, sum(counts), C))
    logits, _, _, points, _, stride = evaluated
    torch.testing.assert_close(scores, logits.sigmoid())
    mean = (evaluated[1].reshape(2, -1, 4, 17).softmax(-1) * torch.arange(17)).sum(-1) * stride
    torch.testing.assert_close(boxes, torch.cat((points - mean[..., :2], points + mean[..., 2:]), -1))


@pytest.mark.parametrize("size", [(320, 320), (256, 256), (192, 320)])
@torch.no_grad()
def test_ssd_outputs(size):
    model = models.get("ssd_lite_mobilenet_v2", C, image_size=size)
    images = torch.rand(2, 3, *size)
    boxes, logits = model.train()(images)
    count = len(model.head.default_boxes)
    assert (boxes.shape, logits.shape) == ((2, 4, count), (2, C + 1, count))
    decoded, raw = model.eval()(images)
    assert decoded.shape == (2, count, 5 + C)
    probability = raw[1].softmax(1)[:, 1:].transpose(1, 2)  # without the background
    torch.testing.assert_close(decoded[..., 5:], probability)
    torch.testing.assert_close(decoded[..., 4], probability.amax(-1))
    height, width = size
    default = model.head.default_boxes * torch.tensor([width, height, width, height])
    offsets = raw[0].transpose(1, 2)
    torch.testing.assert_close(decoded[..., :2], default[:, :2] + 0.1 * offsets[..., :2] * default[:, 2:])
    torch.testing.assert_close(decoded[..., 2:4], default[:, 2:] * (0.2 * offsets[..., 2:]).exp())
    area = default[:, 2] * default[:, 3]
    assert area[0] == pytest.approx((32 / 320) ** 2 * height * width, rel=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_traced_models_give_the_same(zoo, name):
    """PP-YOLOE and YOLO-NAS give boxes and scores alone, the others all that they give in evaluation mode."""
    model = zoo[name].eval()
    images = torch.rand(1, 3, *size_of(model))
    outputs = model(images)
    traced = torch.jit.trace(model, images, check_trace=False)
    expected = outputs[0] if name in ("ppyoloe_s", "yolo_nas_s") else outputs
    for found, wanted in zip(flatten(traced(images)), flatten(expected), strict=True):
        torch.testing.assert_close(found, wanted)
    callback = model.get_post_prediction_callback(conf=0.0, nms_top_k=20)
    torch.testing.assert_close(callback(traced(images)), callback(outputs))


@pytest.mark.parametrize("name", ["yolox_n", "ppyoloe_s", "yolo_nas_s"])
@pytest.mark.parametrize("size", [(63, 64), (64, 48), (100, 100)])
def test_sizes_that_are_no_multiples_of_32_are_refused(zoo, name, size):
    with pytest.raises(ValueError, match=f"images of {size[0]}x{size[1]} pixels: both sides must be multiples of 32"):
        zoo[name](torch.zeros(1, 3, *size))


def test_an_ssd_takes_the_size_it_is_built_for(zoo):
    with pytest.raises(ValueError, match=r"default boxes are for 320x320; build it with image_size=\(256, 320\)"):
        zoo["ssd_lite_mobilenet_v2"](torch.zeros(1, 3, 256, 320))


@pytest.mark.parametrize("name", ["yolox_n", "ppyoloe_s", "yolo_nas_s"])
@torch.no_grad()
def test_a_fresh_model_expects_background(name):
    outputs, _ = models.get(name, C).eval()(torch.zeros(1, 3, 64, 64))
    scores = outputs[..., 5:] if isinstance(outputs, torch.Tensor) else outputs[1]
    torch.testing.assert_close(scores.mean(), torch.tensor(0.01), atol=2e-3, rtol=0)


def test_only_the_nano_is_depthwise():
    for name in ("yolox_n", "yolox_t"):
        kinds = {type(module) for module in models.get(name, 2).modules()}
        assert (DepthwiseConv in kinds) == (name == "yolox_n")
        assert Conv in kinds


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_fusing_leaves_one_convolution_for_each_block_and_the_model_as_it_was(zoo, name):
    model = zoo[name].train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    fused = model.fuse()
    kinds = [type(module) for module in fused.modules()]
    assert not {nn.BatchNorm2d, RepVGG, QARepVGG} & set(kinds)
    assert not any(p.requires_grad for p in fused.parameters())
    assert model.training
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    images = torch.rand(1, 3, *size_of(model))
    for found, wanted in zip(flatten(fused(images)), flatten(model.eval()(images)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.parametrize("settings", [{}, {"conf": 1e-4, "iou": 0.5, "nms_top_k": 7, "max_predictions": 3}])
@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_the_callback_of_a_model_takes_its_output(zoo, name, settings):
    model = zoo[name].eval()
    images = torch.rand(2, 3, *size_of(model))
    callback = model.get_post_prediction_callback(**settings, multi_label_per_box=False, class_agnostic_nms=True)
    found = callback(model(images))
    assert [rows.shape[1] for rows in found] == [6, 6]
    assert all(len(rows) <= settings.get("max_predictions", 300) for rows in found)
    if settings:
        assert all(len(rows) > 0 and (rows[:, 4] >= settings["conf"]).all() for rows in found)


@pytest.mark.parametrize("name", sorted(set(PARAMETERS) - set(SMALL)))
@torch.no_grad()
def test_larger_sizes_run_and_fuse_too(name):
    torch.manual_seed(0)
    model = models.get(name, 2).eval()
    images = torch.rand(1, 3, 64, 96)
    for found, wanted in zip(flatten(model.fuse()(images)), flatten(model(images)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


class Scaled(nn.Conv2d):
    """A convolution of a class of its own."""

    def forward(self, x):
        return super().forward(x) / (1 + self.weight.std())


@torch.no_grad()
def test_norms_that_cannot_be_folded_stay():
    torch.manual_seed(0)
    pairs = [
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(4)),
        (Scaled(4, 4, 1), nn.BatchNorm2d(4)),
        (nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, affine=False)),
        (nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8)),
    ]
    backbone = nn.Sequential(*(module for pair in pairs for module in pair)).train()
    backbone(torch.rand(4, 3, 8, 8) * 5)
    model = models.Detector(backbone, nn.Identity(), nn.Identity()).eval()
    images = torch.rand(1, 3, 32, 32)
    fused = model.fuse()
    torch.testing.assert_close(fused(images), model(images))
    assert sum(isinstance(module, nn.BatchNorm2d) for module in fused.modules()) == 3


class Tiny(nn.Module):
    """A backbone of one's own."""

    out_channels = (8, 16, 24)

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.BatchNorm2d(8), nn.ReLU())
        self.c4, self.c5 = nn.Conv2d(8, 16, 2, 2), nn.Conv2d(16, 24, 2, 2)

    def forward(self, images):
        c3 = self.stem(images)
        c4 = self.c4(c3)
        return c3, c4, self.c5(c4)


def test_parts_compose_to_a_detector_of_one_s_own():
    backbone = Tiny()
    neck = models.YoloXPAN(backbone.out_channels)
    model = models.Detector(backbone, neck, models.YoloXHead(neck.out_channels, 3, hidden=16))
    family = models.family_of(model)
    assert family.name == "YOLOX"
    criterion = family.losses[0](**family.loss_arguments(model))
    loss, _ = criterion(model(torch.rand(1, 3, 64, 64)), torch.tensor([[0, 2, 30.0, 30, 20, 20]]))
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert len(model.get_post_prediction_callback(conf=0.5)(model.eval()(torch.rand(2, 3, 64, 64)))) == 2
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.fuse().modules())


def test_a_head_that_no_family_knows_is_refused():
    model = models.Detector(Tiny(), nn.Identity(), nn.Identity())
    with pytest.raises(RaydetError, match="has none of the heads that raydet has losses for: SSDHead, YoloXHead"):
        models.family_of(model)


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(RaydetError, match="no model is named 'yolox-s'; did you mean yolox_s"):
        models.get("yolox-s")


@pytest.mark.parametrize("channels", ["BGR", "RGB"])
def test_preprocessing(channels):
    preprocessing = models.Preprocessing((1.0, 2.0, 3.0), (4.0, 5.0, 6.0), channels)
    images = torch.randint(0, 256, (2, 3, 4, 6), dtype=torch.uint8)
    order = images if channels == "BGR" else images[:, [2, 1, 0]]
    expected = (order.float() - torch.tensor([1.0, 2, 3]).view(3, 1, 1)) / torch.tensor([4.0, 5, 6]).view(3, 1, 1)
    found = preprocessing(images)
    torch.testing.assert_close(found, expected)
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_families_expect_what_their_references_do():
    expected = {
        "SSD": ("BGR", "pad_bottom_right", 1.0),
        "YOLOX": ("BGR", "pad_bottom_right", 1.0),
        "PP-YOLOE": ("BGR", "stretch", 58.395),
        "YOLO-NAS": ("RGB", "pad_centre", 255.0),
        "D-FINE": ("RGB", "stretch", 255.0),
    }
    for family in models.FAMILIES:
        p = family.preprocessing
        assert (p.channels, p.resize, p.std[0]) == expected[family.name]


@pytest.mark.parametrize("of_model", SMALL)
@pytest.mark.parametrize("of_loss", SMALL)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_mixed_families_are_refused_by_name(zoo, of_model, of_loss, mode):
    model, other = zoo[of_model], zoo[of_loss]
    mine, theirs = models.family_of(model), models.family_of(other)
    criterion = theirs.losses[0](**theirs.loss_arguments(other))
    with torch.no_grad():
        outputs = getattr(model, mode)()(torch.rand(2, 3, *size_of(model)))
    targets = torch.tensor([[0, 1, 30.0, 30, 20, 20]])
    callback = other.get_post_prediction_callback()
    if set(mine.losses) & set(theirs.losses):
        assert criterion(outputs, targets)[0].isfinite()
        assert mode == "train" or len(callback(outputs)) == 2
        return
    for call in (lambda: criterion(outputs, targets), lambda: callback(outputs)):
        with pytest.raises(ValueError, match="takes the output of") as error:
            call()
        assert theirs.name in str(error.value)
        assert mine.name in str(error.value)


def test_a_training_output_is_refused_by_the_callback(zoo):
    for model in zoo.values():
        with torch.no_grad():
            outputs = model.train()(torch.rand(2, 3, *size_of(model)))
        with pytest.raises(ValueError, match=r"in evaluation mode: call model\.eval\(\)"):
            model.get_post_prediction_callback()(outputs)


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (losses.PPYoloELoss(num_classes=7), "PPYoloELoss is for 7 classes, the output has 5"),
        (losses.PPYoloELoss(num_classes=C, reg_max=8), "PPYoloELoss has reg_max 8, the output that of 16"),
    ],
)
def test_a_loss_for_another_model_of_the_family_is_refused(zoo, criterion, message):
    with pytest.raises(ValueError, match=message):
        criterion(zoo["ppyoloe_s"].train()(torch.rand(1, 3, 64, 64)), torch.zeros(0, 6))


def test_an_ssd_loss_for_another_size_or_class_count_is_refused(zoo):
    model = zoo["ssd_lite_mobilenet_v2"].train()
    outputs = model(torch.rand(2, 3, 320, 320))
    other = models.get("ssd_lite_mobilenet_v2", C, image_size=(256, 256)).head.default_boxes
    with pytest.raises(ValueError, match="default boxes for 256x256 pixels, the output has 3234: build model and loss"):
        losses.SSDLoss(other, (256, 256), num_classes=C)(outputs, torch.zeros(0, 6))
    with pytest.raises(ValueError, match="SSDLoss is for 80 classes, the output has 5"):
        losses.SSDLoss(model.head.default_boxes, (320, 320))(outputs, torch.zeros(0, 6))


def test_other_models_of_a_family_log_nothing(caplog):
    with caplog.at_level(logging.WARNING):
        models.get("yolox_n", C)
    assert not caplog.records
