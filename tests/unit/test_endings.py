"""How the worker loop ends: told to stop, or by a validation beside the training that comes, fails or never answers."""

import json
import shlex
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from raydet.data.formats import load_index
from raydet.data.pipeline import train_samples, val_samples
from raydet.recipe import load
from raydet.runs import checkpoint
from raydet.runs.folder import STOP
from raydet.runs.log import RunLog
from raydet.training import keeper
from raydet.training.job import Run, Validated
from raydet.training.loop import train_loop
from raydet.training.prepare import make_job
from raydet.training.worlds import LocalWorld

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS_AN_EPOCH = 5  # of 40 images, 8 a step
WATCH = "val/mAP@0.50:0.95"


class Scripted:
    """A validation beside the training that answers as it is told: each poll gives the next of its answers."""

    def __init__(self, *answers):
        self.answers, self.cancelled = list(answers), False

    def poll(self):
        answer = self.answers.pop(0) if self.answers else []
        if isinstance(answer, Exception):
            raise answer
        return answer

    def cancel(self):
        self.cancelled = True


class World(LocalWorld):
    """This process; it counts what is asked of it, and may be told to stop at a step."""

    def __init__(self, job, streams, validations=(), stop_at=None):
        super().__init__(job, *streams, device=torch.device("cpu"))
        self.folder, self.stop_at = job.folder, stop_at
        self.validations, self.started, self.happened = list(validations), [], []
        if self.validations:
            self.validate = self.start

    def start(self, weights, epoch, step):
        self.started.append((epoch, step))
        return self.validations[len(self.started) - 1]

    def train_batches(self, start, stop):
        try:
            for number, batch in enumerate(super().train_batches(start, stop), start=start // 8 + 1):
                if number == self.stop_at:
                    (self.folder / STOP).touch()
                yield batch
        finally:
            self.happened.append("stream closed")

    def val_batches(self):
        whole = super().val_batches()

        def batches():
            self.happened.append("validation")
            return whole()

        return batches


@pytest.fixture
def train(demo, monkeypatch):
    monkeypatch.setattr(keeper, "_LOOK_EVERY_S", -1.0)  # at each step

    def run(*overrides, **world):
        recipe = load("demo", [*demo, "eval.every=1", "track.visualize=[]", "track.extreme_batches=[]", *overrides])
        indices = [load_index(recipe.data, split) for split in ("train", "val")]
        job = make_job(recipe, *indices)
        resize = job.config.preprocessing.resize
        streams = train_samples(recipe, indices[0], resize), val_samples(recipe, indices[1], resize)
        world, log = World(job, streams, **world), RunLog(job.folder)
        (job.folder / STOP).unlink(missing_ok=True)
        ended = train_loop(Run(job, world, log))
        return ended, world, (job.folder / "log.txt").read_text().splitlines(), job.folder

    return run


def found(value):
    return [Validated({WATCH: value, "val/mAP@0.50": value}, [], 1.0)]


@pytest.mark.parametrize("step", [STEPS_AN_EPOCH - 1, STEPS_AN_EPOCH, STEPS_AN_EPOCH + 2])
def test_a_training_that_is_told_to_stop_keeps_a_checkpoint_and_says_which(train, step):
    ended, _, said, folder = train("train.epochs=3", stop_at=step)
    assert ended.interrupted
    epoch = step // STEPS_AN_EPOCH
    name = f"checkpoint_{epoch:06d}" + ("" if step == epoch * STEPS_AN_EPOCH else f"_{step:08d}")
    assert said[-1] == f"stopped after step {step}; the same command goes on from {name}"
    last, damaged = checkpoint.latest(folder)
    assert (last.name, checkpoint.position(last), damaged) == (name, 8 * step, [])
    _, _, again, _ = train("train.epochs=3")
    assert f"resumed after step {step}" in again


def test_dfine_goes_on_to_the_bit_as_its_noise_follows_seed_and_position(train):
    options = ["model.name=dfine_n", "loss={name: DFineLoss}", "train.optimizer=adamw", "train.lr=0.001"]
    options += ["train.epochs=2", "eval.every=2"]
    _, _, _, whole = train(*options, "name=whole")
    ended, _, _, folder = train(*options, "name=stopped", stop_at=7)
    assert ended.interrupted
    train(*options, "name=stopped")
    (first, _), (second, _) = checkpoint.latest(whole), checkpoint.latest(folder)
    assert first.name == second.name == "checkpoint_000002"
    weights, again = (load_file(last / checkpoint.WEIGHTS) for last in (first, second))
    assert all(torch.equal(tensor, again[name]) for name, tensor in weights.items())


def test_a_verdict_that_comes_in_mid_epoch_ends_the_training_in_order(train):
    """With a checkpoint, averaged weights and a last line, and so that the same command does not train on."""
    options = ["train.epochs=6", "scale.async_validation=true", "eval.patience=1", "track.average_best=true"]
    answers = [Scripted(found(0.5)), Scripted([], found(0.4))]
    ended, world, said, folder = train(*options, validations=answers)
    assert not ended.interrupted
    assert world.started == [(1, 5), (2, 10)]
    assert "mAP@0.50:0.95 has not been better than 0.5000 in 1 validations: the end" in said
    last, _ = checkpoint.latest(folder)
    assert last.name == "checkpoint_000002_00000012", "two polls after the second epoch"
    assert (folder / checkpoint.AVERAGE).is_dir()
    _, world, _, _ = train(*options, validations=[Scripted()])
    assert world.happened == ["stream closed", "validation"], "no step, only the average is measured again"


def test_the_stream_is_let_go_before_the_last_validation(train):
    options = ["train.epochs=6", "scale.async_validation=true", "eval.patience=1", "track.average_best=true"]
    _, world, _, _ = train(*options, validations=[Scripted(found(0.5)), Scripted(found(0.4))])
    assert world.happened == ["stream closed", "validation"]


@pytest.mark.parametrize(
    ("answer", "said_of_it"),
    [
        (OSError("disk full\nand more"), "warning: the validation of checkpoint_000001 failed: OSError: disk full"),
        ([], "warning: the validation of checkpoint_000001 failed: no sign of life for"),
    ],
)
def test_a_validation_that_fails_or_never_answers_is_said_and_costs_its_metrics_only(train, answer, said_of_it):
    options = ["train.epochs=2", "scale.async_validation=true", "scale.hang_minutes=0.01"]
    first, second = Scripted(["validated 8 of 24 images"], *([answer] if answer else [])), Scripted(found(0.25))
    ended, world, said, folder = train(*options, validations=[first, second])
    assert world.started == [(1, 5), (2, 10)]
    assert any(line.startswith(said_of_it) for line in said)
    assert first.cancelled is (answer == [])
    assert ended.metrics[WATCH] == 0.25
    contents = [json.loads((folder / f"checkpoint_00000{n}" / "config.json").read_text()) for n in (1, 2)]
    assert [content["metrics"].get(WATCH) for content in contents] == [None, 0.25]
    assert not any(content["awaited"] for content in contents)


def test_validations_that_were_awaited_are_taken_up_by_the_next_start(train):
    options = ["train.epochs=2", "scale.async_validation=true"]
    ended, _, _, _ = train(*options, validations=[Scripted()], stop_at=7)
    assert ended.interrupted
    ended, world, _, folder = train(*options, validations=[Scripted(found(0.125)), Scripted(found(0.25))])
    assert world.started == [(1, 5), (2, 10)]
    assert json.loads((folder / "checkpoint_000001" / "config.json").read_text())["metrics"][WATCH] == 0.125


def test_a_full_disk_leaves_the_checkpoints_before_it(demo, tmp_path):
    """A real disk, of 40 MB, which is full from the third checkpoint on. The run says so and ends with an error."""
    if subprocess.run(["unshare", "-rm", "true"], check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount: unshare -rm")
    disk, saved = tmp_path / "disk", tmp_path / "saved"
    disk.mkdir()
    settings = [*demo, f"storage={disk}", "name=full", "train.epochs=4", "track.checkpoint_steps=3"]
    train = shlex.join([sys.executable, "-m", "raydet.cli", "train", "demo", "--debug", *settings])
    fill = f"mount -t tmpfs -o size=40m none {disk} && head -c 10M /dev/zero > {disk}/other"
    script = f"{fill}; {train}; echo code $?; cp -r {disk}/full-debug {saved}"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, check=False)
    assert "cannot be kept: No space left on device. The checkpoints before it stay" in done.stdout, done.stdout
    assert "the last checkpoint could not be kept; free the disk" in done.stderr
    assert "code 2" in done.stdout
    assert checkpoint.latest(saved)[0] is not None
