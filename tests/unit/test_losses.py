import multiprocessing
import os

import pytest
import torch
import torch.distributed as dist

from raydet.losses import YoloXDetectionLoss, YoloXFastDetectionLoss

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
@pytest.mark.parametrize(
    "outputs",
    [
        [torch.zeros(1, 1, 8, 8, 5 + 80)] * 3,  # of another class count
        [torch.zeros(1, 1, 8, 8, 5 + CLASSES)] * 2,
        (torch.zeros(1, 84, CLASSES), torch.zeros(1, 84, 68), torch.zeros(84, 4), torch.zeros(84, 2), [64, 16, 4], 0),
    ],
)
def test_outputs_of_another_model_are_refused(kind, outputs):
    with pytest.raises(ValueError, match=f"a YOLOX loss for {CLASSES} classes takes three maps"):
        kind(num_classes=CLASSES)(outputs, some_targets())


def test_wrong_iou_type():
    with pytest.raises(ValueError, match="iou_type is 'ciou'"):
        YoloXDetectionLoss(iou_type="ciou")


def _half_of_the_batch(rank, port, kind, queue):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo")
    maps, targets = [m[2 * rank : 2 * rank + 2].detach().requires_grad_() for m in raw_maps(batch=4)], halved(rank)
    loss, components = kind(num_classes=CLASSES, use_l1=True)(maps, targets)
    (loss / 2).backward()  # DDP averages gradients over ranks
    queue.put((rank, [m.grad.numpy() for m in maps], components.tolist()))
    dist.barrier()
    dist.destroy_process_group()


def halved(rank):
    targets = some_targets(images=(0, 0, 0, 1, 3))
    mine = targets[(targets[:, 0] // 2) == rank].clone()
    mine[:, 0] -= 2 * rank
    return mine


@pytest.mark.parametrize("kind", LOSSES)
def test_two_ranks_learn_what_one_learns_from_both_batches(kind):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    port = 29500 + os.getpid() % 1000
    ranks = [context.Process(target=_half_of_the_batch, args=(rank, port, kind, queue)) for rank in range(2)]
    for process in ranks:
        process.start()
    results = sorted((queue.get(timeout=120) for _ in ranks), key=lambda result: result[0])
    for process in ranks:
        process.join(timeout=60)
    maps = raw_maps(batch=4)
    loss, components = kind(num_classes=CLASSES, use_l1=True)(maps, some_targets(images=(0, 0, 0, 1, 3)))
    loss.backward()
    for level, whole in enumerate(maps):
        halves = torch.cat([torch.from_numpy(gradients[level]) for _, gradients, _ in results])
        torch.testing.assert_close(halves, whole.grad, atol=1e-7, rtol=1e-5)
    for _, _, logged in results:
        assert logged == pytest.approx(components.tolist(), rel=1e-5)
