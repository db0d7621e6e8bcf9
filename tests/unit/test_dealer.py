"""Who deals the blocks of a validation: every block once a round, also to a rank that is late."""

import pytest

from raydet.data.shares import Share
from raydet.data.stream import DataTasks, _EvalDealer


@pytest.fixture
def dealer(monkeypatch):
    monkeypatch.setattr(_EvalDealer, "_execute", lambda self: iter("abc"))
    return _EvalDealer(["samples"], Share(0, 3, 3, 1, 0, 1, 1), DataTasks(), part=1, near=None)


def test_a_round_ends_and_a_higher_number_begins_anew(dealer):
    assert [dealer.next(1) for _ in range(4)] == [["a"], ["b"], ["c"], []]
    assert [dealer.next(2) for _ in range(4)] == [["a"], ["b"], ["c"], []]


def test_a_rank_that_is_late_with_a_round_gets_nothing_more_of_it(dealer):
    for _ in range(4):
        dealer.next(1)
    assert dealer.next(2) == ["a"]
    assert dealer.next(1) == []
    assert [dealer.next(2) for _ in range(3)] == [["b"], ["c"], []]
