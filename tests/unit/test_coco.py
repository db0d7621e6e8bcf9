import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest

from raydet.data.coco import load_coco
from raydet.data.problems import Problems
from raydet.errors import RaydetError
from raydet.store import Store


def content(**changes):
    image = {"id": 7, "file_name": "a.jpg", "width": 100, "height": 50} | changes.pop("image", {})
    annotation = {"id": 1, "image_id": 7, "category_id": 3, "bbox": [10, 5, 20, 30], "area": 500, "iscrowd": 0}
    annotation |= changes.pop("annotation", {})
    return {
        "images": [image, {"id": 2, "file_name": "sub/b.jpg", "width": 60, "height": 40}],
        "annotations": [{k: v for k, v in annotation.items() if v is not None}],
        "categories": [{"id": 9, "name": "dog"}, {"id": 3, "name": "cat"}],
        **changes,
    }


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.jpg").touch()
    (tmp_path / "sub/b.jpg").touch()
    return tmp_path


def read(folder, value, problems=None):
    path = folder / "annotations.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return load_coco(path, folder, problems)


def test_index(folder):
    crowd = {"id": 2, "image_id": 7, "category_id": 9, "bbox": [0.25, 0, 99.5, 50], "area": 99, "iscrowd": 1}
    value = content()
    value["annotations"].append(crowd)
    index = read(folder, value)
    assert (len(index), index.num_boxes) == (2, 2)
    assert (index.class_names, index.category_ids) == (("cat", "dog"), (3, 9))  # by id
    assert index.image_ids.tolist() == [2, 7]  # sorted
    assert index.size(1) == (100, 50)
    assert index.path(0) == str(folder / "sub/b.jpg")
    assert len(index.annotations(0).labels) == 0  # images without objects are kept
    objects = index.annotations(1)
    assert objects.boxes.tolist() == [[10, 5, 30, 35], [0.25, 0, 99.75, 50]]
    assert objects.labels.tolist() == [0, 1]
    assert objects.crowd.tolist() == [False, True]
    assert objects.area.tolist() == [500, 99]


def test_area_and_crowd_may_be_missing(folder):
    objects = read(folder, content(annotation={"area": None, "iscrowd": None})).annotations(1)
    assert (objects.area.tolist(), objects.crowd.tolist()) == ([600], [False])


def test_no_annotations_at_all(folder):
    assert read(folder, content(annotations=[])).num_boxes == 0


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a COCO annotation file: it has no list 'images'"),
        ({"images": []}, "is not a COCO annotation file: it has no list 'categories'"),
        (content(images=[]), "the list 'images' is empty"),
        (content(categories=None), "it has no list 'categories'"),
        (content(annotations=None), "it has no list 'annotations'"),
        (content(categories=[1]), "a category has no 'id' or no 'name': 1"),
        (content(categories=[{"id": 1}]), "a category has no 'id' or no 'name'"),
        (content(categories=[{"id": 3, "name": "a"}, {"id": 3, "name": "b"}]), "category id 3 occurs more than once"),
        (content(categories=[{"id": "3", "name": "a"}]), "category id '3' is not a whole number of 0 or more"),
        (content(categories=[{"id": 3, "name": "a"}, {"id": 4, "name": "a"}]), "category name a occurs more than once"),
    ],
)
def test_a_file_that_is_not_coco_is_an_error_whatever_may_be_skipped(folder, value, message):
    with pytest.raises(RaydetError, match=message) as error:
        read(folder, value, Problems("skip"))
    assert "annotations.json" in str(error.value)


SECOND = {"id": 2, "image_id": 2, "category_id": 9, "bbox": [1, 1, 5, 5]}


def with_second(**changes):
    value = content(**changes)
    return {**value, "annotations": [*value["annotations"], SECOND]}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (with_second(images=[1, *content()["images"]]), r"image \? \(id \?\): it is no object: 1"),
        (with_second(image={"id": "x"}, annotation={"image_id": "x"}), r"image a.jpg \(id x\): id 'x' is not a whole"),
        (with_second(image={"id": 2**63}, annotation={"image_id": 2**63}), "is not a whole number"),
        (with_second(images=[*content()["images"], content()["images"][1]]), r"\(id 2\): its id occurs more than once"),
        (with_second(image={"width": 0}), r"image a.jpg \(id 7\): it has no valid width and height"),
        (with_second(image={"height": "tall"}), "it has no valid width and height"),
        (with_second(image={"height": 1e400}), "it has no valid width and height"),
        (with_second(image={"file_name": "../a.jpg"}), "leaves the folder"),
        (with_second(image={"file_name": "/etc/passwd"}), "leaves the folder"),
        (with_second(image={"file_name": ""}), "the file name is empty"),
        (with_second(image={"file_name": "c.jpg"}), r"image c.jpg \(id 7\): it is not in .* \(1 of 2 are not\)"),
        (with_second(image={"file_name": "none/c.jpg"}), r"image none/c.jpg \(id 7\): it is not in"),
        (with_second(annotations=[1]), r"annotation \? of image \?: it is no object: 1"),
        (with_second(annotation={"id": 2}), "annotation 2 of image 2: its id occurs more than once"),
        (with_second(annotation={"id": [1]}), "unhashable"),
        (
            with_second(annotation={"category_id": 4}),
            "annotation 1 of image 7: category_id 4 is not in the file's categ",
        ),
        (with_second(annotation={"category_id": [3]}), r"category_id \[3\] is not in the file's categories"),
        (with_second(annotation={"image_id": 3}), "annotation 1 of image 3: image_id 3 is not in the file's images"),
        (with_second(annotation={"image_id": []}), r"image_id \[\] is not in the file's images"),
        (with_second(annotation={"bbox": None}), "annotation 1 of image 7: it has no bbox"),
        (with_second(annotation={"bbox": [1, 2, 3]}), "annotation 1 of image 7: bbox .* is not of numbers"),
        (with_second(annotation={"bbox": 5}), "bbox 5 or area 500 is not of numbers"),
        (with_second(annotation={"bbox": ["1", "2", "3", "4"]}), "is not of numbers"),
        (with_second(annotation={"area": "big"}), "bbox .* or area big is not of numbers"),
        (with_second(annotation={"bbox": [1, 2, -3, 4]}), "annotation 1 of image 7: bbox .* or has a negative side"),
        (with_second(annotation={"bbox": [1, 2, math.nan, 4]}), "annotation 1 of image 7: bbox .* is not finite"),
        (with_second(annotation={"bbox": [1, 2, 3, math.inf]}), "annotation 1 of image 7: bbox .* is not finite"),
        (with_second(annotation={"bbox": [10**400, 2, 3, 4]}), "is not of numbers"),
        (with_second(annotation={"area": -500}), "annotation 1 of image 7: area -500 is negative: leave its sign out"),
        (
            with_second(annotation={"id": "x", "image_id": 3}),
            "annotation x of image 3: image_id 3 is not in the file's",
        ),
        (with_second(annotation={"id": 2.5, "category_id": 4}), "annotation 2.5 of image 7: category_id 4 is not in"),
    ],
)
def test_a_broken_record_is_named_or_left_out(folder, value, message):
    with pytest.raises(RaydetError, match=message) as error:
        read(folder, value)
    assert "annotations.json" in str(error.value)

    problems = Problems("skip")
    index = read(folder, value, problems)
    assert len(problems.messages) == 1  # an image's annotations are left out with it, without a word
    assert re.search(message, problems.messages[0])
    assert index.num_boxes == (2 if len(value["images"]) == 3 else 1)  # a third image has no annotation
    with pytest.raises(RaydetError, match=r"more than data\.max_errors = 0"):
        read(folder, value, Problems("skip", max_errors=0))


@pytest.mark.parametrize("bbox", [[10, 5, 0, 30], [5, 5, 0, 0], [90, 40, 50, 50], [-20, -20, 10, 10], [300, 0, 5, 5]])
def test_boxes_without_area_or_outside_stay_as_annotated(folder, bbox):
    x, y, width, height = bbox
    index = read(folder, content(annotation={"bbox": bbox}))
    assert index.annotations(1).boxes.tolist() == [[x, y, x + width, y + height]]


@pytest.mark.parametrize(
    "segmentation",
    [[], [[1, 2.5, -3e-1, 4, 5, 6]], [[1, 2], [3, 4]], {"counts": [1, 2], "size": [3, 4]}, {"counts": "x", "size": []}],
)
@pytest.mark.parametrize("first", [True, False])
def test_polygons_are_passed_over(folder, segmentation, first):
    value = content()
    polygon, rest = {"segmentation": segmentation}, value["annotations"][0]
    value["annotations"] = [polygon | rest if first else rest | polygon, SECOND]
    value["categories"][0]["name"] = 'a "segmentation": [[1]]'  # text that looks like one is text
    index = read(folder, value)
    assert index.num_boxes == 2
    assert index.class_names[1] == 'a "segmentation": [[1]]'


def test_the_lists_may_be_in_any_order_and_ids_of_any_kind(folder):
    value = content()
    value["annotations"] += [SECOND | {"id": each} for each in ("b", 2**70, 1.5, True, None, None)]
    read_first = read(folder, value, problems := Problems("skip"))
    assert [message.split(": ")[-1] for message in problems.messages] == ["its id occurs more than once"]  # true is 1
    backwards = dict(reversed(list(value.items())))
    assert read(folder, backwards, Problems("skip")).table.equals(read_first.table)
    value["annotations"][1]["id"] = "b"
    value["annotations"][2]["id"] = "b"
    assert read(folder, value, problems := Problems("skip")).num_boxes == 5
    assert "annotation b of image 2: its id occurs more than once" in problems.messages[0]


@pytest.mark.parametrize("piece", [1, 7, 100])
def test_a_file_is_read_in_pieces(folder, monkeypatch, piece):
    value = content()
    value["annotations"] = [SECOND | {"id": i, "segmentation": [[i, 2.5], [1, 2]]} for i in range(50)]
    whole = read(folder, value)
    monkeypatch.setattr("raydet.data.coco._PIECE", piece)
    monkeypatch.setattr("raydet.data.coco._BLOCK", 8)
    assert read(folder, value).table.equals(whole.table)
    assert whole.num_boxes == 50


def test_many_annotations_take_little_memory(tmp_path):
    """A piece of the file, a block of records, and 57 bytes an annotation; all of them as records took 1,100 bytes."""
    count = 200_000
    (tmp_path / "0.jpg").touch()
    with open(tmp_path / "annotations.json", "w") as file:
        file.write('{"images": [{"id": 0, "file_name": "0.jpg", "width": 640, "height": 480}], "annotations": [')
        for i in range(count):
            polygon = ", ".join(["123.45"] * 40)
            file.write(
                f'{"," * (i > 0)}{{"segmentation": [[{polygon}]], "area": 70.5, "iscrowd": 0, "image_id": 0, '
                f'"bbox": [{i % 600}.5, 2.5, 9.5, 9.5], "category_id": 1, "id": {i}}}'
            )
        file.write('], "categories": [{"id": 1, "name": "a"}]}')
    script = (
        "import re, sys\n"
        "from raydet.data.coco import load_coco\n"
        "peak = lambda: 1024 * int(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])\n"
        "before = peak()\n"
        "index = load_coco(sys.argv[1] + '/annotations.json', sys.argv[1])\n"
        "print(index.num_boxes, peak() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True)
    boxes, grown = map(int, done.stdout.split())
    assert boxes == count
    assert grown < 150e6


SHARES = [[0.1, 0.1, 0.5, 0.5], [0, 0, 1, 1]]


@pytest.mark.parametrize("boxes", [SHARES, SHARES[:1]])
def test_boxes_in_shares_are_asked_about_whatever_may_be_skipped(folder, boxes):
    value = content()
    value["annotations"] = [SECOND | {"id": i, "bbox": box} for i, box in enumerate(boxes)]
    with pytest.raises(RaydetError, match=r"annotations\.json: all . boxes are between 0 and 1: are they shares of"):
        read(folder, value, Problems("skip"))


@pytest.mark.parametrize("boxes", [[[0, 0, 1, 1], [0, 0, 0, 0]], [*SHARES, [0.5, 0.5, 2, 2]], []])
def test_small_boxes_in_pixels_are_no_shares(folder, boxes):
    value = content()
    value["annotations"] = [SECOND | {"id": i, "bbox": box} for i, box in enumerate(boxes)]
    assert read(folder, value).num_boxes == len(boxes)


@pytest.mark.parametrize("names", [("fish", "fish"), ("ponds", "fish"), ("ponds", "fish", "frog")])
def test_a_root_category_of_roboflow_is_left_out_with_a_word(folder, names):
    value = content()
    root, *others = names
    value["categories"] = [{"id": 0, "name": root, "supercategory": "none"}]
    value["categories"] += [{"id": i, "name": each, "supercategory": root} for i, each in enumerate(others, 1)]
    value["annotations"] = [SECOND | {"category_id": 1}]
    index = read(folder, value, problems := Problems())
    assert (index.class_names, index.category_ids) == (names[1:], tuple(range(1, len(names))))
    assert index.annotations(0).labels.tolist() == [0]
    (notice,) = problems.notices
    assert str(notice).startswith(f"left out: 1 category that only others have above them, such as {root}: ")


@pytest.mark.parametrize(
    "categories",
    [
        [{"id": 3, "name": "animal", "supercategory": "none"}, {"id": 9, "name": "dog", "supercategory": "animal"}],
        [{"id": 3, "name": "person", "supercategory": "person"}, {"id": 9, "name": "dog", "supercategory": "animal"}],
        [{"id": 3, "name": "a", "supercategory": "b"}, {"id": 9, "name": "b", "supercategory": "a"}],
        [{"id": 3, "name": "a", "supercategory": "none"}, {"id": 9, "name": "b", "supercategory": "none"}],
        [{"id": 3, "name": "a", "supercategory": "none"}, {"id": 9, "name": "none", "supercategory": "none"}],
    ],
)
def test_other_categories_stay(folder, categories):
    assert len(read(folder, {**content(), "categories": categories}, problems := Problems()).class_names) == 2
    assert problems.notices == []


@pytest.mark.parametrize(
    ("images", "name", "start"),
    [
        ("images", "images/a.jpg", "."),
        ("images", r"images\a.jpg", "."),
        ("all/images", "all/images/a.jpg", "."),
        ("all/images", "images/a.jpg", "all"),
    ],
)
def test_names_that_start_from_another_folder_are_told_which(tmp_path, images, name, start):
    (tmp_path / images).mkdir(parents=True)
    (tmp_path / images / "a.jpg").touch()
    (tmp_path / "a.json").write_text(json.dumps(content(image={"file_name": name})))
    with pytest.raises(RaydetError, match=rf"names start from another folder: pass data\.val_images={start}\)"):
        load_coco("a.json", images, store=Store(tmp_path), images_key="data.val_images")


def test_absolute_names_in_the_folder_are_taken(folder):
    index = read(folder, content(image={"file_name": f"{folder}/a.jpg"}))
    assert index.path(1) == str(folder / "a.jpg")


def test_missing_files(tmp_path):
    with pytest.raises(RaydetError, match="no such annotation file"):
        load_coco(tmp_path / "none.json", tmp_path)
    with pytest.raises(RaydetError, match="no such folder of images"):
        load_coco(tmp_path / "none.json", tmp_path / "none")


def test_paths_may_start_from_a_store(folder):
    index = read(folder, content())
    assert load_coco("annotations.json", "", store=Store(folder)).table.equals(index.table)


def test_coco_mini(shared):
    folder = shared / "data/coco_mini"
    index = load_coco(folder / "annotations/instances_val2017.json", folder / "val2017")
    assert (len(index), index.num_boxes, len(index.class_names)) == (254, 2081, 80)
    crowds = sum(index.annotations(row).crowd.sum() for row in range(len(index)))
    assert crowds == 23
    assert np.all(np.diff(index.image_ids) > 0)
