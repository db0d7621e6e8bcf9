import contextlib
import io
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from raydet.boxes import xyxy_to_xywh
from raydet.data.index import make_index
from raydet.errors import RaydetError
from raydet.evaluation import matching, measures
from raydet.evaluation.coco import IOUS, RECALLS, TWELVE, CocoEvaluation, beyond, metric_names, twelve_names
from raydet.evaluation.matching import BoxTable, average_precision, match, operating

CATEGORIES = (2, 5, 9)


def random_set(seed, false_alarms=4):
    """An index with crowds and empty images, and detections of it: shifted truth, with ties and false alarms."""
    rng = np.random.default_rng(seed)
    images, boxes, of_image, detections = int(rng.integers(1, 8)), [], [], []
    for image in range(images):
        count = int(rng.integers(0, 6))
        corner, size = rng.integers(0, 100, (count, 2)), rng.integers(1, 120, (count, 2))
        boxes.append(np.hstack([corner, corner + size]).astype(float))
        of_image += [image] * count
        found = boxes[-1][rng.random(count) < 0.8] + rng.integers(-8, 9, (1, 4))
        false = rng.integers(0, 60, (int(rng.integers(0, false_alarms)), 4)).astype(float)
        false[:, 2:] += false[:, :2] + 1
        found = np.vstack([found, false])
        found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
        scores, labels = rng.integers(1, 10, len(found)) / 10, rng.integers(0, 3, len(found))
        detections.append(np.column_stack([found, scores, labels]))
    total = len(of_image)
    index = make_index(
        [(int(image_id), f"{image_id}.jpg", 200, 200) for image_id in rng.permutation(100)[:images]],
        np.vstack([*boxes, np.empty((0, 4))]),
        labels=rng.integers(0, 3, total),
        crowd=rng.random(total) < 0.15,
        area=rng.integers(1, 12000, total).astype(float),
        image_of_box=np.array(of_image, int),
        root="/",
        class_names=("a", "b", "c"),
        category_ids=CATEGORIES,
    )
    return index, detections


def official(index, detections, top_k=None, max_dets=(1, 10, 100)):
    """The COCO API's twelve numbers; and by IoU threshold, for each of the best `top_k` detections of an image and
    class: its image, label and score, whether it is right, and whether it is ignored."""
    annotations, results = [], []
    for row, found in enumerate(detections):
        image_id = int(index.image_ids[row])
        objects = index.annotations(row)
        for box, label, crowd, area in zip(xyxy_to_xywh(objects.boxes).tolist(), *objects[1:], strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": CATEGORIES[label],
                    "bbox": box,
                    "area": float(area),
                    "iscrowd": int(crowd),
                }
            )
        for row_of_six in found:
            box = xyxy_to_xywh(row_of_six[:4]).tolist()
            category = CATEGORIES[int(row_of_six[5])]
            results.append({"image_id": image_id, "category_id": category, "bbox": box, "score": row_of_six[4]})
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "info": {},
            "images": [{"id": int(image_id)} for image_id in index.image_ids],
            "annotations": annotations,
            "categories": [{"id": category, "name": str(category)} for category in CATEGORIES],
        }
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.params.maxDets = list(max_dets) if top_k is None else [top_k]
        evaluation.evaluate()
        matched = [[] for _ in IOUS]
        for entry in evaluation.evalImgs:
            if entry is None or entry["aRng"] != evaluation.params.areaRng[0]:  # objects of all sizes
                continue
            row = int(np.flatnonzero(index.image_ids == entry["image_id"])[0])
            label = CATEGORIES.index(entry["category_id"])
            for level in range(len(IOUS)):
                ignored = entry["dtIgnore"][level]
                right = (entry["dtMatches"][level] > 0) & (ignored == 0)
                kinds = zip(entry["dtScores"], right, ignored, strict=True)
                matched[level] += [((row, label, score), bool(r), bool(i)) for score, r, i in kinds]
        if top_k is None:
            evaluation.accumulate()
    return stats_of(evaluation.eval) if top_k is None else None, matched


def stats_of(accumulated):
    """What the COCO API's `summarize` says, which with other numbers of detections than COCO's it does not."""

    def mean(what, iou, area, place):
        values = accumulated[what][..., area, place]
        values = values if iou is None else values[iou]
        return values[values > -1].mean() if (values > -1).any() else -1

    precision = [mean("precision", iou, area, 2) for iou, area in ((None, 0), (0, 0), (5, 0))]
    precision += [mean("precision", None, area, 2) for area in (1, 2, 3)]
    return [
        *precision,
        *(mean("recall", None, 0, place) for place in range(3)),
        *(mean("recall", None, area, 2) for area in (1, 2, 3)),
    ]


def index_of(boxes):
    """An image with some boxes of one class."""
    return make_index(
        [(1, "1.jpg", 100, 100)],
        np.array(boxes, float).reshape(-1, 4),
        labels=np.zeros(len(boxes), int),
        crowd=np.zeros(len(boxes), bool),
        area=np.full(len(boxes), 100.0),
        image_of_box=np.zeros(len(boxes), int),
        root="/",
        class_names=("a",),
        category_ids=(1,),
    )


def check(metrics, expected, names=TWELVE):
    for name, value in zip(names, expected, strict=True):
        if value == -1:
            assert name not in metrics
        else:
            assert metrics[name] == pytest.approx(value, abs=1e-12), name


def evaluated(index, detections, max_dets=100):
    evaluation = CocoEvaluation(index, max_dets)
    evaluation.update(range(len(index)), detections)
    return evaluation


def has_objects(index):
    return not index.objects()[1].crowd.all()


@given(st.integers(0, 10**6))
@settings(max_examples=200, deadline=None)
def test_the_twelve_numbers_are_the_coco_api_s(seed):
    """Of sets with crowds, ties, empty images, single classes, and IoUs of exactly a threshold."""
    index, detections = random_set(seed)
    assume(has_objects(index) and sum(map(len, detections)))
    check(evaluated(index, detections).compute(), official(index, detections)[0])


@pytest.mark.parametrize("seed", range(4))
def test_more_than_a_hundred_detections_of_an_image(seed):
    index, detections = random_set(seed, false_alarms=150)
    assert max(map(len, detections)) > 100
    check(evaluated(index, detections).compute(), official(index, detections)[0])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("max_dets", [11, 30, 100, 150])
def test_as_many_detections_of_a_class_and_image_count_as_max_dets_says(seed, max_dets):
    index, detections = random_set(seed, false_alarms=400)
    evaluation = evaluated(index, detections, max_dets)
    expected = official(index, detections, max_dets=(1, 10, max_dets))[0]
    check(evaluation.compute(), expected, twelve_names(max_dets))
    assert set(evaluation.compute()) <= set(metric_names(index, max_dets))
    other = CocoEvaluation(index)
    other.merge_bytes([evaluation.to_bytes()])
    assert other.compute() == evaluation.compute()


def test_all_of_150_objects_of_a_class_can_be_found_where_max_dets_lets_them():
    boxes = [[x, y, x + 4, y + 4] for x in range(0, 75, 5) for y in range(0, 50, 5)]
    index = index_of(boxes)
    found = [np.array([[*box, 1 - number / 200, 0] for number, box in enumerate(boxes)])]
    capped, whole = evaluated(index, found).compute(), evaluated(index, found, 150).compute()
    assert capped["AR@0.50:0.95_max=100"] == pytest.approx(100 / 150)
    assert capped["Recall@0.50"] == pytest.approx(100 / 150)
    assert whole["AR@0.50:0.95_max=150"] == whole["Recall@0.50"] == whole["mAP@0.50:0.95"] == 1
    assert "AR@0.50:0.95_max=100" not in whole


def test_objects_beyond_the_detections_that_count_are_named():
    crowded = index_of([[x, 0, x + 4, 4] for x in range(30)])
    assert beyond(crowded, 30, 30) == []
    assert list(map(str, beyond(crowded, 20, 25))) == [
        "1 images have more objects of a class than the 20 that AP counts, such as 1.jpg: a 30: "
        "set eval.max_dets=30, or those beyond count as missed",
        "1 images have more objects than the 25 detections of an image that are kept, such as 1.jpg: 30: "
        "set eval.max_detections=30, or those beyond count as missed",
    ]


@given(st.integers(0, 10**6), st.sampled_from([1, 2, 100]))
@settings(max_examples=200, deadline=None)
def test_what_is_matched_is_what_the_coco_api_matches(seed, top_k):
    index, detections = random_set(seed)
    assume(has_objects(index) and sum(map(len, detections)))
    evaluation = evaluated(index, detections)
    matches = match(evaluation.truth, evaluation.found, 3, IOUS, top_k)
    theirs = official(index, detections, top_k)[1]
    for level in range(len(IOUS)):
        for right, ignored in ((True, False), (False, True), (False, False)):
            which = (matches.right[level] == right) & (matches.ignored[level] == ignored)
            ours = sorted(zip(matches.image[which], matches.label[which], matches.score[which], strict=True))
            expected = sorted(key for key, *kind in theirs[level] if kind == [right, ignored])
            assert ours == expected


def test_precision_and_recall_are_those_of_the_detections_above_the_threshold():
    index = index_of([[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]])
    # One wrong above all, two right, a second of an object already found.
    found = [[80, 80, 90, 90, 0.9], [0, 0, 10, 10, 0.8], [20, 0, 30, 10, 0.6], [20, 0, 30, 10, 0.5]]
    evaluation = evaluated(index, [np.array([[*row, 0] for row in found])])
    matches = match(evaluation.truth, evaluation.found, 1, np.array([0.5]))
    at = operating(matches, np.array([0, 0.6, 0.85, 0.95]))
    assert at.precision[0, 0].tolist() == pytest.approx([2 / 4, 2 / 3, 0, 0])
    assert at.recall[0, 0].tolist() == pytest.approx([2 / 3, 2 / 3, 0, 0])
    assert at.f1[0, 0].tolist() == pytest.approx([4 / 7, 2 / 3, 0, 0])
    metrics = evaluation.compute()
    assert metrics["Best_score_threshold"] == pytest.approx(0.51)
    assert metrics["F1@0.50"] == metrics["Precision@0.50"] == metrics["Recall@0.50"] == pytest.approx(2 / 3)


def test_without_objects_it_says_so():
    evaluation = evaluated(index_of([]), [np.array([[0, 0, 1, 1, 0.5, 0]])])
    with pytest.raises(RaydetError, match=r"there are no objects .* in the 1 images"):
        evaluation.compute()


def test_results_have_the_ids_of_the_data_set():
    index, detections = random_set(3)
    results = evaluated(index, detections).results()
    assert {entry["image_id"] for entry in results} <= set(index.image_ids.tolist())
    assert {entry["category_id"] for entry in results} <= set(CATEGORIES)
    x1, y1, x2, y2, score, _ = detections[0][0]
    first = next(entry for entry in results if entry["image_id"] == index.image_ids[0])
    assert first["bbox"] == [x1, y1, x2 - x1, y2 - y1]
    assert first["score"] == score


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shards", [2, 3])
def test_shards_merge_to_the_same_numbers(seed, shards):
    index, detections = random_set(seed)
    whole = CocoEvaluation(index)
    whole.update(range(len(index)), detections)
    states = []
    for shard in range(shards):
        part = CocoEvaluation(index)
        for row in reversed(range(shard, len(index), shards)):  # one by one, backwards
            part.update([row], [detections[row]])
        states.append(part.to_bytes())
    merged = CocoEvaluation(index)
    merged.merge_bytes(states)
    assert merged.compute() == whole.compute()


def test_classes_without_truth_are_left_out_and_the_rest_averages_to_map():
    index, detections = random_set(4)
    evaluation = CocoEvaluation(index)
    evaluation.update(range(len(index)), detections)
    metrics = evaluation.compute()
    classes = [value for name, value in metrics.items() if name.startswith("AP@0.50:0.95_")]
    present = {
        index.class_names[label]
        for row in range(len(index))
        for label in index.annotations(row).labels[~index.annotations(row).crowd]
    }
    assert {name.rpartition("_")[2] for name in metrics if name.startswith("AP@")} == present
    assert np.mean(classes) == pytest.approx(metrics["mAP@0.50:0.95"])


def test_no_detections_is_zero():
    index, _ = random_set(4)
    evaluation = CocoEvaluation(index)
    evaluation.update(range(len(index)), [np.empty((0, 6))] * len(index))
    assert evaluation.compute()["mAP@0.50:0.95"] == 0


@given(st.integers(0, 10**6), st.integers(1, 4), st.sampled_from([11, 100]))
@example(seed=2707, groups=1, max_dets=100)  # crowds only: no pair of group and class has objects
@settings(max_examples=100, deadline=None)
def test_groups_of_images_have_the_metrics_that_each_has_alone(seed, groups, max_dets):
    index, detections = random_set(seed, false_alarms=4 if max_dets == 100 else 60)
    whole = evaluated(index, detections)
    found = measures.Measured(whole.truth, whole.found, index.class_names, max_dets)
    group = np.random.default_rng(seed).integers(0, groups, len(index))
    measured = {name: found.measure(name, group) for name in measures.names(index.class_names, max_dets)}
    for number in range(group.max() + 1):
        rows = np.flatnonzero(group == number).tolist()
        alone = CocoEvaluation(index, max_dets)
        alone.update(rows, [detections[row] for row in rows])
        with contextlib.suppress(RaydetError):  # no objects
            expected = alone.compute()
            for name, values in measured.items():
                assert values[number] == pytest.approx(expected.get(name, np.nan), abs=1e-12, nan_ok=True), name
            continue
        assert all(np.isnan(values[number]) for values in measured.values())


def plain_average_precision(matches, weights):
    """AP of each IoU threshold and class by its definition, one after the other."""
    found = np.full((len(matches.right), len(matches.objects)), np.nan)
    for level, label in np.argwhere(np.ones_like(found)):
        mine = matches.label == label
        if not matches.objects[label]:
            continue
        right, ignored = matches.right[level, mine], matches.ignored[level, mine]
        hits, misses = (np.cumsum(which * weights[mine]) for which in (right, ~(right | ignored)))
        precision = np.maximum.accumulate((hits / (hits + misses + np.spacing(1)))[::-1])[::-1]
        place = np.searchsorted(hits / matches.objects[label], RECALLS, side="left")
        at_recalls = np.concatenate((precision, [0]))[np.minimum(place, mine.sum())]
        found[level, label] = at_recalls.sum() / len(RECALLS)
    return found


@given(st.integers(0, 10**6), st.booleans())
@settings(max_examples=100, deadline=None)
def test_average_precision_is_that_of_its_definition_to_the_bit(seed, weighted):
    index, detections = random_set(seed, false_alarms=60)
    whole = evaluated(index, detections)
    matches = match(whole.truth, whole.found, 3, IOUS)
    weights = np.random.default_rng(seed).integers(1, 4, len(matches.score)).astype(float) ** weighted
    found = average_precision(matches, RECALLS, weights if weighted else None)
    assert np.array_equal(found, plain_average_precision(matches, weights), equal_nan=True)


@given(st.integers(0, 10**6), st.sampled_from([1, 3, 20]))
@settings(max_examples=100, deadline=None)
def test_matches_do_not_depend_on_how_many_pairs_are_compared_at_once(seed, pairs):
    index, detections = random_set(seed, false_alarms=20)
    whole = evaluated(index, detections)
    expected = match(whole.truth, whole.found, 3, IOUS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "_PAIRS_AT_ONCE", pairs)
        found = match(whole.truth, whole.found, 3, IOUS)
    parts = zip(vars(found).values(), vars(expected).values(), strict=True)
    assert all(np.array_equal(mine, other) for mine, other in parts)


def test_memory_is_bounded_where_a_class_has_a_thousand_objects_in_an_image():
    """40 images, 100 detections each: four million pairs, at 8 bytes a number."""
    rng, images, objects, detections = np.random.default_rng(0), 40, 1000, 100
    corner = rng.uniform(0, 900, (images * objects, 2))
    boxes = np.hstack((corner, rng.uniform(5, 20, corner.shape)))
    image, label = np.repeat(np.arange(images), objects), np.zeros(len(boxes), int)
    truth = BoxTable(image, label, boxes)
    found = BoxTable(image, label, boxes + 1, score=rng.random(len(boxes)))[
        np.arange(len(boxes)) % objects < detections
    ]
    tracemalloc.start()
    matches = match(truth, found, 1, IOUS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert matches.right[0].sum() > images * detections / 2
    assert peak < 100e6


def cpu_seconds(work):
    """The least of three times."""
    times = []
    for _ in range(3):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return min(times)


def test_the_measures_of_each_image_cost_about_what_the_metrics_do():
    """Of 500 images with 80 classes, and 7 objects and 100 detections each."""
    rng, images = np.random.default_rng(0), 500

    def boxes(count):
        corner = rng.uniform(0, 500, (count, 2))
        return np.hstack((corner, corner + rng.uniform(10, 120, (count, 2))))

    truth, labels = boxes(7 * images), rng.integers(0, 80, 7 * images)
    index = make_index(
        [(image, f"{image}.jpg", 640, 640) for image in range(images)],
        truth,
        labels=labels,
        crowd=np.zeros(len(truth), bool),
        area=np.ones(len(truth)),
        image_of_box=np.repeat(np.arange(images), 7),
        root="/",
        class_names=[str(label) for label in range(80)],
        category_ids=range(80),
    )
    near = truth + rng.normal(0, 5, truth.shape), labels
    detections = []
    for image in range(images):
        mine = slice(7 * image, 7 * image + 7)
        found = np.concatenate((near[0][mine], boxes(93)))
        detections.append(np.column_stack((found, rng.random(100), [*near[1][mine], *rng.integers(0, 80, 93)])))
    whole = evaluated(index, detections)

    def by_image():
        found = measures.Measured(whole.truth, whole.found, index.class_names)
        for group in (np.arange(images) // 16, np.arange(images)):
            found.measure("mAP@0.50:0.95", group)

    assert cpu_seconds(by_image) < 3 * cpu_seconds(whole.compute)


def test_all_measures_are_of_one_matching(monkeypatch):
    calls = []
    monkeypatch.setattr(measures, "match", lambda *given: calls.append(1) or match(*given))
    index, detections = random_set(4)
    whole = evaluated(index, detections)
    found = measures.Measured(whole.truth, whole.found, index.class_names)
    for name in measures.names(index.class_names):
        for group in (np.zeros(len(index), int), np.arange(len(index))):
            found.measure(name, group)
    assert len(calls) == 1


def test_a_metric_that_no_batch_has_is_named():
    with pytest.raises(RaydetError, match=r"extreme_batches: a batch has no metric mAP@0.500; did you mean mAP@0.50"):
        measures.check("mAP@0.500", ("cat",), "track.extreme_batches")
