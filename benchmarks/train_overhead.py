"""What Ray, the stream, EMA and logging cost: raydet's training against a bare loop of the same model.

Both train the same recipe with the same number of processes on the same pictures. The bare loop is PyTorch's DDP with
forward, loss, backward and step on batches that are in memory. It runs before and after raydet's, as machines drift.

    python benchmarks/train_overhead.py                       # YOLOX-n, 416 px, two CPU workers, some minutes
    python benchmarks/train_overhead.py --recipe demo train.epochs=4
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
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
from raydet.data.synthetic import make_dataset
from raydet.recipe import Recipe, load
from raydet.training.optimization import make_optimizer
from raydet.training.prepare import make_job, train_samples

BATCHES_IN_MEMORY = 4


def bare_loop(rank: int, recipe: Recipe, steps: int, port: int, results: Any) -> None:
    """Train on batches in memory; report the images/s of this process."""
    _, workers = recipe.scale.workers
    torch.set_num_threads(recipe.scale.cpus_per_worker or 1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=workers)
    index = load_index(recipe.data, "train")
    job = make_job(recipe, index, load_index(recipe.data, "val"))
    size = recipe.train.batch_size // workers
    stop = BATCHES_IN_MEMORY * size
    batches = list(local_train_batches(train_samples(recipe, index, job.config.preprocessing.resize), 0, stop, size))
    assert job.criterion is not None
    model: nn.Module = job.model.to(memory_format=torch.channels_last)
    network = DistributedDataParallel(model.train())
    optimizer = make_optimizer(model, recipe.train)
    began = 0.0
    for step in range(steps + 3):
        if step == 3:
            dist.barrier()
            began = time.perf_counter()
        batch = batches[step % len(batches)]
        loss, _ = job.criterion(network(job.config.preprocessing(batch.images)), batch.targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    dist.barrier()
    results[rank] = steps * size / (time.perf_counter() - began)
    dist.destroy_process_group()


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


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--recipe", default="coco2017_yolox_n")
    parser.add_argument("--steps", type=int, default=30, help="of each bare run (default: %(default)s)")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = make_dataset(Path(folder) / "shapes", train=320, val=32)
        recipe = load(
            arguments.recipe,
            [
                "name=overhead",
                f"storage={folder}",
                f"data.root={data}",
                "augment.multiscale=null",
                "train.batch_size=16",
                "train.epochs=3",
                "scale.num_workers=2",
                "scale.cpus_per_worker=1",
                "track.log_every=10",
                *arguments.overrides,
            ],
        )
        before = bare(recipe, arguments.steps)
        speed, waiting, validation = trained(recipe)
        after = bare(recipe, arguments.steps)
    print(f"bare loop: {before:.1f} and {after:.1f} images/s, before and after")
    print(f"raydet:    {speed:.1f} images/s, {waiting:.1%} of the time waiting for data")
    print(f"ratio:     {2 * speed / (before + after):.3f}")
    print(f"validation took {validation:.1%} of the time, apart from that")


if __name__ == "__main__":
    main()
