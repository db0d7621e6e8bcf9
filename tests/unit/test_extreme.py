"""The most extreme batch of an epoch, as a training finds it, against all batches computed one by one."""

import json
import os
import socket
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import spawn

import raydet
from raydet.boxes import cxcywh_to_xyxy, xyxy_to_xywh
from raydet.data.coco import load_coco
from raydet.data.pipeline import train_samples, val_samples
from raydet.errors import RaydetError
from raydet.evaluation import measures
from raydet.evaluation.coco import detected
from raydet.evaluation.matching import BoxTable
from raydet.predict.predictor import post_prediction
from raydet.recipe import load
from raydet.runs import checkpoint
from raydet.runs.log import RunLog
from raydet.tracking import DetectionVisualizationCallback, ExtremeBatchDetectionVisualizationCallback
from raydet.training.extremes import ValPictures
from raydet.training.job import Run
from raydet.training.loop import train_loop, train_mode
from raydet.training.prepare import make_job
from raydet.training.validation import Validation
from raydet.training.worlds import LocalWorld
from tests.unit.test_ranks import share_of

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(600)]

CPU = torch.device("cpu")
METRIC = "AR@0.50:0.95_max=100"
# Recipe, model, and the component that is looked for.
FAMILIES = {
    "ssd": ("ssd_lite_finetune", "ssd_lite_mobilenet_v2", "SSDLoss/smooth_l1"),
    "yolox": ("yolox_finetune", "yolox_n", "YoloXFastDetectionLoss/cls"),
    "ppyoloe": ("ppyoloe_finetune", "ppyoloe_s", "PPYoloELoss/loss_cls"),
    "yolo_nas": ("yolo_nas_finetune", "yolo_nas_s", "PPYoloELoss/loss_iou"),
}
MEASURES = ("metric", "loss_to_monitor")


class SharedWorld(LocalWorld):
    """One of two ranks: half of each training batch, every second validation batch."""

    def __init__(self, rank, *given):
        super().__init__(*given)
        self.rank, self.size = rank, 2

    def train_batches(self, start, stop):
        return (share_of(batch, self.rank) for batch in LocalWorld.train_batches(self, start, stop))

    def val_batches(self):
        whole = super().val_batches()
        return lambda: islice(whole(), self.rank, None, 2)


def settings(family, shapes, folder):
    recipe, model, component = FAMILIES[family]
    both = "enable_on_train_loader: true, max_images: null, images: 3, score: 0"
    entries = [
        f"{{{kind}: '{name}', max: {most}, {both}}}"
        for kind, name in zip(MEASURES, (METRIC, component), strict=True)
        for most in ("false", "true")
    ]
    return recipe, [
        f"name={family}",
        f"model.name={model}",
        "model.weights=null",
        f"data.root={shapes}",
        f"storage={folder}",
        "data.image_size=96",
        "data.chunk_size=8",
        *("augment.mosaic=0", "augment.mixup=0", "augment.multiscale=null"),
        *("train.batch_size=8", "train.epochs=1", "train.precision=fp32"),
        # Weights stay as they are, so that each batch can be computed again.
        *("train.lr=1e-12", "train.warmup_epochs=0", "train.cooldown_epochs=0", "train.weight_decay=0"),
        *("eval.batch_size=4", "eval.score=0", "eval.nms_top_k=300"),
        "track.average_best=false",
        "track.visualize=[{batch_idx: 2}, {batch_idx: 1, phase: valid}]",
        f"track.extreme_batches=[{', '.join(entries)}]",
    ]


def surroundings(family, shapes, folder):
    """A training, and what a world is made of."""
    name, overrides = settings(family, shapes, folder)
    recipe = load(name, overrides)
    parts = [load_coco(shapes / f"annotations/instances_{split}.json", shapes / split) for split in ("train", "val")]
    job = make_job(recipe, *parts)
    for name, parameter in job.model.named_parameters():
        if "reg_preds." in name and name.endswith("bias") and FAMILIES[family][2].startswith("PPYoloELoss"):
            # Boxes of two strides, some of which fit an object; untrained, they are larger than the image.
            parameter.data = -0.7 * torch.arange(17.0).repeat(4)
    resize = job.config.preprocessing.resize
    return job, (job, train_samples(recipe, parts[0], resize), val_samples(recipe, parts[1], resize), CPU)


def _rank(rank, port, shapes, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for family in FAMILIES:
        job, given = surroundings(family, shapes, folder)
        train_loop(Run(job, SharedWorld(rank, *given), RunLog(job.folder)))
        dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(shapes, tmp_path_factory):
    """Folders of runs of all families, with one rank and with two."""
    alone, shared = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    for family in FAMILIES:
        job, given = surroundings(family, shapes, alone)
        train_loop(Run(job, LocalWorld(*given), RunLog(job.folder)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(_rank, (port, shapes, shared), nprocs=2)
    return {1: alone, 2: shared}


def joined(parts):
    """Outputs of a model of several ranks as if it were one's; anchors are the same for all."""
    first = parts[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(parts) if first.ndim > 2 else first
    if isinstance(first, list | tuple):
        items = [joined([part[n] for part in parts]) for n in range(len(first))]
        return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
    return first


def measured(batch, found):
    """The metric of a batch, and of each of its images."""
    images = len(batch.images)
    targets = batch.targets.double().numpy()
    truth = BoxTable(targets[:, 0].astype(int), targets[:, 1].astype(int), xyxy_to_xywh(cxcywh_to_xyxy(targets[:, 2:])))
    rows = [np.column_stack((np.full(len(rows), n), rows.double().numpy())) for n, rows in enumerate(found)]
    whole = measures.Measured(truth, detected(np.concatenate(rows)), [str(n) for n in range(5)])
    return whole.measure(METRIC, np.zeros(images, int))[0], whole.measure(METRIC, np.arange(images))


@cache
def brute_force(family, ranks, shapes, folder):
    """Of each training and each validation batch: names of its images, metric, component, metric of the images."""
    job, given = surroundings(family, shapes, folder / "unused")
    world, criterion = LocalWorld(*given), job.criterion
    component = list(criterion.component_names).index(FAMILIES[family][2].partition("/")[2])
    criterion.at_epoch(0, 1)
    callback = post_prediction(job.model, job.recipe.eval)
    prepare = job.config.preprocessing
    batches = {"train": [], "valid": []}
    with torch.no_grad():
        train_mode(job.model, job.recipe.train)
        for batch in islice(world.train_batches(0, 40), 5):
            shares = [share_of(batch, rank) for rank in range(ranks)] if ranks > 1 else [batch]
            outputs = joined([job.model(prepare(share.images)) for share in shares])
            found = callback(job.model.head.decode(outputs))
            loss = criterion(outputs, batch.targets)[1][component].item()
            batches["train"].append((names_of(given[1], batch), *measured(batch, found), loss))
        kept = max((folder / family).glob("checkpoint_*"))
        model = checkpoint.load_model(kept, job.config, job.model).eval()
        for batch in world.val_batches()():
            outputs = model(prepare(batch.images))
            loss = criterion(outputs, batch.targets)[1][component].item()
            batches["valid"].append((names_of(given[2], batch), *measured(batch, callback(outputs)), loss))
    return batches


def names_of(samples, batch):
    return [Path(samples.index.path(row)).name for row in batch.rows.tolist()]


def pictures(folder):
    lines = (folder / "images/pictures.jsonl").read_text().splitlines()
    return {note["name"]: note for note in map(json.loads, lines)}


@pytest.mark.parametrize("end", ["min", "max"])
@pytest.mark.parametrize("by", MEASURES)
@pytest.mark.parametrize("phase", ["train", "valid"])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_one_that_computing_all_of_them_finds(runs, family, ranks, phase, by, end, shapes):
    batches = brute_force(family, ranks, shapes, runs[ranks])[phase]
    measure = METRIC if by == "metric" else FAMILIES[family][2]
    note = pictures(runs[ranks] / family)[f"{phase}/{end}_{measure}_batch"]
    values = np.array([metric if by == "metric" else loss for _, metric, _, loss in batches])
    assert values.max() - values.min() > 1e-4 * abs(values).max() > 0, "or any batch would do"
    best = int(values.argmin() if end == "min" else values.argmax())
    assert note["value"] == pytest.approx(values[best], rel=1e-4)
    assert note["captions"] == batches[best][0]
    if phase == "train":
        assert note["step"] == best + 1


@pytest.mark.parametrize("end", ["min", "max"])
@pytest.mark.parametrize("phase", ["train", "valid"])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_so_are_the_images_whichever_batch_they_were_in(runs, family, ranks, phase, end, shapes):
    batches = brute_force(family, ranks, shapes, runs[ranks])[phase]
    note = pictures(runs[ranks] / family)[f"{phase}/{end}_{METRIC}_images"]
    of_images = {name: value for names, _, values, _ in batches for name, value in zip(names, values, strict=True)}
    known = sorted((value for value in of_images.values() if not np.isnan(value)), reverse=end == "max")
    shown = [caption.split("  ") for caption in note["captions"]]
    assert [float(value) for _, value in shown] == pytest.approx(known[:3], abs=6e-4)
    assert [of_images[name] for name, _ in shown] == pytest.approx(known[:3], abs=1e-3)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("phase", ["train", "valid"])
def test_a_batch_is_drawn_by_its_number(runs, ranks, phase, shapes):
    number = 2 if phase == "train" else 1
    note = pictures(runs[ranks] / "yolox")[f"{phase}/batch_{number}"]
    batches = brute_force("yolox", ranks, shapes, runs[ranks])[phase]
    # A validation batch is one rank's, here the first's, who has every second.
    assert note["captions"] == batches[number if phase == "train" else number * ranks][0]
    assert (runs[ranks] / "yolox" / note["picture"]).is_file()


def test_each_measure_and_each_picture_is_a_sign_of_life(shapes, tmp_path):
    job, given = surroundings("yolox", shapes, tmp_path)
    beats = []
    batches = LocalWorld(*given).val_batches()
    validation = Validation(job, 0, CPU, batches, RunLog(job.folder), lambda: beats.append(1))
    validation.evaluate(job.model.eval(), ValPictures(validation, job.criterion, 1, 5))
    drawn = sum(len(note["captions"]) for note in pictures(job.folder).values())
    assert drawn >= 4 * (4 + 3) + 4
    assert len(beats) > drawn + 1


def test_pictures_are_asked_for_in_python_too(demo, tmp_path):
    asked = [
        ExtremeBatchDetectionVisualizationCallback(
            loss_to_monitor="YoloXFastDetectionLoss/iou", max=True, max_images=2
        ),
        DetectionVisualizationCallback(phase="valid", batch_idx=0, max_images=3),
    ]
    run = raydet.train("demo", overrides=demo, debug=True, device="cpu", say=lambda line: None, callbacks=asked)
    notes = pictures(run.folder)
    assert len(notes["valid/max_YoloXFastDetectionLoss/iou_batch"]["captions"]) == 2
    assert len(notes["valid/batch_0"]["captions"]) == 3


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{metric: mAP@0.5}", "a batch has no metric mAP@0.5; did you mean mAP@0."),
        ("{metric: 'AP@0.50:0.95_disk'}", "did you mean AP@0.50:0.95_disc"),
        ("{loss_to_monitor: YoloXFastDetectionLoss/giou}", "there is no YoloXFastDetectionLoss/giou, only "),
        ("{max: true}", "it should have either metric, such as mAP@0.50, or loss_to_monitor"),
    ],
)
def test_what_cannot_be_measured_is_named_before_the_training(entry, message, demo):
    with pytest.raises(RaydetError, match=message):
        raydet.train("demo", overrides=[*demo, f"track.extreme_batches=[{entry}]"], debug=True, device="cpu")
