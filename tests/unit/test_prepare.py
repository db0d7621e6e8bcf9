from dataclasses import replace

import pytest

from raydet.data.coco import load_coco
from raydet.errors import RaydetError
from raydet.losses import YoloXDetectionLoss
from raydet.recipe import Recipe, load
from raydet.training.prepare import make_job, open_run


@pytest.fixture
def job(demo, shapes):
    """Makes the job of the demo recipe with other overrides or objects."""
    indices = [load_coco(shapes / f"annotations/instances_{split}.json", shapes / split) for split in ("train", "val")]

    def make(*overrides, head=40, **objects):
        return make_job(load("demo", [*demo, *overrides]), indices[0].head(head), indices[1], **objects)

    return make


def keep_a_checkpoint(folder):
    (folder / "checkpoint_000001").mkdir()
    (folder / "checkpoint_000001" / "config.json").write_text("{}")


def test_a_run_can_be_opened_again_and_what_changes_no_result_may_change(job):
    open_run(job())
    keep_a_checkpoint(job().folder)
    open_run(job("scale.num_workers=2", "track.log_every=5"))


def test_settings_are_free_until_there_is_a_checkpoint(job):
    open_run(job())
    open_run(job("train.lr=0.5"))
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
    open_run(job())
    keep_a_checkpoint(job().folder)
    with pytest.raises(RaydetError) as error:
        open_run(job(*overrides, **others))
    assert message in str(error.value)
    assert "choose another name" in str(error.value)


def test_a_run_needs_a_name_and_a_folder_that_can_be_made(job, tmp_path):
    with pytest.raises(RaydetError, match="name is empty"):
        open_run(replace(job(), recipe=Recipe()))
    (tmp_path / "file").write_text("")
    with pytest.raises(RaydetError, match=r"storage: .* cannot be made or written"):
        open_run(job(f"storage={tmp_path}/file"))


@pytest.mark.parametrize(
    ("images", "batch_size", "every", "epochs", "expected"),
    [(40, 8, 2, 6, [2, 4, 6]), (40, 128, 10, 40, [10, 20, 30, 40]), (30, 128, 10, 20, [10, 20]), (40, 8, 4, 6, [4, 6])],
)
def test_validations_are_due_every_so_many_epochs_even_where_a_step_is_longer(
    job, images, batch_size, every, epochs, expected
):
    mine = job(f"train.batch_size={batch_size}", f"eval.every={every}", f"train.epochs={epochs}", head=images)
    due = [step for step in range(1, mine.total_steps + 1) if mine.validates_after(step)]
    assert len(due) == len(expected)
    for step, epoch in zip(due, expected, strict=True):
        assert epoch <= mine.epoch_of(step) <= epoch + batch_size / images
