import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from raydet.data.own import (
    COCODetectionDataset,
    DetectionDataset,
    TargetFormat,
    find_dataset,
    index_of_records,
    load_own,
    register_dataset,
)
from raydet.data.problems import Problems
from raydet.errors import RaydetError
from raydet.store import Store

CLASSES = ("cat", "dog", "cow")
BOXES = np.array([[10.0, 5, 30, 15]])


@pytest.fixture
def root(tmp_path):
    """Pictures of 40x20: b.jpg, and in a folder a.jpg and c.jpg."""
    (tmp_path / "sub").mkdir()
    for name in ("b.jpg", "sub/a.jpg", "sub/c.jpg"):
        Image.new("RGB", (40, 20)).save(tmp_path / name)
    return tmp_path


def record(path="b.jpg", **more):
    return {"path": path, "boxes": [[10, 5, 30, 15]], "labels": ["dog"]} | more


# ---- target formats


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("XYXY_LABEL", [10, 5, 30, 15, 2]),
        ("XYWH_LABEL", [10, 5, 20, 10, 2]),
        ("CXCYWH_LABEL", [20, 10, 20, 10, 2]),
        ("LABEL_XYXY", [2, 10, 5, 30, 15]),
        ("LABEL_XYWH", [2, 10, 5, 20, 10]),
        ("LABEL_CXCYWH", [2, 20, 10, 20, 10]),
        ("NORMALIZED_XYXY_LABEL", [0.25, 0.25, 0.75, 0.75, 2]),
        ("NORMALIZED_XYWH_LABEL", [0.25, 0.25, 0.5, 0.5, 2]),
        ("NORMALIZED_CXCYWH_LABEL", [0.5, 0.5, 0.5, 0.5, 2]),
        ("LABEL_NORMALIZED_XYXY", [2, 0.25, 0.25, 0.75, 0.75]),
        ("LABEL_NORMALIZED_XYWH", [2, 0.25, 0.25, 0.5, 0.5]),
        ("LABEL_NORMALIZED_CXCYWH", [2, 0.5, 0.5, 0.5, 0.5]),
    ],
)
def test_target_formats(name, target):
    boxes, labels = TargetFormat(name).to_xyxy(np.array([target]), 40, 20)
    assert (boxes.tolist(), labels.tolist()) == (BOXES.tolist(), [2])
    assert TargetFormat(name).from_xyxy(BOXES, np.array([2]), 40, 20).tolist() == [target]


def test_there_are_twelve():
    assert len(TargetFormat) == 12


@given(
    kind=st.sampled_from(TargetFormat),
    boxes=arrays.arrays(np.float64, st.tuples(st.integers(0, 5), st.just(4)), elements=st.floats(-1e4, 1e4)),
    width=st.integers(1, 10_000),
    height=st.integers(1, 10_000),
    data=st.data(),
)
def test_they_are_inverted(kind, boxes, width, height, data):
    labels = np.array(data.draw(st.lists(st.integers(0, 1000), min_size=len(boxes), max_size=len(boxes))), np.int64)
    target = kind.from_xyxy(boxes, labels, width, height)
    assert target.shape == (len(boxes), 5)
    again, labels_again = kind.to_xyxy(target, width, height)
    np.testing.assert_allclose(again, boxes, atol=1e-8)
    assert labels_again.tolist() == labels.tolist()


@pytest.mark.parametrize("target", [[], np.zeros((0, 5)), np.zeros(0), np.zeros((0, 4))])
def test_a_target_may_be_empty(target):
    boxes, labels = TargetFormat.XYXY_LABEL.to_xyxy(target, 40, 20)
    assert (boxes.shape, labels.shape) == ((0, 4), (0,))


@pytest.mark.parametrize("target", [np.zeros(5), np.zeros((1, 4)), np.full((1, 5), np.nan)])
def test_a_target_of_another_shape_is_refused(target):
    with pytest.raises(ValueError, match="target"):
        TargetFormat.XYXY_LABEL.to_xyxy(target, 40, 20)


# ---- records


def test_records(root):
    records = [
        record("sub/c.jpg", labels=[0], crowd=[True], width=400, height=200),
        record(f"{root}/sub/a.jpg", labels=np.array([2])),
        record(),
    ]
    index = index_of_records(iter(records), CLASSES, root)
    assert [index.path(row) for row in range(3)] == [str(root / name) for name in ("b.jpg", "sub/a.jpg", "sub/c.jpg")]
    assert index.image_ids.tolist() == [0, 1, 2]  # by path
    assert [index.size(row) for row in range(3)] == [(40, 20), (40, 20), (400, 200)]
    assert [index.annotations(row).labels.tolist() for row in range(3)] == [[1], [2], [0]]
    assert [index.annotations(row).crowd.tolist() for row in range(3)] == [[False], [False], [True]]
    assert index.annotations(0).boxes.tolist() == BOXES.tolist()
    assert index.annotations(0).area.tolist() == [200]
    assert index.class_names == CLASSES


def test_records_may_be_none_or_empty(root):
    assert len(index_of_records([], CLASSES, root)) == 0
    assert index_of_records([record(boxes=[], labels=[])], CLASSES, root).num_boxes == 0


def test_images_may_lie_outside_the_root_by_an_absolute_path(root):
    index = index_of_records([record(f"{root}/sub/a.jpg")], CLASSES, root / "none")
    assert index.path(0) == str(root / "sub/a.jpg")


TWO = {"boxes": [[1, 1, 9, 9], [2, 2, 8, 8]], "labels": [0, 1]}


@pytest.mark.parametrize(
    ("broken", "message", "boxes"),
    [
        ({"path": "b.jpg", "labels": []}, "record 1 has no boxes", 1),
        ({"boxes": [], "labels": []}, "record 1 has no path", 1),
        (record("../b.jpg"), "record 1: file name '../b.jpg' leaves the folder", 1),
        (record("none.jpg"), "record 1, .*none.jpg: there is no such image", 1),
        (record("none/none.jpg"), "record 1, .*none.jpg: there is no such image", 1),
        (record(width=0, height=5), r"record 1 \(b.jpg\) has no valid width and height", 1),
        (record(width="40", height="20"), r"record 1 \(b.jpg\) has no valid width and height", 1),
        (record(labels=[]), "record 1, .*b.jpg: it has 1 boxes, 0 labels and 0 of crowd", 1),
        (record(crowd=[]), "it has 1 boxes, 1 labels and 0 of crowd", 1),
        (record(boxes=[1, 2, 3]), "record 1, .*b.jpg: cannot reshape", 1),
        (record(boxes="none"), "record 1, .*b.jpg: could not convert", 1),
        (record(**TWO | {"labels": [0, 3]}), "record 1, .*b.jpg: object 1: there is no class 3", 2),
        (record(**TWO | {"labels": [-1, 0]}), "object 0: there is no class -1", 2),
        (record(**TWO | {"labels": ["dog", "dot"]}), "object 1: there is no class dot", 2),
        (record(**TWO | {"boxes": [[1, 1, 2, 2], [np.nan, 1, 1, 1]]}), r"object 1: box .* is not finite", 2),
        (record(**TWO | {"boxes": [[1, 1, 2, 2], [5, 1, 4, 2]]}), "object 1: box .* corners are swapped", 2),
    ],
)
def test_a_broken_record_is_named_or_left_out(root, broken, message, boxes):
    with pytest.raises(RaydetError, match=message):
        index_of_records([record("sub/a.jpg"), broken], CLASSES, root)
    problems = Problems("skip")
    assert index_of_records([record("sub/a.jpg"), broken], CLASSES, root, problems).num_boxes == boxes
    assert len(problems.messages) == 1
    with pytest.raises(RaydetError, match=r"more than data\.max_errors = 0"):
        index_of_records([record("sub/a.jpg"), broken], CLASSES, root, Problems("skip", max_errors=0))


@pytest.mark.parametrize("path", ["b\udce9.jpg", "/b\udce9.jpg"])
def test_a_name_that_is_not_utf8_is_named_or_left_out(root, path):
    with pytest.raises(RaydetError, match=r"record 0: file name '/?b\\udce9\.jpg' is not UTF-8"):
        index_of_records([record(path)], CLASSES, root)
    assert len(index_of_records([record(path), record()], CLASSES, root, Problems("skip"))) == 1


def test_boxes_in_shares_are_asked_about(root):
    with pytest.raises(RaydetError, match="all 1 boxes are between 0 and 1: are they shares of the image's width"):
        index_of_records([record(boxes=[[0.1, 0.1, 0.5, 0.5]])], CLASSES, root, Problems("skip"))


def test_an_image_that_is_none_is_left_out(root):
    (root / "b.jpg").write_text("text")
    with pytest.raises(RaydetError, match=r"b\.jpg is not an image"):
        index_of_records([record()], CLASSES, root)
    assert len(index_of_records([record(), record("sub/a.jpg")], CLASSES, root, Problems("skip"))) == 1


# ---- classes with SuperGradients' hooks


class Mine(DetectionDataset):
    """As users of SuperGradients have written them: images are found in a folder, and boxes scaled to input_dim."""

    def __init__(self, data_dir, target_format=TargetFormat.XYXY_LABEL, classes=CLASSES, extra=(), **settings):
        self.extra = dict(extra)
        super().__init__(data_dir, target_format, all_classes_list=classes, **settings)

    def _setup_data_source(self):
        self.files = ["sub/c.jpg", "b.jpg", "sub/a.jpg"]
        return len(self.files)

    def _load_annotation(self, sample_id):
        target = np.array([[10, 5, 30, 15, sample_id]], np.float32)
        annotation = {"img_path": f"{self.data_dir}/{self.files[sample_id]}", "target": target}
        if self.input_dim is not None:
            ratio = min(self.input_dim[0] / 20, self.input_dim[1] / 40)
            target[:, :4] *= ratio
            annotation["resized_img_shape"] = (int(20 * ratio), int(40 * ratio))
        return annotation | self.extra


def test_hooks(root):
    index = Mine(root).index()
    assert [index.path(row) for row in range(3)] == [str(root / name) for name in ("b.jpg", "sub/a.jpg", "sub/c.jpg")]
    assert [index.annotations(row).labels.tolist() for row in range(3)] == [[1], [2], [0]]
    assert all(index.annotations(row).boxes.tolist() == BOXES.tolist() for row in range(3))
    assert index.class_names == CLASSES


@pytest.mark.parametrize("input_dim", [20, 640, (20, 30), (33, 77), (640, 320), (7, 1000)])
def test_scaled_boxes_are_scaled_back(root, input_dim):
    index = Mine(root, input_dim=input_dim).index()
    np.testing.assert_allclose(index.annotations(0).boxes, BOXES, rtol=1e-6)


def test_boxes_of_a_stretched_image_are_scaled_back(root):
    target = np.array([[5, 10, 15, 30, 0]])
    dataset = Mine(root, input_dim=(40, 20), extra={"target": target, "resized_img_shape": (40, 20, 3)})
    assert dataset.index().annotations(0).boxes.tolist() == BOXES.tolist()


def test_shares_of_the_image_are_not_scaled(root):
    target = np.array([[1, 0.5, 0.5, 0.5, 0.5]])
    dataset = Mine(root, "LABEL_NORMALIZED_CXCYWH", input_dim=320, extra={"target": target})
    assert dataset.index().annotations(0).boxes.tolist() == BOXES.tolist()


def test_crowds(root):
    objects = Mine(root, extra={"crowd_target": np.array([[0, 0, 40, 20, 1]])}).index().annotations(0)
    assert objects.crowd.tolist() == [False, True]
    assert objects.boxes.tolist() == [[10, 5, 30, 15], [0, 0, 40, 20]]


def test_a_size_that_is_given_is_not_read(root):
    assert Mine(root, extra={"initial_img_shape": (200, 400)}).index().size(0) == (400, 200)


def test_the_first_samples_of_the_source(root):
    index = Mine(root, max_num_samples=2).index()
    assert [index.path(row) for row in range(2)] == [str(root / "b.jpg"), str(root / "sub/c.jpg")]


def test_classes_to_keep(root):
    index = Mine(root, class_inclusion_list=["cow", "cat"]).index()
    assert (len(index), index.class_names) == (3, ("cow", "cat"))
    assert [index.annotations(row).labels.tolist() for row in range(3)] == [[], [0], [1]]
    assert len(Mine(root, class_inclusion_list=["cow"], ignore_empty_annotations=True).index()) == 1
    with pytest.raises(RaydetError, match="there is no class dot"):
        Mine(root, class_inclusion_list=["dot"]).index()


def test_the_classes_may_be_a_property(root):
    class Other(Mine):
        _all_classes = ("x", "y", "z")

    assert Other(root, classes=None).index().class_names == ("x", "y", "z")


def test_paths_start_from_the_current_folder(root, monkeypatch):
    monkeypatch.chdir(root.parent)
    index = Mine(root.name).index()
    assert index.path(0) == str(root / "b.jpg")


@pytest.mark.parametrize("missing", ["img_path", "target"])
def test_what_a_hook_does_not_return_is_said(root, missing):
    class Other(Mine):
        def _load_annotation(self, sample_id):
            return {key: value for key, value in super()._load_annotation(sample_id).items() if key != missing}

    with pytest.raises(RaydetError, match=f"sample 0 of Other: _load_annotation returned no {missing}, only"):
        Other(root).index(Problems("skip"))


def test_a_broken_sample_is_named_or_left_out(root):
    dataset = Mine(root, classes=("cat", "dog"))  # sample 2 is of the third class
    with pytest.raises(RaydetError, match=r"sample 2 of Mine, .*a.jpg: object 0: there is no class 2"):
        dataset.index()
    problems = Problems("skip")
    assert dataset.index(problems).num_boxes == 2
    assert len(problems.messages) == 1


def test_coco_detection_dataset(shapes, shapes_index):
    index = COCODetectionDataset(shapes, "train", "instances_train.json").index()
    assert index.table.equals(shapes_index.table)
    index = COCODetectionDataset(shapes, "train", "instances_train.json", max_num_samples=5).index()
    assert index.table.equals(shapes_index.head(5).table)


# ---- the registry


@pytest.fixture
def registry(monkeypatch):
    """Data sets that this test registers."""
    registered = {}
    monkeypatch.setattr("raydet.data.own.REGISTERED", registered)
    return registered


def test_register(root, registry):
    @register_dataset("cells")
    class Cells(Mine):
        pass

    @register_dataset
    def bare():
        pass

    @register_dataset()
    def called():
        pass

    assert registry == {"cells": Cells, "bare": bare, "called": called}
    assert find_dataset("cells") is Cells
    assert load_own(Store(root), "cells", "train").table.equals(Mine(root).index().table)


@pytest.mark.parametrize("name", ["coco", "auto", "taken"])
def test_a_name_is_taken_once(registry, name):
    @register_dataset("taken")
    def first():
        pass

    register_dataset("taken")(first)  # the same again: its module was loaded again
    with pytest.raises(RaydetError, match=f"the name {name} is taken"):
        register_dataset(name)(lambda: None)


def test_what_is_not_registered_is_refused(registry):
    with pytest.raises(RaydetError, match=r"data\.format: cocoa is none of auto, coco, .*; did you mean coco\?"):
        find_dataset("cocoa")


def test_a_function_that_yields_records(root, registry):
    @register_dataset("mine", class_names=CLASSES)
    def records(split, annotations):
        yield record(labels=[split], boxes=[annotations])

    index = load_own(Store(root), "mine", "dog", [1, 2, 3, 4])
    assert index.annotations(0).boxes.tolist() == [[1, 2, 3, 4]]
    assert index.class_names == CLASSES


def test_a_function_that_returns_an_index(root, registry):
    expected = Mine(root).index()

    @register_dataset
    def mine(data_dir, images, problems):
        assert (data_dir, images) == (str(root), "pictures")
        problems.add("one is broken")
        return expected

    problems = Problems("skip")
    assert load_own(Store(root), "mine", "train", None, "pictures", problems) is expected
    assert problems.messages == ["one is broken"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([record()], r"data\.format: mine gives records: decorate it with register_dataset\(class_names=…\)"),
        (5, r"data\.format: mine gives int, not an Index"),
    ],
)
def test_what_gives_no_index_is_refused(root, registry, value, message):
    register_dataset("mine")(lambda: value)
    with pytest.raises(RaydetError, match=message):
        load_own(Store(root), "mine", "train")


def test_by_module_and_name(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "data_of_mine.py").write_text(
        "from raydet.data.own import index_of_records\n"
        "def mine(root):\n"
        "    return index_of_records([{'path': 'b.jpg', 'boxes': [], 'labels': []}], ['cat'], root)\n"
        "number = 5\n"
    )
    assert len(load_own(Store(root), "data_of_mine:mine", "train")) == 1
    with pytest.raises(RaydetError, match="data_of_mine:number is no class and no function"):
        load_own(Store(root), "data_of_mine:number", "train")
    with pytest.raises(RaydetError, match="has no mind; did you mean mine"):
        load_own(Store(root), "data_of_mine:mind", "train")
