"""What goes wrong in a training, and what is lost: each line of the fault table in docs/faults.md.

The runs are of two workers on one CPU each, with a checkpoint every third step of five an epoch; "straight" is the run
that nothing happens to. Equal means to the bit: weights, their moving average, the optimizer's state, where it stands.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from ray.util.state import list_actors
from safetensors.torch import load_file

import raydet
from raydet.runs import checkpoint

EPOCHS, STEPS = 4, 20
FIRST_CHECKPOINT = "checkpoint: checkpoint_000000_00000003"


@pytest.fixture(scope="module")
def options(shapes, tmp_path_factory):
    return [
        f"data.root={shapes}",
        f"storage={tmp_path_factory.mktemp('faults')}",
        "data.image_size=96",
        "data.chunk_size=16",
        "train.batch_size=8",
        f"train.epochs={EPOCHS}",
        "eval.every=2",
        "track.log_every=1",
        "track.checkpoint_steps=3",
        "scale.num_workers=2",
        "scale.cpus_per_worker=1",
    ]


@pytest.fixture(scope="module")
def straight(options):
    return raydet.train("demo", overrides=[*options, "name=straight"], say=lambda text: None).folder


def log_of(options, name):
    storage = next(o for o in options if o.startswith("storage=")).removeprefix("storage=")
    return Path(storage, name, "log.txt")


def wait_for(log, text, alive, seconds=240):
    deadline = time.monotonic() + seconds
    while not (log.exists() and text in log.read_text()):
        assert alive(), f"the run ended before {text!r}"
        assert time.monotonic() < deadline, log.read_text() if log.exists() else "no log"
        time.sleep(0.01)


@contextlib.contextmanager
def running(options, name):
    """Train in a thread of this process, whose cluster the tests can look into; give what is said."""
    said, failed = [], []

    def run():
        try:
            raydet.train("demo", overrides=[*options, f"name={name}"], say=said.append)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield thread, said
    finally:
        thread.join(240)
    assert not thread.is_alive()
    if failed:
        raise failed[0]


@contextlib.contextmanager
def command(options, name):
    """The command line in a session of its own, as in a terminal."""
    overrides = [*options, f"name={name}"]
    # A shell that starts the tests in the background lets them, and all that they start, ignore Ctrl-C.
    attentive = ["env", "--default-signal=INT"]
    arguments = [*attentive, sys.executable, "-m", "raydet.cli", "train", "demo", *overrides]
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as driver:
        try:
            yield driver
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(driver.pid, signal.SIGKILL)


def workers():
    # The address is named: without one Ray asks the cluster started last, which may be that of a killed driver.
    here = ray.get_runtime_context().gcs_address
    found = list_actors(here, filters=[("class_name", "=", "RayTrainWorker"), ("state", "=", "ALIVE")])
    return [actor.pid for actor in found]


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same(ours, theirs):
    """Are two values of a training's state equal to the bit?"""
    if isinstance(ours, torch.Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return ours == theirs


def assert_equal_to(straight, folder):
    last = f"checkpoint_{EPOCHS:06d}"
    assert same(load_file(straight / last / "model.safetensors"), load_file(folder / last / "model.safetensors"))
    ours, theirs = (torch.load(run / last / "training.pt", weights_only=True) for run in (straight, folder))
    assert same(ours, theirs)
    for key in ("step", "epoch", "position", "train/loss", "train/lr", "val/mAP@0.50:0.95"):
        ours, theirs = ([line.get(key) for line in metrics_of(run)] for run in (straight, folder))
        assert ours == theirs, key


def test_driver_killed_in_mid_epoch_and_the_last_checkpoint_damaged(options, straight):
    """It is named, and the same command goes on from the one before. Lost: the steps since then.

    The workers live some seconds longer than their driver, and make some steps more.
    """
    with command(options, "driver") as driver:
        wait_for(log_of(options, "driver"), f"step 13/{STEPS}", lambda: driver.poll() is None)
        os.killpg(driver.pid, signal.SIGKILL)  # as by the kernel: no clean-up of its own
    folder, seen = log_of(options, "driver").parent, 0
    while seen != (seen := (folder / "log.txt").stat().st_size):
        time.sleep(4)  # longer than some steps
    last = sorted(folder.glob("checkpoint_0*"))[-1]
    content = (last / "training.pt").read_bytes()
    (last / "training.pt").write_bytes(content[: len(content) // 2])
    with running(options, "driver") as (_, said):
        pass
    assert any(line.startswith(f"warning: {last.name} is damaged: training.pt has") for line in said)
    assert any(line.startswith("resumed after step") for line in said)
    assert_equal_to(straight, folder)


def test_worker_killed(options, straight):
    """The others are replaced with it, by themselves. Lost: the steps since the last checkpoint."""
    with running(options, "worker") as (thread, said):
        wait_for(log_of(options, "worker"), FIRST_CHECKPOINT, thread.is_alive)
        os.kill(workers()[-1], signal.SIGKILL)
    assert any(line.startswith("resumed after step") for line in said)
    assert_equal_to(straight, log_of(options, "worker").parent)


def test_worker_hangs(options, straight):
    """The others wait for it in vain, until the watchdog ends them all. Lost: as if it was killed, and the wait."""
    with running([*options, "scale.hang_minutes=0.4"], "hangs") as (thread, said):
        wait_for(log_of(options, "hangs"), FIRST_CHECKPOINT, thread.is_alive)
        stopped = workers()[-1]
        os.kill(stopped, signal.SIGSTOP)
    assert any("has done nothing for 24 s (scale.hang_minutes)" in line for line in said)
    assert any(line.startswith("resumed after step") for line in said)
    folder = log_of(options, "hangs").parent
    stacks = next(folder.glob("hang_rank_*.txt")).read_text()
    assert "raydet/training/step.py" in stacks, "where it hung"
    assert_equal_to(straight, folder)
    with contextlib.suppress(ProcessLookupError):
        os.kill(stopped, signal.SIGKILL)


def test_ctrl_c_and_the_same_command_again(options, straight):
    """As in a terminal, where all processes of the command get the signal. Lost: nothing."""
    with command(options, "ctrl-c") as driver:
        wait_for(log_of(options, "ctrl-c"), FIRST_CHECKPOINT, lambda: driver.poll() is None)
        os.killpg(driver.pid, signal.SIGINT)
        printed, _ = driver.communicate(timeout=60)
    assert driver.returncode == 130, printed
    assert "stopping after this step, with a checkpoint" in printed
    assert "goes on when the same command is run again" in printed
    folder = log_of(options, "ctrl-c").parent
    done = [line["step"] for line in metrics_of(folder)][-1]
    assert 3 <= done < STEPS
    assert checkpoint.position(checkpoint.latest(folder)[0]) == 8 * done
    with running(options, "ctrl-c") as (_, said):
        pass
    assert f"resumed after step {done}" in said
    assert_equal_to(straight, folder)


def test_node_killed(options, tmp_path):
    """Of two that train, with elastic workers: it goes on with one, and with two when there is another. Lost: the steps
    since the last checkpoint; no sample is left out or taken twice after it. A third node makes the samples."""
    overrides = [o for o in options if not o.startswith(("storage=", "scale.", "train."))]
    nodes = ["scale.data_label=raydet=data", "scale.worker_resources={fake_gpu: 1}"]
    long = [
        "train.batch_size=9",
        "train.epochs=1000",
        "eval.every=1000",
        "scale.num_workers=[1, 2]",
        "scale.cpus_per_worker=1",
    ]
    script = Path(__file__).parent / "node_killed.py"
    done = subprocess.run(
        [sys.executable, str(script), "demo", *overrides, *nodes, *long, f"storage={tmp_path}", "name=node"],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert re.findall(r"(\d) worker\(s\) on cpu", result["log"]) == ["2", "1", "2"]
    assert "train.batch_size 9 cannot be shared by 2 workers equally: steps take 8 images" in result["log"]
    positions = [line["position"] for line in metrics_of(tmp_path / "node") if "train/loss" in line]
    steps = np.diff([0, *positions])
    assert set(steps) == {8, 9}, "each step takes the samples after those of the step before"
    assert np.count_nonzero(np.diff(steps)) == 2, "two workers, one, two"
    assert set(result["ran_on"]["workers"]) == {"train"}
    assert len(result["ran_on"]["workers"]) == 5
    assert set(result["ran_on"]["tasks"]) == {"data"}
    assert len(result["ran_on"]["tasks"]) > 5
    lost = result["seen"]["again"] - result["seen"]["killed"]
    print(f"time lost: {lost:.1f} s")
    assert lost < 120


def test_validation_elsewhere_gives_the_same_numbers(options, straight):
    """And the training does not wait for it."""
    with running([*options, "scale.async_validation=true"], "async"):
        pass
    folder = log_of(options, "async").parent
    ours, theirs = (
        {line["epoch"]: line for line in metrics_of(run) if "val/mAP@0.50:0.95" in line} for run in (straight, folder)
    )
    assert ours.keys() == theirs.keys() == {2, 4}
    for epoch, line in ours.items():
        for key, value in line.items():
            if key.startswith("val/"):
                assert theirs[epoch][key] == pytest.approx(value, abs=1e-6), key
    last = f"checkpoint_{EPOCHS:06d}"
    assert same(load_file(straight / last / "model.safetensors"), load_file(folder / last / "model.safetensors"))
    content = json.loads((folder / last / "config.json").read_text())
    assert content["metrics"]["val/mAP@0.50:0.95"] == theirs[4]["val/mAP@0.50:0.95"]
    assert not content["awaited"]
