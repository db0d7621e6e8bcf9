import json

import numpy as np
import pytest

from raydet.data.coco import load_coco
from raydet.errors import RaydetError


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


def read(folder, value):
    path = folder / "annotations.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return load_coco(path, folder)


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
        ({"images": []}, "it has no list 'images', or an empty one"),
        (content(categories=None), "it has no list 'categories'"),
        (content(annotations=None), "it has no list 'annotations'"),
        (content(categories=[{"id": 1}]), "a record of 'categories' has no 'name'"),
        (content(categories=[{"id": 3, "name": "a"}, {"id": 3, "name": "b"}]), "category id 3 occurs more than once"),
        (content(categories=[{"id": "3", "name": "a"}]), "category id '3' is not a whole number of 0 or more"),
        (content(categories=[{"id": 3, "name": "a"}, {"id": 4, "name": "a"}]), "category name a occurs more than once"),
        (content(annotations=[1]), "an annotation is no object: 1"),
        (content(annotation={"category_id": [3]}), r"category_id \[3\] is not in the file's categories"),
        (content(annotation={"bbox": [5]}), "annotation 1 of image 7: bbox or area is missing or not of numbers"),
        (content(image={"id": 2}), "image id 2 occurs more than once"),
        (content(image={"id": "x"}), "image id 'x' of a.jpg is not a whole number"),
        (content(image={"width": 0}), "image a.jpg .* has no valid width and height"),
        (content(image={"file_name": "../a.jpg"}), "leaves the folder of images"),
        (content(image={"file_name": "/etc/passwd"}), "leaves the folder of images"),
        (content(image={"file_name": "c.jpg"}), "1 of the 2 images that annotations.json lists are not there.*c.jpg"),
        (content(annotation={"category_id": 4}), "annotation 1 of image 7: category_id 4 is not in"),
        (content(annotation={"image_id": 3}), "annotation 1 of image 3: image_id 3 is not in the file's images"),
        (content(annotation={"bbox": [1, 2, 3]}), "annotation 1 of image 7: bbox or area is missing or not of numbers"),
        (content(annotation={"bbox": None}), "annotation 1 of image 7: bbox or area is missing"),
        (content(annotation={"bbox": [1, 2, -3, 4]}), "annotation 1 of image 7: bbox .* negative or infinite side"),
        (
            content(annotation={"bbox": [1, 2, float("nan"), 4]}),
            "annotation 1 of image 7: bbox .* negative or infinite",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(folder, value, message):
    with pytest.raises(RaydetError, match=message) as error:
        read(folder, value)
    assert "annotations.json" in str(error.value)


def test_missing_files(tmp_path):
    with pytest.raises(RaydetError, match="no such annotation file"):
        load_coco(tmp_path / "none.json", tmp_path)
    with pytest.raises(RaydetError, match="no such folder of images"):
        load_coco(tmp_path / "none.json", tmp_path / "none")


def test_coco_mini(shared):
    folder = shared / "data/coco_mini"
    index = load_coco(folder / "annotations/instances_val2017.json", folder / "val2017")
    assert (len(index), index.num_boxes, len(index.class_names)) == (254, 2081, 80)
    crowds = sum(index.annotations(row).crowd.sum() for row in range(len(index)))
    assert crowds == 23
    assert np.all(np.diff(index.image_ids) > 0)
