"""Does a training's memory grow? Trains 30 epochs of a small data set and prints what the processes hold.

python benchmarks/memory.py                   # some minutes on two CPU cores
python benchmarks/memory.py train.epochs=100
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path

import raydet
from raydet.data.synthetic import make_dataset

SHOWN = (2, 5, 10, 20, 30, 50, 100)  # epochs


def private_mb(pid: int) -> float:
    """Return the memory of a process in MB that is neither a file's nor the object store's."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:  # it has ended
        return 0.0
    found = re.search(r"^Anonymous: +(\d+) kB", text, re.MULTILINE)
    return int(found[1]) / 1e3 if found else 0.0


def processes(driver: int) -> dict[str, float]:
    """Return the MB of the driver, and of Ray's processes by kind, the largest of each."""
    found: dict[str, float] = defaultdict(float, driver=private_mb(driver))
    listing = subprocess.run(["ps", "-eo", "pid=,args="], capture_output=True, text=True, check=True).stdout
    for line in listing.splitlines():
        pid, _, name = line.strip().partition(" ")
        if name.startswith("ray::"):
            kind = name.split()[0].removeprefix("ray::").partition(".")[0]
            found[kind] = max(found[kind], private_mb(int(pid)))
    return dict(found)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    seen: dict[int, dict[str, float]] = {}

    def say(text: str) -> None:
        if found := re.match(r"epoch (\d+) validated", text):
            seen[int(found[1])] = processes(os.getpid())
            print(text, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        data = make_dataset(Path(folder) / "shapes", train=64, val=32)
        small = [f"storage={folder}", f"data.root={data}", "name=memory", "data.image_size=128", "train.epochs=30"]
        workers = ["scale.num_workers=2", "scale.cpus_per_worker=1", "eval.every=1"]
        raydet.train("demo", overrides=[*small, *workers, *arguments.overrides], say=say)
    for epoch in [epoch for epoch in SHOWN if epoch in seen]:
        shown = "  ".join(f"{kind} {size:.0f}" for kind, size in sorted(seen[epoch].items()) if size)
        print(f"MB after epoch {epoch}: {shown}")


if __name__ == "__main__":
    main()
