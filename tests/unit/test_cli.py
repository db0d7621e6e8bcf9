"""The command line, as a user meets it."""

import json
import subprocess
import sys

import cv2
import numpy as np
import pytest

from raydet.recipe import load, shipped
from tests.command import raydet

COMMANDS = (
    *(
        "train",
        "tune",
        "tune-nms",
        "evaluate",
        "predict",
        "batch-predict",
        "plot",
        "report",
        "inspect",
        "ingest",
        "recipes",
    ),
)


@pytest.fixture(scope="module")
def run(shapes, tmp_path_factory):
    """A debug run made by the command, and what it printed."""
    folder = tmp_path_factory.mktemp("cli")
    options = [f"data.root={shapes}", f"storage={folder}/runs", "data.image_size=96", "train.epochs=1"]
    done = raydet("train", "demo", *options, "--debug", "--device", "cpu", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "demo-debug", done.stdout


def test_help_names_every_command_and_imports_nothing_slow():
    imported = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "raydet.cli", "--help"], capture_output=True, text=True, check=False
    )
    assert imported.returncode == 0
    for command in COMMANDS:
        assert command in imported.stdout
    modules = {line.rpartition("|")[2].strip() for line in imported.stderr.splitlines()}
    assert "raydet.cli" in modules or "raydet" in modules
    assert not modules & {"torch", "ray", "cv2", "pyarrow", "pydantic"}


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_s_help_has_an_example(command):
    assert "Example: raydet " in raydet(command, "--help").stdout


def test_help_shows_defaults_that_the_checkpoint_or_the_machine_decides():
    """They are given as defaults: square brackets in a help text are styles, and are not shown."""
    assert "[default: (the checkpoint's)]" in raydet("predict", "--help").stdout
    assert "the first GPU" in raydet("evaluate", "--help").stdout


def test_recipes_lists_all_and_prints_one(tmp_path):
    listed = raydet("recipes").stdout
    assert [line.split()[0] for line in listed.splitlines()] == list(shipped())
    printed = raydet("recipes", "demo", "train.epochs=7").stdout
    assert "\n  # number of passes over the training images\n  epochs: 7\n" in printed
    (tmp_path / "mine.yaml").write_text(printed)
    assert raydet("recipes", tmp_path / "mine.yaml").stdout == printed
    assert load(tmp_path / "mine.yaml").name == "mine"


def test_training_ends_with_a_table_the_folder_and_what_comes_next(run, shapes):
    folder, printed = run
    for part in ("mAP@0.50:0.95", f"run folder: {folder}", "best checkpoint: ", f" predict {folder} {shapes}/val"):
        assert part in printed, part
    sheet = cv2.imread(str(folder / "images" / "validation.jpg"))
    assert sheet is not None
    assert sheet.std() > 10


def test_evaluate_leaves_files_which_it_evaluates_too(run, shapes, tmp_path):
    folder, _ = run
    first = raydet("evaluate", folder, "--debug", "--device", "cpu", "--out", tmp_path / "one")
    assert first.returncode == 0, first.stderr
    data = ["--recipe", "demo", f"data.root={shapes}", "data.max_num_samples=64"]
    again = raydet("evaluate", tmp_path / "one" / "detections.json", *data, "--out", tmp_path / "two")
    assert again.returncode == 0, again.stderr
    ours, theirs = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert ours == theirs
    assert f"{ours['mAP@0.50:0.95']:.4f}" in first.stdout
    assert len(list((tmp_path / "one").glob("*.png"))) == 5


def test_predict_writes_pictures_and_coco_results(run, shapes, tmp_path):
    folder, _ = run
    done = raydet("predict", folder, shapes / "val", "--out", tmp_path / "out", "--score", "0", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").glob("*.jpg"))) == 24
    results = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert set(results[0]) == {"image_id", "category_id", "bbox", "score", "file_name"}
    assert all(int(entry["file_name"].removesuffix(".jpg")) == entry["image_id"] for entry in results)
    assert {entry["category_id"] for entry in results} <= {1, 2, 3, 4, 5}


def test_predict_neither_replaces_photos_nor_detects_in_its_own_pictures(run, tmp_path):
    folder, _ = run
    for name in ("a/1.png", "b/1.png", "c.photo"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        encoded = cv2.imencode(".jpg" if name == "c.photo" else ".png", np.zeros((40, 40, 3), np.uint8))[1]
        (tmp_path / name).write_bytes(encoded.tobytes())
    done = raydet("predict", folder, tmp_path, "--out", tmp_path)
    assert done.returncode == 2
    assert "1.png is there and is not raydet's" in done.stderr
    for _ in range(2):
        done = raydet("predict", folder, tmp_path, "--out", tmp_path / "out", "--score", "0", "--device", "cpu")
        assert "in 2 images" in done.stdout
    found = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert {(entry["image_id"], entry["file_name"]) for entry in found} == {(1, "a/1.png"), (2, "b/1.png")}
    assert raydet("predict", folder, tmp_path / "c.photo", "--out", tmp_path / "out").returncode == 0
    assert (tmp_path / "out" / "c.jpg").is_file()


@pytest.mark.parametrize(("names", "code"), [(["1.jpg", "2.jpg"], 0), (["2.jpg"], 1)])
def test_predict_lists_what_it_could_not_read_and_fails_when_that_is_all(run, shapes, tmp_path, names, code):
    photo = next((shapes / "val").iterdir()).read_bytes()
    (tmp_path / "photos").mkdir()
    for name in names:
        (tmp_path / "photos" / name).write_bytes(photo if name == "1.jpg" else photo[:200])
    done = raydet("predict", run[0], tmp_path / "photos", "--save", tmp_path / "out", "--device", "cpu")
    assert done.returncode == code
    assert f"not done: {tmp_path}/photos/2.jpg: " in done.stdout
    assert f"in {len(names) - 1} images" in done.stdout
    assert done.stdout.endswith("; 1 could not be read\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "demo", "train.epoch=3"], "train.epoch: no such setting; did you mean train.epochs?"),
        (["train", "dmeo"], "did you mean demo?"),
        (["train", "demo", "data.root=/nowhere"], "data.root: /nowhere is not a folder"),
        (["train", "demo", "data.root={shapes}", "data.val_annotations=list.json"], "is not a COCO annotation file"),
        (["train", "demo", "data.root={shapes}", "model.num_classes=80"], "but the data has 5 classes"),
        (["train", "demo", "data.root={shapes}", "--device", "cpu"], "--device goes with --debug"),
        (["evaluate", "/nowhere"], "/nowhere: no such file or folder"),
        (["tune", "coco2017_yolox_s"], "tune.space is empty: say what to try"),
        (["tune-nms", "/nowhere"], "/nowhere: no such file or folder"),
        (["predict", "/nowhere", "{shapes}/val"], "/nowhere"),
        (["predict", "weights.pth", "{shapes}/val"], "weights.pth holds weights alone"),
        (["predict", "/nowhere", "nothing.jpg"], "nothing.jpg: no such file or folder"),
        (["batch-predict", "/nowhere", "{shapes}/val", "out"], "/nowhere: no such file or folder"),
        (["recipes", "coco2017_yolox_q"], "did you mean coco2017_yolox_"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_exit_code_2(shapes, arguments, message, tmp_path):
    (shapes / "list.json").write_text("[1, 2]")
    (tmp_path / "weights.pth").touch()
    done = raydet(*(argument.format(shapes=shapes) for argument in arguments), cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists(), "nothing is left behind"
