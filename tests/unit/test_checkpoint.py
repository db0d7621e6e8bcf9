import json
import pickle
import re
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from torch import nn

from raydet import models
from raydet.errors import RaydetError
from raydet.models import Preprocessing
from raydet.recipe import Eval, Train
from raydet.runs import checkpoint
from raydet.runs.checkpoint import Config, Progress
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


@pytest.fixture(scope="module")
def state():
    model, average, optimizer = trained(0)
    return model, average, optimizer


@pytest.fixture
def run(tmp_path, state):
    """Writes checkpoints of a run: epoch → mAP, None where it was not validated."""

    def write(scores, keep=None):
        for epoch, score in scores.items():
            metrics = {} if score is None else {"val/mAP@0.50:0.95": score}
            checkpoint.write(tmp_path / f"checkpoint_{epoch:06d}", files(state, metrics, epoch))
            if keep is not None:
                checkpoint.prune(tmp_path, keep)
        return tmp_path

    return write


def files(state, metrics, epoch=1, **more):
    model, average, optimizer = state
    trained_states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    progress = Progress(position=8 * epoch, step=2 * epoch, best=0.5, stale=1)
    return checkpoint.pack(CONFIG, average, trained_states, progress, epoch, metrics, **more)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_comes_back_to_the_bit(tmp_path, state):
    metrics = {"val/mAP@0.50:0.95": 0.25}
    checkpoint.write(tmp_path / "c", files(state, metrics, epoch=3))
    model, average, optimizer = trained(1)
    progress, found = checkpoint.restore(tmp_path / "c", average, model, {"optimizer": optimizer})
    assert progress == Progress(position=24, step=6, best=0.5, stale=1)
    assert found == metrics
    for ours, theirs in zip(state[:2], (model, average), strict=True):
        for name, tensor in ours.state_dict().items():
            assert torch.equal(tensor, theirs.state_dict()[name]), name
    for ours, theirs in zip(
        state[2].state_dict()["state"].values(), optimizer.state_dict()["state"].values(), strict=True
    ):
        assert torch.equal(ours["momentum_buffer"], theirs["momentum_buffer"])
    assert checkpoint.read_config(tmp_path / "c") == CONFIG
    loaded = checkpoint.load_model(tmp_path / "c", CONFIG)
    assert not loaded.training
    for name, tensor in state[1].named_parameters():
        assert torch.equal(tensor, loaded.get_parameter(name)), "the weights to use are the average"


def test_the_optimizer_keeps_its_count_of_steps_on_the_cpu(tmp_path, state):
    """As a fresh AdamW does: from a GPU, for which the meta device stands here, each step would wait for it."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.rand(1, 2)).sum().backward()
    optimizer.step()
    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    checkpoint.write(tmp_path / "c", checkpoint.pack(CONFIG, model, states, Progress(), 1, {}))
    elsewhere = nn.Linear(2, 2, device="meta")
    resumed = torch.optim.AdamW(elsewhere.parameters())
    checkpoint.restore(tmp_path / "c", nn.Linear(2, 2), elsewhere, {"optimizer": resumed})
    devices = {key: {state[key].device.type for state in resumed.state.values()} for key in ("step", "exp_avg")}
    assert devices == {"step": {"cpu"}, "exp_avg": {"meta"}}


def test_a_checkpoint_has_a_model_card_that_follows_its_metrics(tmp_path, state):
    folder = tmp_path / "checkpoint_000002"
    checkpoint.write(folder, files(state, {}, 2))
    card = (folder / "README.md").read_text()
    for text in ("# yolox_n of 2 classes", "64 x 96 pixels", "Apache-2.0 (Megvii)", "disc, ring", "Not measured yet."):
        assert text in card
    checkpoint.set_metrics(folder, {"val/mAP@0.50:0.95": 0.25})
    assert "| mAP@0.50:0.95 | 0.2500 |" in (folder / "README.md").read_text()
    assert checkpoint.damage(folder) is None


def test_a_run_s_best_checkpoint_is_found_by_its_map(run):
    folder = run({1: 0.2, 2: 0.3, 3: None})
    assert checkpoint.find(folder).name == "checkpoint_000002"
    assert checkpoint.find(folder / "checkpoint_000001").name == "checkpoint_000001"
    run({4: 0.3})
    assert checkpoint.find(folder).name == "checkpoint_000004", "of equals the later"


def test_the_metric_to_watch_decides_which_is_best(tmp_path, state):
    config = replace(CONFIG, thresholds=Eval(watch="mAP@0.50"))
    for epoch, (fine, coarse) in enumerate(((0.3, 0.5), (0.2, 0.6)), start=1):
        metrics = {"val/mAP@0.50:0.95": fine, "val/mAP@0.50": coarse}
        packed = checkpoint.pack(config, state[1], None, Progress(position=epoch), epoch, metrics)
        checkpoint.write(tmp_path / f"checkpoint_{epoch:06d}", packed)
    assert checkpoint.find(tmp_path).name == "checkpoint_000002"


@pytest.mark.parametrize(
    ("scores", "keep", "left"),
    [
        ({1: 0.5, 2: 0.1, 3: 0.2, 4: 0.3}, 1, {1: False, 3: True, 4: True}),
        ({1: 0.1, 2: 0.5, 3: 0.4, 4: None, 5: None}, 2, {2: False, 3: False, 4: True, 5: True}),
        ({1: 0.5, 2: 0.5, 3: 0.1, 4: 0.1}, 1, {2: False, 3: True, 4: True}),
        ({1: 0.1, 2: 0.2, 3: 0.3}, 5, {1: False, 2: True, 3: True}),
    ],
)
def test_the_best_and_the_last_two_stay_and_only_these_can_be_gone_on_from(run, scores, keep, left):
    folder = run(scores, keep)
    assert names(folder) == [f"checkpoint_{epoch:06d}" for epoch in left]
    for epoch, complete in left.items():
        assert ("training.pt" in names(folder / f"checkpoint_{epoch:06d}")) == complete
        assert checkpoint.damage(folder / f"checkpoint_{epoch:06d}") is None


def test_a_checkpoint_whose_metrics_are_awaited_stays_until_they_have_come(tmp_path, state, run):
    checkpoint.write(tmp_path / "checkpoint_000001", files(state, {}, 1, is_awaited=True))
    run({2: 0.5, 3: 0.4, 4: 0.3}, keep=1)
    assert names(tmp_path) == ["checkpoint_000001", "checkpoint_000002", "checkpoint_000003", "checkpoint_000004"]
    assert checkpoint.awaited(tmp_path) == [tmp_path / "checkpoint_000001"]
    checkpoint.set_metrics(tmp_path / "checkpoint_000001", {"val/mAP@0.50:0.95": 0.6})
    checkpoint.prune(tmp_path, 1)
    assert names(tmp_path) == ["checkpoint_000001", "checkpoint_000003", "checkpoint_000004"]
    assert checkpoint.find(tmp_path).name == "checkpoint_000001"


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "harm", "message"),
    [
        ("model.safetensors", cut, r"model.safetensors has \d+ bytes of \d+"),
        ("training.pt", flip, "training.pt is not what was written: its checksum differs"),
        ("model.safetensors", flip, "model.safetensors is not what was written"),
        ("config.json", cut, "config.json is damaged"),
        ("model.safetensors", lambda path: path.unlink(), "model.safetensors cannot be read .No such file"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(run, name, harm, message):
    folder = run({1: 0.1, 2: 0.2, 3: 0.3}, keep=3)
    assert checkpoint.latest(folder) == (folder / "checkpoint_000003", [])
    harm(folder / "checkpoint_000003" / name)
    found, problems = checkpoint.latest(folder)
    assert found == folder / "checkpoint_000002"
    assert len(problems) == 1
    assert re.search("checkpoint_000003 is damaged: .*" + message, problems[0])


def test_a_checkpoint_appears_whole_or_not_at_all(tmp_path, state):
    """A process is killed again and again while it writes: what is there can always be gone on from."""
    script = (
        "import pickle, sys; from pathlib import Path; from raydet.runs import checkpoint\n"
        "files = pickle.load(open(sys.argv[1], 'rb'))\n"
        "print('ready', flush=True)\n"
        "while True: checkpoint.write(Path(sys.argv[2]), files)"
    )
    (tmp_path / "files.pkl").write_bytes(pickle.dumps(files(state, {})))
    folder = tmp_path / "run" / "checkpoint_000001"
    seen = 0
    for pause in (0.001, 0.005, 0.01, 0.02):
        with subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / "files.pkl"), str(folder)], stdout=subprocess.PIPE
        ) as writer:
            writer.stdout.readline()
            time.sleep(0.05 + pause)
            writer.kill()
        if folder.exists():
            seen += 1
            assert checkpoint.damage(folder) is None
    assert seen
    checkpoint.prune(tmp_path / "run", 1)
    assert names(tmp_path / "run") == (["checkpoint_000001"] if folder.exists() else [])


def test_a_full_disk_leaves_the_checkpoints_that_were_there(tmp_path, state):
    """The process may not write files of more than a megabyte, which fails as a full disk does."""
    (tmp_path / "files.pkl").write_bytes(pickle.dumps(files(state, {})))
    folder = tmp_path / "run" / "checkpoint_000001"
    checkpoint.write(folder, files(state, {}))
    script = (
        "import pickle, resource, sys; from pathlib import Path; from raydet.runs import checkpoint\n"
        "files = pickle.load(open(sys.argv[1], 'rb'))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))\n"
        "try: checkpoint.write(Path(sys.argv[2]), files)\n"
        "except OSError as error: print(error.strerror)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "files.pkl"), str(folder)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "File too large\n"
    assert names(folder.parent) == ["checkpoint_000001"]
    assert checkpoint.damage(folder) is None


def test_the_average_is_that_of_weights_and_norm_statistics(tmp_path):
    models_of = [trained(seed)[1] for seed in (0, 1, 2)]
    for number, model in enumerate(models_of):
        packed = checkpoint.pack(CONFIG, model, None, Progress(position=number), number, {})
        checkpoint.write(tmp_path / f"checkpoint_{number:06d}", packed)
    mean = trained(3)[1]
    checkpoint.average_weights(mean, sorted(tmp_path.iterdir()))
    states = [model.state_dict() for model in models_of]
    for name, tensor in mean.state_dict().items():
        expected = sum(state[name].double() for state in states) / 3
        torch.testing.assert_close(tensor, expected.to(tensor.dtype))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("weights.pth", r"weights.pth holds weights alone, .*raydet train RECIPE model\.weights=.*weights.pth"),
        ("model.safetensors", r"model.safetensors holds weights alone: give its folder, .*test_a_file"),
        ("photo.jpg", r"photo.jpg is neither a checkpoint or run folder nor an ONNX file"),
        ("nothing", r"nothing: no such file or folder"),
    ],
)
def test_a_file_that_is_no_checkpoint_says_what_to_do(name, message, tmp_path):
    if name != "nothing":
        (tmp_path / name).touch()
    if name == "model.safetensors":
        (tmp_path / "config.json").touch()
    with pytest.raises(RaydetError, match=message):
        checkpoint.find(tmp_path / name)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(RaydetError, match=r"neither a checkpoint .* nor a run"):
        checkpoint.find(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RaydetError, match=r"config\.json is not JSON"):
        checkpoint.read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model": "yolox_n"}))
    with pytest.raises(RaydetError, match=r"config\.json is damaged: 'classes'"):
        checkpoint.read_config(tmp_path)
