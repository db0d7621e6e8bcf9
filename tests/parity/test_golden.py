"""What the original implementations compute, from the shared reference numbers."""

import contextlib
import copy
import importlib.util
import io
import json

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from raydet import losses, models, postprocess
from raydet.api import evaluate
from raydet.boxes import place, xywh_to_xyxy
from raydet.data.coco import load_coco
from raydet.data.samples import Samples
from raydet.data.transforms import Letterbox
from raydet.evaluation.coco import TWELVE, CocoEvaluation
from raydet.outputs import ssd_default_boxes

MODELS = {
    "yolox_nano": "yolox_n",
    "yolox_s": "yolox_s",
    "sg_yolox_s": "yolox_s",
    "sg_ssd_lite_mobilenet_v2": "ssd_lite_mobilenet_v2",
    "sg_ppyoloe_s": "ppyoloe_s",
    "sg_yolo_nas_s": "yolo_nas_s",
}
LOSSES = [
    *("yolox", "yolox_l1", "yolox_giou", "yolox_weights", "yolox_fast", "yolox_fast_objfix"),
    *("ppyoloe_tal", "ppyoloe_atss", "ppyoloe_focal", "ppyoloe_weights"),
    *("ssd_normalised", "ssd_ratio_normalised"),
]
CALLBACKS = [f"{family}_{number}" for family in ("yolox", "ppyoloe") for number in range(4)]
SIZE = 256  # pixels of the loss cases' images


@pytest.fixture(scope="session")
def golden(shared):
    return shared / "golden"


@pytest.fixture(scope="session")
def golden_weights(golden):
    spec = importlib.util.spec_from_file_location("golden_weights", golden / "golden_weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_case_is_checked(golden):
    for file, cases in (("losses", LOSSES), ("postprocess", CALLBACKS)):
        assert list(json.loads((golden / f"{file}.json").read_text())["cases"]) == cases
    assert {path.stem for path in (golden / "models").glob("*.json")} == set(MODELS)


def flat(outputs):
    """Tensors and numbers of a nested output, each under its place in it: "eval.1.0"."""
    if not isinstance(outputs, list | tuple):
        return {"": np.asarray(outputs)}
    items = ((number, flat(item)) for number, item in enumerate(outputs))
    return {f".{number}{rest}": array for number, inner in items for rest, array in inner.items()}


@pytest.fixture(scope="session", params=MODELS)
def reference(request, golden, golden_weights, tmp_path_factory):
    """A model with a reference's weights, its input, and the reference's outputs."""
    description = json.loads((golden / f"models/{request.param}.json").read_text())
    arrays = np.load(golden / f"models/{request.param}.npz")
    tensors = {key: torch.from_numpy(value) for key, value in golden_weights.fill(description["tensors"]).items()}
    start = 0
    for key in description["statistics"]:
        length = description["tensors"][key.rpartition(".")[0] + ".weight"][0]
        tensors[key] = torch.from_numpy(arrays["statistics"][start : start + length])
        start += length
    path = tmp_path_factory.mktemp("reference") / "reference.pth"
    key = "ema_net" if request.param.startswith("sg_") else "model"
    torch.save({key: {f"module.{name}": tensor for name, tensor in tensors.items()}}, path)
    image = description["image"]
    pixels = golden_weights.image(image["seed"], image["shape"]) * np.float32(image["scale"])
    expected = {name.removeprefix("eval"): arrays[name] for name in arrays if name.startswith("eval")}
    if "" in expected:  # Megvii's gives the decoded predictions alone
        expected[".0"] = expected.pop("")
    return models.get(MODELS[request.param], 80, weights=path).eval(), torch.from_numpy(pixels), expected


@torch.no_grad()
def test_model(reference):
    """In double precision, so that only the references' rounding is between: at most 1.5e-4 (YOLO-NAS)."""
    model, pixels, expected = reference
    found = flat(copy.deepcopy(model).double()(pixels.double()))
    for key, array in expected.items():
        assert np.abs(found[key] - array).max() <= 2e-4 * np.abs(array).max(), key


@torch.no_grad()
def test_fused_model(reference):
    """In double precision the fused model is the same function; in single precision as near to it as the model is."""
    model, pixels, expected = reference
    precise = copy.deepcopy(model).double()
    exact = flat(precise(pixels.double()))
    same, single, own = flat(precise.fuse()(pixels.double())), flat(model.fuse()(pixels)), flat(model(pixels))
    for key in expected:
        largest = np.abs(exact[key]).max()
        error = np.abs(own[key] - exact[key]).max()
        assert np.abs(same[key] - exact[key]).max() <= 1e-6 * largest, key
        assert np.abs(single[key] - exact[key]).max() <= max(1e-4 * largest, 2 * error), key


def loss_case(golden, case):
    """The loss of a case, the output it takes, its leaves, the targets, and what is expected."""
    content = json.loads((golden / "losses.json").read_text())
    arrays = np.load(golden / "losses.npz")
    expected = content["cases"][case]
    settings = {"num_classes": content["num_classes"], **expected["kwargs"]}
    kind = getattr(losses, expected["reference"])

    def leaves(*names):
        return [torch.from_numpy(arrays[name]).requires_grad_() for name in names]

    if case.startswith("ssd"):
        raw = leaves("ssd_loc", "ssd_conf")
        default_boxes = torch.from_numpy(arrays["ssd_default_boxes"])
        return kind(default_boxes, (SIZE, SIZE), **settings), tuple(raw), raw, arrays["targets"], expected
    if case.startswith("ppyoloe"):
        raw = leaves("cls", "reg")
        anchors, points, strides = (torch.from_numpy(arrays[name]) for name in ("anchors", "points", "strides"))
        levels = [(SIZE // stride) ** 2 for stride in (8, 16, 32)]
        return kind(**settings), (*raw, anchors, points, levels, strides), raw, arrays["targets"], expected
    raw = leaves("raw8", "raw16", "raw32")
    return kind(**settings), raw, raw, arrays["targets"], expected


@pytest.mark.parametrize("case", LOSSES)
def test_loss(golden, case):
    criterion, outputs, raw, targets, expected = loss_case(golden, case)
    loss, components = criterion(outputs, torch.from_numpy(targets))
    loss.backward()
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-5)
    named = dict(zip(criterion.component_names, components.tolist(), strict=True))
    assert named == pytest.approx(expected["components"], rel=1e-5)
    assert [leaf.grad.norm().item() for leaf in raw] == pytest.approx(expected["grad_norm"], rel=1e-5, abs=1e-9)


def test_ssd_default_boxes(golden):
    """In float32, as the reference computes them, to the last bits."""
    expected = np.load(golden / "losses.npz")["ssd_default_boxes"]
    np.testing.assert_allclose(ssd_default_boxes((320, 320)).numpy(), expected, atol=1e-7)


@pytest.mark.parametrize("case", CALLBACKS)
def test_post_prediction(golden, case):
    expected = json.loads((golden / "postprocess.json").read_text())["cases"][case]
    arrays = np.load(golden / "postprocess.npz")
    callback = getattr(postprocess, expected["reference"])(**expected["kwargs"])
    parts = ("yolox",) if case.startswith("yolox") else ("boxes", "scores")
    decoded = [torch.from_numpy(arrays[part]) for part in parts]
    found = callback((decoded[0] if len(decoded) == 1 else decoded, None))
    for number, rows in enumerate(found):
        np.testing.assert_array_equal(rows.numpy(), arrays[f"{case}.{number}"])


def test_coco_api_s_hundred_images(golden, tmp_path):
    folder = golden / "coco_eval"
    truth = json.loads((folder / "instances_val2014_100.json").read_text())
    for image in truth["images"]:
        (tmp_path / image["file_name"]).touch()
    index = load_coco(folder / "instances_val2014_100.json", tmp_path)
    label_of = {category: label for label, category in enumerate(index.category_ids)}
    detections = {int(image_id): [] for image_id in index.image_ids}
    for result in json.loads((folder / "instances_val2014_fakebbox100_results.json").read_text()):
        box = xywh_to_xyxy(np.array(result["bbox"]))
        detections[result["image_id"]].append([*box, result["score"], label_of[result["category_id"]]])
    evaluation = CocoEvaluation(index)
    evaluation.update(range(len(index)), [np.array(found).reshape(-1, 6) for found in detections.values()])
    metrics = evaluation.compute()
    expected = json.loads((folder / "expected.json").read_text())["bbox"]
    assert [metrics[name] for name in TWELVE] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("file", "relative"),
    # The first file's statistics were estimated anew: in exact arithmetic one value in a million is off by 2.08e-4.
    [("yolox_nano_coco.pth", 1e-4), ("yolox_nano_coco_bnfolded.pth", 0)],
)
def test_yolox_nano_s_raw_outputs(shared, file, relative):
    folder = shared / "weights/yolox_nano"
    arrays = np.load(folder / "reference_io.npz")
    model = models.get("yolox_n", 80, weights=folder / file).eval()
    with torch.no_grad():
        _, maps = model(torch.from_numpy(arrays["input_u8_bgr_chw"]).float())
    raw = torch.cat([m.flatten(1, 3) for m in maps], dim=1)
    raw[..., 4:] = raw[..., 4:].sigmoid()
    np.testing.assert_allclose(raw.numpy(), arrays["output_raw"], atol=2e-4, rtol=relative)


def test_pixels_are_the_reference_s(shared):
    """Scaled to fit, padded at the bottom and the right: to the bit."""
    data = shared / "data/coco_mini"
    index = load_coco(data / "annotations/instances_val2017.json", data / "val2017")
    arrays = np.load(shared / "weights/yolox_nano/reference_io.npz")
    samples = Samples(index, (Letterbox((416, 416)),), (416, 416), shuffle=False)
    for image_id, ratio, pixels in zip(arrays["image_ids"], arrays["ratio"], arrays["input_u8_bgr_chw"], strict=True):
        row = index.image_ids.tolist().index(image_id)
        assert (samples.sample(row).image.transpose(2, 0, 1) == pixels).all()
        assert place(*index.size(row), (416, 416), "pad_bottom_right").scale == (ratio, ratio)


def test_yolox_nano_on_coco_mini(shared, tmp_path):
    """The reference's AP: score >= 0.001, best class a point, NMS 0.65 a class, 300 a picture; and the COCO API's
    twelve numbers of the same detections, from the data set's own file."""
    metrics = evaluate(
        shared / "weights/yolox_nano/yolox_nano_coco.pth",
        recipe="coco2017_yolox_n",
        overrides=[f"data.root={shared / 'data/coco_mini'}"],
        debug=True,
        device="cpu",
        say=lambda text: None,
        out=tmp_path,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(shared / "data/coco_mini/annotations/instances_val2017.json"))
        official = COCOeval(truth, truth.loadRes(str(tmp_path / "detections.json")), "bbox")
        official.evaluate()
        official.accumulate()
        official.summarize()
    assert [metrics[name] for name in TWELVE] == pytest.approx(official.stats.tolist(), abs=1e-12)
    assert metrics["mAP@0.50:0.95"] == pytest.approx(0.3063, abs=0.0005)
    assert metrics["mAP@0.50"] == pytest.approx(0.4603, abs=0.0005)
    assert metrics["mAP@0.75"] == pytest.approx(0.3266, abs=0.0005)
