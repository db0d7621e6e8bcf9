"""Steps on two ranks, which are processes, against the same on one."""

import math
import os
import socket
from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.multiprocessing import spawn

from raydet.data.batch import Batch
from raydet.losses import YoloXDetectionLoss
from tests.unit.test_step import (
    LEAST_MOVED,
    LOSSES,
    MOST,
    assert_same_update,
    criterion_of,
    everything,
    exact_criterion,
    exact_model,
    make_step,
    preparation,
    small_detector,
    some_batch,
    some_model,
    spoiled,
    weights,
)

pytestmark = pytest.mark.usefixtures("one_thread")

RANKS = 2
SHARE = MOST // RANKS
# Some images of each rank have no object, and none of the second rank's last part has.
EMPTY = (1, 12, 13, 14, 15)
COMPARED = ("yolox-l1", "yolox-fast", "ppyoloe-task-aligned", "ssd", "dfine")
CASES = [(loss, size) for loss in COMPARED for size in (None, 4)]
BAD_CASES = [("yolox", None), ("ssd", None), ("ppyoloe-task-aligned", None), ("yolox", 2)]
ASKED = (True, False, True)


def share_of(batch, rank):
    """A rank's images of a batch, and its targets."""
    size = len(batch.images) // RANKS
    mine = batch.targets[batch.targets[:, 0] // size == rank].clone()
    mine[:, 0] -= size * rank
    rows = slice(size * rank, size * (rank + 1))
    return Batch(batch.images[rows], mine, batch.positions[rows], batch.rows[rows])


def same_on_all_ranks(tensors):
    mine = torch.cat([tensor.flatten().double() for tensor in tensors])
    others = [torch.empty_like(mine) for _ in range(RANKS)]
    dist.all_gather(others, mine)
    return torch.equal(*others)


def _good_step(rank, case, size):
    model = exact_model(LOSSES[case][0])
    step, _ = make_step(model, exact_criterion(model, case), RANKS, micro_batch_size=size)
    outcome = step(share_of(some_batch(MOST, EMPTY), rank), preparation(model))
    agree = same_on_all_ranks(model.parameters())
    return weights(model) if rank == 0 else None, outcome, agree


def _bad_step(rank, case, size):
    """Between good ones, with a NaN in an image of the second rank."""
    name, kind, arguments = LOSSES[case]
    model = some_model(name)
    step, optimizer = make_step(
        model, criterion_of(model, kind, **arguments), RANKS, lr=1e-3, momentum=0.9, micro_batch_size=size
    )
    prepare, batch = preparation(model), share_of(some_batch(8), rank)
    step(batch, prepare)
    before = everything(model, optimizer)
    outcome = step(batch, spoiled(prepare, 1) if rank == 1 else prepare, ASKED if rank == 0 else (False,) * 3)
    after = everything(model, optimizer)
    changed = [key for key, tensor in after.items() if not torch.equal(tensor, before[key])]
    next_one = step(batch, prepare, (False,) * 3)
    agree = same_on_all_ranks(model.parameters())
    return outcome, changed, next_one, agree


def _small_step(rank, hook=None, scale=None):
    """With an infinite gradient on the second rank, or a loss that is scaled too far on both."""
    model = small_detector()
    step, optimizer = make_step(
        model, criterion_of(model, YoloXDetectionLoss), RANKS, precision="fp16" if scale else "fp32"
    )
    if scale:
        step.scaler.load_state_dict({**step.scaler.state_dict(), "scale": scale})
    if hook and rank == 1:
        next(model.parameters()).register_hook(lambda gradient: gradient * hook)
    before = everything(model, optimizer)
    outcome = step(share_of(some_batch(8), rank), preparation(model))
    after = everything(model, optimizer)
    return outcome, [key for key, tensor in after.items() if not torch.equal(tensor, before[key])], step.scaler


def _asked(rank, given):
    model = small_detector()
    step, _ = make_step(model, criterion_of(model, YoloXDetectionLoss), RANKS)
    return step(share_of(some_batch(4), rank), preparation(model), given if rank == 0 else (False,) * len(given)).asked


def _exchanges(rank, size):
    """How often a step has the ranks exchange gradients."""
    model, calls = small_detector(), []
    step, _ = make_step(model, criterion_of(model, YoloXDetectionLoss), RANKS, micro_batch_size=size)

    def counted(group, bucket):
        calls.append(bucket.index())
        return allreduce_hook(group, bucket)

    step._parallel.register_comm_hook(None, counted)
    step(share_of(some_batch(MOST), rank), preparation(model))
    return len(calls)


FLAGS = [(), (True,), (False, False), ASKED]


def _rank(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(RANKS))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {("good", *case): _good_step(rank, *case) for case in CASES}
    found |= {("bad", *case): _bad_step(rank, *case) for case in BAD_CASES}
    found["infinite gradient"] = _small_step(rank, hook=torch.inf)
    found["overflow"] = _small_step(rank, scale=2.0**40)
    found |= {("asked", given): _asked(rank, given) for given in FLAGS}
    found |= {("exchanges", size): _exchanges(rank, size) for size in (None, 2)}
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of the two ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(_rank, (port, folder), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


@cache
def _one_rank(case):
    model = exact_model(LOSSES[case][0])
    before = weights(model)
    step, _ = make_step(model, exact_criterion(model, case))
    outcome = step(some_batch(MOST, EMPTY), preparation(model))
    return before, weights(model), outcome


@pytest.mark.parametrize(("case", "size"), CASES)
def test_two_ranks_with_eight_images_each_make_the_step_of_one_with_sixteen(ranks, case, size):
    before, after, expected = _one_rank(case)
    assert_same_update(before, after, ranks[0]["good", case, size][0], least=LEAST_MOVED[case])
    for found in ranks:
        _, outcome, agree = found["good", case, size]
        assert agree, "the ranks have the same weights"
        assert outcome.finite
        torch.testing.assert_close(outcome.components, expected.components, rtol=1e-5, atol=1e-6)
        assert outcome.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
    mean = sum(found["good", case, size][1].loss for found in ranks) / RANKS
    torch.testing.assert_close(mean, expected.loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("case", "size"), BAD_CASES)
def test_all_ranks_skip_the_step_in_which_the_loss_of_one_is_not_finite(ranks, case, size):
    for found in ranks:
        outcome, changed, next_one, agree = found["bad", case, size]
        assert (outcome.finite, outcome.overflow) == (False, False)
        assert changed == []
        assert next_one.finite
        assert agree, "the ranks have the same weights"
        assert outcome.asked == ASKED
    assert ranks[1]["bad", case, size][0].suspect


@pytest.mark.parametrize(("case", "size"), BAD_CASES)
def test_only_the_rank_whose_batch_it_was_is_suspect(ranks, case, size):
    assert [found["bad", case, size][0].suspect for found in ranks] == [False, True]


def test_an_infinite_gradient_may_come_from_any_rank(ranks):
    for found in ranks:
        outcome, changed, _ = found["infinite gradient"]
        assert outcome.loss.isfinite()
        assert not math.isfinite(outcome.grad_norm)
        assert (outcome.finite, outcome.overflow, outcome.suspect) == (False, False, True)
        assert changed == []


def test_an_overflow_is_one_on_all_ranks(ranks):
    for found in ranks:
        outcome, changed, scaler = found["overflow"]
        assert (outcome.finite, outcome.overflow, outcome.suspect) == (False, True, False)
        assert changed == []
        assert scaler.get_scale() == 2.0**39


@pytest.mark.parametrize("given", FLAGS)
def test_what_the_first_rank_asks_reaches_all(ranks, given):
    assert [found["asked", given] for found in ranks] == [given] * RANKS


def test_parts_of_a_step_cost_no_more_exchanges_of_gradients(ranks):
    for found in ranks:
        assert found["exchanges", 2] == found["exchanges", None] > 0
