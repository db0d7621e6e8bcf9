"""The search for thresholds, on yolox_nano's detections in real images."""

import json
from dataclasses import asdict, replace

import cv2
import numpy as np
import pytest

import raydet
from raydet.api import open_evaluation
from raydet.errors import RaydetError
from raydet.evaluation.coco import IOUS, MAIN_METRIC, RECALLS, objects
from raydet.evaluation.matching import average_precision, match
from raydet.predict.predictor import load as load_predictor
from raydet.recipe import Eval
from raydet.runs import checkpoint
from raydet.runs.checkpoint import Progress, pack, write
from raydet.tuning.candidates import FLOOR, TOP_K, CandidateSet
from raydet.tuning.nms import PICTURE, TABLE, tune_nms
from raydet.tuning.thresholds import SPACE, Search, Setting, groups
from tests.unit.test_metrics import evaluated, has_objects, random_set

DEFAULT = Setting(0.001, 0.65, TOP_K, 300, multi_label=False, class_agnostic=False)
SETTINGS = [
    DEFAULT,
    Setting(0.02, 0.5, 300, 100, multi_label=True, class_agnostic=False),
    Setting(0.3, 0.45, 1000, 300, multi_label=False, class_agnostic=True),
    Setting(0.05, 0.8, 40, 5, multi_label=True, class_agnostic=True),
]


@pytest.fixture(scope="module")
def weights(shared):
    return shared / "weights/yolox_nano/yolox_nano_coco.pth"


@pytest.fixture(scope="module")
def given(shared, tmp_path_factory):
    """Recipe and overrides of forty images."""
    storage = tmp_path_factory.mktemp("tune")
    data = [f"data.root={shared}/data/coco_mini", "data.max_num_samples=40", "data.image_size=256"]
    return {"recipe": "coco2017_yolox_n", "overrides": [*data, f"storage={storage}"]}


@pytest.fixture(scope="module")
def saved(weights, given, tmp_path_factory):
    """A checkpoint of these weights."""
    job, _ = open_evaluation(weights, given["recipe"], None, given["overrides"], print)
    folder = tmp_path_factory.mktemp("run") / "checkpoint_000001"
    write(folder, pack(job.config, job.model, None, Progress(), 1, {}))
    return folder


@pytest.fixture(scope="module")
def tuned(saved, given):
    said = []
    found = tune_nms(saved, **given, objective="F1@0.50", trials=40, debug=True, device="cpu", say=said.append)
    return found, said


@pytest.fixture(scope="module")
def candidates(tuned, saved, given):
    job, index = open_evaluation(saved, given["recipe"], None, given["overrides"], print)
    file = next(saved.glob("candidates-*.parquet"))
    return CandidateSet(file.read_bytes(), str(file), index, job.config.image_size, job.config.preprocessing.resize)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_setting_s_value_is_what_evaluate_says(weights, given, candidates, setting):
    overrides = [*given["overrides"], *(f"eval.{name}={value}" for name, value in asdict(setting).items())]
    said = raydet.evaluate(weights, recipe=given["recipe"], overrides=overrides, debug=True, device="cpu")
    everything = np.arange(len(candidates))
    assert said[MAIN_METRIC] > 0.02
    for objective in (MAIN_METRIC, "mAP@0.50", "mAP@0.75"):
        assert Search(candidates, objective).value(setting, everything) == pytest.approx(said[objective], abs=1e-12)


def test_its_value_counts_as_many_detections_as_eval_max_dets(weights, given, candidates):
    overrides = [*given["overrides"], *(f"eval.{name}={value}" for name, value in asdict(SETTINGS[1]).items())]
    overrides += ["eval.max_dets=11", "eval.score=0.001"]
    said = raydet.evaluate(weights, recipe=given["recipe"], overrides=overrides, debug=True, device="cpu")
    setting, everything = replace(SETTINGS[1], score=0.001), np.arange(len(candidates))
    few, many = (Search(candidates, max_dets=most).value(setting, everything) for most in (11, 100))
    assert few == pytest.approx(said[MAIN_METRIC], abs=1e-12) != pytest.approx(many, abs=1e-12)


def test_what_is_better_on_images_held_out_is_kept_and_used(tuned, saved):
    found, said = tuned
    assert found.comparison.winner > found.comparison.default + 0.05, "F1 of detections of any score is low"
    low, gain, high = found.comparison.gain
    assert low <= gain <= high
    assert gain == found.comparison.winner - found.comparison.default
    assert found.values[0] == (max(value for value, _ in found.values), found.winner)
    assert len(found.values) == 40
    config = checkpoint.read_config(saved)
    assert config.thresholds == found.thresholds
    assert config.thresholds.score == found.winner.score > 0.01
    assert checkpoint.damage(saved) is None
    assert load_predictor(saved, "cpu").config.thresholds == found.thresholds
    assert any("candidates of 40 images" in line for line in said)
    table = json.loads((saved / TABLE).read_text())
    assert table["thresholds"] == {name: getattr(found.thresholds, name) for name in SPACE}
    assert cv2.imread(str(saved / PICTURE)).std() > 10


def test_candidates_are_computed_once_and_the_default_stays_where_the_winner_is_no_better(tuned, saved, given):
    before, said = checkpoint.read_config(saved), []
    again = tune_nms(saved, **given, objective="F1@0.50", trials=2, seed=3, debug=True, device="cpu", say=said.append)
    assert any(line.startswith("candidates of an earlier search") for line in said)
    after = checkpoint.read_config(saved)
    assert after.thresholds == again.thresholds
    assert (after == before) == (not again.comparison.is_better)


def test_evaluate_uses_a_checkpoint_s_thresholds_but_for_those_given(tuned, saved, given):
    run = saved.parent
    (run / "recipe.yaml").write_text(f"data: {{root: {given['overrides'][0].removeprefix('data.root=')}}}")
    mine = checkpoint.read_config(saved).thresholds
    said = given["overrides"][1:]
    job, _ = open_evaluation(saved, None, None, said, print)
    assert job.recipe.eval == mine
    job, _ = open_evaluation(saved, None, None, [*said, "eval.iou=0.44"], print)
    assert job.recipe.eval == mine.model_copy(update={"iou": 0.44})


@pytest.fixture
def small(saved, weights, shared, tmp_path):
    """A run whose checkpoint is of yolox_nano at 416 pixels, which the recipe of the run says too."""
    job, _ = open_evaluation(weights, "coco2017_yolox_n", None, [f"data.root={shared}/data/coco_mini"], print)
    folder = tmp_path / "run" / "checkpoint_000001"
    write(folder, pack(job.config, job.model, None, Progress(), 1, {}))
    data = f"root: {shared}/data/coco_mini, max_num_samples: 40, image_size: 416"
    (folder.parent / "recipe.yaml").write_text(f"data: {{{data}}}")
    return folder


def test_tune_nms_measures_at_the_image_size_that_is_given(small):
    """Images, boxes, and candidates that are kept are all of that size."""
    said, values, files = [], {}, {}
    for size in (416, 320):
        given = [f"data.image_size={size}"] if size != 416 else []
        found = tune_nms(small, overrides=given, trials=2, debug=True, device="cpu", say=said.append)
        (files[size],) = set(small.glob("candidates-*.parquet")) - set(files.values())
        job, index = open_evaluation(small, None, None, given, print)
        assert job.config.image_size == job.recipe.data.image_size == (size, size)
        fitted = job.config.image_size, job.config.preprocessing.resize
        candidates = CandidateSet(files[size].read_bytes(), "", index, *fitted)
        values[size] = Search(candidates).value(Setting.of(job.recipe.eval), np.arange(len(index)))
        measured = raydet.evaluate(small.parent, overrides=given, debug=True, device="cpu", say=said.append)
        assert values[size] == pytest.approx(measured[MAIN_METRIC], abs=1e-12)
        assert not found.not_stored or size == 320
    assert values[416] != values[320] > 0.2


def test_thresholds_for_another_image_size_are_not_stored(small):
    given = {"overrides": ["data.image_size=320"], "objective": "F1@0.50", "trials": 8, "debug": True, "device": "cpu"}
    before = checkpoint.read_config(small)
    found = tune_nms(small, **given, say=print)
    assert found.comparison.is_better
    assert found.not_stored == "the checkpoint is used at 416x416 pixels, not at 320x320"
    assert checkpoint.read_config(small) == before
    assert f"{found.not_stored}: add eval.score={found.winner.score} eval.iou=" in found.summary("F1@0.50")[-1]


def test_the_image_size_of_the_checkpoint_counts_not_that_of_a_recipe(small, shared):
    said = []
    data = [f"data.root={shared}/data/coco_mini", "data.max_num_samples=40"]
    mine = raydet.evaluate(small, debug=True, device="cpu", say=said.append)
    assert not any("data.image_size" in line for line in said)
    other = raydet.evaluate(small, recipe="coco2017_yolox_s", overrides=data, debug=True, device="cpu", say=said.append)
    assert other == mine
    assert sum("data.image_size is 640x640 in the recipe, but 416x416 in the checkpoint" in line for line in said) == 1
    smaller = raydet.evaluate(small, overrides=["data.image_size=320"], debug=True, device="cpu", say=said.append)
    assert smaller[MAIN_METRIC] != mine[MAIN_METRIC]


def test_settings_of_too_many_wrong_detections_are_worth_nothing(candidates):
    rows = np.arange(len(candidates))
    precise = Search(candidates, precision=0.5)
    assert precise.value(DEFAULT, rows) == 0
    assert precise.value(replace(DEFAULT, score=0.6), rows) > 0


def test_settings_are_the_default_and_others_by_their_nms():
    drawn = groups(50, DEFAULT, seed=1)
    flat = [setting for group in drawn for setting in group]
    assert len(flat) == len(set(flat)) == 50
    assert flat[0] == DEFAULT
    for group in drawn:
        assert len({(s.iou, s.nms_top_k, s.multi_label, s.class_agnostic) for s in group}) == 1
    assert Setting.of(Eval(score=0.0, nms_top_k=None)).score == FLOOR


def test_mistakes_are_said(candidates):
    with pytest.raises(RaydetError, match=r"objective mAP: it is one of mAP@0\.50:0\.95"):
        Search(candidates, "mAP")
    with pytest.raises(RaydetError, match=r"^some\.parquet cannot be read: .*; remove it to compute it again"):
        CandidateSet(b"no parquet", "some.parquet", candidates.index, (256, 256), "pad_bottom_right")


@pytest.mark.parametrize("seed", range(12))
def test_average_precision_is_coco_s_and_a_weight_is_a_number_of_copies(seed):
    index, detections = random_set(seed)
    if not has_objects(index):
        return
    evaluation = evaluated(index, detections)
    matches = match(evaluation.truth, evaluation.found, 3, IOUS)
    assert np.nanmean(average_precision(matches, RECALLS)) == pytest.approx(
        evaluation.compute()[MAIN_METRIC], abs=1e-12
    )
    copies = np.random.default_rng(seed).integers(0, 4, len(index))
    if not has_objects(index.take(np.flatnonzero(copies))):
        return
    rows = np.repeat(np.arange(len(index)), copies)
    more = index.take(rows)
    real = objects(index)
    counted = np.bincount(real.label[~real.crowd], copies[real.image[~real.crowd]], 3)
    weighted = average_precision(replace(matches, objects=counted), RECALLS, copies[matches.image].astype(float))
    repeated = evaluated(more, [detections[row] for row in rows])
    whole = match(repeated.truth, repeated.found, 3, IOUS)
    expected = average_precision(whole, RECALLS)
    # Copies of a right and a wrong detection with the same score stand in another order.
    if len(set(matches.score)) == len(matches.score):
        assert weighted == pytest.approx(expected, abs=1e-9, nan_ok=True)
