"""Code that a downloaded checkpoint or run names: nothing of it is run unless that is asked for."""

import sys
from functools import partial

import pytest
import torch

import raydet
from raydet import models
from raydet.data.formats import load_index
from raydet.errors import RaydetError
from raydet.models import family_of
from raydet.predict.export import export
from raydet.predict.on_ray import batch_predict
from raydet.recipe import Eval, load
from raydet.runs.checkpoint import Config, Progress, pack, write
from raydet.training.prepare import make_job
from raydet.tuning.nms import tune_nms
from tests.command import raydet as command

PAYLOAD = """
from pathlib import Path

from raydet import models
from raydet.data.coco import load_coco

Path("ran").touch()


def build(num_classes):
    return models.get("yolox_n", num_classes)


def data(root, split):
    return load_coco(f"{root}/annotations/instances_{split}.json", f"{root}/{split}")
"""
NAMES = ("disc", "ring", "square", "frame", "triangle")


@pytest.fixture
def downloaded(shapes, tmp_path, monkeypatch):
    """Makes a run folder as someone else may offer it: its files may name code that lies beside it."""
    monkeypatch.chdir(tmp_path)
    package = f"downloaded_{tmp_path.name}"  # a module of another test would still be imported
    (tmp_path / package).mkdir()
    (tmp_path / package / "payload.py").write_text(PAYLOAD)

    def make(model=False, data=False):
        config = Config(
            f"{package}.payload:build" if model else "yolox_n",
            load_index(load("demo", [f"data.root={shapes}"]).data, "val").class_names,
            (1, 2, 3, 4, 5),
            (96, 96),
            family_of("yolox_n").preprocessing,
            Eval(score=0.0, max_detections=5),
        )
        torch.manual_seed(0)
        files = pack(config, models.get("yolox_n", 5), None, Progress(), 1, {})
        write(tmp_path / package / "checkpoint_000001", files)
        form = f"{package}.payload:data" if data else "coco"
        code = f"loss: {{name: '{package}.payload:Loss'}}\naugment: {{transforms: [{{name: '{package}.payload:T'}}]}}"
        (tmp_path / package / "recipe.yaml").write_text(f"data: {{root: {shapes}, format: '{form}'}}\n{code}\n")
        return tmp_path / package

    yield make
    for name in [name for name in sys.modules if name.startswith(package)]:
        del sys.modules[name]


quiet = {"debug": True, "device": "cpu", "say": lambda text: None}
OPENED = {
    "load": lambda run, **given: raydet.load(run, "cpu", **given),
    "evaluate": lambda run, **given: raydet.evaluate(run, **quiet, **given),
    "tune_nms": lambda run, **given: tune_nms(run, **quiet, trials=2, **given),
    "export": lambda run, **given: export(run, "model.onnx", say=print, **given),
    "batch_predict": lambda run, **given: batch_predict(run, "nowhere", "out", **given),
}
COMMANDS = {
    "evaluate": ["--debug", "--device", "cpu"],
    "tune-nms": ["--debug", "--device", "cpu", "--trials", "2"],
    "export": [],
    "predict": ["photos"],
    "batch-predict": ["photos", "out"],
}


@pytest.mark.parametrize("how", OPENED)
def test_the_code_of_a_downloaded_model_is_not_run(how, downloaded, tmp_path):
    run = downloaded(model=True)
    with pytest.raises(
        RaydetError, match=r"config.json names code.*\.payload:build.*model=….*trust_code=True"
    ) as error:
        OPENED[how](run)
    assert "--trust-code" in str(error.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("command_name", COMMANDS)
def test_no_command_runs_the_code_of_a_downloaded_model(command_name, downloaded, tmp_path, shapes):
    run = downloaded(model=True)
    (tmp_path / "photos").symlink_to(shapes / "val")
    done = command(command_name, run, *COMMANDS[command_name], cwd=tmp_path)
    assert done.returncode == 2
    assert "--trust-code" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("how", ["load", "evaluate", "tune_nms", "export"])
def test_a_model_that_is_given_takes_the_place_of_the_code(how, downloaded, tmp_path):
    OPENED[how](downloaded(model=True), model=models.get("yolox_n", 5))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("how", ["load", "evaluate", "tune_nms", "export"])
def test_code_that_is_trusted_is_run(how, downloaded, tmp_path):
    OPENED[how](downloaded(model=True, data=how in ("evaluate", "tune_nms")), trust_code=True)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("how", ["evaluate", "tune_nms"])
def test_the_code_that_a_run_names_for_its_data_is_not_run(how, downloaded, tmp_path):
    run = downloaded(data=True)
    with pytest.raises(RaydetError, match=r"recipe.yaml names code.*\.payload:data.*data.format=….*trust_code=True"):
        OPENED[how](run)
    OPENED[how](run, overrides=["data.format=coco"])
    assert not (tmp_path / "ran").exists()


def test_an_export_compares_on_images_of_shapes_where_the_run_names_code_for_its_data(downloaded, tmp_path):
    said = []
    export(downloaded(data=True), "model.onnx", say=said.append)
    assert any("images of shapes" in line for line in said)
    assert not (tmp_path / "ran").exists()


def test_weights_of_a_downloaded_run_are_only_weights(downloaded, shapes, tmp_path):
    recipe = load("demo", [f"data.root={shapes}", f"model.weights={downloaded(model=True, data=True)}"])
    make_job(recipe, *(load_index(recipe.data, split) for split in ("train", "val")))
    assert not (tmp_path / "ran").exists()


def test_training_a_model_of_one_s_own_by_the_command_and_going_on_with_it(downloaded, shapes, tmp_path):
    """The recipe is the user's: its code is run, and at the end its pictures are drawn without a word of trust."""
    name = downloaded(model=True).name
    options = [f"data.root={shapes}", "data.image_size=96", "train.epochs=1", f"model.name={name}.payload:build"]
    train = partial(command, "train", "demo", *options, "--debug", "--device", "cpu", cwd=tmp_path)
    done = train()
    assert done.returncode == 0, done.stderr
    assert f"next: raydet predict {tmp_path}/runs/demo-debug {shapes}/val --trust-code" in done.stdout
    assert command("evaluate", "runs/demo-debug", "--debug", "--trust-code", cwd=tmp_path).returncode == 0
