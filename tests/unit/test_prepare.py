import json
from collections import Counter

import numpy as np
import pytest
import torch

from raydet.api import open_evaluation
from raydet.data.coco import load_coco
from raydet.data.formats import load_index
from raydet.data.pipeline import train_samples, val_samples
from raydet.errors import RaydetError
from raydet.losses import YoloXDetectionLoss
from raydet.models import get
from raydet.recipe import Recipe, describe, load
from raydet.runs.checkpoint import Progress, pack, write
from raydet.runs.folder import open_run, run_folder
from raydet.training.loop import resized
from raydet.training.prepare import make_job
from tests.unit.test_metrics import evaluated


@pytest.fixture
def job(demo, shapes):
    """Makes the job of the demo recipe with other overrides or objects."""
    indices = [load_coco(shapes / f"annotations/instances_{split}.json", shapes / split) for split in ("train", "val")]

    def make(*overrides, head=40, **objects):
        return make_job(load("demo", [*demo, *overrides]), indices[0].head(head), indices[1], **objects)

    return make


def opened(job):
    open_run(job.folder, job.recipe, job.inputs)


def keep_a_checkpoint(folder):
    (folder / "checkpoint_000001").mkdir()
    (folder / "checkpoint_000001" / "config.json").write_text("{}")


def test_a_run_can_be_opened_again_and_what_changes_no_result_may_change(job):
    opened(job())
    keep_a_checkpoint(job().folder)
    opened(job("scale.num_workers=2", "track.log_every=5"))


def test_settings_are_free_until_there_is_a_checkpoint(job):
    opened(job())
    opened(job("train.lr=0.5"))
    assert load(job().folder / "recipe.yaml").train.lr == 0.5


@pytest.mark.parametrize(
    ("overrides", "others", "message"),
    [
        (["train.lr=0.5"], {}, "train.lr: 0.1 there, 0.5 here"),
        (
            [],
            {"loss": YoloXDetectionLoss(num_classes=5)},
            "loss: YoloXFastDetectionLoss there, YoloXDetectionLoss here",
        ),
        ([], {"head": 30}, "training images: 40 there, 30 here"),
    ],
)
def test_another_run_under_the_same_name_is_refused(job, overrides, others, message):
    opened(job())
    keep_a_checkpoint(job().folder)
    with pytest.raises(RaydetError) as error:
        opened(job(*overrides, **others))
    assert message in str(error.value)
    assert "choose another name" in str(error.value)
    assert f"to train on from its weights: name=… model.weights={job().folder}" in str(error.value)


def test_a_run_whose_folder_was_renamed_goes_on_under_its_new_name(job, tmp_path):
    opened(job("name=before"))
    keep_a_checkpoint(job("name=before").folder)
    job("name=before").folder.rename(job("name=after").folder)
    opened(job("name=after"))
    assert load(tmp_path / "runs/after/recipe.yaml").name == "after"


def test_a_run_needs_a_name_and_a_folder_that_can_be_made(job, tmp_path):
    with pytest.raises(RaydetError, match="name is empty"):
        run_folder(Recipe(storage=str(tmp_path)))
    (tmp_path / "file").write_text("")
    with pytest.raises(RaydetError, match=r"storage: .* cannot be made or written"):
        opened(job(f"storage={tmp_path}/file"))


@pytest.mark.parametrize(
    ("images", "batch_size", "every", "epochs", "expected"),
    [(40, 8, 2, 6, [2, 4, 6]), (40, 128, 10, 40, [10, 20, 30, 40]), (30, 128, 10, 20, [10, 20]), (40, 8, 4, 6, [4, 6])],
)
def test_validations_are_due_every_so_many_epochs_even_where_a_step_is_longer(
    job, images, batch_size, every, epochs, expected
):
    mine = job(f"train.batch_size={batch_size}", f"eval.every={every}", f"train.epochs={epochs}", head=images)
    positions = range(batch_size, mine.total_steps * batch_size + 1, batch_size)
    due = [position for position in positions if mine.validates_after(position, batch_size)]
    assert len(due) == len(expected)
    for position, epoch in zip(due, expected, strict=True):
        assert epoch <= mine.epoch_of(position) <= epoch + batch_size / images


@pytest.mark.parametrize(("ranks", "batch_size", "left"), [(1, 8, 10), (2, 8, 10), (3, 6, 14), (5, 5, 16), (8, 8, 10)])
def test_ranks_that_cannot_share_the_batch_get_the_next_smaller_one_and_more_steps(job, ranks, batch_size, left):
    mine = job()
    assert mine.total_steps == 10
    assert mine.batch_size(ranks) == batch_size
    assert mine.steps_left(0, batch_size) == left
    assert mine.steps_left(79, batch_size) == 1
    assert mine.steps_left(80, batch_size) == mine.steps_left(83, batch_size) == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["scale.num_workers=3"], "train.batch_size 8 cannot be shared by scale.num_workers 3 equally"),
        (["scale.num_workers=[1, 9]"], "train.batch_size 8 is less than an image for each of scale.num_workers 9"),
        (["eval.watch=mAP@50"], r"eval.watch: there is no metric mAP@50; did you mean mAP@0.50\?"),
        (
            ["eval.watch=map50"],
            r"eval.watch: there is no metric map50; did you mean mAP@0.50\? \(known: mAP@0.50:0.95, ",
        ),
        (["eval.watch=best"], r"no metric best \(known: mAP@0.50:0.95, mAP@0.50, mAP@0.75, .*AP@0.50:0.95_{class}\)"),
        (["eval.watch=AR@0.50:0.95_max=100", "eval.max_dets=300"], "there is no metric AR@0.50:0.95_max=100"),
        (["train.micro_batch_size=4", "loss.obj_loss_fix=true"], "train.micro_batch_size: with loss.obj_loss_fix"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(job, overrides, message):
    with pytest.raises(RaydetError, match=message):
        job(*overrides)


@pytest.mark.parametrize(
    ("watch", "given"),
    [
        ("AP@0.50:0.95_ring", False),
        ("AP@0.50:0.95_disc", True),
        ("mAP@0.50:0.95_area=large", False),
        ("AR@0.50:0.95_area=large", False),
        ("mAP@0.50:0.95_area=medium", True),
        ("F1@0.50", True),
    ],
)
def test_a_metric_that_the_validation_data_has_no_objects_for_is_not_watched(demo, shapes, watch, given):
    """It would be missing only after the first epoch."""
    train, val = (load_coco(shapes / f"annotations/instances_{name}.json", shapes / name) for name in ("train", "val"))
    kept = [
        row
        for row in range(len(val))
        if 1 not in (one := val.annotations(row)).labels and (one.area <= 96**2).all() and len(one.labels)
    ]
    val = val.take(np.array(kept))
    assert len(val) > 3
    recipe = load("demo", [*demo, f"eval.watch={watch}"])
    if given:
        assert watch in evaluated(val, [np.empty((0, 6))] * len(val)).compute()
        make_job(recipe, train, val)
        return
    with pytest.raises(RaydetError, match=r"eval.watch: the validation data has no objects that .* is measured on"):
        make_job(recipe, train, val)


LOSSES = {
    "yolox_n": "YoloXFastDetectionLoss",
    "ppyoloe_s": "PPYoloELoss",
    "yolo_nas_s": "PPYoloELoss",
    "ssd_lite_mobilenet_v2": "SSDLoss",
}


def of_family(name, *overrides):
    return [f"model.name={name}", f"loss.name={LOSSES[name]}", *overrides]


@pytest.mark.parametrize("side", [32, 64, 320, 544])
@pytest.mark.parametrize("name", LOSSES)
def test_a_single_image_at_a_time_is_refused_where_a_norm_would_see_one_value_a_channel(job, name, side):
    """Which is where the model itself fails in its first step."""
    if side > 64 and not name.startswith("ssd"):
        return
    fails = False
    try:
        get(name, 5, image_size=(side, side)).train()(torch.rand(1, 3, side, side))
    except ValueError as error:
        fails = "more than 1 value per channel" in str(error)
    single = of_family(name, f"data.image_size={side}", "train.batch_size=1")
    if fails:
        with pytest.raises(RaydetError, match=rf"train.batch_size 1 .* at {side}x{side} pixels .* one value a channel"):
            job(*single)
    else:
        job(*single)
    job(*single, "train.batch_size=2")
    assert fails == (side == 32 or (name.startswith("ssd") and side < 512))


SMALL_IMAGES = "data.image_size=32"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.batch_size=1"], "set train.batch_size to at least 2, or"),
        (
            ["train.batch_size=4", "scale.num_workers=4"],
            "set train.batch_size to at least 8 or scale.num_workers lower, or",
        ),
        (["train.batch_size=5", "scale.num_workers=[1, 3]"], "set train.batch_size to at least 6 or scale.num_workers"),
        (["train.batch_size=8", "train.micro_batch_size=1"], "set train.micro_batch_size to 2, or"),
        (["train.batch_size=5", "train.micro_batch_size=2"], "set train.micro_batch_size to 3, or"),
        (["train.batch_size=3", "train.micro_batch_size=2"], "set train.micro_batch_size to 3, or"),
        (["train.batch_size=1", "augment.multiscale=[32, 96]"], r"or augment\.multiscale larger"),
    ],
)
def test_the_keys_that_cure_a_norm_of_one_value_are_named(job, overrides, message):
    size = [] if any("multiscale" in key for key in overrides) else [SMALL_IMAGES]
    with pytest.raises(RaydetError, match=message):
        job(*size, *overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.batch_size=4", "train.micro_batch_size=2"],
        ["train.batch_size=7", "train.micro_batch_size=4"],
        ["train.batch_size=4", "scale.num_workers=4", "train.sync_bn=true"],
        ["train.batch_size=1", "train.backbone_lr=0", "train.neck_lr=0", "train.head_lr=1", "data.image_size=128"],
    ],
)
def test_several_values_a_channel_are_enough(job, overrides):
    job(SMALL_IMAGES, *overrides)


def test_norms_that_are_frozen_may_see_a_single_value(job):
    """SSD's neck makes the maps of one cell; the head has no norm on them."""
    frozen = ["train.backbone_lr=0", "train.neck_lr=0"]
    single = of_family("ssd_lite_mobilenet_v2", "data.image_size=320", "train.batch_size=1")
    with pytest.raises(RaydetError, match="the model's norm neck"):
        job(*single)
    job(*single, *frozen)


def test_elastic_workers_need_not_share_the_batch_equally(job):
    assert job("scale.num_workers=[1, 3]").recipe.scale.workers == (1, 3)


@pytest.mark.parametrize("every", [1, 5])
def test_sizes_of_multiscale_are_a_function_of_seed_and_step_and_begin_with_the_largest(job, every):
    mine = job("augment.multiscale=[64, 160]", f"augment.multiscale_every={every}")
    sizes = [mine.multiscale(step) for step in range(200)]
    assert sizes == [mine.multiscale(step) for step in range(200)]
    assert sizes[0] == (160, 160)
    assert set(sizes) == {(side, side) for side in (64, 96, 128, 160)}
    assert all(len(set(sizes[first : first + every])) == 1 for first in range(every, 200, every))
    assert job().multiscale(7) == (96, 96)


@pytest.mark.parametrize("size", "smlx")
def test_dfine_repeats_its_size_among_those_that_batches_are_resized_to_as_the_original_does(job, shared, size):
    augment = load(f"coco2017_dfine_{size}").augment
    scales = json.loads((shared / "golden/dfine/units.json").read_text())["scales"]
    wanted = Counter(scales[f"640/{augment.multiscale_repeats}"])
    repeats = {"s": 20, "m": 6, "l": 4, "x": 3}[size]
    assert augment.multiscale_repeats == repeats
    low, high = augment.multiscale
    small = job(f"augment.multiscale=[{low}, {high}]", f"augment.multiscale_repeats={repeats}", "data.image_size=640")
    found = Counter(small.multiscale(step)[0] for step in range(1, 2001))
    assert set(found) == set(wanted)
    for side, count in wanted.items():
        share = count / wanted.total()
        assert found[side] / 2000 == pytest.approx(share, abs=4 * (share * (1 - share) / 2000) ** 0.5), side


def test_multiscale_keeps_the_aspect_of_the_input(job):
    sizes = {job("augment.multiscale=[64, 256]", "data.image_size=[64, 128]").multiscale(step) for step in range(99)}
    assert all(height == max(32, round(width / 64) * 32) for height, width in sizes)
    assert len(sizes) > 4


def test_resized_images_carry_their_boxes():
    images = torch.zeros(2, 3, 64, 64)
    images[1, :, 16:32, 8:40] = 1.0
    targets = torch.tensor([[1, 3, 24.0, 24.0, 32.0, 16.0]])
    larger, moved = resized(images, targets, (128, 96))
    ys, xs = torch.nonzero(larger[1, 0] > 0.5, as_tuple=True)
    assert [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] == [12, 32, 60, 64]
    assert moved.tolist() == [[1, 3, 36, 48, 48, 32]]
    assert targets.tolist() == [[1, 3, 24, 24, 32, 16]]
    assert resized(images, targets, (64, 64)) == (images, targets)


@pytest.mark.parametrize("form", ["run", "run/checkpoint_000001", "run/checkpoint_000001/model.safetensors"])
def test_weights_of_a_run_go_to_the_classes_of_their_names(job, shapes, tmp_path, form):
    mine = job()
    write(tmp_path / "run/checkpoint_000001", pack(mine.config, mine.model, None, Progress(), 1, {}))
    names = mine.config.class_names
    turned = f"data.class_inclusion_list=[{', '.join(names[::-1])}]"
    recipe = load("demo", [f"data.root={shapes}", "data.image_size=96", turned, f"model.weights={tmp_path / form}"])
    indices = [load_index(recipe.data, split) for split in ("train", "val")]
    weights = make_job(recipe, *indices).model.head.cls_preds[0].weight
    assert torch.equal(weights, mine.model.head.cls_preds[0].weight.flip(0))
    given = ["data.image_size=96", f"data.root={shapes}", turned]
    with pytest.raises(RaydetError, match=r"the same classes in another order.*data\.class_inclusion_list=\[disc, "):
        open_evaluation(tmp_path / form, "demo", None, given, print)


@pytest.mark.parametrize(("given", "size"), [([], (96, 96)), (["data.image_size=[128, 160]"], (128, 160))])
def test_an_ssd_is_evaluated_at_its_own_size_or_built_for_the_one_that_is_given(job, tmp_path, given, size):
    mine = job("model.name=ssd_lite_mobilenet_v2", "loss.name=SSDLoss")
    write(tmp_path / "run/checkpoint_000001", pack(mine.config, mine.model, None, Progress(), 1, {}))
    (tmp_path / "run/recipe.yaml").write_text(describe(mine.recipe))
    opened, _ = open_evaluation(tmp_path / "run", None, None, given, print)
    assert opened.recipe.data.image_size == opened.config.image_size == opened.model.image_size == size


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["augment.rotate90=0.5", "data.image_size=[64, 96]"], r"augment.rotate90 needs a square data.image_size"),
        (["augment.transforms=[{name: nomodule:Flip}]"], r"augment.transforms: nomodule:Flip: cannot import nomodule"),
        (["augment.transforms=[{name: numpy:nothing}]"], r"numpy/__init__.py has no nothing"),
        (["augment.transforms=[{name: string:Template, template: x}]"], "its instances must be callable"),
        (["augment.transforms=[{name: string:Template, colour: x}]"], "takes no colour"),
    ],
)
def test_augmentation_that_cannot_work_is_refused(job, shapes_index, overrides, message):
    with pytest.raises(RaydetError, match=message):
        train_samples(job(*overrides).recipe, shapes_index, "pad_bottom_right")


def test_the_last_epochs_are_without_mosaic_affine_and_mixup(job, shapes_index):
    recipe = job("augment.mosaic=1", "augment.scale=[0.5, 2]", "augment.close_epochs=3", "train.epochs=10").recipe
    samples = train_samples(recipe, shapes_index, "pad_bottom_right")
    assert samples.close_at == 7 * len(shapes_index)
    rows = samples.rows(0, 64).tolist()
    tiles = [len(samples.plan(position, rows).layers[0]) for position in (0, samples.close_at - 1, samples.close_at)]
    assert tiles == [4, 4, 1]


def test_a_recipe_without_augmentation_shows_the_images_as_validation_does(job, shapes_index):
    plain = ["augment.horizontal_flip=0", "augment.hsv=0"]
    recipe = job(*plain).recipe
    train = train_samples(recipe, shapes_index, "pad_centre")
    val = val_samples(recipe, shapes_index, "pad_centre")
    for position, row in enumerate(train.rows(0, 8).tolist()):
        assert (train.sample(position).image == val.sample(row).image).all()


@pytest.mark.parametrize("overrides", [[], ["augment.mosaic=1", "augment.close_epochs=2"]])
def test_a_mirrored_sample_has_its_padding_where_validation_has_it(job, shapes_index, overrides):
    """Of YOLOX: right and below. On the other side, the model would meet a kind of picture that it never sees again."""
    recipe = job("augment.horizontal_flip=1", "augment.vertical_flip=1", "augment.hsv=0", *overrides).recipe
    train = train_samples(recipe, shapes_index, "pad_bottom_right")
    val = val_samples(recipe, shapes_index, "pad_bottom_right")
    padded = 0
    for position, row in enumerate(train.rows(0, 16).tolist()):
        width, height = shapes_index.size(row)
        scale = min(96 / width, 96 / height)
        inside = round(height * scale), round(width * scale)
        mirrored, plain = train.sample(position).image, val.sample(row).image
        for image in (mirrored, plain):
            assert (image[inside[0] :] == 114).all()
            assert (image[:, inside[1] :] == 114).all()
        padded += inside != (96, 96)
        assert (
            abs(mirrored[: inside[0], : inside[1]][::-1, ::-1].astype(int) - plain[: inside[0], : inside[1]]).mean() < 3
        )
    assert padded > 4
