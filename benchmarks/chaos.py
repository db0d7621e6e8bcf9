"""A training on three nodes that share no files, with its run in a bucket, and faults drawn at random.

The nodes are processes of this machine with file systems of their own, the bucket is a local S3 server: see
benchmarks/private_nodes.py for what that takes. First the training runs undisturbed. Then it runs again with faults.
After each fault the training must make some steps before the next fault happens:

    worker killed        a process that trains is killed
    data task killed     a process that makes samples is killed, or the one that deals them where all are made
    node killed          all processes of a node are killed, and a node with an empty disk takes its place
    driver killed        the command is killed, and given again
    bucket away          the bucket answers nobody for ten seconds
    checkpoint damaged   a file of the newest checkpoint in the bucket loses its second half, and the driver is killed

With two workers the weights at the end must be those of the undisturbed run to the bit. With `--elastic`, one or two,
each step must train on the samples that follow those of the step before.

    python -m benchmarks.chaos                 # 10 minutes, seed 0
    python -m benchmarks.chaos 15 3 --elastic
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
from safetensors.torch import load_file

from benchmarks.private_nodes import PRIVATE, PrivateNodes, children, why_not
from raydet.data.synthetic import make_dataset

STEPS_A_MINUTE = 18  # of the training that is disturbed: the next fault comes 2 to 6 steps after the last
BATCH, IMAGES = 8, 40
AWAY_S = 10.0
PATIENCE_S = 300.0
FIND_S = 5.0  # to find a process that can be killed
ENDING_S = 30.0  # for the processes of a training to end after its command
LATE_S = 1.0  # what a process that is killed has just done is logged by then
LEFT = """
import json, ray
from ray.util import placement_group_table
ray.init(logging_level="ERROR")
groups = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
print(json.dumps(len(groups)))
"""


class Training:
    """A command that trains in the bucket, given again whenever it is killed.

    Args:
        nodes: the cluster.
        name: name of the run.
        overrides: settings of the recipe.
    """

    def __init__(self, nodes: PrivateNodes, name: str, overrides: list[str]):
        self.folder = nodes.bucket / "runs" / name
        self._nodes, self._said = nodes, nodes.folder / f"{name}.txt"
        self._arguments = ["train", "demo", f"storage={nodes.uri('runs')}", f"name={name}", *overrides]
        self.start()

    def start(self) -> None:
        """Give the command."""
        with self._said.open("w") as file:
            self.process = self._nodes.raydet(*self._arguments, out=file)

    def kill(self) -> None:
        """Kill the command."""
        with suppress(OSError):  # it has just ended
            self._nodes.kill_driver(self.process)

    def running(self) -> bool:
        """Is the command still there? SystemExit: it has failed."""
        if self.process.poll():
            said = self._said.read_text()[-5000:]
            raise SystemExit(f"the training ended with exit code {self.process.returncode}:\n{said}")
        return self.process.poll() is None

    def wait(self) -> None:
        """Wait for the end of the training. SystemExit: it has failed."""
        while self.running():
            time.sleep(0.2)

    def lines(self) -> list[dict[str, float]]:
        """Return what the run has logged of its steps, as far as that is in the bucket."""
        path = self.folder / "metrics.jsonl"
        found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in found if "train/loss" in line]

    def log(self) -> str:
        """Return log.txt: of the worker that writes it, from its node's disk, or else the bucket's, seconds later."""
        for path in sorted((self.folder / "log.txt", *self._copies()), key=_changed, reverse=True):
            with suppress(OSError):  # a copy has just been removed, or the node is gone
                return path.read_text()
        return ""

    def _copies(self) -> Iterator[Path]:
        for node in self._nodes.nodes.values():
            with suppress(OSError):
                for first in children(node.pid):
                    yield from Path(f"/proc/{first}/root{PRIVATE}/tmp").glob("raydet-run-*/log.txt")

    def step(self) -> int:
        """Return the number of steps that are done: a restart lowers it."""
        return int((re.findall(r"step (\d+)/", self.log()) or [0])[-1])

    def wait_for(self, step: int) -> bool:
        """Wait until a step is done; False: the training has ended. SystemExit: neither comes."""
        deadline = time.monotonic() + PATIENCE_S
        while self.running():
            if self.step() >= step:
                return True
            if time.monotonic() > deadline:
                raise SystemExit(f"no step {step} in {PATIENCE_S:.0f} s: {self.log()[-3000:]}")
            time.sleep(0.2)
        return False


def _changed(path: Path) -> float:
    with suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def worker_killed(nodes: PrivateNodes, training: Training, draw: random.Random) -> None:
    """A process that trains is killed."""
    kill_one(processes(nodes, "ray::RayTrainWorker", FIND_S), draw)


def data_task_killed(nodes: PrivateNodes, training: Training, draw: random.Random) -> None:
    """A process that makes samples is killed, or, where all are made, the one that deals them."""
    kill_one(processes(nodes, "ray::MapBatches", FIND_S) or processes(nodes, "ray::_TrainDealer", FIND_S), draw)


def node_killed(nodes: PrivateNodes, training: Training, draw: random.Random) -> None:
    """A node is killed, and another one takes its place."""
    name = draw.choice("BC")
    nodes.kill(name)
    nodes.start(name)


def driver_killed(nodes: PrivateNodes, training: Training, draw: random.Random) -> None:
    """The command is killed, and given again."""
    training.kill()
    training.start()


def bucket_away(nodes: PrivateNodes, training: Training, draw: random.Random) -> None:
    """The bucket answers nobody for a while."""
    nodes.server.send_signal(signal.SIGSTOP)
    time.sleep(AWAY_S)
    nodes.server.send_signal(signal.SIGCONT)


def checkpoint_damaged(nodes: PrivateNodes, training: Training, draw: random.Random) -> None:
    """A file of the newest checkpoint loses its second half, and the driver is killed."""
    training.kill()
    for config in sorted(training.folder.glob("checkpoint_*/config.json"))[-1:]:
        file = draw.choice(sorted(path for path in config.parent.iterdir() if path != config))
        os.truncate(file, file.stat().st_size // 2)
    training.start()


FaultFunction: TypeAlias = Callable[[PrivateNodes, Training, random.Random], None]
FAULTS: tuple[FaultFunction, ...] = (
    worker_killed,
    data_task_killed,
    node_killed,
    driver_killed,
    bucket_away,
    checkpoint_damaged,
)


def kill_one(found: list[int], draw: random.Random) -> None:
    """Kill one of some processes; at the end of a training there may be none."""
    if found:
        with suppress(ProcessLookupError):
            os.kill(draw.choice(found), signal.SIGKILL)


def processes(nodes: PrivateNodes, title: str, patience_s: float) -> list[int]:
    """Return the processes of the nodes whose title begins so, as soon as there are any, or in vain."""
    deadline = time.monotonic() + patience_s
    while True:
        found = []
        for pid in [pid for node in nodes.nodes.values() for pid in descendants(node.pid)]:
            try:
                command = Path(f"/proc/{pid}/cmdline").read_text()
            except OSError:  # it has just ended
                continue
            if command.startswith(title):
                found.append(pid)
        if found or time.monotonic() > deadline:
            return found
        time.sleep(0.01)


def descendants(pid: int) -> Iterator[int]:
    """Yield the processes that a process has started, and those that they have."""
    try:
        mine = children(pid)
    except OSError:
        return
    for child in mine:
        yield child
        yield from descendants(child)


class Fault(NamedTuple):
    """What a fault was, the seconds it has cost, and the number of steps that were made again."""

    name: str
    lost_s: float
    repeated: int


def disturb(nodes: PrivateNodes, training: Training, draw: random.Random, step_s: float) -> list[Fault]:
    """Let faults happen until the training has ended; undisturbed, a step takes it `step_s` seconds."""
    found: list[Fault] = []
    waiting: list[FaultFunction] = []
    step = 0
    while training.wait_for(step + draw.randint(2, 6)):
        if not waiting:  # each as often as any other, in an order that is drawn
            waiting = draw.sample(FAULTS, len(FAULTS))
        fault = waiting.pop()
        before, resumed, began = training.step(), len(resumes(training)), time.monotonic()
        fault(nodes, training, draw)
        time.sleep(LATE_S)
        going_on = training.wait_for(training.step() + 1)
        step = training.step()
        lost = max(0.0, time.monotonic() - began - max(0, step - before) * step_s)
        repeated = sum(max(0, before - start) for start in resumes(training)[resumed:])
        found.append(Fault(fault.__name__.replace("_", " "), lost, repeated))
        print(f"{found[-1].name} after step {before}: {lost:.0f} s lost, {repeated} steps repeated", flush=True)
        if not going_on:
            break
    return found


def resumes(training: Training) -> list[int]:
    """Return the steps after which the training went on."""
    return [int(step) for step in re.findall(r"resumed after step (\d+)", training.log())]


def same(ours: object, theirs: object) -> bool:
    """Are two values of a training's state equal to the bit?"""
    if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list | tuple) and isinstance(theirs, list | tuple):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return bool(ours == theirs)


def left_over(nodes: PrivateNodes) -> str:
    """Say what the runs have left on the nodes."""
    titles = ("ray::RayTrainWorker", "ray::TrainController", "ray::_TrainDealer", "ray::_EvalDealer")
    deadline = time.monotonic() + ENDING_S
    while alive := [pid for title in titles for pid in processes(nodes, title, 0)]:
        if time.monotonic() > deadline:
            break
        time.sleep(1)
    groups = nodes.done(nodes.popen(sys.executable, "-c", LEFT), PATIENCE_S).splitlines()[-1]
    files = [
        name
        for node in nodes.nodes
        for name in nodes.done(nodes.popen("ls", f"{PRIVATE}/tmp", node=node), PATIENCE_S).split()
        if name.startswith("raydet")
    ]
    return f"{len(alive)} processes, {groups} placement groups, {len(files)} files in the nodes' /tmp {files or ''}"


def main() -> None:
    """Print each fault, what the faults of each kind cost, whether the run is the undisturbed one, and what is left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("minutes", nargs="?", type=float, default=10)
    parser.add_argument("seed", nargs="?", type=int, default=0)
    parser.add_argument("--elastic", action="store_true", help="one or two workers in place of two")
    options = parser.parse_args()
    if reason := why_not():
        raise SystemExit(reason)
    epochs = max(4, round(options.minutes * STEPS_A_MINUTE * BATCH / IMAGES))
    shared_memory = set(os.listdir("/dev/shm"))
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        data = make_dataset(Path(folder, "data"), train=IMAGES, val=8, seed=7)
        settings = [
            f"data.root={data}",
            "data.image_size=192",
            "data.chunk_size=16",
            f"train.batch_size={BATCH}",
            f"train.epochs={epochs}",
            "eval.every=1000",
            "track.log_every=1",
            "track.checkpoint_steps=5",
            "track.average_best=false",
            f"scale.num_workers={'[1, 2]' if options.elastic else '2'}",
            "scale.cpus_per_worker=1",
            "scale.max_failures=1000",
        ]
        Path(folder, "cluster").mkdir()
        with PrivateNodes(Path(folder, "cluster")) as nodes:
            nodes.start("A", "B", "C")
            straight = Training(nodes, "straight", settings)
            straight.wait_for(1)
            began, first = time.monotonic(), straight.step()
            straight.wait()
            step_s = (time.monotonic() - began) / (len(straight.lines()) - first)
            print(f"undisturbed: {len(straight.lines())} steps, {step_s:.2f} s each", flush=True)
            began = time.monotonic()
            training = Training(nodes, "chaos", settings)
            faults = disturb(nodes, training, random.Random(options.seed), step_s)
            training.wait()
            minutes = (time.monotonic() - began) / 60
            print(f"\n{len(faults)} faults and {len(resumes(training))} restarts in {minutes:.1f} minutes")
            for name in sorted({fault.name for fault in faults}):
                mine = [fault for fault in faults if fault.name == name]
                lost, repeated = (statistics.median(values) for values in list(zip(*mine, strict=True))[1:])
                print(f"{len(mine):4d} x {name:<20} median: {lost:4.0f} s lost, {repeated:g} steps repeated")
            steps = [int(line["position"]) // BATCH for line in training.lines()]
            in_order = steps == list(range(1, epochs * IMAGES // BATCH + 1))
            print(f"each step has the samples that follow those of the step before: {'yes' if in_order else 'NO'}")
            if not in_order:
                print(f"steps: {steps}")
            equal = True
            if not options.elastic:
                runs = [run.folder / f"checkpoint_{epochs:06d}" for run in (straight, training)]
                equal = same(*(load_file(run / "model.safetensors") for run in runs))
                equal &= same(*(torch.load(run / "training.pt", weights_only=True) for run in runs))
                print(f"weights and state of the training as undisturbed, to the bit: {'yes' if equal else 'NO'}")
            print(f"left over: {left_over(nodes)}")
    print(f"left in /dev/shm after the cluster: {sorted(set(os.listdir('/dev/shm')) - shared_memory) or 'nothing'}")
    raise SystemExit(0 if in_order and equal else 1)


if __name__ == "__main__":
    main()
