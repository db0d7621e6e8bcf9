import multiprocessing
import os
import socket
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from raydet import models
from raydet.losses import DFineLoss, PPYoloELoss, SSDLoss, YoloXDetectionLoss, YoloXFastDetectionLoss
from raydet.losses.base import PartialLoss
from raydet.outputs import DFineOutput, ssd_default_boxes

pytestmark = pytest.mark.usefixtures("one_thread")

LOSSES = [YoloXDetectionLoss, YoloXFastDetectionLoss]
CLASSES = 4


def raw_maps(batch=3, size=96, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, 1, size // s, size // s, 5 + CLASSES, generator=generator).requires_grad_()
        for s in (8, 16, 32)
    ]


def some_targets(images=(0, 0, 2), size=96, seed=0):
    generator = torch.Generator().manual_seed(seed)
    count = len(images)
    return torch.cat(
        (
            torch.tensor(images, dtype=torch.float32)[:, None],
            torch.randint(0, CLASSES, (count, 1), generator=generator).float(),
            size * (0.2 + 0.6 * torch.rand(count, 2, generator=generator)),
            size * (0.1 + 0.4 * torch.rand(count, 2, generator=generator)),
        ),
        dim=1,
    )


@pytest.mark.parametrize("kind", LOSSES)
def test_components_are_detached_named_and_add_up(kind):
    criterion = kind(num_classes=CLASSES, iou_weight=2, obj_weight=3, cls_weight=4, use_l1=True)
    loss, components = criterion(raw_maps(), some_targets())
    named = dict(zip(criterion.component_names, components.tolist(), strict=True))
    assert list(named) == ["iou", "obj", "cls", "l1", "num_fg", "Loss"]
    assert not components.requires_grad
    expected = 2 * named["iou"] + 3 * named["obj"] + 4 * named["cls"] + named["l1"]
    assert loss.item() == pytest.approx(named["Loss"], rel=1e-6) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", LOSSES)
def test_both_modes_outputs_give_the_same_loss(kind):
    criterion, maps = kind(num_classes=CLASSES), raw_maps()
    expected = criterion(maps, some_targets())[0]
    assert criterion(tuple(maps), some_targets())[0] == expected
    assert criterion((torch.zeros(1), maps), some_targets())[0] == expected


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("settings", [{}, {"use_l1": True}, {"iou_type": "giou"}, {"cls_pos_weight": 2.0}])
def test_no_objects_at_all(kind, settings):
    """An empty batch teaches the background only; the other layers get gradients of zero, which DDP needs."""
    maps = raw_maps()
    loss, components = kind(num_classes=CLASSES, **settings)(maps, torch.zeros(0, 6))
    loss.backward()
    assert components[[0, 2, 3, 4]].tolist() == [0, 0, 0, 0]
    assert all(m.grad.isfinite().all() and (m.grad[..., 4] > 0).all() for m in maps)
    assert all((m.grad[..., :4] == 0).all() and (m.grad[..., 5:] == 0).all() for m in maps)


@pytest.mark.parametrize("kind", LOSSES)
def test_an_image_without_objects_beside_others(kind):
    maps = raw_maps()
    loss, _ = kind(num_classes=CLASSES)(maps, some_targets(images=(0, 0, 2)))
    loss.backward()
    assert all((m.grad[1, ..., :4] == 0).all() and (m.grad[1, ..., 5:] == 0).all() for m in maps)
    assert any((m.grad[0, ..., :4] != 0).any() for m in maps)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize(
    "target",
    [
        [0, 1, 32, 32, 0.5, 0.5],  # smaller than any cell
        [0, 1, 32, 32, 64, 64],  # the whole image
        [0, 1, 0, 0, 10, 10],  # at the corner
        [0, 1, 500, 500, 10, 10],  # outside: no candidates
    ],
)
def test_extreme_boxes_are_finite(kind, target):
    maps = raw_maps(batch=1, size=64)
    loss, _ = kind(num_classes=CLASSES, use_l1=True)(maps, torch.tensor([target, target]))
    loss.backward()
    assert loss.isfinite()
    assert all(m.grad.isfinite().all() for m in maps)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("value", [-100.0, 100.0])
def test_saturated_predictions_are_finite(kind, value):
    maps = [torch.full_like(m, value).requires_grad_() for m in raw_maps()]
    with torch.no_grad():
        for m in maps:
            m[..., 2:4] = 3.0
    loss, _ = kind(num_classes=CLASSES)(maps, some_targets())
    loss.backward()
    assert loss.isfinite()
    assert all(m.grad.isfinite().all() for m in maps)


@pytest.mark.parametrize("kind", LOSSES)
def test_terms_by_image_add_up_to_the_loss_of_each_image_alone(kind):
    """Assignment does not cross images, so that the sums of a batch are those of its images."""
    criterion, maps, targets = kind(num_classes=CLASSES, use_l1=True), raw_maps(), some_targets((0, 0, 1, 2, 2, 2))
    terms = criterion.terms(maps, targets)
    for image in range(3):
        mine = targets[targets[:, 0] == image].clone()
        mine[:, 0] = 0
        alone = criterion.terms([m[image : image + 1] for m in maps], mine)
        torch.testing.assert_close(terms.per_image[image], alone.per_image[0])


@pytest.mark.parametrize("kind", LOSSES)
def test_the_order_of_the_targets_does_not_matter(kind):
    criterion, maps, targets = kind(num_classes=CLASSES), raw_maps(), some_targets((0, 0, 1, 2, 2, 2))
    shuffled = targets[torch.tensor([3, 0, 5, 2, 4, 1])]
    torch.testing.assert_close(criterion(maps, shuffled)[1], criterion(maps, targets)[1])


def test_a_point_learns_one_object_at_most():
    twin = torch.tensor([[0, 1, 40, 40, 30, 30], [0, 2, 40, 40, 30, 30]], dtype=torch.float32)
    for kind in LOSSES:
        criterion = kind(num_classes=CLASSES)
        assigned = []
        assign = criterion.assign
        criterion.assign = lambda *args, call=assign, seen=assigned: seen.append(call(*args)) or seen[-1]
        criterion(raw_maps(batch=1), twin)
        kept = assigned[0].points[assigned[0].keep].tolist()
        assert len(kept) == len(set(kept)) > 0


def test_center_sampling_radius_is_used_by_both():
    """The reference's fast loss ignores it."""
    for kind in LOSSES:
        few, many = (
            kind(num_classes=CLASSES, center_sampling_radius=radius).terms(raw_maps(), some_targets())
            for radius in (0.5, 5.0)
        )
        assert not torch.equal(few.per_image, many.per_image)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("outputs", [[torch.zeros(1, 1, 8, 8, 5 + 80)] * 3, [torch.zeros(1, 1, 8, 8, 5 + CLASSES)] * 2])
def test_maps_for_other_classes_or_levels_are_refused(kind, outputs):
    with pytest.raises(ValueError, match=f"{kind.__name__} for {CLASSES} classes takes 3 maps"):
        kind(num_classes=CLASSES)(outputs, some_targets())


@pytest.mark.parametrize("outputs", [None, torch.zeros(3), [], [torch.zeros(1, 2)], {"a": 1}])
def test_what_no_model_gives_is_refused_with_its_shapes(outputs):
    with pytest.raises(ValueError, match="takes the output of YOLOX; this is that of something else: "):
        YoloXDetectionLoss(num_classes=CLASSES)(outputs, some_targets())


def test_ssd_teaches_nothing_of_an_object_outside_the_image_and_is_finite_for_one_without_size():
    generator = torch.Generator().manual_seed(0)
    default_boxes = ssd_default_boxes((SIDE, SIDE))
    outputs = tuple(torch.randn(1, rows, len(default_boxes), generator=generator) for rows in (4, CLASSES + 1))
    criterion = SSDLoss(default_boxes, (SIDE, SIDE), num_classes=CLASSES)
    inside = [0, 1, 30, 30, 20, 20]
    alone = criterion.terms(outputs, torch.tensor([inside], dtype=torch.float32))
    outside = criterion.terms(outputs, torch.tensor([inside, [0, 2, 900, 900, 20, 20]], dtype=torch.float32))
    torch.testing.assert_close(outside, alone)
    assert criterion(outputs, torch.tensor([inside, [0, 2, 40, 40, 0, 0]], dtype=torch.float32))[0].isfinite()


def test_ppyoloe_goes_from_atss_to_the_task_aligned_assigner():
    criterion = PPYoloELoss(static_assigner_end_epoch=2)
    used = []
    for epoch in (0, 1, 2, 3, 0):  # a training may be resumed at any
        criterion.at_epoch(epoch, 5)
        used.append(criterion.use_static_assigner)
    assert used == [True, True, False, False, True]
    for always in (True, False):
        criterion = PPYoloELoss(use_static_assigner=always)
        criterion.at_epoch(7, 10)
        assert criterion.use_static_assigner == always


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize(("last", "first_with"), [(1, 9), (3, 7), (10, 0), (15, 0)])
def test_l1_joins_in_the_last_epochs(kind, last, first_with):
    criterion = kind(num_classes=CLASSES, l1_last_epochs=last)
    for epoch in (*range(10), 0):  # a training may be resumed at any
        criterion.at_epoch(epoch, 10)
        l1 = criterion(raw_maps(), some_targets())[1][3].item()
        assert (l1 > 0) == (epoch >= first_with)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("use_l1", [True, False])
def test_without_last_epochs_use_l1_says_for_all(kind, use_l1):
    criterion = kind(num_classes=CLASSES, use_l1=use_l1)
    for epoch in (0, 9):
        criterion.at_epoch(epoch, 10)
        assert criterion.use_l1 == use_l1


def test_positive_weights_must_be_one_a_class():
    with pytest.raises(ValueError, match="cls_pos_weight has 2 numbers for 4 classes"):
        YoloXDetectionLoss(num_classes=CLASSES, cls_pos_weight=[1.0, 2.0])


def test_an_object_takes_a_point_however_small_the_bias():
    criterion = YoloXFastDetectionLoss(num_classes=CLASSES, dynamic_ks_bias=0.01)
    assert criterion.terms(raw_maps(), some_targets()).normaliser >= 1


def test_wrong_iou_type():
    with pytest.raises(ValueError, match="iou_type is 'ciou'"):
        YoloXDetectionLoss(iou_type="ciou")


# Model, loss and settings of each.
STEPS = [
    ("yolox_n", YoloXDetectionLoss, {"use_l1": True}),
    ("yolox_n", YoloXFastDetectionLoss, {"use_l1": True}),
    ("yolox_n", YoloXFastDetectionLoss, {"obj_loss_fix": True, "iou_type": "giou"}),
    ("ppyoloe_s", PPYoloELoss, {"use_static_assigner": True}),
    ("ppyoloe_s", PPYoloELoss, {"use_static_assigner": False, "use_varifocal_loss": False}),
    ("yolo_nas_s", PPYoloELoss, {"use_static_assigner": False}),
    ("ssd_lite_mobilenet_v2", SSDLoss, {"alpha": 0.7}),
    ("dfine_n", DFineLoss, {"classification": "vfl"}),
    ("dfine_n", DFineLoss, {"classification": "mal"}),
]
SIDE, LR = 64, 1e-5


def some_model(name):
    """A model whose predictions differ from point to point, so that none is assigned by the last bit of a number."""
    torch.manual_seed(0)
    model = models.get(name, CLASSES, image_size=(SIDE, SIDE)).train()
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "_preds." in key:
                parameter.normal_(std=0.1)
        for norm in norms:
            norm.momentum = 1.0
        model(batch_of_four()[0])
    for norm in norms:
        norm.eval()
    return model


def one_step(case, images, targets, wrap):
    """A step of SGD from the same weights, norms in evaluation mode: the parameters after it, and the components."""
    name, kind, settings = case
    model = some_model(name)
    before = [p.detach().clone() for p in model.parameters()]
    criterion = kind(**models.family_of(model).loss_arguments(model), **settings)
    network = wrap(model)  # must live until the backward pass is over
    loss, components = criterion(network(images), targets)
    loss.backward()
    torch.optim.SGD(model.parameters(), LR).step()
    after = [p.detach() for p in model.parameters()]
    assert max((a - b).abs().max() for a, b in zip(after, before, strict=True)) > 1e-3
    return after, components


def batch_of_four():
    images = torch.rand(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    return images, some_targets(images=(0, 0, 0, 1, 3), size=SIDE)


def _half_of_the_batch(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    images, targets = batch_of_four()
    mine = targets[targets[:, 0] // 2 == rank]
    mine[:, 0] -= 2 * rank
    results = [one_step(case, images[2 * rank : 2 * rank + 2], mine, DistributedDataParallel) for case in STEPS]
    torch.save(results, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What two ranks with half of the batch each get, for all cases."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=_half_of_the_batch, args=(rank, port, folder)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=240)
    assert [process.exitcode for process in ranks] == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("number", range(len(STEPS)), ids=[f"{name}-{kind.__name__}" for name, kind, _ in STEPS])
def test_two_ranks_learn_what_one_learns_from_both_batches(two_ranks, number):
    parameters, components = one_step(STEPS[number], *batch_of_four(), wrap=lambda model: model)
    for rank in two_ranks:
        theirs, logged = rank[number]
        for mine, other in zip(parameters, theirs, strict=True):
            torch.testing.assert_close(other, mine, atol=1e-5, rtol=0)
        torch.testing.assert_close(logged, components, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", STEPS, ids=lambda case: f"{case[0]}-{case[1].__name__}")
@pytest.mark.parametrize(
    ("images", "classes", "dtype"),
    [(0, 2, torch.float32), (2, 1, torch.float32), (1, 2, torch.bfloat16), (2, 2, torch.float16)],
)
def test_no_images_one_class_and_half_precision_are_finite(case, images, classes, dtype):
    """Autocast gives outputs in half precision; the loss is computed in single precision."""
    name, kind, settings = case
    model = models.get(name, classes, image_size=(SIDE, SIDE)).eval()
    criterion = kind(**models.family_of(model).loss_arguments(model), **settings)
    with torch.no_grad():
        _, raw = model(torch.rand(2, 3, SIDE, SIDE))

    layered = 3 if isinstance(raw, DFineOutput) else 0  # so many parts have decoder layers before the images

    def leaf(number, item):
        if not isinstance(item, torch.Tensor) or item.ndim <= 2:  # such as the anchors
            return item
        return (item[:, :images] if number < layered else item[:images]).to(dtype).requires_grad_()

    outputs = [leaf(*part) for part in enumerate(raw)]
    loss, components = criterion(outputs, torch.tensor([[0, classes - 1, 30.0, 30, 40, 20]])[:images])
    loss.backward()
    assert loss.dtype == components.dtype == torch.float32
    assert components.isfinite().all()
    assert loss.item() == pytest.approx(components[-1].item())
    assert all(item.grad.isfinite().all() for item in outputs if getattr(item, "requires_grad", False))


@pytest.mark.parametrize("case", STEPS, ids=lambda case: f"{case[0]}-{case[1].__name__}")
def test_accumulated_terms_are_those_of_the_larger_batch(case):
    """Sums, normalisers and counts of parts add up, so that one division at the end serves any number of parts."""
    name, kind, settings = case
    model = some_model(name)
    criterion = kind(**models.family_of(model).loss_arguments(model), **settings)
    images, targets = batch_of_four()
    with torch.no_grad():
        whole = criterion.terms(model(images), targets)
        parts = []
        for first in (0, 2):
            mine = targets[targets[:, 0] // 2 == first // 2]
            mine[:, 0] -= first
            parts.append(criterion.terms(model(images[first : first + 2]), mine))
    assert whole.per_image.shape == (4, len(criterion.weights))
    torch.testing.assert_close(torch.cat([part.per_image for part in parts]), whole.per_image, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sum(part.normaliser for part in parts), whole.normaliser, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sum(part.counts for part in parts), whole.counts, rtol=1e-4, atol=1e-4)
    divided = whole.per_image.sum(0) / criterion.divisors(whole)
    expected = sum(weight * term for weight, term in zip(criterion.weights, divided, strict=True))
    torch.testing.assert_close(criterion(model(images), targets)[0].detach(), expected)


PARTIAL = [
    (YoloXDetectionLoss, {"use_l1": True}),
    (YoloXFastDetectionLoss, {}),
    (PPYoloELoss, {"use_static_assigner": True}),
    (PPYoloELoss, {"use_static_assigner": False}),
    (SSDLoss, {"alpha": 0.7}),
]


def raw_output(kind):
    """Leaves of a raw output for three images, what the loss takes of some of these, and a criterion of the kind."""
    if issubclass(kind, YoloXDetectionLoss):
        return raw_maps(), lambda leaves, rows: [leaf[rows] for leaf in leaves], {}
    generator = torch.Generator().manual_seed(0)
    if kind is SSDLoss:
        boxes = ssd_default_boxes((SIDE, SIDE))
        leaves = [torch.randn(3, size, len(boxes), generator=generator).requires_grad_() for size in (4, CLASSES + 1)]
        given = {"default_boxes": boxes, "image_size": (SIDE, SIDE)}
        return leaves, lambda leaves, rows: tuple(leaf[rows] for leaf in leaves), given
    with torch.no_grad():
        raw = models.get("ppyoloe_s", CLASSES).train()(torch.rand(3, 3, 96, 96, generator=generator))
    leaves = [torch.randn(item.shape, generator=generator).requires_grad_() for item in raw[:2]]
    return leaves, lambda leaves, rows: (*(leaf[rows] for leaf in leaves), *raw[2:]), {}


def targets_of(targets, first, last):
    mine = targets[(targets[:, 0] >= first) & (targets[:, 0] < last)].clone()
    mine[:, 0] -= first
    return mine


@pytest.mark.parametrize("edges", [(0, 1, 2, 3), (0, 2, 3), (0, 3)], ids=["1+1+1", "2+1", "3"])
@pytest.mark.parametrize("images", [(0, 0, 1, 2), (1, 2, 2), (2,), (0,)], ids=lambda images: f"objects in {images}")
@pytest.mark.parametrize(("kind", "settings"), PARTIAL)
def test_gradients_and_components_of_parts_are_those_of_the_whole_in_the_end(kind, settings, images, edges):
    """Also where the first part, or the last, has no object."""
    (leaves, some, given), targets = raw_output(kind), some_targets(images, size=60)
    criterion = kind(num_classes=CLASSES, **given, **settings)
    loss, components = criterion(some(leaves, slice(0, 3)), targets)
    expected = torch.autograd.grad(loss, leaves)

    partial = PartialLoss(criterion)
    for first, last in pairwise(edges):
        mine = partial.add(some(leaves, slice(first, last)), targets_of(targets, first, last))
        mine.backward()
    scale, whole, logged = partial.finish()
    assert scale.ndim == 0
    for leaf, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad * scale, gradient, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(whole, loss.detach())
    torch.testing.assert_close(logged, components)
    assert not whole.requires_grad
    assert not logged.requires_grad


def test_the_first_part_is_divided_by_its_own_normaliser_until_all_are_known():
    """So that gradients have the size they have without parts, which half precision needs."""
    criterion, maps, targets = YoloXDetectionLoss(num_classes=CLASSES), raw_maps(), some_targets((0, 0, 1, 2))
    partial = PartialLoss(criterion)
    alone = criterion([m[:1] for m in maps], targets_of(targets, 0, 1))[0]
    assert partial.add([m[:1] for m in maps], targets_of(targets, 0, 1)).item() == pytest.approx(alone.item())
    assert partial.finish()[0] == 1, "it was the only one so far"
    partial.add([m[1:] for m in maps], targets_of(targets, 1, 3))
    normalisers = [
        criterion.terms([m[part] for m in maps], mine).normaliser
        for part, mine in ((slice(0, 1), targets_of(targets, 0, 1)), (slice(1, 3), targets_of(targets, 1, 3)))
    ]
    assert partial.finish()[0] == pytest.approx((normalisers[0] / sum(normalisers)).item())


def test_terms_with_divisors_of_their_own_come_in_one_part_only():
    criterion = YoloXFastDetectionLoss(num_classes=CLASSES, obj_loss_fix=True)
    maps, targets = raw_maps(), some_targets((0, 1, 2))
    partial = PartialLoss(criterion)
    first = partial.add([m[:2] for m in maps], targets_of(targets, 0, 2))
    torch.testing.assert_close(first, criterion([m[:2] for m in maps], targets_of(targets, 0, 2))[0])
    with pytest.raises(ValueError, match="YoloXFastDetectionLoss divides its terms by different numbers"):
        partial.add([m[2:] for m in maps], targets_of(targets, 2, 3))
