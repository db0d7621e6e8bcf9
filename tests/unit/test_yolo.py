import pytest
from PIL import Image

from raydet.data.problems import Problems
from raydet.data.yolo import load_yolo
from raydet.errors import RaydetError
from raydet.store import Store


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
        ("0 0.5 0.5 0.2 0.2 0.93", "but what detectors write: class cx cy w h confidence"),
        ("0 0.5 0.5 0.2 0.2 0.93 1", "but what detectors write: class cx cy w h confidence"),
        ("1 0.5 0.5 0.2 0.2 1 17", "but what detectors write: class cx cy w h confidence"),
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


POSE = "train: images\nnames: [cat, dog]\nkpt_shape: [{}]\n"


@pytest.mark.parametrize(
    ("shape", "line"),
    [
        ("3, 2", "0 0.5 0.5 0.2 0.2 0.45 0.45 0.55 0.45 0.5 0.55"),
        ("2, 3", "0 0.5 0.5 0.2 0.2 0.45 0.45 2 -0.1 1.3 0"),  # points may be hidden, or outside
        ("4, 3", "0 0.5 0.5 0.2 0.2 0.45 0.45 1 0.55 0.45 1 0.5 0.55 1 0 0 0"),
        ("17, 3", f"0 0.5 0.5 0.2 0.2 {'0.5 0.5 2 ' * 17}"),
        ("17, 3", "0 0.5 0.5 0.2 0.2"),
    ],
)
def test_of_a_pose_the_box_is_taken(root, shape, line):
    (root / "data.yaml").write_text(POSE.format(shape))
    assert load(root, line).annotations(1).boxes.tolist() == [pytest.approx([16, 8, 24, 12])]


@pytest.mark.parametrize(
    "line", ["0 0.1 0.1 0.9 0.1 0.9 0.9", "0 0.5 0.5 0.2 0.2 0.45 0.45 1", "0 0.5 0.5 0.2 0.2 0.9"]
)
def test_other_lengths_are_no_pose(root, line):
    (root / "data.yaml").write_text(POSE.format("3, 2"))
    with pytest.raises(
        RaydetError, match=r"line 1: .* is neither class cx cy w h nor that with 6 numbers of keypoints"
    ):
        load(root, line)


@pytest.mark.parametrize("shape", ["17", "a, b", "17, 3, 1"])
def test_what_a_pose_has_must_be_said(root, shape):
    (root / "data.yaml").write_text(POSE.format(shape))
    with pytest.raises(RaydetError, match=r"data\.yaml: kpt_shape: .* such as \[17, 3\]"):
        load(root)


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
    message = r"none of the 2 images of train has a txt file .* it would be labels/a\.txt and images/a\.txt$"
    with pytest.raises(RaydetError, match=message):
        load(root)


def notices(root, split="train", images=None):
    problems = Problems()
    load_yolo(Store(root), split, images, problems)
    return [str(notice) for notice in problems.notices]


BACKGROUND = ": an image without a label file of its name is background"


@pytest.mark.parametrize(
    ("files", "notice"),
    [
        (["images/0.jpg", "labels/0.txt", "images/1.jpg", "labels/1.txt"], None),
        (["images/0.jpg", "labels/0.txt", "images/1.jpg", "images/2.jpg"], None),  # many are background
        (["images/0.jpg", "images/0.txt", "images/1.jpg", "labels/1.TXT"], None),
        (
            ["images/0.jpg", "labels/0.txt", "images/1.jpg", "labels/1.txt", "images/2.jpg"],
            "1 image has no label file, such as images/2.jpg",
        ),
        (
            ["images/0.jpg", "labels/0.txt", "labels/1.txt", "labels/b/2.txt"],
            "2 label files have no image, such as labels/1.txt",
        ),
        (
            [
                "images/0.jpg",
                "labels/0.txt",
                *(f"images/_{i}.jpg" for i in range(6)),
                *(f"labels/{i}.txt" for i in "123"),
            ],
            "6 images have no label file; 3 label files have no image, such as labels/1.txt",
        ),
        (["images/0.jpg", "labels/0.txt", "labels/.ipynb_checkpoints/0-checkpoint.txt", "labels/._0.txt"], None),
    ],
)
def test_images_and_labels_that_do_not_belong_together_are_said(tmp_path, files, notice):
    write(tmp_path, **{name: HALF if "labels" in name or name.endswith("t") else None for name in files})
    write(tmp_path, **{"obj.names": "cat\ndog", "labels/classes.txt": "cat\ndog\n"})
    assert notices(tmp_path, images="images") == ([notice + BACKGROUND] if notice else [])


def test_other_splits_labels_belong_to_images(tmp_path):
    write(tmp_path, **FLAT, **{"train.txt": "images/a.jpg\n", "val.txt": "images/b.jpg\n", "obj.names": "cat\ndog"})
    assert notices(tmp_path) == notices(tmp_path, "val") == []


def test_links_to_nothing_are_said(root):
    (root / "images/c.jpg").symlink_to("/gone/c.jpg")
    (root / "labels/c.txt").write_text(HALF)
    link, label = notices(root, images="images")
    assert link == "1 link to nothing, such as images/c.jpg: fetch the files, or remove the links"
    assert label.startswith("1 image has no label file; 1 label file has no image, such as labels/c.txt")


def test_what_is_hidden_is_no_image(root):
    for name in (".ipynb_checkpoints/a.jpg", "@eaDir/a.jpg/THUMB.jpg", ".Trash-0/files/a.jpg", "__MACOSX/a.jpg"):
        write(root / "images", **{name: None})
    (root / "images/._b.jpg").write_bytes(b"Mac OS X")
    (root / "._data.yaml").write_bytes(b"Mac OS X")
    assert load(root).table["path"].to_pylist() == ["images/a.jpg", "images/b.jpg"]


def test_links_that_lead_back_are_not_followed(root):
    (root / "images/images").symlink_to(".")
    (root / "images/sub").mkdir()
    (root / "images/sub/all").symlink_to(root)
    assert load(root).table["path"].to_pylist() == ["images/a.jpg", "images/b.jpg"]


def test_a_name_that_is_not_utf8_is_named_or_left_out(root):
    (root / "images/b.jpg").rename(root / "images/caf\udce9.jpg")
    (root / "labels/a.txt").write_text(HALF)
    with pytest.raises(RaydetError, match=r"images/caf\\xe9\.jpg: the name is not UTF-8"):
        load(root)
    problems = Problems("skip")
    assert load(root, problems=problems).table["path"].to_pylist() == ["images/a.jpg"]
    assert len(problems.messages) == 1


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


def test_lists_may_go_through_a_link_to_the_root(root):
    link = root.with_name("link")
    link.symlink_to(root)
    write(root, **{"train.txt": f"{link}/images/b.jpg", "data.yaml": f"{NAMES}val: {link}/images"})
    for given in (link, root):
        assert load_yolo(Store(given), "train").path(0) == str(root / "images/b.jpg")
        assert len(load_yolo(Store(given), "val")) == 2


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
        ({"data.yaml": "names: {1: cat, 2: dog}"}, r"label 0 has none \(1: cat, 2: dog\); number them from 0"),
        ({"data.yaml": "names: {0: cat, 2: dog}"}, r"data\.yaml: .* label 1 has none .*without gaps"),
        ({"data.yaml": "names: {0: cat, dog: 1}"}, r"label 1 has none \(0: cat, dog: 1\)"),
        ({"data.yaml": "train: images\nnames: cat"}, r"data\.yaml: names: cat: .* write names: \[cat\]"),
        ({"data.yaml": "names: {{ x }}: ["}, r"data\.yaml is not YAML: line 1: .*; indent with spaces"),
        ({"data.yaml": "train: images\n\tnames: [a]"}, r"data\.yaml is not YAML: line 2: "),
        ({"data.yaml": "path: [\n", "a.yaml": f"train: images\n{NAMES}"}, r"data\.yaml is not YAML"),
        ({"data.yaml": f"train: none\n{NAMES}"}, "data.yaml: train: none: no such file or folder in /"),
        (
            {"data.yaml": f"train: /etc\n{NAMES}"},
            "train: /etc: no such file .*; set data.root to a folder that holds both",
        ),
        ({"data.yaml": "train: images\nnames: none.names"}, r"none\.names: no such file or folder"),
        (
            {"data.yaml": f"train: images\n{NAMES}", "b.yaml": "train: images\nnames: [dog, cat]"},
            r"which describes the data, data\.yaml or b\.yaml\? They differ in names: keep one",
        ),
        ({"a.yaml": f"train: a\n{NAMES}", "b.yml": f"train: b\n{NAMES}"}, r"a\.yaml or b\.yml\? They differ in train"),
        ({}, r"found no images of train; looked for train in data\.yaml, images/train, train/images, train\.txt"),
    ],
)
def test_what_is_not_there_is_said(root, files, message):
    write(root, **files)
    with pytest.raises(RaydetError, match=message):
        load_yolo(Store(root), "train")


@pytest.mark.parametrize(
    ("file", "text", "names"),
    [
        ("classes.txt", "\ncat\ndog\n", ("(label 0 without a name)", "cat", "dog")),
        ("classes.txt", "cat\n  \ndog\n\n\n", ("cat", "(label 1 without a name)", "dog")),
        ("labels/classes.txt", "cat\ndog\n", ("cat", "dog")),
    ],
)
def test_a_line_of_names_is_a_label(root, file, text, names):
    (root / "classes.txt").unlink()
    (root / file).write_text(text)
    problems = Problems()
    assert load(root, problems=problems).class_names == names
    assert [notice.what for notice in problems.notices] == ["classes.txt has 1 blank line"] * (len(names) - 2)


@pytest.mark.parametrize("other", [{"z.yaml": f"train: images\n{NAMES}"}, {"z.yaml": "lr: ["}, {"z.yaml": "lr: 1"}])
def test_other_files_of_settings_may_lie_beside(root, other):
    write(root, **{"data.yaml": f"train: images\n{NAMES}"}, **other)
    assert len(load_yolo(Store(root), "train")) == 2


def test_classes_must_be_named(root):
    (root / "classes.txt").unlink()
    with pytest.raises(RaydetError, match="found no names of classes"):
        load(root)
