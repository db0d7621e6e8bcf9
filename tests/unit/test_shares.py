import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raydet.data.shares import Share, divide, enough


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


@pytest.mark.parametrize(
    ("nodes", "most", "streams"),
    [
        ("a", 8, [1]),
        ("aaaabbbb", 4, [4, 4]),  # a stream for each node
        ("aaaabbbb", 2, [2, 2, 2, 2]),
        ("aaaaabbb", 3, [2, 3, 3]),  # parts of a node are as equal as can be
        ("aaaabb", 4, [4, 2]),
        ("abcdef", 4, [4, 2]),  # small nodes share one
        ("aabbccdd", 4, [4, 4]),
        ("aaaabbbb", 100, [8]),
    ],
)
def test_the_ranks_of_a_node_have_streams_of_their_own_unless_several_nodes_fit_into_one(nodes, most, streams):
    assert [len(fed) for fed in divide(nodes, most)] == streams


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 20))
def test_each_rank_is_fed_by_one_stream_and_none_feeds_too_many(sizes, most):
    nodes = [str(number) for number, size in enumerate(sizes) for _ in range(size)]
    streams = divide(nodes, most)
    assert [rank for fed in streams for rank in fed] == list(range(len(nodes)))
    assert all(0 < len(fed) <= most for fed in streams)


@pytest.mark.parametrize(
    ("nodes", "batch", "ranks"),
    [
        ("aaaaaaaabbbbbbbb", 16, 8),  # a node's ranks
        ("aaab", 64, 3),  # the largest node's
        ("abcd", 16, 4),  # four nodes take a chunk together
        ("aabb", 20, 4),
        ("a", 1, 64),
    ],
)
def test_a_stream_feeds_a_node_or_enough_for_a_chunk(nodes, batch, ranks):
    assert enough(nodes, batch, 64) == ranks


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=4), min_size=1, max_size=4),
    st.integers(1, 30),
    st.integers(1, 70),
    st.integers(0, 300),
    st.data(),
)
def test_no_position_is_missed_or_made_twice_when_nodes_come_and_go(starts, batch, chunk, position, data):
    """Each start has its own nodes, and goes on where the one before was cut off, with a batch of as many samples."""
    begin, trained = position, []
    for sizes in starts:
        nodes = [str(number) for number, size in enumerate(sizes) for _ in range(size)]
        most, steps = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
        stop = position + 2 * steps * batch * len(nodes)  # the start was to go further than it got
        for number in range(steps):
            for fed in divide(nodes, most):
                share = Share(position, stop, batch, len(nodes), fed.start, len(fed), chunk)
                for rank in fed:
                    parts = [share.positions(each)[run] for each in share.chunks() for run in share.runs(each, rank)]
                    got = np.concatenate(parts)[number * batch :][:batch]
                    assert got.tolist() == share.batch(number, rank).tolist()
                    trained += got.tolist()
        position += steps * batch * len(nodes)
    assert trained == list(range(begin, position)), "step by step, rank by rank: in order"
