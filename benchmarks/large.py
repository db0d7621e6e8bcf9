"""What a data set of millions of images costs before its first step: time, and memory of each process.

    python -m benchmarks.large              # 1 million images
    python -m benchmarks.large 10000000     # needs 20 GB

A training on shards starts and is stopped after its first step. The shards hold 64 pictures; the index has a row for
each of the millions of images, with boxes of its own, and each row points to one of the pictures.
"""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.memory import processes
from raydet.data.index import Index
from raydet.data.synthetic import make_dataset

PICTURES, BOXES = 64, 7  # pictures in the shards, boxes of an image
LOOK_EVERY_S = 0.5
SHOWN_MB = 150  # processes with less are not shown
RAYDET = [sys.executable, "-m", "raydet.cli"]


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="?", type=int, default=1_000_000, help="images (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", help="settings of the training, section.key=value")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="large-") as folder:
        data = make_dataset(Path(folder, "shapes"), train=PICTURES, val=8)
        shards = Path(folder, "shards")
        subprocess.run([*RAYDET, "ingest", "demo", str(shards), f"data.root={data}"], check=True, capture_output=True)
        index = shards / "train/index.parquet"
        content = enlarge(Index.load(index.read_bytes()), given.images)
        index.write_bytes(content)
        print(f"index of {given.images:,} images: {len(content) / 1e6:.0f} MB on disk", flush=True)
        settings = [f"data.root={shards}", "data.format=shards", f"storage={folder}/runs", "scale.num_workers=1"]
        measure(["train", "demo", *settings, "data.image_size=192", "track.log_every=1", *given.overrides])


def enlarge(index: Index, images: int) -> memoryview:
    """Return the file of an index of many images with random boxes, each of them one of an index's few pictures."""
    rng = np.random.default_rng(0)
    rows = pa.array(np.arange(images) % len(index))
    low = rng.uniform(0, 90, (images * BOXES, 2))
    boxes = np.concatenate((low, low + rng.uniform(5, 90, low.shape)), axis=1).reshape(-1)
    starts = pa.array(np.arange(images + 1, dtype=np.int32) * BOXES)
    columns = {
        "image_id": pa.array(np.arange(images)),
        "boxes": pa.ListArray.from_arrays(starts, pa.FixedSizeListArray.from_arrays(pa.array(boxes), 4)),
        "labels": pa.ListArray.from_arrays(starts, pa.array(np.zeros(images * BOXES, np.int32))),
        "crowd": pa.ListArray.from_arrays(starts, pa.array(np.zeros(images * BOXES, np.uint8))),
        "area": pa.ListArray.from_arrays(starts, pa.array(rng.uniform(25, 8100, images * BOXES))),
    }
    others = {name: index.table[name].take(rows) for name in index.table.column_names if name not in columns}
    return Index(pa.table(columns | others), index.root, index.class_names, index.category_ids).save()


def measure(command: list[str]) -> None:
    """Run a command of raydet's until a training's first step, and print what that took."""
    most: Counter[str] = Counter()
    ended = threading.Event()
    began = time.monotonic()
    process = subprocess.Popen([*RAYDET, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def watch() -> None:
        while not ended.wait(LOOK_EVERY_S):
            for kind, size in processes(process.pid).items():
                most[kind] = max(most[kind], round(size))

    watcher = threading.Thread(target=watch)
    watcher.start()
    said = []
    assert process.stdout is not None
    try:
        for line in process.stdout:
            said.append(line)
            if re.search(r"step \d+/", line):
                print(f"first step after {time.monotonic() - began:.1f} s")
                break
        else:
            raise SystemExit("".join(said))
    finally:
        ended.set()
        watcher.join()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=120)
    print(
        "MB of its own, at most:  "
        + "  ".join(f"{kind} {size}" for kind, size in most.most_common() if size > SHOWN_MB)
    )


if __name__ == "__main__":
    main()
