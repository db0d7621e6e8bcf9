import re

import numpy as np
import pytest
from PIL import Image

from raydet.data.problems import Problems
from raydet.data.voc import class_names_in, load_voc
from raydet.errors import RaydetError
from raydet.store import Store

SIZE = "<size><width>40</width><height>30</height><depth>3</depth></size>"


def thing(name="dog", box=(1, 2, 20, 25), more=""):
    corners = "".join(
        f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    return f"<object><name>{name}</name>{more}<bndbox>{corners}</bndbox></object>"


def picture(*things, filename="", size=SIZE):
    return f"<annotation><filename>{filename}</filename>{size}{''.join(things)}</annotation>"


DIFFICULT = thing("cat", more="<difficult>1</difficult>")
FILES = {"b": picture(thing()), "a": picture(thing("cow", (0, 0, 40, 30)), DIFFICULT), "c": picture()}


@pytest.fixture
def root(tmp_path):
    """A data set of three pictures, the second in a split."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    for name, xml in FILES.items():
        (tmp_path / f"Annotations/{name}.xml").write_text(xml)
        Image.new("RGB", (40, 30)).save(tmp_path / f"JPEGImages/{name}.jpg")
    (tmp_path / "ImageSets/Main/train.txt").write_text("b\n\na\n")
    return tmp_path


def load(root, *arguments, **settings):
    return load_voc(Store(root), *arguments, **settings)


def test_index(root):
    index = load(root)
    assert (len(index), index.class_names, index.category_ids) == (3, ("cat", "cow", "dog"), (0, 1, 2))
    assert index.image_ids.tolist() == [0, 1, 2]  # by name
    assert index.path(0) == str(root / "JPEGImages/a.jpg")
    assert index.size(0) == (40, 30)
    objects = index.annotations(0)
    assert objects.boxes.tolist() == [[0, 0, 40, 30], [1, 2, 20, 25]]  # corners as they stand
    assert objects.labels.tolist() == [1, 0]
    assert objects.crowd.tolist() == [False, False]
    assert objects.area.tolist() == [1200, 19 * 23]
    assert len(index.annotations(2).labels) == 0  # images without objects are kept


def test_a_split_has_its_images_and_the_classes_of_all(root):
    (root / "ImageSets/Main/val.txt").write_text("c")
    assert [load(root, "ImageSets/Main/train.txt").path(row)[-5:] for row in range(2)] == ["a.jpg", "b.jpg"]
    index = load(root, "ImageSets/Main/val.txt")
    assert (len(index), index.num_boxes, index.class_names) == (1, 0, ("cat", "cow", "dog"))


def test_the_list_of_one_class_has_numbers(root):
    (root / "ImageSets/Main/cat_train.txt").write_text("a  1\nb -1\nc  0\n")
    assert len(load(root, "ImageSets/Main/cat_train.txt")) == 3


def test_names_may_have_blanks(root):
    (root / "Annotations/a 1.xml").write_text(picture(thing()))
    Image.new("RGB", (40, 30)).save(root / "JPEGImages/a 1.jpg")
    (root / "list.txt").write_text("a 1")
    assert load(root, "list.txt").path(0) == str(root / "JPEGImages/a 1.jpg")


@pytest.mark.parametrize(
    ("difficult", "labels", "crowd"), [("keep", [1, 0], [0, 0]), ("ignore", [1, 0], [0, 1]), ("drop", [1], [0])]
)
def test_difficult(root, difficult, labels, crowd):
    objects = load(root, difficult=difficult).annotations(0)
    assert (objects.labels.tolist(), objects.crowd.tolist()) == (labels, crowd)


def test_class_names_may_be_given(root):
    index = load(root, class_names=["dog", "cow", "cat", "bird"])
    assert index.class_names == ("dog", "cow", "cat", "bird")
    assert index.annotations(0).labels.tolist() == [1, 2]
    assert class_names_in(Store(root), "Annotations") == ["cat", "cow", "dog"]


@pytest.mark.parametrize(
    "size", ["", "<size/>", "<size><width>0</width><height>0</height></size>", "<size><width>x</width></size>"]
)
def test_a_size_that_is_not_stated_is_the_images(root, size):
    (root / "Annotations/a.xml").write_text(picture(size=size))
    Image.new("RGB", (7, 9)).save(root / "JPEGImages/a.jpg")
    assert load(root).size(0) == (7, 9)


@pytest.mark.parametrize(
    ("images", "filename", "expected"),
    [
        (["d.PNG"], "", "d.PNG"),
        (["d.png", "other.png"], "other.png", "d.png"),  # files are renamed, what is in them is not
        (["other.png"], "other.png", "other.png"),
        (["d.bmp", "d.txt", "d.png"], "", "d.bmp"),
    ],
)
def test_the_image_of_a_file(root, images, filename, expected):
    (root / "Annotations/d.xml").write_text(picture(filename=filename))
    for name in images:
        (root / "JPEGImages" / name).touch()
    assert load(root).path(3) == str(root / "JPEGImages" / expected)


@pytest.mark.parametrize(
    ("images", "filename", "expected"),
    [
        (["cam1/d.jfif"], "", "cam1/d.jfif"),
        (["cam1/e.jpg"], "e.jpg", "cam1/e.jpg"),
        (["cam1/e.jpg"], "cam1/e.jpg", "cam1/e.jpg"),
        (["d.jpg"], "d.jpg", "d.jpg"),
        (["cam1/d.png", "d.png"], "d.png", "cam1/d.png"),
        (["cam1/d.png", "cam1/cam1/d.png"], "d.png", "cam1/d.png"),
    ],
)
@pytest.mark.parametrize("split_file", [None, "list.txt"])
def test_files_may_lie_in_folders_below(root, images, filename, expected, split_file):
    for name in ("Annotations/cam1", "JPEGImages/cam1/cam1"):
        (root / name).mkdir(parents=True)
    (root / "Annotations/cam1/d.xml").write_text(picture(thing(), filename=filename))
    (root / "list.txt").write_text("a\ncam1/d\n")
    for name in images:
        (root / "JPEGImages" / name).touch()
    index = load(root, split_file)
    assert index.table["path"].to_pylist() == ["a.jpg", *["b.jpg", "c.jpg"][: 2 * (not split_file)], expected]


def test_a_namespace_is_passed_over(root):
    plain = load(root)
    for name, xml in FILES.items():
        named = f'<?xml version="1.0"?>{xml}'.replace("<annotation>", '<annotation xmlns="http://x.org/voc">')
        if name == "a":
            named = re.sub("<(/?)", r"<\1v:", xml).replace(
                "<v:annotation>", '<v:annotation xmlns:v="http://x.org/voc">'
            )
        (root / f"Annotations/{name}.xml").write_text(named)
    assert load(root).table.equals(plain.table)


def notices(root, *arguments, **settings):
    load(root, *arguments, problems=(problems := Problems()), **settings)
    return [str(notice) for notice in problems.notices]


def test_images_without_a_file_are_said_where_most_have_one(root):
    Image.new("RGB", (40, 30)).save(root / "JPEGImages/d.png")
    (notice,) = notices(root)
    assert notice.startswith("1 image has no XML file, such as d.png: they are left out")
    assert notices(root, "ImageSets/Main/train.txt") == []  # the list says which are meant
    (root / "val").mkdir()
    (root / "val/d.xml").write_text(picture())
    assert notices(root, folders=["Annotations", "val"]) == []  # it is of the other split
    for number in range(3):
        (root / f"JPEGImages/{number}.jpg").touch()
    assert notices(root) == []


def test_hidden_files_are_none(root):
    (root / "Annotations/._a.xml").write_bytes(b"Mac OS X")
    (root / "JPEGImages/._a.jpg").write_bytes(b"Mac OS X")
    (root / "JPEGImages/@eaDir").mkdir()
    (root / "JPEGImages/@eaDir/a.jpg").touch()
    assert len(load(root)) == 3
    assert notices(root) == []


def test_a_name_that_is_not_utf8_is_named_or_left_out(root):
    (root / "Annotations/d\udce9.xml").write_text(picture(thing()))
    Image.new("RGB", (40, 30)).save(root / "JPEGImages/d\udce9.jpg")
    with pytest.raises(RaydetError, match=r"JPEGImages/d\\xe9\.jpg: the name is not UTF-8"):
        load(root)
    assert len(load(root, problems=(problems := Problems("skip")))) == 3
    assert len(problems.messages) == 2


def test_boxes_in_shares_are_asked_about(root):
    for name in FILES:
        (root / f"Annotations/{name}.xml").write_text(picture(thing(box=(0.1, 0.1, 0.5, 0.5))))
    with pytest.raises(RaydetError, match="Annotations: all 3 boxes are between 0 and 1: are they shares"):
        load(root, problems=Problems("skip"))


@pytest.mark.parametrize("box", [(5, 5, 5, 20), (5, 5, 5, 5), (-9, 0, 90, 10), (50, 50, 60, 60)])
def test_boxes_without_area_or_outside_stay_as_annotated(root, box):
    (root / "Annotations/a.xml").write_text(picture(thing(box=box)))
    assert load(root).annotations(0).boxes.tolist() == [list(box)]


def bomb(encoding):
    entities = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10 if i else "lol"}">' for i in range(10))
    xml = f'<?xml version="1.0" encoding="{encoding}"?><!DOCTYPE a [{entities}]>{picture(thing(name="&l9;"))}'
    return xml.encode(encoding)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<annotation>", "is not valid XML: no element"),
        ("", "is not valid XML: no element"),
        (b"\xff\xfe\x00", "is not valid XML"),
        ('<?xml version="1.0" encoding="klingon"?><a/>', "is not valid XML"),
        (bomb("utf-8"), "is not valid XML: it declares a document type"),
        (bomb("utf-16"), "is not valid XML: it declares a document type"),
        (picture(), "the file name is empty"),
        (picture(filename="none.jpg"), r"its image, none\.jpg, is not in .*JPEGImages"),
        (picture(filename="../../passwd"), r"file name '../../passwd' leaves the folder"),
    ],
)
def test_a_broken_file_is_named_or_left_out(root, content, message):
    (root / "Annotations/d.xml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RaydetError, match=rf"d\.xml:? {message}"):
        load(root)
    problems = Problems("skip")
    index = load(root, problems=problems)
    assert (len(index), index.num_boxes, len(problems.messages)) == (3, 3, 1)


def test_a_listed_file_may_be_missing(root):
    (root / "ImageSets/Main/train.txt").write_text("a\nd\n")
    with pytest.raises(RaydetError, match=r"Annotations/d\.xml: cannot be read"):
        load(root, "ImageSets/Main/train.txt")
    assert len(load(root, "ImageSets/Main/train.txt", problems=Problems("skip"))) == 1


def test_an_image_without_size_may_be_no_image(root):
    (root / "Annotations/a.xml").write_text(picture(thing("cow"), size=""))
    (root / "JPEGImages/a.jpg").write_text("text")
    with pytest.raises(RaydetError, match=r"JPEGImages/a\.jpg is not an image \(4 bytes\)"):
        load(root)
    assert len(load(root, problems=Problems("skip"))) == 2


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (thing(""), "it has no <name>"),
        ("<object><name>dog</name></object>", "it has no <bndbox><xmin>"),
        (thing(box=("", 1, 2, 3)), "it has no <bndbox><xmin>"),
        (thing(box=("left", 1, 2, 3)), "could not convert .*'left'"),
        (thing(box=("nan", 1, 2, 3)), "a corner of .*nan.* is not finite"),
        (thing(box=(0, 1, "1e999", 3)), "a corner of .*inf.* is not finite"),
        (thing(box=(5, 1, 2, 3)), "the corners .* are swapped"),
        (thing(box=(1, 5, 2, 3)), "the corners .* are swapped"),
        (thing("dot"), "there is no class dot; did you mean dog"),
    ],
)
def test_a_broken_object_is_named_or_left_out(root, broken, message):
    (root / "Annotations/a.xml").write_text(picture(thing("cow"), broken))
    classes = ["cat", "cow", "dog"]
    with pytest.raises(RaydetError, match=rf"a\.xml: object 2: {message}"):
        load(root, class_names=classes)
    problems = Problems("skip")
    index = load(root, problems=problems, class_names=classes)
    assert (len(index), index.num_boxes) == (3, 2)
    assert re.search(message, problems.messages[0])
    with pytest.raises(RaydetError, match=r"more than data\.max_errors = 0"):
        load(root, problems=Problems("skip", max_errors=0), class_names=classes)


def test_what_is_broken_in_another_split_is_not_told(root):
    (root / "Annotations/c.xml").write_text("<")
    assert len(load(root, "ImageSets/Main/train.txt")) == 2


@pytest.mark.parametrize("folder", ["Annotations", "JPEGImages", "ImageSets/Main/train.txt"])
def test_what_is_not_there_is_named(root, folder):
    (root / folder).rename(root / "elsewhere")
    with pytest.raises(RaydetError, match=folder):
        load(root, "ImageSets/Main/train.txt")


def test_bccd(shared):
    root = shared / "data/bccd"
    train, val = (load(root, f"ImageSets/Main/{split}.txt") for split in ("train", "val"))
    assert (len(train), len(val)) == (205, 87)
    assert train.class_names == val.class_names == ("Platelets", "RBC", "WBC")
    everything = load(root)
    boxes = np.concatenate([everything.annotations(row).boxes for row in range(len(everything))])
    assert len(boxes) == 4888
    assert ((boxes[:, 2:] - boxes[:, :2]).min(1) == 0).sum() == 2  # kept as annotated
