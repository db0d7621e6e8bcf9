import json

import pytest
import torch

from raydet import models
from raydet.errors import RaydetError
from raydet.models import Preprocessing
from raydet.recipe import Eval, Train
from raydet.training import checkpoint
from raydet.training.checkpoint import Config
from raydet.training.optimization import EMA, make_optimizer

CONFIG = Config(
    model="yolox_n",
    class_names=("disc", "ring"),
    category_ids=(3, 7),
    image_size=(64, 96),
    preprocessing=Preprocessing((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    thresholds=Eval(score=0.05, iou=0.5),
    licence="Apache-2.0 (Megvii)",
)
CPU = torch.device("cpu")


def trained(seed):
    """A model, its average and its optimizer, some steps into a training."""
    torch.manual_seed(seed)
    model = models.get("yolox_n", 2).train()
    average = EMA(model, Train(ema_decay=0.9), 10)
    optimizer = make_optimizer(model, Train(lr=0.01))
    for step in (1, 2):
        optimizer.zero_grad()
        sum(level.square().mean() for level in model(torch.rand(2, 3, 64, 64))).backward()
        optimizer.step()
        average.update(step)
    return model, average.model, optimizer


def save(folder, metrics, epoch=1, state=None):
    folder.mkdir(parents=True)
    model, average, optimizer = state or trained(0)
    checkpoint.save(folder, CONFIG, average, model, optimizer, step=2, epoch=epoch, metrics=metrics)
    return model, average, optimizer


def test_what_is_saved_comes_back_to_the_bit(tmp_path):
    metrics = {"val/mAP@0.50:0.95": 0.25}
    saved = save(tmp_path / "c", metrics)
    fresh = trained(1)
    assert checkpoint.restore(tmp_path / "c", fresh[1], fresh[0], fresh[2], CPU) == (2, metrics)
    for ours, theirs in zip(saved[:2], fresh[:2], strict=True):
        for name, tensor in ours.state_dict().items():
            assert torch.equal(tensor, theirs.state_dict()[name]), name
    for ours, theirs in zip(
        saved[2].state_dict()["state"].values(), fresh[2].state_dict()["state"].values(), strict=True
    ):
        assert torch.equal(ours["momentum_buffer"], theirs["momentum_buffer"])
    assert checkpoint.read_config(tmp_path / "c") == CONFIG
    loaded = checkpoint.load_model(tmp_path / "c", CONFIG)
    assert not loaded.training
    for name, tensor in saved[1].named_parameters():
        assert torch.equal(tensor, loaded.get_parameter(name)), "the weights to use are the average"


def test_a_run_s_best_checkpoint_is_found_by_its_map(tmp_path):
    state = trained(0)
    for epoch, metrics in enumerate(({"val/mAP@0.50:0.95": 0.2}, {"val/mAP@0.50:0.95": 0.3}, {}), start=1):
        save(tmp_path / f"checkpoint_{epoch:06d}", metrics, epoch, state)
    assert checkpoint.find(tmp_path).name == "checkpoint_000002"
    assert checkpoint.find(tmp_path / "checkpoint_000001").name == "checkpoint_000001"
    save(tmp_path / "checkpoint_000004", {"val/mAP@0.50:0.95": 0.3}, 4, state)
    assert checkpoint.find(tmp_path).name == "checkpoint_000004", "of equals the later"


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(RaydetError, match=r"neither a checkpoint .* nor a run"):
        checkpoint.find(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RaydetError, match=r"config\.json is not JSON"):
        checkpoint.read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model": "yolox_n"}))
    with pytest.raises(RaydetError, match=r"config\.json is damaged: 'classes'"):
        checkpoint.read_config(tmp_path)
