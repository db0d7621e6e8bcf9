import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from raydet.recipe import Train
from raydet.training.optimization import EMA, Schedule, make_optimizer

TRAIN = Train(epochs=10, lr=0.1, warmup_epochs=2, cooldown_epochs=3, final_lr=0.05)


def small_model():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


def test_schedule_is_a_ramp_a_half_cosine_and_a_plateau():
    schedule = Schedule.of(TRAIN, total=100)
    assert (schedule.warmup, schedule.cooldown) == (20, 30)
    rates = [schedule(step) for step in range(100)]
    assert rates[:20] == pytest.approx([0.1 * (step + 1) / 20 for step in range(20)])
    assert rates[20] == pytest.approx(0.1)
    assert rates[45] == pytest.approx((0.1 + 0.005) / 2), "half-way down the cosine"
    assert rates[70:] == pytest.approx([0.005] * 30)
    assert all(earlier >= later for earlier, later in pairwise(rates[20:]))


@pytest.mark.parametrize("total", [1, 2, 3, 10])
@pytest.mark.parametrize(("warmup", "cooldown"), [(0, 0), (5, 15), (100, 0), (0, 100)])
def test_a_short_run_shortens_warm_up_and_cooldown_to_half_of_it(total, warmup, cooldown):
    settings = Train(epochs=1, lr=0.1, warmup_epochs=warmup, cooldown_epochs=cooldown)
    schedule = Schedule.of(settings, total)
    assert schedule.warmup + schedule.cooldown <= total / 2 + 1
    assert all(0 < schedule(step) <= 0.1 for step in range(total))


def test_biases_and_norms_are_not_decayed():
    model = small_model()
    decayed, free = make_optimizer(model, TRAIN).param_groups
    assert decayed["params"] == [model[0].weight]
    assert decayed["weight_decay"] == TRAIN.weight_decay
    assert {id(p) for p in free["params"]} == {id(model[0].bias), id(model[1].weight), id(model[1].bias)}
    assert free["weight_decay"] == 0
    assert decayed["nesterov"]


def test_frozen_parameters_are_left_out():
    model = small_model()
    model[0].requires_grad_(False)
    assert [len(group["params"]) for group in make_optimizer(model, TRAIN).param_groups] == [0, 2]


def test_all_may_be_decayed_and_the_optimizer_may_be_adamw():
    settings = Train(optimizer="adamw", lr=0.1, weight_decay=0.3, decay_all=True)
    optimizer = make_optimizer(small_model(), settings)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups] == [(1, 0.3), (3, 0.3)]


def test_warm_up_in_steps():
    schedule = Schedule.of(Train(epochs=10, warmup_steps=7, cooldown_epochs=0), total=100)
    assert schedule.warmup == 7


@pytest.mark.parametrize(
    ("rise", "decay_after"),
    [
        ("exp", lambda step: 0.9 * (1 - math.exp(-15 * step / 20))),
        ("threshold", lambda step: min(0.9, (1 + step) / (10 + step))),
        ("constant", lambda step: 0.9),
    ],
)
def test_moving_average_is_the_sum_it_stands_for(rise, decay_after):
    model = small_model()
    total = 20
    average = EMA(model, Train(ema_decay=0.9, ema_ramp=15.0, ema_rise=rise), total)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for step in range(1, total + 1):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model(torch.randn(2, 3, 4, 4))  # moves the norm's statistics
        average.update(step)
        share = decay_after(step)
        for name, tensor in model.state_dict().items():
            expected[name] = (
                share * expected[name] + (1 - share) * tensor if tensor.is_floating_point() else tensor.clone()
            )
    state = average.model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor)
    assert not average.model.training
    assert not any(p.requires_grad for p in average.model.parameters())
