"""The stream: samples as batches, through Ray Data tasks into Ray Train workers.

Global step k trains on positions k·G to (k + 1)·G, G being the global batch. Ray Data tasks make chunks as blocks of
gcd(B, chunk size, start) rows (B: a worker's batch), or whole for a worker that is alone; Ray hands the blocks to the
ranks in turn, and a batch is the next B rows a rank gets; so where a run stands is one number, and a restart is a
stream from that position, with as many ranks as there are then.

    Samples ──► blocks (Arrow, made in tasks) ──► streaming_split over the ranks ──► Batch (torch)

The tasks import this module: torch, which would cost each of them seconds and 300 MB, is imported by the workers only.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import gcd
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa

from raydet.data.samples import Samples
from raydet.errors import user_error

if TYPE_CHECKING:
    import ray

    from raydet.data.batch import Batch

logger = logging.getLogger(__name__)

# Ray Data plans every task of an execution before the first runs: 2.6 s for 1,000 tasks, 30 s for 40,000.
SEGMENT_CHUNKS = 2000
# CPUs that a task reserves: less than it uses while it runs, as Ray takes up to 0.1 s to see that one has ended and to
# start the next. On two cores three tasks make 40 % more samples than two.
TASK_CPUS = 2 / 3
# The next execution starts this long before the last batch of the one before: time to plan it on busy cores.
NEXT_SEGMENT_LEAD_S = 30.0
# Without a batch for this long, the log says what may be wrong; the wait goes on.
STARVED_AFTER_S = 60.0


@dataclass(frozen=True)
class DataTasks:
    """The Ray Data tasks of a stream.

    Attributes:
        most: at once; None: as many as Ray has CPUs for.
        nodes: labels of the nodes that run them; None: any node.
    """

    most: int | None = None
    nodes: dict[str, str] | None = None


class Ranks(Protocol):
    """What the stream must know of the worker group it feeds."""

    rank: int
    size: int

    def share(self, value: Any) -> Any:
        """Return rank 0's value on every rank; all ranks call it at the same time."""
        ...


def train_batches(
    source: ray.ObjectRef,
    samples: Samples,
    start: int,
    stop: int,
    batch_size: int,
    ranks: Ranks,
    *,
    tasks: DataTasks = DataTasks(),
    pin_memory: bool = False,
) -> Generator[Batch, None, None]:
    """Yield this rank's batches of positions start … stop - 1, made by Ray Data tasks.

    Args:
        source: `samples` in Ray's object store, for the tasks.
        samples: the same here.
        start: first position.
        stop: end, whole global batches after it.
        batch_size: of one rank.
        ranks: the worker group; every rank iterates at the same time.
        tasks: which make them.
        pin_memory: batches in pinned memory, for a GPU.
    """
    turn = gcd(batch_size, samples.chunk_size, start)
    # A block costs Ray some milliseconds whatever its size: a rank that is alone gets whole chunks.
    block_size = turn if ranks.size > 1 else samples.chunk_size
    step = batch_size * ranks.size
    span = max(1, SEGMENT_CHUNKS * samples.chunk_size // step) * step  # whole steps, or batches would be torn
    edges = [*range(start, stop, span), stop]
    segments = [_Segment(source, samples, low, high, block_size, tasks) for low, high in pairwise(edges)]

    def start_segment(number: int) -> _Prefetch | None:
        if number >= len(segments):
            return None
        split = _share_split(segments[number], ranks, equal=True)
        return _Prefetch(lambda: _batches(split, batch_size, block_size, samples.image_size, pin_memory))

    position = start
    following = start_segment(0)
    for number, segment in enumerate(segments):
        current, following = following, None
        assert current is not None
        began = time.monotonic()
        for batch in current:
            if number + 1 < len(segments) and following is None:
                # Here all ranks are at the same step: sharing is a collective call.
                following = start_segment(number + 1)
            if following is not None:
                done, left = position - segment.start, segment.stop - position
                if left * (time.monotonic() - began) < NEXT_SEGMENT_LEAD_S * done:
                    following.start()
            _check(batch, position, batch_size, turn, ranks)
            position += batch_size * ranks.size
            yield batch
            if position == segment.stop:  # not waiting for Ray to end the execution
                break
    if position != stop:
        raise RuntimeError(f"the stream ended at position {position}, expected {stop}")


def eval_batches(
    source: ray.ObjectRef,
    samples: Samples,
    batch_size: int,
    ranks: Ranks,
    *,
    tasks: DataTasks = DataTasks(),
    pin_memory: bool = False,
) -> Callable[[], Iterator[Batch]]:
    """Return what yields this rank's share of all images, each exactly once over the ranks; it can be called again.

    Arguments as in `train_batches`; batches at the end of a chunk may be smaller than `batch_size`.
    """
    segment = _Segment(source, samples, 0, len(samples.index), batch_size, tasks)
    split = _share_split(segment, ranks, equal=False)
    return lambda: iter(_Prefetch(lambda: _whole_blocks(split, samples.image_size, pin_memory)))


@dataclass(frozen=True)
class _Segment:
    """Positions start … stop - 1 as one Ray Data execution."""

    source: ray.ObjectRef
    samples: Samples
    start: int
    stop: int
    block_size: int
    tasks: DataTasks

    def split(self, ranks: int, *, equal: bool) -> list[Any]:
        import ray.data

        size = self.samples.chunk_size
        first, last = self.start // size, -(-self.stop // size)
        dataset = ray.data.range(last - first, override_num_blocks=last - first).map_batches(
            _make_blocks,
            batch_size=None,
            batch_format="pyarrow",
            fn_kwargs={
                "source": self.source,
                "first_chunk": first,
                "start": self.start,
                "stop": self.stop,
                "block_size": self.block_size,
            },
            num_cpus=TASK_CPUS,
            compute=ray.data.TaskPoolStrategy(size=self.tasks.most),
            # A task that has begun runs to its end: one that waits for a reader would keep its CPU from the validation.
            _generator_backpressure_num_objects=-1,
        )
        context = dataset.context
        # A table is larger than its pixels, so that each becomes a block of its own.
        context.target_max_block_size = self.block_size * 3 * self.samples.image_size[0] * self.samples.image_size[1]
        context.execution_options.preserve_order = True
        context.execution_options.label_selector = self.tasks.nodes
        context.execution_no_progress_timeout_s = -1  # a long validation pauses the training stream
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        return dataset.streaming_split(ranks, equal=equal)  # type: ignore[no-any-return]


def _make_blocks(
    batch: pa.Table, source: Any, first_chunk: int, start: int, stop: int, block_size: int
) -> Iterator[pa.Table]:
    """Runs in a Ray Data task: makes the chunks whose numbers are in the batch."""
    samples = _fetch(source)
    for number in batch["id"].to_pylist():
        low = (first_chunk + number) * samples.chunk_size
        yield from samples.blocks(max(low, start), min(low + samples.chunk_size, stop), block_size)


def _fetch(source: Any) -> Samples:
    """Return what a reference stands for. A process keeps the last two, training's and validation's: they are views of
    the node's one copy, but the order of an epoch is not."""
    import ray

    key = source.hex()
    if key not in _fetched:
        while len(_fetched) > 1:
            del _fetched[next(iter(_fetched))]
        _fetched[key] = ray.get(source)
    return _fetched[key]


_fetched: dict[str, Samples] = {}


def _share_split(segment: _Segment, ranks: Ranks, *, equal: bool) -> Any:
    """Return this rank's iterator over a segment; rank 0 makes them for all."""
    import ray

    # By reference, as Ray Train's broadcast is for less than a kilobyte; in a list, as Ray would fetch a bare one.
    made = [ray.put(segment.split(ranks.size, equal=equal))] if ranks.rank == 0 else None
    splits = ray.get(ranks.share(made)[0])
    ranks.share(None)  # rank 0 holds the reference until all have read it
    return splits[ranks.rank]


def _batches(
    split: Any, batch_size: int, block_size: int, image_size: tuple[int, int], pin_memory: bool
) -> Iterator[Batch]:
    """Cut or join blocks to batches; what is cut is a view."""
    from raydet.data.batch import to_batch

    waiting: list[pa.Table] = []
    missing = batch_size
    prefetch = 2 * -(-batch_size // block_size)
    for block in split.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=prefetch):
        rest = block
        while len(rest) >= missing:
            yield to_batch([*waiting, rest.slice(0, missing)], image_size, pin_memory)
            rest, waiting, missing = rest.slice(missing), [], batch_size
        if len(rest):
            waiting.append(rest)
            missing -= len(rest)
    if waiting:
        raise RuntimeError(f"the stream ended within a batch: {missing} of its {batch_size} samples did not come")


def _whole_blocks(split: Any, image_size: tuple[int, int], pin_memory: bool) -> Iterator[Batch]:
    from raydet.data.batch import to_batch

    for block in split.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2):
        yield to_batch([block], image_size, pin_memory)


def _check(batch: Batch, position: int, batch_size: int, turn: int, ranks: Ranks) -> None:
    """Raise if this is not the rank's part of the step: ranks get `turn` samples each in turn."""
    starts = position + turn * (ranks.rank + ranks.size * np.arange(batch_size // turn))
    due = (starts[:, None] + np.arange(turn)).reshape(-1)
    if not np.array_equal(batch.positions.numpy(), due):
        raise RuntimeError(
            f"rank {ranks.rank} got positions {batch.positions.tolist()} where {due.tolist()} were due: "
            "Ray Data delivered blocks out of order"
        )


class _Prefetch:
    """An iterator that runs in a thread, up to `DEPTH` batches ahead, and says so when it starves."""

    DEPTH = 2

    def __init__(self, make: Callable[[], Iterator[Batch]]):
        self._make = make
        self._ready: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=self.DEPTH)
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()

    def start(self) -> None:
        """Begin to fill, where that has not begun."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._fill, name="raydet-prefetch", daemon=True)
            self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        self.start()
        try:
            while (item := self._next()) is not None:
                if isinstance(item, BaseException):
                    raise user_error(item) or item
                yield item
        finally:
            self._stopped.set()

    def _next(self) -> Batch | BaseException | None:
        began = time.monotonic()
        while True:
            try:
                return self._ready.get(timeout=STARVED_AFTER_S)
            except queue.Empty:
                logger.warning(
                    "no batch for %.0f s: are the images slow to read, or are there no free CPUs for the data tasks?",
                    time.monotonic() - began,
                )

    def _fill(self) -> None:
        try:
            for batch in self._make():
                if not self._put(batch):
                    return
            self._put(None)
        except BaseException as error:  # handed to the consumer, whatever it is
            self._put(error)

    def _put(self, item: Batch | BaseException | None) -> bool:
        while not self._stopped.is_set():
            try:
                self._ready.put(item, timeout=1)
            except queue.Full:
                continue
            return True
        return False
