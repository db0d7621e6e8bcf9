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
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from ray.util.state import list_actors
from safetensors.torch import load_file

import raydet
from benchmarks.chaos import same
from raydet.runs import checkpoint

pytestmark = pytest.mark.timeout(500)  # the unlucky run starts five groups of workers

EPOCHS, STEPS = 8, 40
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
        "eval.every=4",
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


def wait_for(log, text, alive, seconds=240, after=0):
    deadline = time.monotonic() + seconds
    while not (log.exists() and text in log.read_text()[after:]):
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
    return {actor.pid for actor in found}


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_equal_to(straight, folder):
    last = f"checkpoint_{EPOCHS:06d}"
    assert same(load_file(straight / last / "model.safetensors"), load_file(folder / last / "model.safetensors"))
    ours, theirs = (torch.load(run / last / "training.pt", weights_only=True) for run in (straight, folder))
    assert same(ours, theirs)
    for key in ("step", "epoch", "position", "train/loss", "train/lr", "val/mAP@0.50:0.95"):
        ours, theirs = ([line.get(key) for line in metrics_of(run)] for run in (straight, folder))
        assert ours == theirs, key


@pytest.fixture(scope="module")
def unlucky(options):
    """A run to which one fault after the other happens: its folder, what was said from each fault to the next, the
    checkpoint that was damaged, and the position of the one that Ctrl-C left."""
    name, said = "unlucky", {}
    log = log_of(options, name)

    with command(options, name) as driver:
        wait_for(log, FIRST_CHECKPOINT, lambda: driver.poll() is None)
        os.killpg(driver.pid, signal.SIGINT)  # as in a terminal, where all processes of the command get it
        said["ctrl-c"], _ = driver.communicate(timeout=60)
    assert driver.returncode == 130, said["ctrl-c"]
    stopped_at = checkpoint.position(checkpoint.latest(log.parent)[0])

    with command(options, name) as driver:
        wait_for(log, f"step 8/{STEPS}", lambda: driver.poll() is None)
        os.killpg(driver.pid, signal.SIGKILL)  # as by the kernel: no clean-up of its own
    size = 0
    while size != (size := log.stat().st_size):  # the workers live some seconds longer, and make some steps more
        time.sleep(4)
    last = sorted(log.parent.glob("checkpoint_0*"))[-1]
    content = (last / "training.pt").read_bytes()
    (last / "training.pt").write_bytes(content[: len(content) // 2])

    with running([*options, "scale.hang_minutes=0.4"], name) as (thread, lines):
        seen: set[int] = set()
        for fault, number in (("worker killed", signal.SIGKILL), ("worker hangs", signal.SIGSTOP)):
            before = len(log.read_text())
            wait_for(log, "2 worker(s)", thread.is_alive, after=before)
            while len(alive := workers() - seen) < 2:  # Ray takes a moment to see that those before are gone
                time.sleep(0.1)
            seen, victim = alive, max(alive)
            wait_for(log, "checkpoint: ", thread.is_alive, after=before)
            os.kill(victim, number)
            said[fault] = len(lines)
    edges = [0, *(said.pop(fault) for fault in ("worker killed", "worker hangs")), len(lines)]
    for fault, (start, stop) in zip(("driver killed", "worker killed", "worker hangs"), pairwise(edges), strict=True):
        said[fault] = lines[start:stop]
    with contextlib.suppress(ProcessLookupError):
        os.kill(victim, signal.SIGKILL)
    return log.parent, said, last.name, stopped_at


def resumed(lines):
    return [int(line.split()[-1]) for line in lines if line.startswith("resumed after step")]


def test_ctrl_c(unlucky):
    """Lost: nothing."""
    folder, said, _, stopped_at = unlucky
    assert "stopping after this step, with a checkpoint" in said["ctrl-c"]
    assert "goes on when the same command is run again" in said["ctrl-c"]
    done = int(re.findall(rf"step (\d+)/{STEPS}", said["ctrl-c"])[-1])
    assert 3 <= done < STEPS
    assert stopped_at == 8 * done
    assert resumed((folder / "log.txt").read_text().splitlines())[0] == done


def test_driver_killed_in_mid_epoch_and_the_last_checkpoint_damaged(unlucky):
    """It is named, and the same command goes on from the one before. Lost: the steps since then."""
    _, said, damaged, _ = unlucky
    assert any(line.startswith(f"warning: {damaged} is damaged: training.pt has") for line in said["driver killed"])
    assert len(resumed(said["driver killed"])) == 1


def test_worker_killed(unlucky):
    """The others are replaced with it, by themselves. Lost: the steps since the last checkpoint."""
    _, said, *_ = unlucky
    assert len(resumed(said["worker killed"])) == 1


def test_worker_hangs(unlucky):
    """The others wait for it in vain, until the watchdog ends them all. Lost: as if it was killed, and the wait."""
    folder, said, *_ = unlucky
    assert any("has done nothing for 24 s (scale.hang_minutes)" in line for line in said["worker hangs"])
    assert len(resumed(said["worker hangs"])) == 1
    stacks = next(folder.glob("hang_rank_*.txt")).read_text()
    assert "raydet/training/step.py" in stacks, "where it hung"


def test_all_of_it_leaves_the_run_that_nothing_happens_to(unlucky, straight):
    assert_equal_to(straight, unlucky[0])


def test_node_killed(options, tmp_path):
    """Of two that train, with elastic workers: it goes on with one, and with two when there is another. Lost: the steps
    since the last checkpoint; no sample is left out or taken twice after it. A third node makes the samples.

    When a node is about to be taken away, it goes on without it before that. Lost: no step.
    """
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
    assert re.findall(r"(\d) worker\(s\) on cpu", result["log"]) == ["2", "1", "2", "1"]
    assert "train.batch_size 9 cannot be shared by 2 workers equally: steps take 8 images" in result["log"]
    positions = [line["position"] for line in metrics_of(tmp_path / "node") if "train/loss" in line]
    steps = np.diff([0, *positions])
    assert set(steps) == {8, 9}, "each step takes the samples after those of the step before"
    assert np.count_nonzero(np.diff(steps)) == 3, "two workers, one, two, one"
    assert set(result["ran_on"]["workers"]) == {"train"}
    assert len(result["ran_on"]["workers"]) == 6
    assert set(result["ran_on"]["tasks"]) == {"data"}
    assert len(result["ran_on"]["tasks"]) > 5
    seen = result["seen"]
    print(f"time lost: {seen['again'] - seen['killed']:.1f} s, and {seen['left'] - seen['notice']:.1f} s with a notice")
    assert seen["again"] - seen["killed"] < 120
    assert seen["left"] - seen["notice"] < 60
    before, notice, after = result["log"].partition("a node of this training is about to be taken away")
    until_restart, _, restart = after.partition("resumed after step ")
    assert notice
    assert restart.startswith(re.findall(r"step (\d+)/", before + until_restart)[-1] + "\n"), "no step is lost"


def test_validation_elsewhere_gives_the_same_numbers(options, straight):
    """And the training does not wait for it."""
    with running([*options, "scale.async_validation=true"], "async"):
        pass
    folder = log_of(options, "async").parent
    ours, theirs = (
        {line["epoch"]: line for line in metrics_of(run) if "val/mAP@0.50:0.95" in line} for run in (straight, folder)
    )
    assert ours.keys() == theirs.keys() == {4, 8}
    for epoch, line in ours.items():
        for key, value in line.items():
            if key.startswith("val/"):
                assert theirs[epoch][key] == pytest.approx(value, abs=1e-6), key
    last = f"checkpoint_{EPOCHS:06d}"
    assert same(load_file(straight / last / "model.safetensors"), load_file(folder / last / "model.safetensors"))
    content = json.loads((folder / last / "config.json").read_text())
    assert content["metrics"]["val/mAP@0.50:0.95"] == theirs[8]["val/mAP@0.50:0.95"]
    assert not content["awaited"]
