"""A step in parts, clipped, guarded, in half precision; tests/unit/test_ranks.py has several ranks."""

import copy
import math
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from raydet import models
from raydet.data.batch import Batch
from raydet.errors import RaydetError
from raydet.losses import DFineLoss, PPYoloELoss, SSDLoss, YoloXDetectionLoss, YoloXFastDetectionLoss
from raydet.models import Detector, YoloXHead
from raydet.models.blocks import Conv
from raydet.recipe import Eval, Recipe, Train
from raydet.runs.checkpoint import Config
from raydet.runs.log import Recorder
from raydet.training.job import Job
from raydet.training.optimization import make_optimizer
from raydet.training.step import Step, _precision
from raydet.training.validation import Validation

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
CLASSES, SIDE = 4, 64
MOST = 16  # images of a batch here

# Model, loss and settings of each.
LOSSES = {
    "yolox": ("yolox_n", YoloXDetectionLoss, {}),
    "yolox-l1": ("yolox_n", YoloXDetectionLoss, {"use_l1": True}),
    "yolox-fast": ("yolox_n", YoloXFastDetectionLoss, {"use_l1": True, "iou_type": "giou"}),
    "ppyoloe-atss": ("ppyoloe_s", PPYoloELoss, {"use_static_assigner": True}),
    "ppyoloe-atss-focal": ("ppyoloe_s", PPYoloELoss, {"use_static_assigner": True, "use_varifocal_loss": False}),
    "ppyoloe-task-aligned": ("ppyoloe_s", PPYoloELoss, {"use_static_assigner": False}),
    "ppyoloe-task-aligned-focal": (
        "ppyoloe_s",
        PPYoloELoss,
        {"use_static_assigner": False, "use_varifocal_loss": False},
    ),
    "ssd": ("ssd_lite_mobilenet_v2", SSDLoss, {"alpha": 0.7}),
    "dfine": ("dfine_n", DFineLoss, {}),
}
LEAST_MOVED = {case: 1e-4 if case == "dfine" else 1e-3 for case in LOSSES}  # by a step of the learning rate 1e-5


def some_batch(count, empty=(), seed=1):
    """Images of noise with one to three objects each, but for the empty ones."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (MOST, SIDE, SIDE, 3), generator=generator, dtype=torch.uint8)[:count]
    owners = torch.tensor([image for image in range(count) if image not in empty for _ in range(1 + image % 3)])
    objects = len(owners)
    targets = torch.cat(
        (
            owners[:, None].float(),
            torch.randint(0, CLASSES, (objects, 1), generator=generator).float(),
            SIDE * (0.2 + 0.6 * torch.rand(objects, 2, generator=generator)),
            SIDE * (0.1 + 0.4 * torch.rand(objects, 2, generator=generator)),
        ),
        dim=1,
    )
    return Batch(images.permute(0, 3, 1, 2), targets, torch.arange(count), torch.arange(count))


@cache
def _calibrated(name):
    torch.manual_seed(0)
    model = models.get(name, CLASSES, image_size=(SIDE, SIDE)).train()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "_preds." in key:
                parameter.normal_(std=0.1)
        for norm in norms:
            norm.momentum = 1.0
        model(models.family_of(model).preprocessing(some_batch(MOST).images))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model


def some_model(name):
    """A model whose predictions differ from point to point, so that none is assigned by the last bit of a number."""
    return copy.deepcopy(_calibrated(name))


def exact_model(name):
    """The same in double precision, norms in evaluation mode: what images give does not depend on their neighbours."""
    model = some_model(name).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def criterion_of(model, kind, **settings):
    return kind(**models.family_of(model).loss_arguments(model), **settings).float()


def exact_criterion(model, case):
    _, kind, settings = LOSSES[case]
    return criterion_of(model, kind, **settings)


def preparation(model):
    """What `Step` is to make the model's input with."""
    preprocessing, dtype = models.family_of(model).preprocessing, next(model.parameters()).dtype
    return lambda images, targets: (preprocessing(images).to(dtype), targets)


def make_step(model, criterion, ranks=1, **settings):
    given = Train(**{"lr": 1e-5, "momentum": 0.0, "weight_decay": 0.0, **settings})
    optimizer = make_optimizer(model, given)
    return Step(model, criterion, optimizer, given, CPU, ranks, seed=0), optimizer


def weights(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def assert_same_update(before, mine, theirs, share=1e-5, least=1e-3):
    """Each tensor moved by the same in two steps from the same weights, to a share of how far it moved. One of them has
    moved by at least so much."""
    furthest = max((m - b).abs().max() for m, b in zip(mine, before, strict=True))
    assert furthest > least
    for first, second, third in zip(before, mine, theirs, strict=True):
        assert (third - second).norm() <= share * (second - first).norm() + 1e-9 * furthest


# ---------------------------------------------------------------- parts

# The first part of two has no object at all, and parts of four leave one of two.
UNEVEN = {"count": 10, "empty": (0, 1)}


@cache
def _whole(case):
    """The step of the whole batch: the weights before and after, and the outcome."""
    model = exact_model(LOSSES[case][0])
    before = weights(model)
    step, _ = make_step(model, exact_criterion(model, case))
    outcome = step(some_batch(**UNEVEN), preparation(model))
    return before, weights(model), outcome


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", LOSSES)
def test_the_parts_of_a_batch_give_the_step_of_the_whole(case, size):
    before, whole, expected = _whole(case)
    model, batch = exact_model(LOSSES[case][0]), some_batch(**UNEVEN)
    step, _ = make_step(model, exact_criterion(model, case), micro_batch_size=size)
    targets = batch.targets.clone()
    outcome = step(batch, preparation(model))
    assert_same_update(before, whole, weights(model), least=LEAST_MOVED[case])
    torch.testing.assert_close(outcome.loss, expected.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(outcome.components, expected.components, rtol=1e-5, atol=1e-6)
    assert outcome.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
    assert outcome.finite
    assert torch.equal(batch.targets, targets), "the batch is not to be written to"


@pytest.mark.parametrize("case", ["yolox-l1", "yolox-fast", "ppyoloe-task-aligned", "ssd", "dfine"])
def test_a_batch_that_fits_in_one_part_is_the_whole(case):
    _, whole, expected = _whole(case)
    model = exact_model(LOSSES[case][0])
    step, _ = make_step(model, exact_criterion(model, case), micro_batch_size=10)
    outcome = step(some_batch(**UNEVEN), preparation(model))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(weights(model), whole, strict=True))
    assert outcome.grad_norm == expected.grad_norm
    torch.testing.assert_close(outcome.components, expected.components)


@pytest.mark.parametrize("case", ["yolox", "ssd", "dfine"])
def test_no_objects_in_any_part(case):
    results = []
    for size in (None, 2):
        model = exact_model(LOSSES[case][0])
        step, _ = make_step(model, exact_criterion(model, case), micro_batch_size=size, lr=0.1)
        outcome = step(some_batch(4, empty=range(4)), preparation(model))
        assert outcome.finite
        results.append((weights(model), outcome))
    (whole, expected), (parts, outcome) = results
    torch.testing.assert_close(outcome.components, expected.components)
    for mine, theirs in zip(parts, whole, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-9)


def test_the_second_step_in_parts_is_as_the_second_of_wholes():
    """Nothing of a step's sums is left in the next."""
    results = []
    for size in (None, 2):
        model = exact_model("yolox_n")
        step, _ = make_step(model, exact_criterion(model, "yolox"), micro_batch_size=size, momentum=0.9)
        step(some_batch(4, seed=1), preparation(model))
        before = weights(model)
        step(some_batch(6, seed=2), preparation(model))
        results.append(weights(model))
    assert_same_update(before, *results, share=1e-4)


@pytest.mark.parametrize("count", [4, 5])
def test_objectness_over_all_points_cannot_be_trained_in_parts(count):
    """Its terms have different divisors, which no one number corrects."""
    model = exact_model("yolox_n")
    criterion = criterion_of(model, YoloXFastDetectionLoss, obj_loss_fix=True)
    step, _ = make_step(model, criterion, micro_batch_size=2)
    before = weights(model)
    with pytest.raises(ValueError, match="YoloXFastDetectionLoss divides its terms by different numbers"):
        step(some_batch(count), preparation(model))
    assert all(torch.equal(mine, first) for mine, first in zip(weights(model), before, strict=True))


@pytest.mark.parametrize("count", [1, 2])
def test_objectness_over_all_points_needs_no_parts_where_the_batch_fits_in_one(count):
    after = []
    for size in (None, 2):
        model = exact_model("yolox_n")
        criterion = criterion_of(model, YoloXFastDetectionLoss, obj_loss_fix=True)
        step, _ = make_step(model, criterion, micro_batch_size=size)
        assert step(some_batch(count), preparation(model)).finite
        after.append(weights(model))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*after, strict=True))


def test_no_part_is_a_single_image_where_parts_can_be_more_even():
    """SSD's last map has one cell an image: its norm needs two of them."""
    model = some_model("ssd_lite_mobilenet_v2")
    step, _ = make_step(model, criterion_of(model, SSDLoss), micro_batch_size=4)
    assert step(some_batch(5), preparation(model)).finite


class Doubled(PPYoloELoss):
    """A loss whose sums are no longer all that it is."""

    def forward(self, outputs, targets):
        loss, components = super().forward(outputs, targets)
        return 2 * loss, 2 * components


class Foreign(nn.Module):
    """A loss of which only its results are known."""

    def __init__(self, num_classes):
        super().__init__()
        self.loss = YoloXDetectionLoss(num_classes=num_classes)

    def forward(self, outputs, targets):
        return self.loss(outputs, targets)


@pytest.mark.parametrize(("name", "kind"), [("ppyoloe_s", Doubled), ("yolox_n", Foreign)])
def test_parts_of_a_loss_that_overrides_forward_are_averaged_by_their_images(name, kind):
    batch, twin = some_batch(**UNEVEN), exact_model(name)
    before, criterion, prepare = weights(twin), criterion_of(twin, kind), preparation(twin)
    expected = []
    for first, count in ((0, 4), (4, 4), (8, 2)):
        mine = batch.targets[(batch.targets[:, 0] >= first) & (batch.targets[:, 0] < first + count)].clone()
        mine[:, 0] -= first
        inputs, _ = prepare(batch.images[first : first + count], mine)
        loss, components = criterion(twin(inputs), mine)
        (loss * count / 10).backward()
        expected.append(torch.cat((loss.detach()[None], components)) * count / 10)
    torch.optim.SGD(twin.parameters(), 1e-5).step()

    model = exact_model(name)
    step, _ = make_step(model, criterion, micro_batch_size=4)
    outcome = step(batch, preparation(model))
    assert_same_update(before, weights(twin), weights(model))
    torch.testing.assert_close(torch.cat((outcome.loss[None], outcome.components)), sum(expected))


# ---------------------------------------------------------------- clipping


def _length(after, before):
    return torch.cat([(a - b).flatten() for a, b in zip(after, before, strict=True)]).norm().item()


@pytest.mark.parametrize("size", [None, 2])
def test_a_longer_gradient_is_clipped_and_a_shorter_one_is_not(size):
    def step_of(clip):
        model = exact_model("yolox_n")
        before = weights(model)
        step, _ = make_step(
            model, exact_criterion(model, "yolox-l1"), micro_batch_size=size, lr=1e-3, clip_grad_norm=clip
        )
        outcome = step(some_batch(4), preparation(model))
        return weights(model), _length(weights(model), before), outcome.grad_norm

    free, length, norm = step_of(None)
    assert length == pytest.approx(1e-3 * norm, rel=1e-6), "the update of plain SGD is lr · gradient"
    clipped, shorter, same_norm = step_of(norm / 10)
    assert shorter == pytest.approx(1e-3 * norm / 10, rel=1e-6)
    assert same_norm == norm, "it is that before clipping"
    start = weights(exact_model("yolox_n"))
    for mine, theirs, first in zip(clipped, free, start, strict=True):
        torch.testing.assert_close(mine - first, (theirs - first) / 10, rtol=1e-5, atol=1e-9)
    within, _, _ = step_of(norm * 1.01)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(within, free, strict=True))


# ---------------------------------------------------------------- what is not finite


def spoiled(prepare, number, image=0):
    """Make the input with a NaN in an image of the batch's part of this number."""
    calls = []

    def spoil(images, targets):
        inputs, targets = prepare(images, targets)
        calls.append(None)
        if len(calls) == number:
            inputs[image, 1, 5, 5] = torch.nan
        return inputs, targets

    return spoil


def everything(model, optimizer):
    """Weights, norm statistics and the optimizer's state."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"{number}.{name}": value.clone() for name, value in state.items()}
    return tensors


def assert_equal(mine, theirs):
    assert mine.keys() == theirs.keys()
    assert [name for name, tensor in mine.items() if not torch.equal(tensor, theirs[name])] == []


def _training(case, **settings):
    """Norms follow their batches here."""
    name, kind, arguments = LOSSES[case]
    model = some_model(name)
    step, optimizer = make_step(
        model, criterion_of(model, kind, **arguments), **{"lr": 1e-3, "momentum": 0.9, **settings}
    )
    return model, step, optimizer, preparation(model)


@pytest.mark.parametrize(
    ("case", "settings", "part"),
    [
        ("yolox-l1", {}, 1),
        ("yolox-fast", {"optimizer": "adamw"}, 1),
        ("ppyoloe-atss", {"clip_grad_norm": 1.0}, 1),
        ("ssd", {}, 1),
        ("yolox", {"micro_batch_size": 2}, 1),
        ("ppyoloe-task-aligned", {"micro_batch_size": 2}, 2),
        ("ssd", {"micro_batch_size": 2}, 2),
    ],
)
def test_an_image_that_is_not_finite_leaves_no_trace(case, settings, part):
    """After a good step, so that momentum and statistics are not those of a beginning; nor is the next step another."""
    model, step, optimizer, prepare = _training(case, **settings)
    assert step(some_batch(4), prepare).finite
    twin, never, its_optimizer = copy.deepcopy((model, step, optimizer))
    outcome = step(some_batch(4, seed=2), spoiled(prepare, part))
    assert (outcome.finite, outcome.overflow, outcome.suspect) == (False, False, True)
    before = everything(twin, its_optimizer)
    assert_equal(everything(model, optimizer), before)

    for each in (step, never):
        assert each(some_batch(4, seed=3), prepare).finite
    assert_equal(everything(model, optimizer), everything(twin, its_optimizer))
    moved = [not torch.equal(tensor, before[name]) for name, tensor in everything(model, optimizer).items()]
    assert sum(moved) > len(moved) / 2


@pytest.mark.parametrize("size", [None, 2])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_an_infinite_gradient_of_a_finite_loss_leaves_no_trace(value, size):
    model, step, optimizer, prepare = _training("yolox", micro_batch_size=size)
    assert step(some_batch(4), prepare).finite
    twin, never, its_optimizer = copy.deepcopy((model, step, optimizer))
    hook = next(model.neck.parameters()).register_hook(lambda gradient: gradient * value)
    outcome = step(some_batch(4, seed=2), prepare)
    hook.remove()
    assert outcome.loss.isfinite()
    assert not math.isfinite(outcome.grad_norm)
    assert (outcome.finite, outcome.overflow, outcome.suspect) == (False, False, True)
    assert_equal(everything(model, optimizer), everything(twin, its_optimizer))
    for each in (step, never):
        assert each(some_batch(4, seed=3), prepare).finite
    assert_equal(everything(model, optimizer), everything(twin, its_optimizer))


def test_a_norm_that_averages_over_all_batches_does_not_count_one_that_was_skipped():
    """With momentum None the n-th batch has a share of 1 / n of the statistics."""

    def of(*batches):
        model = small_detector()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
        step, _ = make_step(model, criterion_of(model, YoloXDetectionLoss), lr=1e-3)
        prepare = preparation(model)
        for seed, good in batches:
            assert step(some_batch(2, seed=seed), prepare if good else spoiled(prepare, 1)).finite == good
        return model.state_dict()

    assert_equal(of((1, True), (2, False), (3, True)), of((1, True), (3, True)))


# ---------------------------------------------------------------- a small detector, where any will do


class Strides(nn.Module):
    """Maps at strides 8, 16 and 32, of one convolution each."""

    out_channels = (8, 8, 8)

    def __init__(self):
        super().__init__()
        self.stem = Conv(3, 8, 3, 4)
        self.levels = nn.ModuleList(Conv(8, 8, 3, 2) for _ in range(3))

    def forward(self, images):
        x, maps = self.stem(images), []
        for level in self.levels:
            x = level(x)
            maps.append(x)
        return maps


def small_detector():
    torch.manual_seed(0)
    backbone = Strides()
    return Detector(backbone, nn.Identity(), YoloXHead(backbone.out_channels, CLASSES, hidden=8)).train()


def test_a_model_whose_norms_keep_no_statistics_is_trained():
    model = small_detector()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.GroupNorm(2, child.num_features))
    assert not list(model.buffers())
    before = weights(model)
    step, _ = make_step(model, criterion_of(model, YoloXDetectionLoss), lr=1e-2)
    assert step(some_batch(2), preparation(model)).finite
    assert _length(weights(model), before) > 0


# ---------------------------------------------------------------- half precision


def _losses(steps, **settings):
    model = small_detector()
    step, _ = make_step(model, criterion_of(model, YoloXDetectionLoss), lr=1e-2, momentum=0.9, **settings)
    outcomes = [step(some_batch(4), preparation(model)) for _ in range(steps)]
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    return [outcome.loss.item() for outcome in outcomes if outcome.finite]


def test_auto_is_single_precision_on_a_cpu():
    assert _losses(2, precision="auto") == _losses(2, precision="fp32")


@pytest.mark.parametrize("size", [None, 2])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_computes_nearly_the_same_and_learns(precision, size):
    losses, (exact,) = _losses(12, precision=precision, micro_batch_size=size), _losses(1, precision="fp32")
    assert losses[0] != exact, "it is not single precision"
    assert losses[0] == pytest.approx(exact, rel=0.01)
    # The lowest, not the last: the loss swings at this learning rate, on each kind of CPU at other steps.
    assert min(losses) < 0.75 * losses[0]


def _in_fp16(scale, size=None):
    model = small_detector()
    step, optimizer = make_step(
        model,
        criterion_of(model, YoloXDetectionLoss),
        lr=1e-2,
        momentum=0.9,
        precision="fp16",
        micro_batch_size=size,
    )
    step.scaler.load_state_dict({**step.scaler.state_dict(), "scale": scale})
    return model, step, optimizer, preparation(model)


@pytest.mark.parametrize("size", [None, 2])
def test_a_loss_that_was_scaled_too_far_is_an_overflow_which_halves_the_scale(size):
    model, step, optimizer, prepare = _in_fp16(2.0**40, size)
    before = everything(model, optimizer)
    outcome = step(some_batch(4), prepare)
    assert (outcome.finite, outcome.overflow, outcome.suspect) == (False, True, False)
    assert outcome.loss.isfinite()
    assert step.scaler.get_scale() == 2.0**39
    assert_equal(everything(model, optimizer), before)
    outcomes = [step(some_batch(4), prepare) for _ in range(36)]
    assert outcomes[0].overflow
    assert outcomes[-1].finite, "it is halved until it fits"
    assert not any(o.suspect for o in outcomes)
    assert outcomes[-1].loss < outcome.loss


def test_the_scale_of_a_loss_is_none_of_its_gradient():
    norms = []
    for scale in (1.0, 2.0**8):
        _, step, _, prepare = _in_fp16(scale)
        norms.append(step(some_batch(4), prepare).grad_norm)
    assert norms[1] == pytest.approx(norms[0], rel=0.05)
    assert norms[1] != norms[0], "the scale has reached the half-precision part"


def test_what_is_not_finite_without_any_scale_is_no_overflow():
    model, step, _, prepare = _in_fp16(1.0)
    next(model.parameters()).register_hook(lambda gradient: gradient * torch.inf)
    outcome = step(some_batch(4), prepare)
    assert outcome.loss.isfinite()
    assert (outcome.finite, outcome.overflow, outcome.suspect) == (False, False, True)


@pytest.mark.parametrize("size", [None, 2])
def test_a_loss_that_is_not_finite_is_no_overflow_whatever_the_scale(size):
    model, step, optimizer, prepare = _in_fp16(2.0**10, size)
    before = everything(model, optimizer)
    outcome = step(some_batch(4), spoiled(prepare, 1))
    assert (outcome.finite, outcome.overflow, outcome.suspect) == (False, False, True)
    assert_equal(everything(model, optimizer), before)
    assert step(some_batch(4), prepare).finite


# ---------------------------------------------------------------- compilation, flags


class OneConvolution(nn.Module):
    """As few kernels as a model for YOLOX's loss can have: each takes seconds to compile."""

    def __init__(self):
        super().__init__()
        self.maps = nn.ModuleList(nn.Conv2d(3, 5 + CLASSES, stride, stride) for stride in (8, 16, 32))
        self.norm = nn.BatchNorm2d(3)

    def forward(self, images):
        x = self.norm(images)
        return [layer(x).permute(0, 2, 3, 1).unsqueeze(1) for layer in self.maps]


@pytest.mark.timeout(900)
@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="torch.compile needs a C++ compiler")
def test_a_compiled_model_makes_the_same_steps():
    def two_steps(**settings):
        torch.manual_seed(0)
        model = OneConvolution()
        step, optimizer = make_step(model, YoloXDetectionLoss(num_classes=CLASSES), lr=1e-3, **settings)
        for seed in (1, 2):
            outcome = step(some_batch(4, seed=seed), lambda images, targets: (images.float(), targets))
            assert outcome.finite
        return everything(model, optimizer), outcome, step

    (compiled, outcome, step), (plain, expected, _) = two_steps(compile=True), two_steps()
    assert isinstance(step._network, torch._dynamo.OptimizedModule)
    for name, tensor in plain.items():
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outcome.components, expected.components, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("asked", [(), (True,), (False, True, False), (False, False, False), (True, True, True)])
@pytest.mark.parametrize("good", [True, False])
def test_what_is_asked_comes_back(asked, good):
    model = small_detector()
    step, _ = make_step(model, criterion_of(model, YoloXDetectionLoss))
    prepare = preparation(model)
    outcome = step(some_batch(2), prepare if good else spoiled(prepare, 1), asked)
    assert outcome.finite == good
    assert outcome.asked == asked
    assert all(type(flag) is bool for flag in outcome.asked)


def test_targets_and_images_reach_the_model_as_they_were_prepared():
    """A `prepare` may change both, as a batch in another size does."""
    seen = []
    model = small_detector()
    model.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].shape))

    def halve(images, targets):
        targets = targets.clone()
        targets[:, 2:] /= 2
        return images[..., ::2, ::2].float(), targets

    step, _ = make_step(model, criterion_of(model, YoloXDetectionLoss), micro_batch_size=3)
    assert step(some_batch(5), halve).finite
    assert seen == [(3, 3, SIDE // 2, SIDE // 2), (2, 3, SIDE // 2, SIDE // 2)]


# ---------------------------------------------------------------- GPUs, as far as a CPU can tell


@pytest.mark.parametrize(
    ("device", "has_bf16", "expected"),
    [("cpu", True, torch.float32), ("cuda", True, torch.bfloat16), ("cuda", False, torch.float16)],
)
def test_automatic_precision_is_one_that_the_device_computes_in(device, has_bf16, expected, monkeypatch):
    """Of a T4 or V100 torch says that it supports bf16, which it emulates."""
    supported = lambda including_emulation=True: has_bf16 or including_emulation  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert _precision(Train(precision="auto"), torch.device(device)) == expected


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB.")


def raises_out_of_memory(*arguments, **named):
    raise OUT_OF_MEMORY


def test_a_batch_that_a_gpu_cannot_hold_is_the_user_s_error():
    model = some_model("yolox_n")
    step, _ = make_step(model, criterion_of(model, YoloXFastDetectionLoss))
    message = r"does not hold 4 images at once: set train.micro_batch_size .* \(CUDA out of memory\)"
    with pytest.raises(RaydetError, match=message):
        step(some_batch(4), raises_out_of_memory)


def test_an_optimizer_that_a_gpu_cannot_hold_is_the_user_s_error(monkeypatch):
    """AdamW makes its state in the first step, when forward and backward have gone well."""
    model = some_model("yolox_n")
    step, optimizer = make_step(model, criterion_of(model, YoloXFastDetectionLoss))
    monkeypatch.setattr(optimizer, "step", raises_out_of_memory)
    with pytest.raises(RaydetError, match="does not hold the state of the optimizer beside the model"):
        step(some_batch(4), preparation(model))


def test_a_validation_that_a_gpu_cannot_hold_is_the_user_s_error(shapes_index):
    class Large(nn.Module):
        forward = raises_out_of_memory

    config = Config("yolox_n", (), (), (64, 64), models.family_of("yolox_n").preprocessing, Eval())
    job = Job(Recipe(), Path(), config, Large(), None, 0, shapes_index)
    validation = Validation(job, 0, CPU, lambda: iter([some_batch(4)]), Recorder(print), lambda: None)
    with pytest.raises(RaydetError, match=r"does not hold 4 images of a validation at once: lower eval\.batch_size"):
        list(validation.outputs(Large(), list))
