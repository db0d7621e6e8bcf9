"""What Ray, the stream, EMA and logging cost: raydet's training against a bare loop of the same model.

Both train the same recipe with the same number of processes on the same pictures. The bare loop is PyTorch's DDP with
forward, loss, backward and step on batches that are in memory. It runs before and after raydet's, as machines drift.

    python benchmarks/train_overhead.py            # YOLOX-n, 416 px, two CPU workers, some minutes
    python benchmarks/train_overhead.py --gpu      # YOLOX-s, 640 px, batch 64, bf16, with and without compile
    python benchmarks/train_overhead.py --recipe demo train.epochs=4
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

import raydet
from raydet.data.batch import local_train_batches
from raydet.data.formats import load_index
from raydet.data.pipeline import train_samples
from raydet.data.synthetic import make_dataset
from raydet.recipe import Recipe, load
from raydet.training.optimization import make_optimizer
from raydet.training.prepare import make_job

BATCHES_IN_MEMORY = 4
WARM_UP = 3  # steps


def bare_loop(rank: int, recipe: Recipe, steps: int, port: int, results: Any) -> None:
    """Train on batches in memory; report the images/s of this process."""
    _, workers = recipe.scale.workers
    torch.set_num_threads(recipe.scale.cpus_per_worker or 1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    gpu = bool(recipe.scale.gpu)
    device = torch.device("cuda", rank) if gpu else torch.device("cpu")
    dist.init_process_group("nccl" if gpu else "gloo", rank=rank, world_size=workers)
    torch.backends.cudnn.benchmark = True
    index = load_index(recipe.data, "train")
    job = make_job(recipe, index, load_index(recipe.data, "val"))
    size = recipe.train.batch_size // workers
    stop = BATCHES_IN_MEMORY * size
    batches = list(local_train_batches(train_samples(recipe, index, job.config.preprocessing.resize), 0, stop, size))
    if gpu:
        batches = [replace(b, images=b.images.pin_memory(), targets=b.targets.pin_memory()) for b in batches]
    assert job.criterion is not None
    criterion = job.criterion.to(device)
    model: nn.Module = job.model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    network: Any = DistributedDataParallel(model.train()) if workers > 1 else model.train()
    if recipe.train.compile:
        network = torch.compile(network)
    optimizer = make_optimizer(model, recipe.train)
    began = 0.0
    for step in range(steps + WARM_UP):
        if step == WARM_UP:
            _wait(gpu)
            began = time.perf_counter()
        batch = batches[step % len(batches)]
        images = job.config.preprocessing(batch.images.to(device, non_blocking=True))
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.train.precision == "bf16"):
            outputs = network(images)
        loss, _ = criterion(outputs, batch.targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    _wait(gpu)
    results[rank] = steps * size / (time.perf_counter() - began)
    dist.destroy_process_group()


def _wait(gpu: bool) -> None:
    if gpu:
        torch.cuda.synchronize()
    dist.barrier()


def bare(recipe: Recipe, steps: int) -> float:
    """Return the bare loop's images/s over all processes."""
    with multiprocessing.Manager() as manager:
        results = manager.dict()
        port = 20000 + os.getpid() % 10000
        arguments = (recipe, steps, port, results)
        spawn(bare_loop, arguments, nprocs=recipe.scale.workers[1])  # type: ignore[no-untyped-call]
        return float(sum(results.values()))


def trained(recipe: Recipe) -> tuple[float, float, float]:
    """Train; return the images/s of the steps, the share of time waiting for data, and validation's share."""
    result = raydet.train(recipe, say=lambda text: None)
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    progress = [line for line in lines if "perf/images_per_s" in line][1:]  # the first has the start in it
    validation = sum(line.get("perf/val_s", 0.0) for line in lines)
    speed = statistics.median(line["perf/images_per_s"] for line in progress)
    images = lines[-1]["step"] * recipe.train.batch_size
    waiting = statistics.mean(line["perf/data_wait"] for line in progress)
    return speed, waiting, validation / (validation + images / speed)


@contextmanager
def utilisation(gpu: bool) -> Iterator[list[float]]:
    """Give a list that has the GPU's utilisation in percent, second by second, when the context is left."""
    values: list[float] = []
    if not gpu:
        yield values
        return
    query = ["nvidia-smi", "--id=0", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--loop=1"]
    with subprocess.Popen(query, stdout=subprocess.PIPE, text=True) as process:
        yield values
        process.terminate()
        assert process.stdout is not None
        values += [float(line) for line in process.stdout if line.strip().isdigit()]


def compare(recipe: Recipe, steps: int) -> None:
    """Run both and print."""
    gpu = bool(recipe.scale.gpu)
    with utilisation(gpu) as bare_use:
        before = bare(recipe, steps)
    with utilisation(gpu) as use:
        speed, waiting, validation = trained(recipe)
    after = bare(recipe, steps)
    if gpu:
        print(f"compile:   {recipe.train.compile}")
        # Of the busier half of the seconds: the start and the validation are not training.
        for what, values in (("bare loop", bare_use), ("raydet", use)):
            busy = sorted(values)[len(values) // 2 :]
            print(f"{what}: GPU utilisation {statistics.mean(busy):.0f} %")
    print(f"bare loop: {before:.1f} and {after:.1f} images/s, before and after")
    print(f"raydet:    {speed:.1f} images/s, {waiting:.1%} of the time waiting for data")
    print(f"ratio:     {2 * speed / (before + after):.3f}")
    print(f"validation took {validation:.1%} of the time, apart from that")


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--recipe", help="(default: coco2017_yolox_n, with --gpu coco2017_yolox_s)")
    parser.add_argument("--gpu", action="store_true", help="on a GPU")
    parser.add_argument("--steps", type=int, default=30, help="of each bare run (default: %(default)s)")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = make_dataset(Path(folder) / "shapes", train=640 if arguments.gpu else 320, val=32)
        common = [f"storage={folder}", f"data.root={data}", "augment.multiscale=null", "track.log_every=10"]
        cpu = ["train.batch_size=16", "train.epochs=3", "scale.num_workers=2", "scale.cpus_per_worker=1"]
        gpu = ["train.batch_size=64", "train.epochs=20", "train.precision=bf16", "scale.gpu=true", "eval.every=20"]
        for compiled in (False, True) if arguments.gpu else (False,):
            own = [f"name=overhead-{compiled}", f"train.compile={compiled}", *(gpu if arguments.gpu else cpu)]
            name = arguments.recipe or ("coco2017_yolox_s" if arguments.gpu else "coco2017_yolox_n")
            compare(load(name, [*common, *own, *arguments.overrides]), arguments.steps)


if __name__ == "__main__":
    main()
