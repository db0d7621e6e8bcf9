"""Who gets which positions: the steps of a training over its ranks, and the ranks over streams.

Step k of a stretch of the training trains on positions start + k·G to start + (k + 1)·G. Each rank gets B consecutive
ones of them (G = B · ranks). A stream feeds some of the ranks: it makes the positions of all of these, which are
consecutive too. Tasks make them by the chunk, so that a sample is the same whoever makes it. Nothing here knows Ray.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.int64]


def divide(nodes: Sequence[str], most: int) -> list[range]:
    """Divide ranks among streams: those of a node have streams of their own, unless several nodes fit into one.

    Args:
        nodes: name of the node that each rank is on.
        most: largest number of ranks that a stream feeds.

    Returns:
        The ranks of each stream, which are consecutive.
    """
    streams: list[range] = []
    for _, group in groupby(range(len(nodes)), key=nodes.__getitem__):
        ranks = list(group)
        if streams and len(streams[-1]) + len(ranks) <= most:
            streams[-1] = range(streams[-1].start, ranks[-1] + 1)
        else:
            parts = -(-len(ranks) // most)
            edges = [ranks[0] + len(ranks) * part // parts for part in range(parts + 1)]
            streams += [range(low, high) for low, high in pairwise(edges)]
    return streams


def enough(nodes: Sequence[str], batch_size: int, chunk_size: int) -> int:
    """Return how many ranks a stream feeds by default: those of a node, or more where these take less than a chunk.

    Args:
        nodes: name of the node that each rank is on.
        batch_size: number of positions of one rank in a step.
        chunk_size: number of positions in a chunk.
    """
    largest = max(len(list(group)) for _, group in groupby(nodes))
    return max(largest, -(-chunk_size // batch_size))


@dataclass(frozen=True)
class Share:
    """The positions that one stream makes for its ranks.

    Attributes:
        start: first position of the stretch.
        stop: end of the stretch, whole steps after its start.
        batch_size: number of positions of one rank in a step, B.
        ranks: number of ranks that train together.
        first: the first rank that the stream feeds.
        fed: number of ranks that the stream feeds.
        chunk_size: number of positions in a chunk.
    """

    start: int
    stop: int
    batch_size: int
    ranks: int
    first: int
    fed: int
    chunk_size: int

    @property
    def step(self) -> int:
        """G, positions of a step."""
        return self.batch_size * self.ranks

    def chunks(self) -> Array:
        """Return the numbers of the chunks that hold some of the positions, ascending."""
        numbers = np.arange(self.start // self.chunk_size, -(-self.stop // self.chunk_size))
        low = np.maximum(numbers * self.chunk_size, self.start) - self.start
        high = np.minimum((numbers + 1) * self.chunk_size, self.stop) - self.start
        begin, size = self.first * self.batch_size, self.fed * self.batch_size
        # The first step whose part of the stream ends behind the chunk's beginning: does it begin before its end?
        step = np.maximum((low - begin - size) // self.step + 1, 0)
        needed: Array = numbers[step * self.step + begin < high]
        return needed

    def positions(self, chunk: int) -> Array:
        """Return the positions in a chunk that the stream makes, ascending."""
        low, high = chunk * self.chunk_size, (chunk + 1) * self.chunk_size
        every = np.arange(max(low, self.start), min(high, self.stop))
        return every[(self.rank(every) >= self.first) & (self.rank(every) < self.first + self.fed)]

    def rank(self, positions: Array) -> Array:
        """Return the rank that trains on each position."""
        return (positions - self.start) % self.step // self.batch_size

    def takers(self, chunk: int) -> set[int]:
        """Return the ranks that get some of a chunk."""
        return set(self.rank(self.positions(chunk)).tolist())

    def runs(self, chunk: int, rank: int) -> Iterator[slice]:
        """Yield which of `positions(chunk)` a rank gets, a slice for each step."""
        positions = self.positions(chunk)
        mine = np.flatnonzero(self.rank(positions) == rank)
        steps = (positions[mine] - self.start) // self.step
        edges = np.flatnonzero(np.diff(steps, prepend=-1, append=-1))
        for begin, end in pairwise(edges.tolist()):
            yield slice(int(mine[begin]), int(mine[end - 1]) + 1)

    def batch(self, number: int, rank: int) -> Array:
        """Return the positions that a rank trains on in the number-th step."""
        begin = self.start + number * self.step + rank * self.batch_size
        return np.arange(begin, begin + self.batch_size)
