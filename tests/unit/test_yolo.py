import pytest
from PIL import Image

from raydet.data.problems import Problems
from raydet.data.store import Store
from raydet.data.yolo import load_yolo
from raydet.errors import RaydetError


def write(root, **files):
    """Write text files and, where there is no text, images of 40x20 pixels."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            Image.new("RGB", (40, 20)).save(path)
        else:
            path.write_text(content)


NAMES = "names: [cat, dog]\n"
HALF = "1 0.5 0.5 0.5 0.5\n"


@pytest.fixture
def root(tmp_path):
    """Two images, one with an object."""
    write(
        tmp_path,
        **{
            "images/b.jpg": None,
            "images/a.jpg": None,
            "labels/b.txt": HALF,
            "classes.txt": "cat\ndog\n",
        },
    )
    return tmp_path


def load(root, text=None, problems=None):
    if text is not None:
        (root / "labels/b.txt").write_text(text)
    return load_yolo(Store(root), "train", "images", problems)


def test_index(root):
    index = load(root)
    assert (len(index), index.class_names, index.category_ids) == (2, ("cat", "dog"), (0, 1))
    assert index.image_ids.tolist() == [0, 1]  # by path
    assert index.path(1) == str(root / "images/b.jpg")
    assert index.size(1) == (40, 20)
    objects = index.annotations(1)
    assert objects.boxes.tolist() == [[10, 5, 30, 15]]
    assert (objects.labels.tolist(), objects.crowd.tolist(), objects.area.tolist()) == ([1], [False], [200])
    assert len(index.annotations(0).labels) == 0  # without a txt file: without objects


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ("", []),
        ("\n  \n", []),
        ("0 0.5 0.5 1 1", [[0, 0, 40, 20]]),
        ("0.0 0.25 0.5 0.5 0\n", [[0, 10, 20, 10]]),  # without area, as annotated
        ("0 0 0 0.5 0.5", [[-10, -5, 10, 5]]),  # partly outside, as annotated
        ("0 1.0009 0.5 0 0", [[40, 10, 40, 10]]),  # rounded: clipped
        ("0 0.5 -0.0009 0 0", [[20, 0, 20, 0]]),
        ("0 0.25 0.5 0.75 0.5 0.5 1", [[10, 10, 30, 20]]),  # a polygon
        ("0 0.1 0.1 0.9 0.1 0.9 0.9 0.1 0.9", [[4, 2, 36, 18]]),
        ("\ufeff0 0.5 0.5 1 1", [[0, 0, 40, 20]]),
    ],
)
def test_lines(root, text, boxes):
    assert load(root, text).annotations(1).boxes.tolist() == [pytest.approx(box) for box in boxes]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("dog 0.5 0.5 0.5 0.5", "could not convert string to float: 'dog'"),
        ("0 0.5 0.5 0.5", "is neither class cx cy w h nor a polygon"),
        ("0", "is neither class cx cy w h nor a polygon"),
        ("0 0.5 0.5 0.5 0.5 0.9", "is neither class cx cy w h nor a polygon"),  # a detection with its score
        ("0 0.1 0.1 0.2 0.2 0.3 0.3 0.4", "is neither class cx cy w h nor a polygon"),
        ("2 0.5 0.5 0.5 0.5", "class 2 is not one of 0 to 1"),
        ("-1 0.5 0.5 0.5 0.5", "class -1 is not one of 0 to 1"),
        ("0.5 0.5 0.5 0.5 0.5", "class 0.5 is not one of 0 to 1"),
        ("nan 0.5 0.5 0.5 0.5", "class nan is not one of 0 to 1"),
        ("inf 0.5 0.5 0.5 0.5", "class inf is not one of 0 to 1"),
        ("0 nan 0.5 0.5 0.5", "has numbers that are not between 0 and 1"),
        ("0 0.5 0.5 -0.5 0.5", "has numbers that are not between 0 and 1"),
        ("0 0.5 0.5 0.5 1.002", "has numbers that are not between 0 and 1"),
        ("0 20 10 40 20", "has numbers that are not between 0 and 1"),
        ("0 0.1 0.1 2 0.1 0.9 0.9", "has numbers that are not between 0 and 1"),
    ],
)
def test_a_broken_line_is_named_or_left_out(root, line, message):
    text = f"{HALF}\n{line}\n{HALF}"
    with pytest.raises(RaydetError, match=rf"labels/b\.txt, line 3: .*{message}"):
        load(root, text)
    problems = Problems("skip")
    index = load(root, text, problems)
    assert (len(index), index.num_boxes, len(problems.messages)) == (2, 2, 1)
    with pytest.raises(RaydetError, match=r"more than data\.max_errors = 0"):
        load(root, text, Problems("skip", max_errors=0))


def test_labels_that_are_no_text_are_named_or_left_out(root):
    (root / "labels/b.txt").write_bytes(b"\xff\xfe0 0.5")
    with pytest.raises(RaydetError, match=r"labels/b\.txt is not text"):
        load(root)
    index = load(root, problems=Problems("skip"))
    assert (len(index), index.num_boxes) == (2, 0)


def test_an_image_that_is_none_is_named_or_left_out(root):
    (root / "images/b.jpg").write_text("text")
    with pytest.raises(RaydetError, match=r"images/b\.jpg is not an image"):
        load(root)
    (root / "labels/a.txt").write_text(HALF)
    assert len(load(root, problems=Problems("skip"))) == 1


def test_labels_must_be_somewhere(root):
    (root / "labels/b.txt").unlink()
    with pytest.raises(RaydetError, match="none of the 2 images of train has a txt file"):
        load(root)


IMAGES = {"images/train/a.jpg": None, "labels/train/a.txt": HALF, "images/val/b.jpg": None, "labels/val/b.txt": HALF}
BY_FOLDER = {
    "train/images/a.jpg": None,
    "train/labels/a.txt": HALF,
    "valid/images/b.jpg": None,
    "valid/labels/b.txt": HALF,
}
FLAT = {"images/a.jpg": None, "labels/a.txt": HALF, "images/b.jpg": None, "labels/b.txt": HALF}
BESIDE = {"obj/a.jpg": None, "obj/a.txt": HALF, "obj/b.jpg": None, "obj/b.txt": HALF}


@pytest.mark.parametrize(
    "files",
    [
        IMAGES | {"classes.txt": "cat\ndog"},
        IMAGES | {"data.yaml": NAMES},
        IMAGES | {"data.yaml": "train: images/train\nval: images/val\nnc: 2\nnames: {0: cat, 1: dog}"},
        IMAGES | {"data.yaml": f"path: .\ntrain: [images/train]\nval: [images/val]\n{NAMES}"},
        IMAGES | {"data.yaml": f"path: ../datasets/mine\ntrain: images/train\nval: images/val\n{NAMES}"},
        IMAGES | {"mine.yml": f"train: images/train/\nval: images/val/\n{NAMES}", "a.yaml": "other: 1"},
        {f"mine/{name}": content for name, content in IMAGES.items()}
        | {"data.yaml": f"path: mine\ntrain: images/train\nval: images/val\n{NAMES}"},
        BY_FOLDER | {"my.names": "cat\ndog\n"},
        BY_FOLDER | {"data.yaml": f"train: ../train/images\nval: ../valid/images\n{NAMES}"},  # Roboflow's
        FLAT | {"train.txt": "images/a.jpg\n", "val.txt": "./images/b.jpg\n", "obj.names": "cat\ndog", "z.names": "x"},
        FLAT
        | {"lists/t.txt": "../images/a.jpg", "lists/v.txt": "images/b.jpg"}
        | {"data.yaml": f"train: lists/t.txt\nval: lists/v.txt\n{NAMES}"},
        BESIDE  # darknet's, and CVAT's
        | {"train.txt": "data/obj/a.jpg\n", "val.txt": "data/obj/b.jpg\n", "names": "cat\ndog"}
        | {"obj.data": "classes = 2\ntrain = data/train.txt\nvalid = data/val.txt\nnames = data/names\n"},
    ],
)
def test_layouts(tmp_path, files):
    write(tmp_path, **files)
    for split, name in (("train", "a.jpg"), ("val", "b.jpg")):
        index = load_yolo(Store(tmp_path), split)
        assert [index.path(row).rpartition("/")[2] for row in range(len(index))] == [name]
        assert (index.num_boxes, index.class_names) == (1, ("cat", "dog"))


def test_names_are_text(root):
    write(root, **{"data.yaml": "train: images\nnames: [no, 007]"})
    assert load_yolo(Store(root), "train").class_names == ("no", "007")


def test_the_last_folder_images_is_that_of_the_labels(tmp_path):
    write(tmp_path, **{"images/images/s/a.jpg": None, "images/labels/s/a.txt": HALF, "obj.names": "cat\ndog"})
    assert load_yolo(Store(tmp_path), "train", "images").num_boxes == 1


def test_lists_may_have_absolute_paths(root):
    (root / "train.txt").write_text(f"{root}/images/b.jpg\n\n")
    assert load_yolo(Store(root), "train").path(0) == str(root / "images/b.jpg")


@pytest.mark.parametrize("line", ["images/none.jpg", "../{name}/images/b.jpg", "/etc/passwd", "../../../etc/passwd"])
def test_a_listed_image_that_is_missing_or_outside_is_named_or_left_out(root, line):
    (root / "train.txt").write_text(f"images/b.jpg\n{line.format(name=root.name)}")
    with pytest.raises(RaydetError, match=r"train\.txt: there is no image .* in "):
        load_yolo(Store(root), "train")
    assert len(load_yolo(Store(root), "train", problems=Problems("skip"))) == 1


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"train.txt": "images/b.jpg", "classes.txt": ""}, "names of the 0 classes"),
        ({"data.yaml": "names: [cat]\nnc: 2"}, "names of the 2 classes are not so many different ones"),
        ({"data.yaml": "names: [cat, cat]"}, "are not so many different ones"),
        ({"data.yaml": "names: {1: cat, 2: dog}"}, "are not so many different ones"),
        ({"data.yaml": "names: {{ x }}: ["}, r"data\.yaml is not YAML"),
        ({"data.yaml": f"train: none\n{NAMES}"}, "none: no such file or folder"),
        ({"data.yaml": "train: images\nnames: none.names"}, r"none\.names: no such file or folder"),
        ({}, r"found no images of train; looked for train in data\.yaml, images/train, train/images, train\.txt"),
    ],
)
def test_what_is_not_there_is_said(root, files, message):
    write(root, **files)
    with pytest.raises(RaydetError, match=message):
        load_yolo(Store(root), "train")


def test_classes_must_be_named(root):
    (root / "classes.txt").unlink()
    with pytest.raises(RaydetError, match="found no names of classes"):
        load(root)
