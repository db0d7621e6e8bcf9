"""What streams cost Ray: samples that cost nothing, read by plain actors as ranks on made-up nodes of this machine.

    python benchmarks/streams.py                      # 1, 2, 4 and 8 nodes of two ranks: a stream each, and one for all
    python benchmarks/streams.py --nodes 1 2 --ranks 8

A node with half the CPUs of the other, and a node whose samples take twice as long:

    python benchmarks/streams.py --nodes 2 --ranks 1 --blocks 60 --sample-ms 20 --cpus 4 2
    python benchmarks/streams.py --nodes 2 --ranks 1 --blocks 60 --sample-ms 20 --cpus 3 3 --slow 2

All nodes share this machine's CPUs, so blocks a second do not add up as they do on machines of their own. What a block
costs a dealer in CPU time, and where it was made, is as there.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from raydet.data.index import index_of_images
from raydet.data.samples import Samples

SIDE, CHUNK = 32, 64
WARM = 0.3  # fraction of the steps that is not counted: processes start and import
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class FreeSamples(Samples):
    """Grey pictures, whose row says on which node they were made.

    Args:
        seconds: time that a picture takes; the task sleeps, so that the CPUs of this machine are no limit.
        step: number of positions in a step.
        late: first position within a step that belongs to the last node's ranks.
        slow: the pictures from `late` on take that many times as long.
    """

    seconds: float = 0.0
    step: int = 1
    late: int = 1
    slow: float = 1.0

    def blocks(
        self, positions: Sequence[int], block_size: int | None = None, failed: Mapping[int, str] | None = None
    ) -> Iterator[pa.Table]:
        """See Samples."""
        import ray

        count, node = len(positions), number_of(ray.get_runtime_context().get_node_id())
        time.sleep(self.seconds * sum(self.slow if each % self.step >= self.late else 1.0 for each in positions))
        nothing = pa.array(np.zeros(count + 1, np.int32))
        pixels = pa.array(np.zeros(count * SIDE * SIDE * 3, np.uint8))
        corners = pa.FixedSizeListArray.from_arrays(pa.array(np.empty(0, np.float32)), 4)
        yield pa.table(
            {
                "position": pa.array(positions, pa.int64()),
                "row": pa.array([node] * count, pa.int64()),
                "image": pa.FixedSizeListArray.from_arrays(pixels, SIDE * SIDE * 3),
                "boxes": pa.ListArray.from_arrays(nothing, corners),
                "labels": pa.ListArray.from_arrays(nothing, pa.array(np.empty(0, np.int64))),
                "errors": pa.array([[]] * count, pa.list_(pa.string())),
            }
        )


def number_of(node: str) -> int:
    """Return a number for the name of a node."""
    return int(node[:12], 16)


class Board:
    """An actor: shows all ranks what rank 0 shares."""

    def __init__(self) -> None:
        self._shown: list[Any] = []
        self._changed = threading.Condition()

    def show(self, value: Any) -> None:
        """Show the next value."""
        with self._changed:
            self._shown.append(value)
            self._changed.notify_all()

    def read(self, number: int) -> Any:
        """Wait for a value."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._shown) > number)
            return self._shown[number]


class Reader:
    """An actor: one rank of a worker group, which reads its batches and does nothing with them."""

    def __init__(self, rank: int, nodes: Sequence[str], board: Any):
        self.rank, self.size, self.nodes = rank, len(nodes), nodes
        self._board, self._shared = board, 0

    def share(self, value: Any) -> Any:
        """See Ranks."""
        import ray

        if self.rank == 0:
            ray.get(self._board.show.remote(value))
        self._shared += 1
        return ray.get(self._board.read.remote(self._shared - 1))

    def read(
        self, source: Sequence[Any], steps: int, batch_size: int, most: int | None, pace: float
    ) -> tuple[float, float, float]:
        """Read a number of batches, `pace` of them a second; 0: as fast as they come.

        Returns:
            When the counted steps began and ended, and which part of the samples was made on this node.
        """
        import ray

        from raydet.data.stream import DataTasks, train_batches

        here, mine, began, samples = number_of(self.nodes[self.rank]), 0, 0.0, ray.get(source[0])
        warm = int(WARM * steps)
        stop = steps * batch_size * self.size
        stream = train_batches(source[0], samples, 0, stop, batch_size, self, tasks=DataTasks(ranks=most))
        for number, batch in enumerate(stream):
            if number == warm:
                began = time.time()
            if pace and number > warm:
                time.sleep(max(0.0, began + (number - warm) / pace - time.time()))
            mine += int((batch.rows == here).sum()) * (number >= warm)
        return began, time.time(), mine / ((steps - warm) * batch_size)


@dataclass(frozen=True)
class Result:
    """What a run cost: `dealer` and `dealer_ms` are the CPUs of the busiest dealer, and its CPU time for a block of its
    own, `control` the CPUs of Ray's control store, `driver_mb` the memory of the driver."""

    blocks_s: float
    at_home: float
    dealer: float
    dealer_ms: float
    control: float
    driver_mb: float


def measure(
    nodes: Sequence[str],
    ranks: int,
    steps: int,
    batch_size: int,
    most: int | None,
    pace: float,
    seconds: float = 0.0,
    slow: float = 1.0,
) -> Result:
    """Read a stretch with some ranks on each node, and a stream for `most` ranks; `pace` blocks a second and node.

    A sample takes `seconds`, and a sample for the last node `slow` times as long.
    """
    import ray

    from raydet.data.shares import Share, divide, enough
    from raydet.data.stream import NODE_LABEL

    index = index_of_images(
        [(0, "none", SIDE, SIDE)], [(np.empty((0, 4)), np.empty(0, int), np.empty(0, bool))], **NAMES
    )
    places = [node for node in nodes for _ in range(ranks)]
    step = len(places) * batch_size
    late = step - ranks * batch_size
    samples = FreeSamples(index, (), (SIDE, SIDE), CHUNK, seconds=seconds, step=step, late=late, slow=slow)
    source = ray.put(samples)
    board = ray.remote(num_cpus=0, max_concurrency=len(places) + 2)(Board).remote()
    reader = ray.remote(num_cpus=0)(Reader)
    readers = [
        reader.options(label_selector={NODE_LABEL: node}).remote(rank, places, board)
        for rank, node in enumerate(places)
    ]
    seen: list[tuple[float, dict[int, tuple[str, float]]]] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.5):
            seen.append((time.time(), cpu_times()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        batches_s = pace * CHUNK / (ranks * batch_size)
        results = ray.get([each.read.remote([source], steps, batch_size, most, batches_s) for each in readers])
    finally:
        ended.set()
        watcher.join()
        for each in (*readers, board):
            ray.kill(each)
    began, stopped = min(began for began, _, _ in results), max(stopped for _, stopped, _ in results)
    during = [cpus for when, cpus in seen if began <= when <= stopped]
    used = {pid: (command, cpu - during[0][pid][1]) for pid, (command, cpu) in during[-1].items() if pid in during[0]}
    streams = divide(places, most or enough(places, batch_size, CHUNK))
    fraction = 1 - WARM
    stop = steps * step
    blocks = [
        len(Share(0, stop, batch_size, len(places), fed.start, len(fed), CHUNK).chunks()) * fraction for fed in streams
    ]
    dealers = [cpu for command, cpu in used.values() if command.startswith("ray::_TrainDealer")]
    control = sum(cpu for command, cpu in used.values() if "gcs_server" in command)
    return Result(
        sum(blocks) / (stopped - began),
        sum(home for _, _, home in results) / len(results),
        max(dealers) / (during_s := seen_s(seen, began, stopped)),
        1e3 * max(dealers) / max(blocks) * (stopped - began) / during_s,
        control / during_s,
        int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6,
    )


NAMES: dict[str, Any] = {"root": "/", "class_names": ["none"]}


def seen_s(seen: Sequence[tuple[float, Any]], began: float, stopped: float) -> float:
    """Return the seconds between the first and the last look at the processes while the steps were counted."""
    times = [when for when, _ in seen if began <= when <= stopped]
    return times[-1] - times[0]


def cpu_times() -> dict[int, tuple[str, float]]:
    """Return command and CPU seconds of each process that this one has started, directly or not."""
    found: dict[int, tuple[int, str, float]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                command = (entry / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue
            found[int(entry.name)] = int(fields[1]), command, (int(fields[11]) + int(fields[12])) / TICKS
    family = [os.getpid()]
    for member in family:
        family += [pid for pid, (parent, _, _) in found.items() if parent == member]
    return {pid: found[pid][1:] for pid in family if pid in found}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of nodes, ascending")
    parser.add_argument("--ranks", type=int, default=2, help="ranks a node (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="images a rank and step (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=400, help="blocks of a node (default: %(default)s)")
    parser.add_argument("--pace", type=float, default=0, help="blocks a second of a node; 0: as fast as they come")
    parser.add_argument("--cpus", type=int, nargs="+", default=[2], help="CPUs of the nodes, in turn (default: 2)")
    parser.add_argument("--sample-ms", type=float, default=0, help="time that a sample takes in its task (default: 0)")
    parser.add_argument("--slow", type=float, default=1, help="samples for the last node take that many times as long")
    given = parser.parse_args(arguments)
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 2 * 10**8})
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    nodes: list[str] = []
    steps = given.blocks * CHUNK // (given.ranks * given.batch_size)
    print("nodes ranks streams  blocks/s  made on the reader's node  dealer CPUs  ms/block  control CPUs  driver MB")
    try:
        for count in given.nodes:
            while len(nodes) < count:
                cpus = given.cpus[len(nodes) % len(given.cpus)]
                nodes.append(cluster.add_node(num_cpus=cpus, object_store_memory=2 * 10**8).node_id)
            cluster.wait_for_nodes()
            for most, streams in ((None, count), (count * given.ranks, 1))[: 1 + (count > 1)]:
                cost = given.sample_ms / 1e3, given.slow
                found = measure(nodes, given.ranks, steps, given.batch_size, most, given.pace, *cost)
                print(
                    f"{count:5} {count * given.ranks:5} {streams:7} {found.blocks_s:9.1f} {found.at_home:26.0%} "
                    f"{found.dealer:12.3f} {found.dealer_ms:9.1f} {found.control:13.2f} {found.driver_mb:10.0f}",
                    flush=True,
                )
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
