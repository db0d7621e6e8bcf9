"""D-FINE beyond its numbers: parts of batches, empty batches, weights, parameter groups, sizes, no NMS."""

import hashlib
import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raydet import models
from raydet.data.batch import Batch
from raydet.data.distort import IoUCrop, PhotometricDistort, ZoomedLetterbox, ZoomOut
from raydet.data.transforms import SamplePlan
from raydet.errors import RaydetError
from raydet.losses import DFineLoss
from raydet.losses.base import PartialLoss
from raydet.losses.hungarian import union
from raydet.models.denoising import denoising_queries
from raydet.models.dfine import FAMILY
from raydet.outputs import DFineOutput, distance_bins, slots
from raydet.predict.predictor import Predictor
from raydet.recipe import Train, load
from raydet.runs.checkpoint import Config
from raydet.training.optimization import make_optimizer
from raydet.training.prepare import check_recipe_without_nms
from raydet.training.step import Step
from raydet.tuning.nms import Tuned
from raydet.tuning.thresholds import OF_NMS, Comparison, Setting, groups

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES, QUERIES, LAYERS, BINS, SIDE = 3, 12, 2, 33, 64


def some_targets(images, seed=0):
    """An object for each entry of `images`, in pixels."""
    generator = torch.Generator().manual_seed(seed)
    count = len(images)
    centres, sizes = (torch.rand(count, 2, generator=generator) for _ in range(2))
    labels = torch.randint(CLASSES, (count, 1), generator=generator)
    boxes = torch.cat((0.2 + 0.6 * centres, 0.1 + 0.4 * sizes), dim=1) * SIDE
    return torch.cat((torch.tensor(images, dtype=torch.float32)[:, None], labels, boxes), dim=1)


def some_output(count, objects, seed=0):
    """A training output for so many images; `objects` of the one with the most, for the denoising queries."""
    generator = torch.Generator().manual_seed(seed)
    made = 2 if objects else 0
    queries = QUERIES + 2 * objects * made

    def boxes(*shape):
        return torch.cat(
            (
                0.2 + 0.6 * torch.rand(*shape, 2, generator=generator),
                0.3 * torch.rand(*shape, 2, generator=generator) + 0.05,
            ),
            -1,
        )

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    up, scale = torch.tensor([0.5]), torch.tensor([4.0])
    leaves = [
        normal(LAYERS, count, queries, CLASSES),
        boxes(LAYERS, count, queries),
        normal(LAYERS, count, queries, 4 * BINS),
        normal(count, queries, CLASSES),
        boxes(count, queries),
        normal(count, QUERIES, CLASSES),
        boxes(count, QUERIES),
    ]
    leaves = [leaf.double().requires_grad_() for leaf in leaves]
    return DFineOutput(*leaves, distance_bins(up, scale, BINS).double(), scale.double(), made, (SIDE, SIDE))


def part_of(raw, first, last):
    """Return the output of some images."""
    per_layer = [part[:, first:last] for part in raw[:3]]
    return raw._replace(**dict(zip(raw._fields, (*per_layer, *(part[first:last] for part in raw[3:7])), strict=False)))


def targets_of(targets, first, last):
    mine = targets[(targets[:, 0] >= first) & (targets[:, 0] < last)].clone()
    mine[:, 0] -= first
    return mine


@settings(deadline=None, max_examples=15)
@given(
    images=st.lists(st.integers(0, 3), max_size=14),
    edges=st.sampled_from([(0, 1, 2, 3, 4), (0, 2, 4), (0, 1, 4)]),
    kind=st.sampled_from(["vfl", "mal"]),
)
def test_parts_of_a_batch_have_the_gradients_and_components_of_the_whole(images, edges, kind):
    targets = some_targets(images)
    most = max((images.count(image) for image in images), default=0)
    raw = some_output(4, most)
    leaves, criterion = raw[:7], DFineLoss(CLASSES, kind)
    loss, components = criterion(raw, targets)
    whole = torch.autograd.grad(loss, leaves, allow_unused=True)
    parts = [(part_of(raw, *edge), targets_of(targets, *edge)) for edge in pairwise(edges)]
    partial = PartialLoss(criterion)
    for part in parts:
        partial.count(*part)
    sums = sum(partial.add(*part) for part in parts)
    scale, total, found = partial.finish()
    assert scale.item() == 1
    torch.testing.assert_close(total, loss.detach())
    torch.testing.assert_close(found, components)
    torch.testing.assert_close(partial.shares().sum(0), components[:-1])
    for mine, theirs in zip(torch.autograd.grad(sums, leaves, allow_unused=True), whole, strict=True):
        if theirs is None:
            assert mine is None
        else:
            torch.testing.assert_close(mine, theirs)


@settings(deadline=None, max_examples=15)
@given(images=st.lists(st.integers(0, 2), min_size=1, max_size=30), seed=st.integers(0, 5))
def test_more_objects_than_queries_have_finite_gradients(images, seed):
    targets = some_targets(images, seed)
    raw = some_output(3, 0, seed)
    loss, _ = DFineLoss(CLASSES)(raw, targets)
    loss.backward()
    assert all(leaf.grad is None or leaf.grad.isfinite().all() for leaf in raw[:7])


@given(st.lists(st.integers(0, 5), max_size=20))
def test_objects_of_an_image_are_numbered_in_their_order(images):
    wanted = [images[:place].count(image) for place, image in enumerate(images)]
    assert slots(torch.tensor(images, dtype=torch.long)).tolist() == wanted


def test_in_the_union_the_most_frequent_pair_of_a_query_counts_and_of_equals_the_lower_object():
    matchings = [([0, 1], [1, 0]), ([0, 2], [0, 1]), ([0, 3], [0, 1]), ([1], [2])]
    matchings = [tuple(map(np.array, each)) for each in matchings]
    assert [part.tolist() for part in union(matchings, 3)] == [[0, 1, 2, 3], [0, 0, 1, 1]]


@pytest.mark.parametrize("size", [(64, 96), (96, 64), (32, 32), (128, 32)])
def test_any_size_in_training_and_evaluation(size):
    torch.manual_seed(0)
    model = models.get("dfine_n", CLASSES)
    images, targets = torch.rand(2, 3, *size), some_targets([0, 0, 1])
    raw = model.train()(images, targets)
    loss, components = DFineLoss(CLASSES)(raw, targets)
    loss.backward()
    assert loss.isfinite()
    assert len(components) == len(DFineLoss.component_names)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        (boxes, scores), again = model.eval()(images)
    assert boxes.shape == (2, len(boxes[0]), 4)
    assert ((scores >= 0) & (scores <= 1)).all()
    assert boxes[..., 0::2].max() < 2 * size[1]
    assert DFineLoss(CLASSES)(again, targets)[0].isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_boxes_and_logits_are_single_precision_under_autocast(dtype):
    torch.manual_seed(0)
    model, targets = models.get("dfine_n", CLASSES).train(), some_targets([0, 1])
    with torch.autocast("cpu", dtype):
        raw = model(torch.rand(2, 3, SIDE, SIDE), targets)
    assert {part.dtype for part in raw[:9]} == {torch.float32}
    loss, _ = DFineLoss(CLASSES)(raw, targets)
    loss.backward()
    assert loss.isfinite()


def test_a_batch_without_objects_gives_every_weight_a_gradient():
    model = models.get("dfine_n", CLASSES).train()
    loss, components = DFineLoss(CLASSES)(model(torch.rand(2, 3, SIDE, SIDE), torch.zeros(0, 6)), torch.zeros(0, 6))
    loss.backward()
    assert loss.isfinite()
    assert not components[6:-1].any(), "there are no denoising queries"
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_noise_of_an_image_follows_its_seed_wherever_it_is():
    """Images whose batch has images with more objects get padding that makes them alike."""
    targets, seeds = some_targets([0, 1, 1, 2]), torch.tensor([7, -8, 9])
    whole = denoising_queries(targets, seeds, CLASSES, QUERIES)
    for first, last in pairwise((0, 1, 3)):
        part = denoising_queries(targets_of(targets, first, last), seeds[first:last], CLASSES, QUERIES, most_objects=2)
        assert torch.equal(part.labels, whole.labels[first:last])
        assert torch.equal(part.boxes, whole.boxes[first:last])
        assert torch.equal(part.blocked, whole.blocked)
    other = denoising_queries(targets, seeds + 1, CLASSES, QUERIES)
    assert (other.boxes != whole.boxes).any()


def test_noise_without_seeds_follows_the_generator_of_torch():
    model, targets = models.get("dfine_n", CLASSES).train(), some_targets([0, 1])
    images, made = torch.rand(2, 3, SIDE, SIDE), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        raw = model(images, targets)
        made.append(raw.logits[-1][:, : -raw.selected_logits.shape[1]])
        assert made[-1].numel()
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_micro_batches_make_finite_steps_that_leave_the_norms_of_the_counting_pass_alone():
    torch.manual_seed(0)
    model = models.get("dfine_n", CLASSES).train()
    norm = model.backbone.stem.stem1.bn
    step = Step(
        model,
        DFineLoss(CLASSES),
        torch.optim.SGD(model.parameters(), 1e-4),
        Train(micro_batch_size=2),
        torch.device("cpu"),
        ranks=1,
        seed=0,
    )
    images = torch.randint(0, 256, (4, 3, SIDE, SIDE), dtype=torch.uint8)
    batch = Batch(images, some_targets([0, 0, 1, 3]), torch.arange(4), torch.arange(4))
    outcome = step(batch, lambda pixels, targets: (pixels / 255, targets))
    assert outcome.finite
    assert norm.num_batches_tracked == 2


# Weights.


def official(model):
    """Return a model's tensors under the names of D-FINE."""
    renames = (
        ("neck.aifi.", "encoder.encoder.0.layers.0."),
        ("neck.", "encoder."),
        ("head.cls_preds.3.", "decoder.enc_score_head."),
        ("head.cls_preds.", "decoder.dec_score_head."),
        ("head.class_embed.", "decoder.denoising_class_embed."),
        ("head.layers.", "decoder.decoder.layers."),
        ("head.lqe_layers.", "decoder.decoder.lqe_layers."),
        ("head.", "decoder."),
    )
    tensors = {}
    for name, tensor in model.state_dict().items():
        ours = name
        if ours.startswith("neck.") and "norm" not in ours:
            ours = ours.replace(".bn.", ".norm.")
        ours = ours.replace(".branch_3x3.", ".conv1.").replace(".branch_1x1.", ".conv2.")
        for level in range(2):
            for number in range(2):
                ours = ours.replace(
                    f"downsample_convs.{level}.{number}.", f"downsample_convs.{level}.0.cv{number + 1}."
                )
        first = next(((a, b) for a, b in renames if ours.startswith(a)), None)
        tensors[ours.replace(*first, 1) if first else ours] = tensor
    return tensors


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(3)
    model = models.get("dfine_n", 80)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    return model


@pytest.mark.parametrize(
    "wrap", [lambda t: {"model": t}, lambda t: {"ema": {"module": t}, "model": {}}], ids=["model", "ema"]
)
def test_files_of_the_original_load_with_and_without_counters(trained, wrap, tmp_path):
    tensors = official(trained)
    some = {name: t for name, t in tensors.items() if not name.endswith("num_batches_tracked")}
    extra = {"decoder.anchors": torch.zeros(1, 8, 4), "decoder.decoder.up": torch.zeros(1)}
    for number, content in enumerate((tensors | extra, some)):
        file = tmp_path / f"{number}.pth"
        torch.save(wrap(content), file)
        loaded = models.get("dfine_n", 80, weights=file)
        assert "Apache-2.0" in loaded.licence
        for name, parameter in trained.named_parameters():
            assert torch.equal(loaded.get_parameter(name), parameter), name


def test_another_number_of_classes_keeps_all_but_the_class_layers(trained, tmp_path, caplog):
    torch.save({"model": official(trained)}, tmp_path / "dfine.pth")
    loaded = models.get("dfine_n", 3, weights=tmp_path / "dfine.pth")
    assert "start afresh" in caplog.text
    fresh = {name for name, p in loaded.named_parameters() if p.shape != trained.get_parameter(name).shape}
    assert {name.split(".")[1] for name in fresh} == {"cls_preds", "class_embed"}
    for name, parameter in loaded.named_parameters():
        assert name in fresh or torch.equal(parameter, trained.get_parameter(name)), name


def test_a_backbone_alone_loads_and_leaves_the_rest(trained, tmp_path):
    stem = {name: t for name, t in trained.backbone.state_dict().items() if "num_batches" not in name}
    torch.save(stem, tmp_path / "PPHGNetV2_B0_stage1.pth")
    torch.manual_seed(5)
    fresh = models.get("dfine_n", 3)
    torch.manual_seed(5)
    loaded = models.get("dfine_n", 3, weights=tmp_path / "PPHGNetV2_B0_stage1.pth")
    for name, parameter in loaded.named_parameters():
        source = trained if name.startswith("backbone.") else fresh
        assert torch.equal(parameter, source.get_parameter(name)), name


def test_the_number_of_queries_is_free_and_other_families_have_none(trained):
    few = models.get("dfine_n", 80, num_queries=7)
    few.load_state_dict(trained.state_dict())
    with torch.no_grad():
        assert few.eval()(torch.rand(1, 3, SIDE, SIDE))[0][0].shape == (1, 7, 4)
    with pytest.raises(RaydetError, match="num_queries is 7: YOLOX has no queries"):
        models.get("yolox_n", num_queries=7)


# Recipes.


@pytest.mark.parametrize("size", ["n", "s", "m", "l", "x"])
def test_parameter_groups_are_those_of_the_original(shared, size):
    wanted = json.loads((shared / "golden/dfine/units.json").read_text())[f"model.{size}"]["groups"]
    names = json.loads((shared / "golden/dfine/names.json").read_text())[f"dfine_{size}"]
    adapter = next(each for each in FAMILY.adapters if each.knows(names))
    theirs = {next(iter(adapter.translate({name: torch.empty(0)})), ""): name for name in names}
    model, train = models.get(f"dfine_{size}"), load(f"coco2017_dfine_{size}").train
    ours = {id(parameter): theirs[name] for name, parameter in model.named_parameters()}
    found = {}
    for group in make_optimizer(model, train).param_groups:
        members = "\n".join(sorted(ours[id(p)] for p in group["params"])).encode()
        lr = round(train.lr * group["factor"], 12)
        found[f"lr {lr} weight_decay {group['weight_decay']}"] = hashlib.sha1(members).hexdigest()
    assert found == {
        key: group["sha1_of_sorted_names_joined_by_newline"] for key, group in wanted.items() if group["tensors"]
    }


@pytest.mark.parametrize("override", ["eval.iou=0.5", "eval.nms_top_k=100", "eval.class_agnostic=true"])
def test_settings_of_nms_are_refused(override):
    with pytest.raises(RaydetError, match=f"{override.split('=')[0]}: D-FINE has no NMS"):
        check_recipe_without_nms(load("dfine_finetune", [override]).eval, FAMILY)
    check_recipe_without_nms(load("dfine_finetune").eval, FAMILY)


def test_an_iou_threshold_is_refused():
    model, preprocessing = models.get("dfine_n", CLASSES), FAMILY.preprocessing
    config = Config("dfine_n", ("a", "b", "c"), (1, 2, 3), (SIDE, SIDE), preprocessing, load("dfine_finetune").eval)
    predictor = Predictor(model, config, torch.device("cpu"))
    picture = np.zeros((SIDE, SIDE, 3), np.uint8)
    predictor.predict(picture, conf=0.5)
    with pytest.raises(RaydetError, match=r"iou: the model has no NMS, so that 0\.5 changes nothing: leave it out"):
        predictor.predict(picture, iou=0.5)


def test_the_search_for_thresholds_leaves_nms_out():
    default = Setting.of(load("dfine_finetune").eval)
    drawn = [setting for group in groups(60, default, 0, has_nms=False) for setting in group]
    assert len(set(drawn)) == 48  # all there are: 12 scores, two limits, with or without several labels
    for name in OF_NMS:
        assert {getattr(setting, name) for setting in drawn} == {getattr(default, name)}


def test_thresholds_that_were_found_are_not_refused_afterwards(tmp_path):
    """A setting of the search has values for NMS too, which a recipe for D-FINE must not have."""
    default = load("dfine_finetune").eval
    winner = replace(Setting.of(default), score=0.3)
    tuned = Tuned(default, winner, Comparison(0.1, 0.2, (0.1, 0.1, 0.1)), [], 1.0, tmp_path, has_nms=False)
    check_recipe_without_nms(load("dfine_finetune", tuned.overrides).eval, FAMILY)
    check_recipe_without_nms(default.model_copy(update=winner.chosen(has_nms=False)), FAMILY)
    assert winner.chosen(has_nms=False) == {"score": 0.3, "max_detections": 300, "multi_label": True}
    assert "iou" not in tuned.summary("mAP")[0]


# Augmentations.


def a_picture(rng, count):
    height, width = rng.integers(20, 200, 2).tolist()
    corners = np.sort(rng.random((count, 2, 2)), axis=1) * (width, height)
    boxes = corners.reshape(count, 4)
    return SamplePlan.of(0, width, height, boxes, np.arange(count, dtype=np.int32))


def origin(tile, boxes):
    """Boxes of the canvas in pixels of the tile's source."""
    (a, _, x), (_, d, y) = tile.matrix
    return (boxes - (x, y, x, y)) / (a, d, a, d)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10_000), count=st.integers(0, 5))
def test_boxes_of_zoom_out_and_crop_are_on_the_same_pixels(seed, count):
    rng = np.random.default_rng(seed)
    picture = a_picture(rng, count)
    zoomed = ZoomOut(1.0)(picture, rng)
    np.testing.assert_allclose(origin(zoomed.layers[0][0], zoomed.boxes), picture.boxes, atol=1e-9)
    assert zoomed.size >= picture.size
    cropped = IoUCrop(1.0)(zoomed, rng)
    tile = cropped.layers[0][0]
    left, top, right, bottom = tile.window
    for box, label in zip(origin(tile, cropped.boxes), cropped.labels, strict=True):
        whole = picture.boxes[label]
        np.testing.assert_allclose(box, np.clip(whole, *_canvas(tile, cropped.size)), atol=1e-6)
        assert box[0] < right
        assert box[1] < bottom
        assert box[2] > left
        assert box[3] > top
    shown = np.array(((left, top), (right, bottom))) @ np.diag((tile.matrix[0][0], tile.matrix[1][1]))
    shown += np.array((tile.matrix[0][2], tile.matrix[1][2]))
    if left < right and top < bottom:
        assert shown.min() >= -1e-6
        assert (shown <= np.array(cropped.size[::-1]) + 1e-6).all(), "what was cut off does not come back"
    fitted = ZoomedLetterbox((64, 64), "stretch", 1.0, 1.0)(picture, rng)
    assert fitted.size == (64, 64)


def _canvas(tile, size):
    low = origin(tile, np.array([[0, 0, size[1], size[0]]], float))[0]
    return low[[0, 1, 0, 1]], low[[2, 3, 2, 3]]


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000))
def test_colours_keep_shape_and_boxes_and_write_in_place(seed):
    rng = np.random.default_rng(seed)
    picture = a_picture(rng, 2)
    changed = PhotometricDistort(0.5)(picture, rng)
    assert changed.boxes is picture.boxes
    image = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    for change in changed.colours:
        out = np.empty_like(image)
        change(image, out)
        same = image.copy()
        change(same, same)
        assert (out == same).all()
    assert PhotometricDistort(0.0)(picture, rng) is picture
