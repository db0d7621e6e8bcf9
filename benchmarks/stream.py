"""How fast the data engine is: images/s a core, beside the textbook's way and beside the JPEG decoder alone.

The textbook's way is what YOLOX's and SuperGradients' loaders do: each mosaic reads and decodes four images, pastes
them on a canvas of twice the size, and warps that.

    python benchmarks/stream.py data/coco             # in this process, and through Ray Data on one and two cores
    python benchmarks/stream.py data/coco --start     # first batch and stalls of a run as long as COCO x 300 epochs
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from raydet.data.formats import load_index
from raydet.data.index import Index
from raydet.data.render import decode, letterbox
from raydet.data.samples import Samples
from raydet.data.transforms import HSV, HorizontalFlip, Letterbox, Mixup, Mosaic, RandomAffine
from raydet.recipe import Data

Array = npt.NDArray[Any]

COCO_IMAGES, COCO_EPOCHS = 118_287, 300
OPENCV = {
    "imdecode": "decode",
    "warpAffine": "warps",
    "cvtColor": "colour spaces",
    "add": "jitter",
    "addWeighted": "mixup",
    "resize": "resize",
}


def pipelines(index: Index, side: int) -> dict[str, Samples]:
    """Return the three settings that are measured."""
    size = (side, side)
    alone, last = Letterbox(size), (HSV(1.0, 5, 30, 30), HorizontalFlip(0.5))
    mosaic = (Mosaic(1.0, alone), RandomAffine(size, 10.0, 0.1, (0.1, 2.0), 2.0))
    return {
        "letterbox": Samples(index, (alone,), size),
        "mosaic + affine + HSV + flip": Samples(index, (*mosaic, *last), size),
        "the same + mixup": Samples(index, (*mosaic, Mixup(1.0, size), *last), size),
    }


def in_process(samples: Samples, count: int) -> float:
    """Make samples in this thread; return milliseconds of CPU time each."""
    return _cpu_ms(lambda: _drain(samples, count), count)


def decoding(index: Index, count: int) -> float:
    """Read and decode only; return milliseconds of CPU time an image."""

    def run() -> None:
        for row in range(count):
            decode(index.read(row % len(index)), "")

    return _cpu_ms(run, count)


def textbook(index: Index, side: int, count: int, *, mixup: bool) -> float:
    """Make mosaics the peers' way, to NCHW in float32; return milliseconds of CPU time each."""
    rng = np.random.default_rng(0)

    def one() -> Array:
        return decode(index.read(int(rng.integers(len(index)))), "")

    def run() -> None:
        for _ in range(count):
            canvas = np.full((2 * side, 2 * side, 3), 114, np.uint8)
            x, y = (int(value) for value in rng.uniform(0.5, 1.5, 2) * side)
            for right in (0, 1):
                for below in (0, 1):
                    image: Any = one()
                    scale = min(side / image.shape[0], side / image.shape[1])
                    image = cv2.resize(image, (int(image.shape[1] * scale), int(image.shape[0] * scale)))
                    height, width = image.shape[:2]
                    left, top = x if right else x - width, y if below else y - height
                    part = canvas[max(0, top) : top + height, max(0, left) : left + width]
                    part[:] = image[max(0, -top) :, max(0, -left) :][: part.shape[0], : part.shape[1]]
            matrix = cv2.getRotationMatrix2D((side, side), rng.uniform(-10, 10), rng.uniform(0.1, 2))
            picture: Any = cv2.warpAffine(canvas, matrix, (side, side), borderValue=(114, 114, 114))
            if mixup:
                factor = rng.uniform(0.5, 1.5)
                other = cv2.resize(letterbox(one(), (side, side), "pad_bottom_right"), None, fx=factor, fy=factor)
                padded = np.full((max(side, other.shape[0]), max(side, other.shape[1]), 3), 114, np.uint8)
                padded[: other.shape[0], : other.shape[1]] = other
                blended = 0.5 * picture.astype(np.float32) + 0.5 * padded[:side, :side].astype(np.float32)
                picture = blended.astype(np.uint8)
            hue, saturation, value = cv2.split(cv2.cvtColor(picture, cv2.COLOR_BGR2HSV))
            table = np.arange(256, dtype=np.uint8)
            jittered = cv2.merge([cv2.LUT(channel, table) for channel in (hue, saturation, value)])
            picture = cv2.cvtColor(jittered, cv2.COLOR_HSV2BGR)[:, ::-1]
            padded = np.full((side, side, 3), 114, np.uint8)
            padded[:] = cv2.resize(np.ascontiguousarray(picture), (side, side))
            np.ascontiguousarray(padded.transpose(2, 0, 1), np.float32)

    return _cpu_ms(run, count)


def stages(samples: Samples, count: int) -> dict[str, float]:
    """Profile; return milliseconds an image of each stage. The profiler itself adds some to plan and rest."""
    profiler = cProfile.Profile()
    profiler.runcall(_drain, samples, count)
    statistics: Any = pstats.Stats(profiler)
    found = dict.fromkeys([*OPENCV.values(), "read", "plan"], 0.0)
    for (file, _, name), (_, _, own, cumulative, _) in statistics.stats.items():
        if file == "~" and name.strip("<>") in OPENCV:
            found[OPENCV[name.strip("<>")]] += 1e3 * own / count
        elif "raydet/data" in file and name in found:
            found[name] += 1e3 * cumulative / count if "index" in file or name == "plan" else 0.0
    found["rest"] = 1e3 * statistics.total_tt / count - sum(found.values())
    return found


class OneRank:
    """A worker group of this process alone."""

    rank, size = 0, 1

    @property
    def nodes(self) -> list[str]:
        """Return the name of this node."""
        import ray

        return [ray.get_runtime_context().get_node_id()]

    def share(self, value: Any) -> Any:
        """Return the value."""
        return value


def through_ray(samples: Samples, count: int, batch_size: int = 16) -> tuple[float, float, float, float]:
    """Stream through Ray Data, which was started with so many cores.

    Returns:
        images/s, milliseconds of CPU time an image over all processes, peak memory of a task and of this process in MB;
        the first third is not counted.
    """
    import ray

    from raydet.data.stream import train_batches

    source = ray.put(samples)
    warm = count // 3 // batch_size * batch_size
    began = cpu = 0.0
    for number, _ in enumerate(train_batches(source, samples, 0, count, batch_size, OneRank())):
        if (number + 1) * batch_size == warm:
            began, cpu = time.perf_counter(), _cpu_of_all()
    seconds, cpu = time.perf_counter() - began, _cpu_of_all() - cpu
    peak = {pid: _status(pid, "VmHWM") / 1024 for pid in _descendants()}
    tasks = max((memory for pid, memory in peak.items() if "ray::" in _command(pid)), default=0.0)
    return (count - warm) / seconds, 1e3 * cpu / (count - warm), tasks, peak[os.getpid()]


def long_run(index: Index) -> Iterator[str]:
    """Measure the start and the stalls of a run over as many images and epochs as COCO's, of tiny pictures."""
    import ray

    from raydet.data.stream import SEGMENT_CHUNKS, train_batches

    many = index.take(np.arange(COCO_IMAGES) % len(index))
    size = (32, 32)
    samples = Samples(many, (RandomAffine(size, scale=(0.05, 0.05)),), size)
    source = ray.put(samples)
    batch_size = 64
    began = last = time.perf_counter()
    gaps: list[float] = []
    segment = SEGMENT_CHUNKS * samples.chunk_size
    for _ in train_batches(source, samples, 0, COCO_EPOCHS * COCO_IMAGES // 64 * 64, batch_size, OneRank()):
        now = time.perf_counter()
        gaps.append(now - last)
        last = now
        if len(gaps) * batch_size > segment + 4096:
            break
    speed = len(gaps[100:]) * batch_size / sum(gaps[100:])
    yield f"first batch of {COCO_EPOCHS} x {COCO_IMAGES:,} samples after {gaps[0]:.1f} s; then {speed:.0f} images/s"
    for name, position in (("an epoch's", COCO_IMAGES), ("a segment's", segment)):
        step = position // batch_size
        yield f"longest wait near {name} end (position {position:,}): {max(gaps[step - 10 : step + 10]):.2f} s"
    yield f"longest wait of all but the first: {max(gaps[1:]):.2f} s; whole time {last - began:.0f} s"


def _drain(samples: Samples, count: int) -> None:
    for start in range(0, count, samples.chunk_size):
        for _ in samples.blocks(range(start, start + samples.chunk_size), 16):
            pass


def _cpu_ms(run: Callable[[], None], count: int, repeats: int = 3) -> float:
    best = float("inf")
    for _ in range(repeats):
        began = time.process_time()
        run()
        best = min(best, time.process_time() - began)
    return 1e3 * best / count


def _descendants() -> list[int]:
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                parents[int(name)] = int(Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    family = [os.getpid()]
    for member in family:
        family += [pid for pid, parent in parents.items() if parent == member]
    return family


def _cpu_of_all() -> float:
    """Return the CPU time in seconds of this process and all that it started."""
    ticks = 0
    for pid in _descendants():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        ticks += sum(int(value) for value in fields[11:15])  # its own and its dead children's
    return ticks / os.sysconf("SC_CLK_TCK")


def _status(pid: int, key: str) -> float:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((float(line.split()[1]) for line in lines if line.startswith(key + ":")), 0.0)


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of a data set")
    parser.add_argument("--side", type=int, default=640, help="pixels of the samples (default: %(default)s)")
    parser.add_argument("--images", type=int, default=512, help="of each measurement (default: %(default)s)")
    parser.add_argument("--start", action="store_true", help="first batch and stalls instead; some minutes")
    given = parser.parse_args(arguments)
    cv2.setNumThreads(1)
    index = load_index(Data(root=str(given.data)), "train")
    if given.start:
        _with_ray(2, lambda: [print(line, flush=True) for line in long_run(index)])
        return

    floor = decoding(index, given.images)
    print(f"{len(index)} images; decoding alone: {floor:.2f} ms, {1e3 / floor:.0f} images/s a core\n")
    print("in process, one core           ms     images/s   textbook's ms   ratio   of the decoder's speed")
    alone = {}
    for name, samples in pipelines(index, given.side).items():
        alone[name] = ms = in_process(samples, given.images)
        line = f"{name:28} {ms:6.2f} {1e3 / ms:10.0f}"
        if name != "letterbox":
            peer = textbook(index, given.side, given.images // 4, mixup="mixup" in name)
            line += f" {peer:13.2f} {peer / ms:9.2f}"
        print(f"{line:67} {floor / ms:12.0%}", flush=True)
    print("\nstages, ms an image (with the profiler's own time)")
    for name, samples in pipelines(index, given.side).items():
        parts = stages(samples, given.images)
        print(f"{name:28} " + ", ".join(f"{stage} {ms:.2f}" for stage, ms in parts.items()))
    print("\nthrough Ray Data               cores  images/s   CPU ms   over in process   peak MB: task, reader")
    for cores in (1, 2):

        def measure(cores: int = cores) -> None:
            for name, samples in pipelines(index, given.side).items():
                speed, ms, task, reader = through_ray(samples, 6 * given.images)
                print(
                    f"{name:28} {cores:6} {speed:9.0f} {ms:9.2f} {ms - alone[name]:12.2f} {task:16.0f}, {reader:.0f}",
                    flush=True,
                )

        _with_ray(cores, measure)


def _with_ray(cpus: int, run: Callable[[], Any]) -> None:
    import ray

    ray.init(num_cpus=cpus, log_to_driver=False, logging_level="ERROR", object_store_memory=2**30)
    try:
        run()
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
