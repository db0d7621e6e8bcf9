"""Training and evaluation in this process, without Ray: what `--debug` runs."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import raydet
from raydet.data.coco import load_coco
from raydet.errors import RaydetError
from raydet.losses import PPYoloELoss, YoloXFastDetectionLoss
from raydet.models import family_of, get
from raydet.recipe import load


def train(demo, *overrides, **arguments):
    said = []
    result = raydet.train("demo", overrides=[*demo, *overrides], debug=True, device="cpu", say=said.append, **arguments)
    return result, said


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def debug_run(shapes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("debug")
    options = [f"data.root={shapes}", f"storage={folder}", "data.image_size=96", "train.lr=0.01"]
    return train(options)


def test_debug_run_leaves_what_a_run_leaves(debug_run):
    result, _ = debug_run
    folder = result.folder
    assert folder.name == "demo-debug"
    for name in ("recipe.yaml", "environment.json", "metrics.jsonl", "log.txt", "summary.json"):
        assert (folder / name).is_file(), name
    assert sorted(path.name for path in result.checkpoint.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "training.pt",
    ]
    assert not list(folder.glob(".partial*"))
    assert set(result.metrics) >= {"val/mAP@0.50:0.95", "val/mAP@0.50", "val/mAP@0.75", "val/AP@0.50:0.95_disc"}


def test_debug_shows_shapes_and_draws_the_first_batch(debug_run):
    result, said = debug_run
    assert any(line.startswith("images 8x3x96x96  targets ") and "outputs [8x1x12x12x10, " in line for line in said)
    picture = cv2.imread(str(result.folder / "images" / "first_batch.png"))
    assert picture.shape == (2 * 96, 4 * 96, 3)
    assert picture.std() > 10


def test_more_objects_than_an_evaluation_counts_are_named_before_the_training(demo, debug_run):
    _, said = train(demo, "eval.max_detections=1", "train.epochs=1")
    (warning,) = (line for line in said if line.startswith("warning: validation: "))
    assert "images have more objects than the 1 detections of an image that are kept, such as 0" in warning
    assert "set eval.max_detections=" in warning
    assert not any(line.startswith("warning") for line in debug_run[1])


def test_progress_says_what_a_user_looks_for(debug_run):
    _, said = debug_run
    line = next(line for line in said if "step 10/10" in line)
    for part in ("epoch 2.00/2", "loss ", "iou ", "obj ", "cls ", "lr ", "images/s", "waiting for data", "ETA 0:00"):
        assert part in line, part
    assert any(line.startswith("the warm-up of 1 epochs is too long for this run: shortened to ") for line in said)


def test_metrics_are_named_as_designed_and_the_loss_falls(debug_run):
    lines = metrics_of(debug_run[0].folder)
    steps = [line for line in lines if "train/loss" in line]
    assert set(steps[0]) >= {
        "step",
        "epoch",
        "train/loss",
        "train/YoloXFastDetectionLoss/iou",
        "train/YoloXFastDetectionLoss/obj",
        "train/YoloXFastDetectionLoss/cls",
        "train/lr",
        "perf/images_per_s",
        "perf/data_wait",
    }
    assert all(isinstance(value, int | float) for line in lines for value in line.values())
    losses = [line["train/loss"] for line in steps]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])


def test_one_s_own_model_loss_and_data(demo, shapes):
    class Doubled(nn.Module):
        """A loss of the user's own."""

        component_names = ("box", "all")

        def __init__(self):
            super().__init__()
            self.inner = YoloXFastDetectionLoss(num_classes=5)

        def forward(self, outputs, targets):
            loss, _ = self.inner(outputs, targets)
            return 2 * loss, torch.stack((loss, 2 * loss)).detach()

    index = load_coco(shapes / "annotations/instances_val.json", shapes / "val")
    model = get("yolox_n", 5)
    result, said = train(
        [o for o in demo if not o.startswith("data.root")],
        "train.epochs=1",
        model=model,
        loss=Doubled(),
        train_data=index,
        val_data=index.head(8),
    )
    assert any("24 training and 8 validation images" in line for line in said)
    lines = [line for line in metrics_of(result.folder) if "train/loss" in line]
    assert all(line["train/loss"] == pytest.approx(2 * line["train/Doubled/box"]) for line in lines)
    with pytest.raises(RaydetError, match="a model that raydet does not know: build it, and pass it as model="):
        raydet.load(result.folder)
    found = raydet.load(result.folder, "cpu", model=get("yolox_n", 5)).predict(index.path(0), conf=0)
    assert len(found) > 0
    with pytest.raises(RaydetError, match="its weights are damaged or of another model than given"):
        raydet.load(result.folder, "cpu", model=get("yolox_t", 5))


def test_debugging_starts_over_beside_the_run_proper(demo):
    first, _ = train(demo, "train.epochs=1", "name=mine")
    assert first.folder.name == "mine-debug"
    proper = first.folder.with_name("mine")
    proper.mkdir()
    (proper / "summary.json").write_text("{}")
    second, said = train(demo, "train.epochs=1", "name=mine", "train.lr=0.5")
    assert second.folder == first.folder
    assert not second.finished_before
    assert any("step 5/5" in line for line in said)
    assert (proper / "summary.json").is_file()
    with pytest.raises(RaydetError, match="name: mine-debug ends with -debug"):
        train(demo, "name=mine-debug")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.root=/nowhere"], "data.root: /nowhere is not a folder; pass data.root=FOLDER"),
        (["data.val_images=none"], "found no COCO annotations of val with images"),
        ("train.epochs=1", "overrides: 'train.epochs=1' is one text, not a list"),
        (["model.num_classes=3"], "model.num_classes is 3, but the data has 5 classes"),
        (["model.name=yolox_q"], "no model is named 'yolox_q'"),
        (["scale.num_workers=3"], "train.batch_size 8 cannot be shared by scale.num_workers 3 equally"),
    ],
)
def test_what_cannot_work_is_refused_before_it_starts(demo, overrides, message):
    given = overrides if isinstance(overrides, str) else [*demo, *overrides]
    with pytest.raises(RaydetError) as error:
        raydet.train("demo", overrides=given, debug=True, device="cpu", say=print)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_narrow_images_are_trained_on_measured_and_drawn(demo, tmp_path):
    sizes = [(80, 60), (6000, 5), (5000, 1), (1, 3000)]
    for split in ("train", "val"):
        for folder in ("images", "labels"):
            (tmp_path / folder / split).mkdir(parents=True)
        for number, (width, height) in enumerate(sizes):
            cv2.imwrite(str(tmp_path / f"images/{split}/{number}.png"), np.full((height, width, 3), 90, np.uint8))
            (tmp_path / f"labels/{split}/{number}.txt").write_text("0 0.5 0.5 0.9 0.9")
    (tmp_path / "classes.txt").write_text("thing")
    overrides = ["data.format=yolo", f"data.root={tmp_path}", "augment.mosaic=0.5", "augment.rotate90=0.5"]
    result, _ = train(demo, *overrides, "train.batch_size=4", "train.epochs=1")
    assert (result.folder / "report.html").is_file()
    picture = cv2.imread(str(result.folder / "images" / "validation.jpg"))
    assert (picture.reshape(-1, 3).min(1) < 200).any()  # all four are on it


def test_evaluating_a_run_gives_what_its_training_found(debug_run):
    result, _ = debug_run
    found = raydet.evaluate(result.folder, debug=True, device="cpu", say=lambda text: None)
    assert {f"val/{name}": value for name, value in found.items()} == pytest.approx(result.metrics, abs=1e-6)


def test_a_run_that_was_copied_is_evaluated_where_it_is(debug_run, tmp_path):
    """Where its training wrote is another machine's folder, which cannot be made here."""
    result, _ = debug_run
    copy = tmp_path / "copied"
    shutil.copytree(result.folder, copy)
    recipe = (copy / "recipe.yaml").read_text().replace(f"storage: {result.folder.parent}", "storage: /proc/elsewhere")
    assert "/proc/elsewhere" in recipe
    (copy / "recipe.yaml").write_text(recipe)
    found = raydet.evaluate(copy, debug=True, device="cpu", say=lambda text: None)
    assert {f"val/{name}": value for name, value in found.items()} == pytest.approx(result.metrics, abs=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["copied"]
    (tmp_path / "file").touch()
    for storage in ("/proc/elsewhere", tmp_path / "file"):
        with pytest.raises(RaydetError, match=rf"^storage: {storage} cannot be written .*storage=… names another"):
            raydet.evaluate(copy, overrides=[f"storage={storage}"], debug=True, device="cpu", say=lambda text: None)


def test_a_weights_file_needs_a_recipe(tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"")
    with pytest.raises(RaydetError, match="add --recipe, such as --recipe coco2017_yolox_s"):
        raydet.evaluate(tmp_path / "weights.pth")


def test_weights_of_another_class_count_are_not_measured(demo, shared):
    weights = shared / "weights/yolox_nano/yolox_nano_coco.pth"
    with pytest.raises(RaydetError, match="is not for the 5 classes of the data: train it on them first"):
        raydet.evaluate(weights, recipe="demo", overrides=demo, debug=True, say=lambda text: None)


def test_evaluating_on_other_classes_is_refused(debug_run, shapes, tmp_path):
    result, _ = debug_run
    content = json.loads((shapes / "annotations/instances_val.json").read_text())
    content["categories"][0]["name"] = "dot"
    (tmp_path / "other.json").write_text(json.dumps(content))
    other = [f"data.val_annotations={tmp_path}/other.json", "data.val_images=val"]
    with pytest.raises(RaydetError, match="detects 5 classes that are not the 5 of the data"):
        raydet.evaluate(result.folder, overrides=other, debug=True, say=print)


@pytest.mark.parametrize(
    ("recipe", "model"),
    [
        ("ssd_lite_finetune", "ssd_lite_mobilenet_v2"),
        ("yolox_finetune", "yolox_n"),
        ("ppyoloe_finetune", "ppyoloe_s"),
        ("yolo_nas_finetune", "yolo_nas_s"),
    ],
)
def test_each_family_trains_is_measured_and_predicts(recipe, model, demo, shapes, tmp_path):
    overrides = [*demo, f"model.name={model}", "name=family"]
    result = raydet.train(recipe, overrides=overrides, debug=True, device="cpu", say=lambda text: None)
    last = max(result.folder.glob("checkpoint_0*"))  # the best may be an earlier one
    found = raydet.evaluate(last, debug=True, device="cpu", say=lambda text: None)
    assert {f"val/{name}": value for name, value in found.items()} == pytest.approx(result.metrics, abs=1e-6)
    detector = raydet.load(result.folder, device="cpu")
    assert type(detector.model) is family_of(model).models[model]
    assert detector.config.preprocessing == family_of(model).preprocessing
    best = detector.predict(next((shapes / "val").iterdir()), conf=0.0)
    assert (best.scores[:-1] >= best.scores[1:]).all()


OWN = """
from torch import nn

from raydet.losses import PPYoloELoss, YoloXFastDetectionLoss
from raydet.models import Detector, Preprocessing, YoloXHead, YoloXPAN


class Backbone(nn.Module):
    out_channels = (8, 16, 24)

    def __init__(self):
        super().__init__()
        self.c3, self.c4, self.c5 = nn.Conv2d(3, 8, 8, 8), nn.Conv2d(8, 16, 2, 2), nn.Conv2d(16, 24, 2, 2)

    def forward(self, images):
        c3 = self.c3(images)
        c4 = self.c4(c3)
        return c3, c4, self.c5(c4)


def build(num_classes):
    backbone = Backbone()
    neck = YoloXPAN(backbone.out_channels)
    head = YoloXHead(neck.out_channels, num_classes, hidden=16)
    return Detector(backbone, neck, head, Preprocessing(std=(255.0, 255.0, 255.0), channels="RGB"))


class Doubled(YoloXFastDetectionLoss):
    def __init__(self, factor, **settings):
        super().__init__(**settings)
        self.factor = factor

    def forward(self, outputs, targets):
        loss, components = super().forward(outputs, targets)
        return self.factor * loss, components


def nothing(num_classes):
    return nn.Identity()


def needs_more(num_classes, depth):
    ...
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    name = f"own_{tmp_path.name}"  # a module of another test would still be imported
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    return name


def test_a_model_and_a_loss_of_one_s_own_by_name(demo, own_module):
    result, _ = train(
        demo, f"model.name={own_module}:build", f"loss.name={own_module}:Doubled", "loss.factor=2", "loss.iou_weight=3"
    )
    recipe = load(result.folder / "recipe.yaml")
    assert recipe.loss.model_dump()["factor"] == 2
    logged = metrics_of(result.folder)[0]
    parts = {name: logged[f"train/Doubled/{name}"] for name in ("iou", "obj", "cls")}
    assert logged["train/loss"] == pytest.approx(2 * (3 * parts["iou"] + parts["obj"] + parts["cls"]), rel=1e-5)
    found = raydet.evaluate(result.folder, trust_code=True, debug=True, device="cpu", say=lambda text: None)
    assert {f"val/{name}": value for name, value in found.items()} == pytest.approx(result.metrics, abs=1e-6)
    assert raydet.load(result.folder, trust_code=True).config.preprocessing.channels == "RGB"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.name={own}:nothing"], "returns a Identity, not a raydet.models.Detector"),
        (["model.name={own}:needs_more"], "needs_more(num_classes, depth): missing a required argument: 'depth'"),
        (["model.name={own}:buld"], "has no buld; did you mean build?"),
        (["loss.name={own}:Doubled"], "missing a required argument: 'factor'"),
        (["loss.name={own}:Backbone", "loss.x=1"], "Backbone() takes no x"),
        (["loss.name={own}:Backbone"], "the loss Backbone must be a torch.nn.Module with component_names"),
        (["loss.name={own}:needs_more"], "needs_more is no class"),
        (["loss.cls_pos_weight=[1, 2]"], "cls_pos_weight has 2 numbers for 5 classes"),
    ],
)
def test_mistakes_in_one_s_own_are_named(demo, own_module, overrides, message):
    with pytest.raises(RaydetError) as error:
        train(demo, *(override.format(own=own_module) for override in overrides))
    assert message in str(error.value)


def test_a_subclass_of_another_loss_than_the_recipe_s_gets_the_arguments_that_its_base_takes(demo, own_module):
    """The recipe's loss has arguments that YOLOX's own has not."""
    path = Path(f"{own_module}.py")
    path.write_text(path.read_text().replace("YoloXFastDetectionLoss", "YoloXDetectionLoss"))
    result, _ = train(demo, f"loss.name={own_module}:Doubled", "loss.factor=2", "train.epochs=1")
    assert "dynamic_ks_bias" not in load(result.folder / "recipe.yaml").loss.model_dump()


def test_a_run_of_objects_is_evaluated_with_the_model_alone(demo):
    """Its recipe names another family's model and loss."""
    model = get("ppyoloe_s", 5)
    model.licence = "mine"
    result, _ = train(demo, "train.epochs=1", model=model, loss=PPYoloELoss(num_classes=5))
    found = raydet.evaluate(result.folder, model=get("ppyoloe_s", 5), debug=True, device="cpu", say=lambda text: None)
    assert {f"val/{name}": value for name, value in found.items()} == pytest.approx(result.metrics, abs=1e-6)
    assert json.loads((result.checkpoint / "config.json").read_text())["licence"] == "mine"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.name=ppyoloe_s"],
            "loss.name: YoloXFastDetectionLoss is a loss of YOLOX, the model is of PP-YOLOE; "
            "its losses are PPYoloELoss. The recipe ppyoloe_finetune has both",
        ),
        (["loss.name=PPYoloELoss"], "is a loss of PP-YOLOE and YOLO-NAS, the model is of YOLOX"),
        (["model.name=ssd_lite_mobilenet_v2"], "the model is of SSD; its losses are SSDLoss"),
    ],
)
def test_a_loss_of_another_family_is_refused_by_the_names_of_both(demo, overrides, message):
    with pytest.raises(RaydetError) as error:
        train(demo, *overrides)
    assert message in str(error.value)


class NotANumber(YoloXFastDetectionLoss):
    """From the third batch on."""

    seen, bad = 0, range(3, 1000)

    def forward(self, outputs, targets):
        loss, components = super().forward(outputs, targets)
        self.seen += 1
        return loss * (float("nan") if self.seen in self.bad else 1), components


def test_after_some_steps_in_a_row_that_are_not_finite_it_stops(demo):
    with pytest.raises(RaydetError, match="was not finite in 3 steps in a row, the last being 5"):
        train(demo, "train.max_bad_steps=3", loss=NotANumber(num_classes=5))


class OnceNotANumber(NotANumber):
    """In the third batch only."""

    bad = range(3, 4)


def test_a_step_that_is_not_finite_is_skipped_and_its_images_are_named_and_kept(demo):
    result, said = train(demo, loss=OnceNotANumber(num_classes=5))
    (warning,) = (line for line in said if "the loss or its gradient is not finite; the step is skipped" in line)
    kept = torch.load(result.folder / "not_finite/step_00000003_rank_0.pt", weights_only=True)
    assert kept["images"].shape == (8, 3, 96, 96)
    assert all(Path(path).is_file() and path in warning for path in kept["paths"])
    weights = load_file(result.checkpoint / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values() if tensor.is_floating_point())
    assert sum(line.get("train/skipped", 0) for line in metrics_of(result.folder)) == 1
