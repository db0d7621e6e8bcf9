"""The stream: samples as batches, through Ray Data tasks into Ray Train workers.

    Samples ──► chunks (Arrow tables, made in Ray Data tasks) ──► a dealer (an actor) ──► the ranks: Batch (torch)

A Ray Data task makes a chunk as one table. A dealer executes a data set and gives each of its ranks the tables that
hold some of the rank's positions; the rank takes its rows of them as views. So a block is a chunk, whatever a rank's
batch is and wherever a run goes on: a block costs Ray some milliseconds whatever its size. `raydet.data.shares` says
which positions are whose: global step k trains on positions k·G to (k + 1)·G, so where a run stands is one number, and
a restart is a stream from that position, with as many ranks as there are then.

The ranks of each node have a stream: a dealer on their node, whose tasks run on the node's own CPUs as long as it has
free ones. So what a dealer does grows with its own ranks only, and a pixel crosses the network only where a node lacks
CPUs.

The tasks import this module: torch, which would cost each of them seconds and 300 MB, is imported by the workers only.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import count, islice, pairwise, repeat
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa

from raydet.data.probe import check_attempts
from raydet.data.samples import Samples
from raydet.data.shares import Share, divide, enough
from raydet.errors import user_error

if TYPE_CHECKING:
    import ray

    from raydet.data.batch import Batch

logger = logging.getLogger(__name__)

# Ray Data plans every task of an execution before the first runs: 2.6 s for 1,000 tasks, 30 s for 40,000.
SEGMENT_CHUNKS = 2000
NODE_LABEL = "ray.io/node-id"  # the label that Ray gives each node: its name
# CPUs that a task reserves: less than it uses while it runs, as Ray takes up to 0.1 s to see that one has ended and to
# start the next. On two cores three tasks make 40 % more samples than two.
TASK_CPUS = 2 / 3
# The next execution starts this long before the last batch of the one before: time to plan it on busy cores.
NEXT_SEGMENT_LEAD_S = 30.0
# Ray Data shares a cluster's memory equally among its executions. One whose process has died keeps its share until its
# request expires, after three minutes by default: the stream that replaces it would have half.
REQUESTS = {"RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S": "15", "RAY_DATA_MIN_GAP_BETWEEN_AUTOSCALING_REQUESTS": "3"}
# Without a batch for this long, the log says what may be wrong; the wait goes on.
STARVED_AFTER_S = 60.0


@dataclass(frozen=True)
class DataTasks:
    """The Ray Data tasks of a stream.

    Attributes:
        most: largest number of tasks at once, of all streams together; None: as many as Ray has CPUs for.
        nodes: labels of the nodes that run the tasks; None: any node, the ranks' own first.
        ranks: largest number of ranks that a stream feeds; None: see `raydet.data.shares.enough`.
    """

    most: int | None = None
    nodes: dict[str, str] | None = None
    ranks: int | None = None


class Ranks(Protocol):
    """What the stream must know of the worker group it feeds."""

    rank: int
    size: int

    @property
    def nodes(self) -> Sequence[str]:
        """Ray's name of the node that each rank is on."""
        ...

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
        source: the samples in Ray's object store, for the tasks.
        samples: the samples in this process.
        start: first position.
        stop: end, whole global batches after it.
        batch_size: number of images in a batch of one rank.
        ranks: the worker group; every rank iterates at the same time.
        tasks: the Ray Data tasks that make the batches.
        pin_memory: put batches into pinned memory, for a GPU.
    """
    step = batch_size * ranks.size
    streams = _streams(ranks, batch_size, samples, tasks)
    chunks = SEGMENT_CHUNKS * len(streams)
    span = max(1, chunks * samples.chunk_size // step) * step  # whole steps, or batches would be torn
    edges = [*range(start, stop, span), stop]
    segments = [
        [Share(low, high, batch_size, ranks.size, fed.start, len(fed), samples.chunk_size) for fed in streams]
        for low, high in pairwise(edges)
    ]
    mine = _own(streams, ranks)

    def start_segment(number: int) -> _Prefetch | None:
        if number >= len(segments):
            return None
        dealer = _share_dealer(ranks, streams, _TrainDealer, source, segments[number], tasks)
        share = segments[number][mine]
        return _Prefetch(lambda: _read_share(dealer, share, ranks.rank, samples.image_size, pin_memory))

    current = following = None
    try:
        following = start_segment(0)
        for number, shares in enumerate(segments):
            segment = shares[mine]
            current, following = following, None
            assert current is not None
            began = time.monotonic()
            for done, batch in enumerate(current):
                if number + 1 < len(segments) and following is None:
                    # Here all ranks are at the same step: sharing is a collective call.
                    following = start_segment(number + 1)
                if following is not None:
                    left = (segment.stop - segment.start) // step - done
                    if left * (time.monotonic() - began) < NEXT_SEGMENT_LEAD_S * done:
                        following.start()
                _check(batch, segment.batch(done, ranks.rank).tolist(), ranks.rank)
                yield batch
    finally:
        for prefetch in (current, following):
            if prefetch is not None:
                prefetch.stop()


def eval_batches(
    source: ray.ObjectRef,
    samples: Samples,
    batch_size: int,
    ranks: Ranks,
    *,
    tasks: DataTasks = DataTasks(),
    pin_memory: bool = False,
) -> Callable[[], Iterator[Batch]]:
    """Return what yields this rank's share of all images, each exactly once over the ranks.

    It can be called again; every rank calls it at the same time.

    Each stream has a fixed part of the images. Which of its ranks gets an image is decided while they run: who is ready
    takes the next chunk.

    Arguments as in `train_batches`; batches at the end of a chunk may be smaller than `batch_size`.
    """
    from raydet.data.batch import to_batch

    streams = _streams(ranks, batch_size, samples, tasks)
    chunks = -(-len(samples.index) // samples.chunk_size)
    edges = [chunks * edge // ranks.size * samples.chunk_size for edge in (*(fed.start for fed in streams), ranks.size)]
    parts = [(low, min(high, len(samples.index))) for low, high in pairwise(edges)]
    shares = [Share(low, high, max(1, high - low), 1, 0, 1, samples.chunk_size) for low, high in parts]
    deal = cache(partial(_share_dealer, ranks, streams, _EvalDealer, source, shares, tasks))  # a training starts first
    rounds = count(1)

    def read(dealer: Any, number: int) -> Iterator[Batch]:
        for table in _tables(dealer.next.remote, repeat(number)):
            for first in range(0, len(table), batch_size):
                yield to_batch([table.slice(first, batch_size)], samples.image_size, pin_memory)

    return lambda: iter(_Prefetch(partial(read, deal(), next(rounds))))


class _Dealer:
    """Runs in an actor: executes a data set, a block a chunk, and deals the references to the blocks.

    Args:
        source: the samples in Ray's object store, in a list, as Ray would fetch a bare reference.
        share: the positions to make.
        tasks: the Ray Data tasks that make them.
        part: fraction of the ranks that the stream feeds.
        near: name of the node whose CPUs are to be used first; None: all nodes alike.
    """

    def __init__(self, source: Sequence[Any], share: Share, tasks: DataTasks, part: float, near: str | None):
        self._lock = threading.Lock()
        self._given = source[0], share, tasks, part, near
        os.environ.update(REQUESTS)  # before Ray Data is imported, which reads them only then

    def _execute(self) -> Iterator[Any]:
        """Yield the reference to the block of each of the share's chunks."""
        import ray.data

        from raydet.data.limits import use_part_of_cluster

        source, share, tasks, part, near = self._given
        # A block for each chunk, made here: ray.data.range would run a task for each, only to make its number.
        chunks = [pa.table({"chunk": [chunk]}) for chunk in share.chunks().tolist()]
        if not chunks:
            return
        # With SPREAD, Ray Data's own choice, tasks would wait for their node however busy it is. map_batches takes no
        # strategy any more.
        first = {"label_selector": {NODE_LABEL: near}, "fallback_strategy": [{"label_selector": {}}]}
        where = {**first, "scheduling_strategy": "DEFAULT"} if near else {}
        dataset = ray.data.from_blocks(chunks).map_batches_internal(
            _make_block,
            batch_size=None,
            batch_format="pyarrow",
            fn_kwargs={"source": source, "share": share},
            num_cpus=TASK_CPUS,
            compute=ray.data.TaskPoolStrategy(size=tasks.most and max(1, int(part * tasks.most))),
            **where,
        )
        context = dataset.context
        context.target_max_block_size = None  # the table of a task is one block
        context.execution_options.preserve_order = True
        context.execution_options.label_selector = tasks.nodes
        context.custom_execution_callback_classes = [use_part_of_cluster(part, tasks.nodes)]
        context.execution_no_progress_timeout_s = -1  # a long validation pauses the training stream
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        for bundle in dataset.iter_internal_ref_bundles():
            for block in bundle.blocks:
                yield block.ref


class _TrainDealer(_Dealer):
    """Deals the blocks of a training: each to the ranks that get some of its positions. Arguments as of _Dealer."""

    def __init__(self, source: Sequence[Any], share: Share, tasks: DataTasks, part: float, near: str | None):
        super().__init__(source, share, tasks, part, near)
        chunks = share.chunks().tolist()
        self._takers = {chunk: len(share.takers(chunk)) for chunk in chunks}
        self._coming = zip(chunks, self._execute(), strict=True)
        self._dealt: dict[int, Any] = {}  # blocks that some of their takers have not got yet
        self._reading = share.fed

    def take(self, chunk: int) -> list[Any]:
        """Return the block of a chunk in a list; each of its takers asks once, in ascending order."""
        with self._lock:
            while chunk not in self._dealt:
                number, block = next(self._coming)
                self._dealt[number] = block
            block = self._dealt[chunk]
            self._takers[chunk] -= 1
            if not self._takers[chunk]:
                del self._dealt[chunk]
        return [block]

    def done(self) -> None:
        """Take note that a rank reads no more; after the last one the execution ends."""
        with self._lock:
            self._reading -= 1
            if not self._reading:
                self._dealt.clear()
                self._coming = zip((), (), strict=True)


class _EvalDealer(_Dealer):
    """Deals the blocks of a validation: each to the rank that asks for the next. Arguments as of _Dealer."""

    def __init__(self, source: Sequence[Any], share: Share, tasks: DataTasks, part: float, near: str | None):
        super().__init__(source, share, tasks, part, near)
        self._round, self._blocks = 0, iter(())

    def next(self, number: int) -> list[Any]:
        """Return the next block in a list, an empty one at the end; a higher number begins anew."""
        with self._lock:
            if number > self._round:
                self._round, self._blocks = number, self._execute()
            # A rank that asks for an earlier round is late: another has seen the end of it.
            return list(islice(self._blocks, 1)) if number == self._round else []


def _make_block(batch: pa.Table, source: Any, share: Share) -> Iterator[pa.Table]:
    """Runs in a Ray Data task: makes the chunks whose numbers are in the batch."""
    samples = _fetch(source)
    for chunk in batch["chunk"].to_pylist():
        positions: list[int] = share.positions(chunk).tolist()
        what = f"samples {positions[0]} to {positions[-1]}"
        rows = sorted(set(samples.chunk_rows(positions[0])))
        failed = check_attempts(attempts_before(), what, rows, samples.index.read)
        yield from samples.blocks(positions, failed=failed)


def attempts_before() -> int:
    """Return how often the running Ray task was tried before. (Ray Data's actors get their tasks as new ones.)"""
    import ray

    # Ray counts the attempts for its dashboard, and says the number nowhere else.
    return ray._private.worker.global_worker.core_worker.get_current_task_attempt_number()  # type: ignore[no-any-return]


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


def _streams(ranks: Ranks, batch_size: int, samples: Samples, tasks: DataTasks) -> list[range]:
    """Return the ranks that each stream feeds."""
    return divide(ranks.nodes, tasks.ranks or enough(ranks.nodes, batch_size, samples.chunk_size))


def _own(streams: Sequence[range], ranks: Ranks) -> int:
    """Return the number of the stream that feeds this rank."""
    return next(number for number, fed in enumerate(streams) if ranks.rank in fed)


def _share_dealer(
    ranks: Ranks, streams: Sequence[range], kind: type[_Dealer], source: Any, shares: Sequence[Share], tasks: DataTasks
) -> Any:
    """Return the handle of the dealer that feeds this rank; rank 0 makes those of all streams."""
    import ray

    made = None
    if ranks.rank == 0:
        dealers = []
        for fed, share in zip(streams, shares, strict=True):
            nodes = [ranks.nodes[rank] for rank in fed]
            near = nodes[0] if tasks.nodes is None and len(set(nodes)) == 1 else None
            # A rank that waits for its next block keeps a thread of the dealer.
            place = {"max_concurrency": len(fed) + 1, "label_selector": {NODE_LABEL: nodes[0]}}
            dealer = ray.remote(num_cpus=0, **place)(kind).remote([source], share, tasks, len(fed) / ranks.size, near)
            dealers.append(ray.put(dealer))
        # By reference, as Ray Train's broadcast is for less than a kilobyte; in a list, as Ray would fetch a bare one.
        # References to the handles, since a process hears of each actor whose handle it holds.
        made = [ray.put(dealers)]
    dealer = ray.get(ray.get(ranks.share(made)[0])[_own(streams, ranks)])
    ranks.share(None)  # rank 0 holds the reference until all have read it
    return dealer


def _read_share(dealer: Any, share: Share, rank: int, image_size: tuple[int, int], pin_memory: bool) -> Iterator[Batch]:
    """Yield a rank's batches of a stretch of the training."""
    from raydet.data.batch import batches_of, to_batch

    chunks = [chunk for chunk in share.chunks().tolist() if rank in share.takers(chunk)]
    tables = _tables(dealer.take.remote, iter(chunks))
    parts = (table[run] for chunk, table in zip(chunks, tables, strict=True) for run in share.runs(chunk, rank))
    try:
        yield from batches_of(parts, share.batch_size, lambda part: to_batch(part, image_size, pin_memory))
    finally:
        dealer.done.remote()


def _tables(ask: Callable[[int], Any], numbers: Iterator[int]) -> Iterator[pa.Table]:
    """Yield the tables that a dealer gives when asked for, one asked for ahead, until it gives none."""
    import ray

    waiting = [ask(number) for number in islice(numbers, 1)]
    while waiting:
        blocks = ray.get(waiting.pop())
        waiting += [ask(number) for number in islice(numbers, 1)]
        if not blocks:
            return
        yield ray.get(blocks[0])


def _check(batch: Batch, due: list[int], rank: int) -> None:
    """Raise if this is not the rank's part of the step."""
    if batch.positions.tolist() != due:
        raise RuntimeError(
            f"rank {rank} got positions {batch.positions.tolist()} where {due} were due: Ray Data delivered blocks out "
            "of order"
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

    def stop(self) -> None:
        """Fill no more."""
        self._stopped.set()

    def __iter__(self) -> Iterator[Batch]:
        self.start()
        try:
            while (item := self._next()) is not None:
                if isinstance(item, BaseException):
                    raise user_error(item) or item
                yield item
        finally:
            self.stop()

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
