import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from raydet import models
from raydet.data.batch import Batch
from raydet.errors import RaydetError
from raydet.losses import YoloXDetectionLoss
from raydet.recipe import Train
from raydet.training.optimization import EMA, PARTS, Schedule, freeze, make_optimizer, train_mode
from raydet.training.step import Step

pytestmark = pytest.mark.usefixtures("one_thread")

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
    assert decayed["factor"] == free["factor"] == 1


def test_frozen_parameters_are_left_out():
    model = small_model()
    model[0].requires_grad_(False)
    (group,) = make_optimizer(model, TRAIN).param_groups
    assert {id(p) for p in group["params"]} == {id(model[1].weight), id(model[1].bias)}


def of_parts(**factors):
    return Train(**{f"{part}_lr": factor for part, factor in factors.items()}, lr=0.01, weight_decay=0.3)


@pytest.mark.parametrize(("decay_all", "groups"), [(False, 6), (True, 3)])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_each_parameter_has_the_factor_of_its_part_and_decay_if_it_is_a_kernel(optimizer, decay_all, groups):
    model = models.get("yolox_n", 3)
    factors = {"backbone": 0.1, "neck": 1.0, "head": 2.0}
    settings = of_parts(**factors).model_copy(update={"optimizer": optimizer, "decay_all": decay_all})
    made = make_optimizer(model, settings).param_groups
    assert len(made) == groups
    of = {id(parameter): (group["factor"], group["weight_decay"]) for group in made for parameter in group["params"]}
    assert sum(len(group["params"]) for group in made) == len(of) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        decay = 0.3 if decay_all or parameter.ndim > 1 else 0
        assert of[id(parameter)] == (factors[name.partition(".")[0]], decay), name


def test_parts_with_the_same_factor_share_their_groups():
    made = make_optimizer(models.get("yolox_n", 3), of_parts(backbone=0.5, neck=2, head=2)).param_groups
    assert sorted((group["factor"], group["weight_decay"]) for group in made) == [
        (0.5, 0),
        (0.5, 0.3),
        (2, 0),
        (2, 0.3),
    ]


def test_the_matrix_of_a_linear_layer_is_decayed_as_kernels_are():
    layer = nn.Linear(3, 2)
    decayed, free = make_optimizer(layer, TRAIN).param_groups
    assert decayed["params"] == [layer.weight]
    assert free["params"] == [layer.bias]
    assert (decayed["weight_decay"], free["weight_decay"]) == (TRAIN.weight_decay, 0)


def test_what_is_in_none_of_the_parts_has_the_factor_one():
    model = models.get("yolox_n", 3)
    model.temperature = nn.Parameter(torch.ones(1))
    settings = of_parts(backbone=0.1, neck=0, head=2)
    freeze(model, settings)
    (mine,) = (
        group
        for group in make_optimizer(model, settings).param_groups
        if any(parameter is model.temperature for parameter in group["params"])
    )
    assert (len(mine["params"]), mine["factor"], mine["weight_decay"]) == (1, 1, 0)


def some_batch(seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (4, 3, 64, 64), generator=generator, dtype=torch.uint8)
    boxes = torch.tensor([[12.0, 20, 16, 16], [40, 24, 40, 30], [32, 32, 60, 60], [50, 50, 20, 24]])
    image_and_class = torch.tensor([[image, image % 3] for image in range(4)]).repeat_interleave(4, dim=0)
    targets = torch.cat((image_and_class, boxes.repeat(4, 1)), dim=1)
    return Batch(images, targets, torch.arange(4), torch.arange(4))


def three_steps(**factors):
    """The model, its state before and after."""
    torch.manual_seed(0)
    model, settings = models.get("yolox_n", 3), of_parts(**factors)
    freeze(model, settings)
    criterion, optimizer = YoloXDetectionLoss(num_classes=3), make_optimizer(model, settings)
    step = Step(model, criterion, optimizer, settings, torch.device("cpu"), ranks=1, seed=0)
    train_mode(model, settings)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for seed in range(3):
        assert step(some_batch(seed), lambda images, targets: (images.float(), targets)).finite
    return model, before, model.state_dict()


@pytest.mark.parametrize("frozen", [("backbone",), ("neck",), ("head",), ("backbone", "neck")])
def test_factor_zero_freezes_the_weights_and_norms_of_its_part_and_of_no_other(frozen):
    model, before, after = three_steps(**dict.fromkeys(frozen, 0))
    learned = {name for name, _ in model.named_parameters()}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name in learned if name.partition(".")[0] not in frozen
    }
    for part in PARTS:
        names = [name for name in before if name.startswith(f"{part}.")]
        moved = {name for name in names if not torch.equal(before[name], after[name])}
        assert any(name.endswith("running_var") for name in names)
        assert moved == (set() if part in frozen else set(names))


def test_training_goes_on_after_an_evaluation_with_the_norms_of_frozen_parts_at_rest():
    model, settings = models.get("yolox_n", 3), of_parts(backbone=0)
    model.eval()
    train_mode(model, settings)
    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert {name for name, norm in norms.items() if not norm.training} == {
        n for n in norms if n.startswith("backbone.")
    }
    assert model.training
    assert model.head.training, "its output is that of training"


def test_a_model_with_nothing_left_to_train_is_refused():
    with pytest.raises(RaydetError, match="backbone_lr, neck_lr and head_lr: all are 0"):
        freeze(models.get("yolox_n", 3), of_parts(backbone=0, neck=0, head=0))


@pytest.mark.parametrize("needs_parts", [freeze, train_mode, make_optimizer])
@pytest.mark.parametrize(("part", "factor"), [("backbone", 0), ("neck", 0.5), ("head", 2)])
def test_a_model_without_such_parts_is_refused_by_the_name_of_the_part(needs_parts, part, factor):
    with pytest.raises(RaydetError, match=f"train.{part}_lr is {factor}.*, but Sequential has no part named {part}"):
        needs_parts(small_model(), of_parts(**{part: factor}))


def test_all_may_be_decayed_and_the_optimizer_may_be_adamw():
    settings = Train(optimizer="adamw", lr=0.1, weight_decay=0.3, decay_all=True)
    optimizer = make_optimizer(small_model(), settings)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups] == [(4, 0.3)]


def test_warm_up_in_steps():
    schedule = Schedule.of(Train(epochs=10, warmup_steps=7, cooldown_epochs=0), total=100)
    assert schedule.warmup == 7


# 100 steps in 10 epochs; the highest rate is 1, so that the numbers are shares of it.
RUN = {"epochs": 10, "lr": 1.0, "final_lr": 0.05}
WARM_UPS = [
    ({"warmup_epochs": 2}, {0: 0.05, 9: 0.5, 18: 0.95, 19: 1.0, 20: 1.0}),
    ({"warmup_steps": 4}, {0: 0.25, 1: 0.5, 2: 0.75, 3: 1.0, 4: 1.0}),
    ({"warmup_epochs": 0}, {0: 1.0, 1: 1.0}),
]
LATER = [
    ("constant", {"cooldown_epochs": 3}, {25: 1.0, 69: 1.0, 70: 0.05, 99: 0.05}),
    ("constant", {"cooldown_epochs": 0}, {25: 1.0, 99: 1.0}),
    (
        "step",
        {"cooldown_epochs": 3, "lr_milestones": [4, 5.5]},
        {25: 1.0, 39: 1.0, 40: 0.1, 54: 0.1, 55: 0.01, 69: 0.01, 70: 0.01, 99: 0.01},
    ),
    ("step", {"cooldown_epochs": 3, "lr_milestones": [5]}, {49: 1.0, 50: 0.1, 69: 0.1, 70: 0.05, 99: 0.05}),
    (
        "step",
        {"cooldown_epochs": 3, "lr_milestones": [5, 9], "lr_gamma": 0.5},
        {49: 1.0, 50: 0.5, 69: 0.5, 70: 0.05, 90: 0.05, 99: 0.05},
    ),
    ("step", {"cooldown_epochs": 0, "lr_milestones": []}, {25: 1.0, 99: 1.0}),
]


@pytest.mark.parametrize(("warm_up", "early"), WARM_UPS, ids=["epochs", "steps", "none"])
@pytest.mark.parametrize(("kind", "settings", "late"), LATER)
def test_steps_and_constants(kind, settings, late, warm_up, early):
    """A cooldown never raises the rate: what is lower already stays."""
    schedule = Schedule.of(Train(**RUN, **warm_up, **settings, schedule=kind), total=100)
    expected = {**early, **late}
    assert {step: schedule(step) for step in expected} == pytest.approx(expected)


COSINES = [
    # From 20 to 70, from 4 to 70, and from 0 to 100: a third of the way has (1 + cos 60°) / 2 = 3 / 4 of the height.
    ({"warmup_epochs": 2, "cooldown_epochs": 3}, {45: 0.525, 70: 0.05, 99: 0.05}),
    ({"warmup_steps": 4, "cooldown_epochs": 3}, {26: 0.7625, 37: 0.525, 48: 0.2875, 70: 0.05, 99: 0.05}),
    ({"warmup_epochs": 0, "cooldown_epochs": 0}, {25: 0.860876, 50: 0.525, 75: 0.189124, 99: 0.050234}),
]


@pytest.mark.parametrize(
    ("settings", "early", "late"),
    [(settings, early, late) for (settings, late), (_, early) in zip(COSINES, WARM_UPS, strict=True)],
    ids=["epochs", "steps", "none"],
)
def test_cosines(settings, early, late):
    schedule = Schedule.of(Train(**RUN, **settings), total=100)
    # Where there is no warm-up, the second step is on the cosine already.
    expected = {**early, **late}
    assert {step: schedule(step) for step in expected} == pytest.approx(expected, rel=1e-3)


def fractions(low, high):
    return [low + (high - low) * part / 400 for part in range(401)]


@pytest.mark.parametrize("kind", ["cosine", "step", "constant"])
@pytest.mark.parametrize(("warm_up", "_"), WARM_UPS, ids=["epochs", "steps", "none"])
def test_smaller_steps_than_planned_never_raise_the_rate_after_the_warm_up(kind, warm_up, _):
    settings = Train(**RUN, **warm_up, schedule=kind, lr_milestones=[4, 5.5], cooldown_epochs=3)
    schedule = Schedule.of(settings, total=100)
    rates = [schedule(step) for step in fractions(schedule.warmup, 100)]
    assert all(earlier >= later for earlier, later in pairwise(rates))
    assert rates[0] == 1.0


@pytest.mark.parametrize(("warm_up", "_"), WARM_UPS[:2], ids=["epochs", "steps"])
def test_smaller_steps_than_planned_rise_steadily_in_the_warm_up(warm_up, _):
    schedule = Schedule.of(Train(**RUN, **warm_up, cooldown_epochs=3), total=100)
    rates = [schedule(step) for step in fractions(0, schedule.warmup - 1)]
    assert all(earlier < later for earlier, later in pairwise(rates))


@pytest.mark.parametrize("warm_up", [{"warmup_epochs": 2}, {"warmup_steps": 4}, {"warmup_steps": 1}])
def test_no_rate_is_above_the_highest(warm_up):
    """As when some workers are gone, and steps are smaller than those that were planned."""
    schedule = Schedule.of(Train(**RUN, **warm_up, cooldown_epochs=3), total=100)
    assert max(schedule(step) for step in fractions(0, 100)) <= 1.0


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
