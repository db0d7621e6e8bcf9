import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raydet.data.shares import Share


@st.composite
def stretches(draw):
    """A stretch of a training, and its ranks divided among streams."""
    batch, chunk = draw(st.integers(1, 40)), draw(st.integers(1, 70))
    fed = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    start = draw(st.integers(0, 500))
    stop = start + draw(st.integers(1, 8)) * batch * sum(fed)
    return [Share(start, stop, batch, sum(fed), sum(fed[:n]), ranks, chunk) for n, ranks in enumerate(fed)]


@settings(max_examples=300, deadline=None)
@given(stretches())
def test_each_step_has_exactly_its_positions_whatever_the_batch_the_chunk_and_the_start(streams):
    whole = streams[0]
    for stream in streams:
        made = [stream.positions(chunk) for chunk in stream.chunks()]
        assert all(len(positions) for positions in made), "no chunk is asked for in vain"
        for rank in range(stream.first, stream.first + stream.fed):
            got = [
                stream.positions(chunk)[run]
                for chunk in stream.chunks()
                if rank in stream.takers(chunk)
                for run in stream.runs(chunk, rank)
            ]
            batches = np.concatenate(got).reshape(-1, stream.batch_size)
            for number, batch in enumerate(batches):
                assert batch.tolist() == stream.batch(number, rank).tolist()
    every = np.concatenate([stream.positions(chunk) for stream in streams for chunk in stream.chunks()])
    assert sorted(every.tolist()) == list(range(whole.start, whole.stop))


@pytest.mark.parametrize(
    ("batch", "ranks", "start", "blocks"),
    [
        (16, 4, 0, 1),  # a chunk is a block, whatever the batch of a rank is
        (20, 2, 0, 1),
        (64, 8, 0, 1),
        (10, 3, 37, 1),  # nor does it matter where an elastic run goes on
    ],
)
def test_a_rank_reads_chunks_as_large_as_they_are_made(batch, ranks, start, blocks):
    share = Share(start, start + 20 * batch * ranks, batch, ranks, 0, ranks, 64)
    chunks = share.chunks()
    assert len(chunks) == -(-share.stop // 64) - share.start // 64
    assert all(len(share.positions(chunk)) == 64 for chunk in chunks[1:-1])


@pytest.mark.parametrize(
    ("batch", "each", "start", "twice"),
    [
        (64, 8, 0, 0),  # parts of whole chunks: none is made twice
        (64, 1, 0, 0),
        (24, 8, 0, 0),  # 192 = 3 chunks
        (20, 8, 0, 1),  # 160 = 2.5 chunks: at most one a step and edge
        (64, 8, 32, 1),
    ],
)
def test_two_nodes_make_few_chunks_twice(batch, each, start, twice):
    steps = 10
    streams = [Share(start, start + steps * batch * 2 * each, batch, 2 * each, first, each, 64) for first in (0, each)]
    counts = np.bincount(np.concatenate([stream.chunks() for stream in streams]))
    edges = 2 * steps - 1
    assert (counts == 2).sum() <= twice * edges
    assert counts.max() <= 2
