"""ONNX files of all families: what onnxruntime detects in them is what PyTorch does."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from torch import nn

import raydet
from raydet import models
from raydet.data.coco import load_coco
from raydet.data.render import decode
from raydet.data.synthetic import make_picture
from raydet.errors import RaydetError
from raydet.models import Detector, YoloXHead, family_of
from raydet.models import export as onnx_models
from raydet.models.blocks import Conv
from raydet.postprocess import PPYoloEPostPredictionCallback
from raydet.predict.export import compare, export
from raydet.predict.predictor import load
from raydet.recipe import Eval
from raydet.runs.checkpoint import Config, Progress, pack, read_config, write
from tests.command import raydet as command
from tests.unit.test_postprocess import some_candidates

SMALL = "small"  # a detector of one's own, which is exported in a second
FAMILIES = ["ssd_lite_mobilenet_v2", "yolox_n", "ppyoloe_s", "yolo_nas_s", "dfine_n"]
SIZE = 128
CLASSES = 80
PICTURES = 32


@pytest.fixture(scope="module")
def pictures(shared):
    """32 images of COCO as arrays, BGR."""
    folder = shared / "data/coco_mini"
    index = load_coco(folder / "annotations/instances_val2017.json", folder / "val2017")
    return [decode(index.read(row), index.path(row)) for row in range(PICTURES)]


class ThreeMaps(nn.Module):
    """Maps at strides 8, 16 and 32, of some channels each."""

    def __init__(self, channels):
        super().__init__()
        self.out_channels = (channels,) * 3
        self.stem = Conv(3, channels, 9, stride=8)
        self.down = nn.ModuleList(Conv(channels, channels, 3, stride=2) for _ in range(2))

    def forward(self, images):
        maps = [self.stem(images)]
        for layer in self.down:
            maps.append(layer(maps[-1]))
        return tuple(maps)


def small():
    backbone = ThreeMaps(8)
    return Detector(backbone, nn.Identity(), YoloXHead(backbone.out_channels, 5, 8))


def made(folder, name, thresholds, num_classes=CLASSES, weights=None, bias=-2.0, spread=1.0):
    """A checkpoint of a model that has learnt nothing, but tells points and classes apart; YOLOX-nano knows COCO."""
    torch.manual_seed(0)
    sizes = {"image_size": (SIZE, SIZE)}
    model = small() if name == SMALL else models.get(name, num_classes, **(sizes if name.startswith("ssd") else {}))
    preprocessing = family_of(model).preprocessing
    images = [make_picture(np.random.default_rng(number))[0][:SIZE, :SIZE] for number in range(4)]
    if weights is not None:
        model = models.get(name, num_classes, weights=weights)
    for module in model.modules() if weights is None else ():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # the statistics are those of the next batch
    if weights is None:
        model.train()(preprocessing(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)))
        for part, module in model.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear) and part.rpartition(".")[0].endswith("preds"):
                nn.init.normal_(
                    module.weight, std=(0.1 if "reg" in part else 1) * spread / module.weight[0].numel() ** 0.5
                )
                nn.init.normal_(module.bias, mean=bias if "cls" in part else 0, std=0 if "reg" in part else spread)
    names = tuple(f"class {number}" for number in range(num_classes))
    config = Config(
        "" if name == SMALL else name, names, tuple(range(num_classes)), (SIZE, SIZE), preprocessing, thresholds
    )
    write(folder / "checkpoint_000001", pack(config, model, None, Progress(), 1, {}))
    return folder / "checkpoint_000001"


def missing(ours, theirs, thresholds):
    """How many detections are in one list only, by score 1e-3 and box 0.5 px, and are they in order of the scores?"""
    assert (np.diff(theirs[:, 4]) <= 0).all()
    return compare(ours, theirs, thresholds.score, thresholds.max_detections)[0]


def both(checkpoint, thresholds, images, tmp_path, form="batch"):
    """What PyTorch and onnxruntime find in some images, fitted into the model's input."""
    own = None if read_config(checkpoint).model else small()
    pytorch = load(checkpoint, "cpu", own)
    written = export(checkpoint, tmp_path / "model.onnx", model=own, form=form, say=lambda text: None)
    onnx = load(written.path)
    inputs = [pytorch.fit(image) for image in images]
    sizes = [(SIZE, SIZE)] * len(inputs)
    ours = pytorch.detect_fitted(inputs, sizes, thresholds)
    return ours, {
        batch: [
            rows
            for start in range(0, len(inputs), batch)
            for rows in onnx.detect_fitted(inputs[start : start + batch], sizes[start : start + batch], thresholds)
        ]
        for batch in (1, 8)
    }


@pytest.mark.parametrize(("name", "form"), [*((name, "batch") for name in FAMILIES), (SMALL, "flat")])
def test_onnxruntime_finds_what_pytorch_does(name, form, pictures, shared, tmp_path):
    thresholds = Eval(score=0.05, max_detections=50)
    weights = shared / "weights/yolox_nano/yolox_nano_coco.pth" if name == "yolox_n" else None
    classes = 5 if name == SMALL else CLASSES
    checkpoint = made(tmp_path, name, thresholds, classes, weights)
    ours, theirs = both(checkpoint, thresholds, pictures, tmp_path, form)
    assert sum(map(len, ours)) > 4 * PICTURES
    for found in theirs.values():
        pairs = list(zip(ours, found, strict=True))
        assert len(pairs) == PICTURES
        # Where two boxes overlap by just the IoU threshold, the last bit decides. YOLO-NAS that has learnt nothing
        # makes the most of rounding: with one thread 5 of 1600 are others, with two threads 1.
        assert sum(missing(*pair, thresholds) for pair in pairs) <= sum(map(len, ours)) / 200


class Told(nn.Module):
    """Finds what it was told, whatever it looks at."""

    def __init__(self, boxes, scores):
        super().__init__()
        self.boxes, self.scores = nn.Buffer(boxes), nn.Buffer(scores)

    def forward(self, images):
        nothing = images.sum((1, 2, 3))[:, None, None] * 0
        return self.boxes + nothing, self.scores + nothing


def session_of(boxes, scores, callback, form="batch"):
    """onnxruntime with a model that always finds the same."""
    import onnxruntime

    module = onnx_models.Exported(Told(boxes, scores), family_of("ppyoloe_s").preprocessing, callback, form)
    return onnxruntime.InferenceSession(onnx_models.to_onnx(module, (32, 32), {}))


@pytest.mark.parametrize(  # each two of their values together once
    ("multi_label", "agnostic", "top_k"),
    [(False, False, None), (False, True, 20), (True, False, 20), (True, True, None)],
)
def test_thresholds_mean_the_same(multi_label, agnostic, top_k):
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 100, (1, 60, 2))
    boxes = torch.from_numpy(np.concatenate((low, low + rng.uniform(5, 60, (1, 60, 2))), axis=2)).float()
    scores = torch.from_numpy(rng.permutation(60 * 5).reshape(1, 60, 5) / 300).float()
    settings = {"multi_label_per_box": multi_label, "class_agnostic_nms": agnostic, "nms_top_k": top_k}
    callback = PPYoloEPostPredictionCallback(score_threshold=0.6, nms_threshold=0.4, max_predictions=30, **settings)
    (ours,) = callback((boxes, scores))
    count, *parts = session_of(boxes, scores, callback).run(None, {"images": np.zeros((3, 3, 32, 32), np.uint8)})
    assert len(ours) > 5
    assert count[:, 0].tolist() == [len(ours)] * 3
    for image in range(3):
        box, score, label = (part[image, : len(ours)] for part in parts)
        assert np.array_equal(np.column_stack((box, score, label)), ours.numpy())


def test_many_classes_and_a_box_far_away_are_no_matter():
    """Classes are never told apart by large numbers, which would round the boxes."""
    found = some_candidates(1, 300, 1203, (200_000.0,))
    boxes, scores = found.boxes[None], torch.zeros(1, 300, 1203)
    scores[0, torch.arange(300), found.labels] = torch.linspace(0.2, 0.9, 300)
    callback = PPYoloEPostPredictionCallback(score_threshold=0.1, nms_threshold=0.6, nms_top_k=None)
    (ours,) = callback((boxes, scores))
    count, *parts = session_of(boxes, scores, callback).run(None, {"images": np.zeros((1, 3, 32, 32), np.uint8)})
    box, score, label = (part[0, : count[0, 0]] for part in parts)
    assert np.array_equal(np.column_stack((box, score, label)), ours.numpy())


@pytest.mark.parametrize("form", ["batch", "flat"])
def test_a_high_class_is_not_lost_to_low_ones(form):
    """300 boxes of class 0 would fill 100 places of a list in the order of classes; a better one is of class 30."""
    corners = torch.arange(300)[:, None] * 20.0
    boxes = torch.cat((corners, corners, corners + 10, corners + 10), dim=1)[None]
    scores = torch.zeros(1, 300, 80)
    scores[0, :, 0] = torch.linspace(0.3, 0.31, 300)
    scores[0, 150] = 0
    scores[0, 150, 30] = 0.958
    callback = PPYoloEPostPredictionCallback(score_threshold=0.1, max_predictions=100)
    outputs = session_of(boxes, scores, callback, form).run(None, {"images": np.zeros((2, 3, 32, 32), np.uint8)})
    if form == "flat":
        (rows,) = outputs
        assert rows.shape == (200, 7)
        assert rows[:, 0].tolist() == [0] * 100 + [1] * 100
        best = rows[100, 5:]
    else:
        count, _, score, label = outputs
        assert count.tolist() == [[100], [100]]
        best = score[1, 0], label[1, 0]
    assert best[0] == pytest.approx(0.958)
    assert best[1] == 30


def test_fewer_detections_than_places_are_padded():
    boxes = torch.tensor([[[0, 0, 10, 10.0], [20, 20, 30, 30]]])
    scores = torch.tensor([[[0.9, 0.0], [0.0, 0.05]]])
    callback = PPYoloEPostPredictionCallback(score_threshold=0.1, max_predictions=2)
    session = session_of(boxes, scores, callback)
    count, box, score, label = session.run(None, {"images": np.zeros((1, 3, 32, 32), np.uint8)})
    assert [part.tolist() for part in (count, box, label)] == [[[1]], [[[0, 0, 10, 10], [0, 0, 0, 0]]], [[0, -1]]]
    assert score[0, 1] == 0
    assert [output.shape for output in session.get_outputs()] == [["batch", 1], ["batch", 2, 4], *[["batch", 2]] * 2]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A checkpoint, its ONNX file, and what the command said."""
    folder = tmp_path_factory.mktemp("run")
    checkpoint = made(folder, "yolox_n", Eval(score=0.05, max_detections=50), num_classes=5)
    done = command("export", checkpoint)
    assert done.returncode == 0, done.stderr
    return checkpoint, checkpoint / "model.onnx", done.stdout


def test_the_command_says_what_it_compared(exported):
    _, path, said = exported
    assert "comparing onnxruntime with PyTorch on 8 images of shapes, as its data is not here" in said
    assert f"model: {path} (" in said
    assert " detections with scores above 0.05 compared: " in said


def test_predict_runs_it(exported, shapes):
    checkpoint, path, _ = exported
    images = sorted((shapes / "val").glob("*.jpg"))[:6]
    ours, theirs = (raydet.load(source, "cpu").predict(images, conf=0.1) for source in (checkpoint, path))
    assert sum(map(len, ours)) > 6
    for mine, yours in zip(ours, theirs, strict=True):
        rows = [np.column_stack((found.boxes, found.scores, found.labels)) for found in (mine, yours)]
        assert not missing(*rows, Eval(score=0.1, max_detections=50))
    assert theirs[0].to_coco()[0].keys() == ours[0].to_coco()[0].keys()


@pytest.mark.parametrize("thresholds", [{"conf": 0.01}, {"iou": 0.9}])
def test_other_thresholds_need_another_export(exported, shapes, thresholds):
    with pytest.raises(RaydetError, match=r"was exported with score 0\.05 and IoU 0\.65"):
        raydet.load(exported[1]).predict(next((shapes / "val").glob("*.jpg")), **thresholds)


def test_the_file_says_what_it_is(exported):
    import onnx

    about = {entry.key: entry.value for entry in onnx.load(exported[1]).metadata_props}
    content = json.loads(about["raydet"])
    assert content["preprocessing"]["resize"] == "pad_bottom_right"
    assert [entry["name"] for entry in content["classes"]] == [f"class {number}" for number in range(5)]
    assert about["raydet_version"] == raydet.__version__


UNSURE = {"bias": -6.0, "spread": 0.01}  # a model that detects nothing with a score above its own threshold


@pytest.mark.parametrize("learnt", [{}, UNSURE])
def test_what_detects_something_else_is_not_written(learnt, tmp_path, monkeypatch):
    """Half the pixels' values: a preprocessing that went wrong on the way."""
    checkpoint = made(tmp_path / "run", SMALL, Eval(score=0.05), num_classes=5, **learnt)
    right = onnx_models.Exported.forward
    monkeypatch.setattr(onnx_models.Exported, "forward", lambda self, images: right(self, images // 2))
    with pytest.raises(RaydetError, match="not written, as onnxruntime detects something else than PyTorch"):
        export(checkpoint, tmp_path / "model.onnx", model=small(), say=lambda text: None)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_where_the_score_leaves_nothing_it_is_compared_at_a_lower_one(tmp_path):
    said = []
    unsure = made(tmp_path / "run", SMALL, Eval(score=0.05), num_classes=5, **UNSURE)
    written = export(unsure, tmp_path / "model.onnx", model=small(), say=said.append)
    assert any(
        "nothing is detected there with a score above 0.05: comparing what is above 0.00" in line for line in said
    )
    assert written.detections > PICTURES
    assert 0 < written.threshold < 0.05
    assert raydet.load(written.path).config.thresholds.score == 0.05


def test_where_nothing_is_detected_at_any_score_no_comparison_is_claimed(tmp_path):
    folder = made(tmp_path, SMALL, Eval(score=0.05), num_classes=5, bias=-1e4)
    written = export(folder, model=small(), say=lambda text: None)
    assert written.path.is_file()
    assert written.detections == 0
    assert str(written).startswith("nothing was compared: neither onnxruntime nor PyTorch detects anything")


@pytest.mark.parametrize(
    ("content", "says"), [(b"no model", "is damaged"), (None, "cannot be read"), ("foreign", "not an ONNX file of")]
)
def test_files_that_are_none_of_ours(content, says, tmp_path):
    path = tmp_path / "some.onnx"
    if content == "foreign":
        from onnx import TensorProto, helper

        value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
        graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", value[:1], value[1:])
        content = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10
        ).SerializeToString()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RaydetError, match=says):
        raydet.load(path)


def test_missing_packages_are_named(exported, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(onnx_models, "find_spec", lambda name: None if name == "onnx" else found(name))
    with pytest.raises(RaydetError, match=r"onnx not installed: pip install 'raydet\[export\]'"):
        export(exported[0], tmp_path / "model.onnx", say=lambda text: None)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["--format", "pt"], "--format pt: it is onnx"), (["--output", "rows"], "--output rows: it is batch or flat")],
)
def test_what_there_is_not(exported, arguments, says):
    done = command("export", exported[0], *arguments)
    assert done.returncode == 2
    assert says in done.stderr
