import importlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from raydet.data.formats import detect, load_index
from raydet.data.problems import Problems
from raydet.data.synthetic import CLASSES
from raydet.errors import RaydetError
from raydet.recipe import Data
from raydet.store import Store
from tests.s3 import serve

OBJECTS = {"a": [("cat", (1, 2, 20, 16)), ("dog", (0, 0, 40, 20))], "b": [("dog", (10, 5, 30, 15))], "c": []}
SPLITS = {"train": ["a", "c"], "val": ["b"]}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("RAYDET_CACHE", str(folder))
    return folder


def write(path, content=None):
    """Write text, or without it an image of 40x20 pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        Image.new("RGB", (40, 20)).save(path)
    else:
        path.write_text(content)


def write_coco(root, annotations="annotations/instances_{}2017.json", images="{}2017", splits=SPLITS):
    for split, names in splits.items():
        listed = [{"id": i, "file_name": f"{name}.jpg", "width": 40, "height": 20} for i, name in enumerate(names)]
        objects = [
            {"image_id": i, "category_id": ["cat", "dog"].index(label), "bbox": [x1, y1, x2 - x1, y2 - y1]}
            for i, name in enumerate(names)
            for label, (x1, y1, x2, y2) in OBJECTS[name]
        ]
        categories = [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}]
        content = {"images": listed, "annotations": objects, "categories": categories}
        write(root / annotations.format(split), json.dumps(content))
        for name in names:
            write(root / images.format(split) / f"{name}.jpg")


def voc_xml(objects):
    corners = ("xmin", "ymin", "xmax", "ymax")
    things = "".join(
        f"<object><name>{label}</name><bndbox>"
        + "".join(f"<{key}>{value}</{key}>" for key, value in zip(corners, box, strict=True))
        + "</bndbox></object>"
        for label, box in objects
    )
    return f"<annotation>{things}</annotation>"


def write_voc(root, annotations="Annotations", images="JPEGImages", lists="ImageSets/Main/{}.txt", splits=SPLITS):
    for split, names in splits.items():
        for name in names:
            write(root / annotations.format(split) / f"{name}.xml", voc_xml(OBJECTS[name]))
            write(root / images.format(split) / f"{name}.jpg")
        if lists:
            write(root / lists.format(split), "\n".join(names))


def write_yolo(root, images="images/{}", labels="labels/{}", splits=SPLITS):
    write(root / "data.yaml", "names: [cat, dog]")
    for split, names in splits.items():
        for name in names:
            lines = [
                f"{['cat', 'dog'].index(label)} {(x1 + x2) / 80} {(y1 + y2) / 40} {(x2 - x1) / 40} {(y2 - y1) / 20}"
                for label, (x1, y1, x2, y2) in OBJECTS[name]
            ]
            write(root / labels.format(split) / f"{name}.txt", "\n".join(lines))
            write(root / images.format(split) / f"{name}.jpg")


def content(index):
    """Name of each image → its size and the set of its objects, labels by name and boxes to a tenth of a pixel."""
    return {
        os.path.basename(index.path(row)): (
            index.size(row),
            sorted(
                (index.class_names[label], *np.round(box, 1).tolist(), bool(crowd))
                for box, label, crowd, _ in zip(*index.annotations(row), strict=True)
            ),
        )
        for row in range(len(index))
    }


def expected(split):
    return {
        f"{name}.jpg": ((40, 20), sorted((label, *map(float, box), False) for label, box in OBJECTS[name]))
        for name in SPLITS[split]
    }


LAYOUTS = {
    "coco": (write_coco, {}),
    "coco, images in a folder": (write_coco, {"images": "images/{}2017"}),
    "coco without a year": (write_coco, {"annotations": "annotations/instances_{}.json", "images": "{}"}),
    "coco without a year, images": (
        write_coco,
        {"annotations": "annotations/instances_{}.json", "images": "images/{}"},
    ),
    "coco by Roboflow": (
        write_coco,
        {"annotations": "{}/_annotations.coco.json", "images": "{}"},
    ),
    "voc": (write_voc, {}),
    "voc, images": (write_voc, {"images": "images"}),
    "voc, images beside": (write_voc, {"images": "Annotations"}),
    "voc, a folder a split": (
        write_voc,
        {"annotations": "{}/Annotations", "images": "{}/images", "lists": ""},
    ),
    "yolo": (write_yolo, {}),
    "yolo, a folder a split": (write_yolo, {"images": "{}/images", "labels": "{}/labels"}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("named", [True, False])
def test_every_layout_is_found_and_gives_one_index(tmp_path, cache, layout, named):
    make, places = LAYOUTS[layout]
    make(tmp_path / "data", **places)
    name = layout.partition(",")[0].split()[0]
    assert detect(Store(tmp_path / "data")) == name
    for split in SPLITS:
        index = load_index(Data(format=name if named else "auto", root=str(tmp_path / "data")), split)
        assert content(index) == expected(split)
        assert index.class_names == ("cat", "dog")  # of both splits


@pytest.mark.parametrize(
    ("make", "places", "settings"),
    [
        (
            write_coco,
            {"annotations": "{}.json", "images": "pictures/{}"},
            {"train_annotations": "train.json", "train_images": "pictures/train"},
        ),
        (write_coco, {"annotations": "my/{}.json", "images": "images/{}"}, {"train_annotations": "my/train.json"}),
        (write_coco, {"annotations": "{}/x.json", "images": "{}"}, {"train_annotations": "train/x.json"}),
        (write_coco, {"images": "pictures/{}"}, {"train_images": "pictures/train"}),
        (write_voc, {"lists": "lists/{}.txt"}, {"train_annotations": "lists/train.txt"}),
        (
            write_voc,
            {"annotations": "xml/{}", "images": "pictures", "lists": ""},
            {
                "format": "voc",
                "train_annotations": "xml/train",
                "val_annotations": "xml/val",
                "train_images": "pictures",
            },
        ),
        (
            write_voc,
            {
                "annotations": "VOC2007/Annotations",
                "images": "VOC2007/JPEGImages",
                "lists": "VOC2007/ImageSets/Main/{}.txt",
            },
            {"format": "voc", "train_annotations": "VOC2007/ImageSets/Main/train.txt"},
        ),
        (write_yolo, {"images": "my/images/{}", "labels": "my/labels/{}"}, {"train_annotations": "my/images/train"}),
        (write_yolo, {"images": "my/images/{}", "labels": "my/labels/{}"}, {"train_images": "my/images/train"}),
    ],
)
def test_places_may_be_named(tmp_path, cache, make, places, settings):
    make(tmp_path / "data", **places)
    index = load_index(Data(root=str(tmp_path / "data"), **settings), "train")
    assert content(index) == expected("train")
    assert index.class_names == ("cat", "dog")


@pytest.mark.parametrize("layout", ["coco", "voc", "yolo"])
def test_an_object_store_is_as_good(tmp_path, cache, layout):
    with serve(tmp_path) as s3:
        make, places = LAYOUTS[layout]
        make(s3.folder / "data", **places)
        data = Data(root=s3.uri("data"))
        for split in SPLITS:
            index = load_index(data, split)
            assert {name.partition("?")[0]: objects for name, objects in content(index).items()} == expected(split)
            assert index.read(0) == (next(s3.folder.rglob(index.table["path"][0].as_py()))).read_bytes()
        before = len(s3.requests)
        load_index(data, "train")
        assert not any(".jpg" in request or ".xml" in request for request in s3.requests[before:])  # the cache's
        with pytest.raises(RaydetError, match=r"data\.root: s3://bucket/none.* is not a folder"):
            load_index(Data(root=s3.uri("none")), "train")


def test_roboflow_calls_the_second_split_valid(tmp_path, cache):
    splits = {"train": ["a", "c"], "valid": ["b"]}
    write_coco(tmp_path / "coco", "{}/_annotations.coco.json", "{}", splits)
    write_voc(tmp_path / "voc", "{}/Annotations", "{}/JPEGImages", "", splits)
    write_yolo(tmp_path / "yolo", "{}/images", "{}/labels", splits)
    for root in ("coco", "voc", "yolo"):
        assert content(load_index(Data(root=str(tmp_path / root)), "val")) == expected("val")


def test_shards(tmp_path, cache):
    write_coco(tmp_path / "data")
    index = load_index(Data(root=str(tmp_path / "data")), "train")
    (tmp_path / "shards/train").mkdir(parents=True)
    (tmp_path / "shards/train/index.parquet").write_bytes(index.save())
    loaded = load_index(Data(root=str(tmp_path / "shards")), "train")
    assert loaded.table.equals(index.table)
    assert loaded.root == str(tmp_path / "shards/train")
    with pytest.raises(RaydetError, match=r"val/index\.parquet: cannot be read"):
        load_index(Data(root=str(tmp_path / "shards")), "val")
    (tmp_path / "shards/train/index.parquet").write_bytes(b"broken")
    with pytest.raises(RaydetError, match=r"train/index\.parquet cannot be read"):
        load_index(Data(root=str(tmp_path / "shards")), "train")


class Listing(list):
    """What os.scandir returns, in an order of one's own."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_order_of_a_folders_listing_does_not_matter(tmp_path, monkeypatch, layout):
    make, places = LAYOUTS[layout]
    make(tmp_path / "data", **places)
    scandir = os.scandir
    indices = []
    for backwards in (False, True):
        monkeypatch.setenv("RAYDET_CACHE", str(tmp_path / f"cache{backwards}"))
        monkeypatch.setattr(
            os,
            "scandir",
            lambda path, way=backwards: Listing(sorted(scandir(path), key=lambda entry: entry.name, reverse=way)),
        )
        indices.append(load_index(Data(root=str(tmp_path / "data")), "train"))
    assert indices[0].table.equals(indices[1].table)
    assert indices[0].class_names == indices[1].class_names


# ---- what is taken of it


@pytest.fixture
def data(tmp_path, cache):
    write_coco(tmp_path / "data", splits={"train": ["a", "b", "c"], "val": ["c", "b"]})

    def settings(**changes):
        return Data(**{"root": str(tmp_path / "data"), **changes})

    return settings


@pytest.mark.parametrize(
    ("settings", "train", "val"),
    [
        ({}, {"a": 2, "b": 1, "c": 0}, {"c": 0, "b": 1}),
        ({"max_num_samples": 2}, {"a": 2, "b": 1}, {"c": 0, "b": 1}),
        ({"class_inclusion_list": ["cat"]}, {"a": 1, "b": 0, "c": 0}, {"c": 0, "b": 0}),
        ({"ignore_empty_annotations": True}, {"a": 2, "b": 1}, {"c": 0, "b": 1}),
        ({"class_inclusion_list": ["cat"], "ignore_empty_annotations": True}, {"a": 1}, {"c": 0, "b": 0}),
        ({"max_num_samples": 1, "ignore_empty_annotations": True}, {"a": 2}, {"c": 0}),
    ],
)
def test_selection(data, settings, train, val):
    for split, wanted in (("train", train), ("val", val)):
        found = content(load_index(data(**settings), split))
        assert {name[0]: len(objects) for name, (_, objects) in found.items()} == wanted


def test_classes_are_numbered_anew(data):
    index = load_index(data(class_inclusion_list=["dog", "cat"]), "train")
    assert index.class_names == ("dog", "cat")
    assert index.annotations(0).labels.tolist() == [1, 0]


def test_difficult(tmp_path, cache):
    write_voc(tmp_path, splits={"train": ["b"]})
    xml = tmp_path / "Annotations/b.xml"
    xml.write_text(xml.read_text().replace("<bndbox>", "<difficult>1</difficult><bndbox>"))
    for difficult, crowd in (("keep", [False]), ("ignore", [True]), ("drop", [])):
        objects = load_index(Data(root=str(tmp_path), difficult=difficult), "train").annotations(0)
        assert objects.crowd.tolist() == crowd


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"root": "/none"}, r"data\.root: /none is not a folder; pass data\.root=FOLDER"),
        ({"format": "cocoa"}, r"data\.format: cocoa is none of auto, coco, shards, voc, yolo; did you mean coco"),
        ({"format": "no_such_module:Mine"}, r"data\.format: cannot import no_such_module"),
        ({"class_inclusion_list": ["cot"]}, r"data\.class_inclusion_list: there is no class cot; did you mean cat"),
        ({"class_inclusion_list": ["cat", "cat"]}, r"data\.class_inclusion_list: a class is named twice"),
        ({"format": "yolo"}, "found no names of classes"),
        (
            {"format": "voc"},
            r"found no VOC annotations of train; looked for ImageSets/Main/train\.txt, train/Annotations",
        ),
        ({"format": "shards"}, "no such folder|cannot be read"),
        ({"train_annotations": "none.json", "train_images": "train2017"}, r"none\.json: no such annotation file"),
        (
            {"train_annotations": "annotations/instances_train2017.json", "train_images": "no"},
            "no: no such folder of im",
        ),
        (
            {"train_annotations": "none.json"},
            r"found no COCO .* looked for none\.json with none, none\.json with images/n",
        ),
    ],
)
def test_what_is_not_there_is_said(data, settings, message):
    with pytest.raises(RaydetError, match=message):
        load_index(data(**settings), "train")


def test_nothing_may_be_left(tmp_path, cache):
    write_coco(tmp_path, splits={"train": ["c"]})
    with pytest.raises(RaydetError, match="no image of train is left"):
        load_index(Data(root=str(tmp_path), ignore_empty_annotations=True), "train")


def test_a_folder_without_annotations_says_what_was_looked_for(tmp_path, cache):
    message = (
        r"holds nothing that tells its format .*shards: train/index\.parquet.*coco: .*voc: .*yolo: .*data\.format="
    )
    with pytest.raises(RaydetError, match=message) as error:
        load_index(Data(root=str(tmp_path)), "train")
    assert len(str(error.value)) < 250 + len(str(tmp_path))


# ---- the cache


def test_an_index_is_kept(data, cache, monkeypatch):
    first = load_index(data(), "train")
    (file,) = cache.iterdir()
    monkeypatch.setattr("raydet.data.coco.read_lists", None)  # so that nothing can be read any more
    again = load_index(data(), "train")
    assert again.table.equals(first.table)
    assert (again.root, again.class_names, again.category_ids) == (first.root, first.class_names, first.category_ids)
    assert len(load_index(data(max_num_samples=1), "train")) == 1  # the same file serves any selection
    assert list(cache.iterdir()) == [file]


def test_a_changed_annotation_is_seen(data, cache):
    before = load_index(data(), "train")
    file = f"{data().root}/annotations/instances_train2017.json"
    with open(file) as opened:
        text = opened.read()
    with open(file, "w") as opened:
        opened.write(text.replace('"bbox": [1, ', '"bbox": [3, '))
    after = load_index(data(), "train")
    assert (before.annotations(0).boxes[0, 0], after.annotations(0).boxes[0, 0]) == (1, 3)


def test_a_missing_image_is_seen(data, cache):
    load_index(data(), "train")
    os.remove(f"{data().root}/train2017/b.jpg")
    with pytest.raises(RaydetError, match=r"image b\.jpg"):
        load_index(data(), "train")


@pytest.mark.parametrize("make", [write_voc, write_yolo])
def test_a_changed_size_of_an_image_is_seen(tmp_path, cache, make):
    make(tmp_path)
    data = Data(root=str(tmp_path))
    before = load_index(data, "train")
    Image.new("RGB", (70, 50)).save(before.path(0))
    assert (before.size(0), load_index(data, "train").size(0)) == ((40, 20), (70, 50))


def test_another_setting_is_another_index(tmp_path, cache):
    write_voc(tmp_path)
    for difficult in ("keep", "drop"):
        load_index(Data(root=str(tmp_path), difficult=difficult), "train")
    load_index(Data(root=str(tmp_path)), "val")
    assert len(list(cache.iterdir())) == 3


def test_what_was_left_out_is_told_each_time(data, cache):
    os.remove(f"{data().root}/train2017/b.jpg")
    messages = []
    for _ in range(2):
        problems = Problems("skip")
        problems.add("of another split")
        assert len(load_index(data(), "train", problems)) == 2
        messages.append(problems.messages)
    assert messages[0] == messages[1]
    assert len(messages[0]) == 2
    with pytest.raises(RaydetError, match=r"image b\.jpg"):
        load_index(data(), "train")
    with pytest.raises(RaydetError, match=r"more than data\.max_errors = 0"):
        load_index(data(on_error="skip", max_errors=0), "train")


def test_notices_are_given_each_time_and_a_link_that_died_is_seen(tmp_path, cache):
    write_yolo(tmp_path)
    (tmp_path / "images/train/notes.heic").touch()
    (tmp_path / "images/train/.DS_Store").touch()
    (tmp_path / "images/train/c.jpg").rename(tmp_path / "c.jpg")
    (tmp_path / "images/train/c.jpg").symlink_to(tmp_path / "c.jpg")
    left_out = (
        "left out: 1 file that is no image raydet decodes, such as images/train/notes.heic: convert them to PNG or "
        "JPEG, if they are images"
    )
    for _ in range(2):
        problems = Problems()
        assert len(load_index(Data(root=str(tmp_path)), "train", problems)) == 2
        assert [str(notice) for notice in problems.notices] == [left_out]
    (tmp_path / "c.jpg").unlink()
    for _ in range(2):
        problems = Problems()
        assert len(load_index(Data(root=str(tmp_path)), "train", problems)) == 1
        assert [str(notice) for notice in problems.notices[:2]] == [
            left_out,
            "1 link to nothing, such as images/train/c.jpg: fetch the files, or remove the links",
        ]


@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b"", lambda b: b[:99] + bytes([b[99] ^ 1]) + b[100:]])
def test_a_damaged_file_is_built_anew(data, cache, damage):
    first = load_index(data(), "train")
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert load_index(data(), "train").table.equals(first.table)
    assert file.read_bytes() == whole


def test_without_a_place_for_it_nothing_is_kept(data, cache, caplog):
    cache.write_text("a file, not a folder")
    assert len(load_index(data(), "train")) == 3
    assert "the index is not kept for the next time" in caplog.text


OWN = """
from raydet.data.own import index_of_records
def mine(root, split):
    print("read")
    return index_of_records([{"path": "a.jpg", "boxes": [[1, 2, 3, SIDE]], "labels": [0]}], ["cat"], root)
def elsewhere(split):
    return mine("FOLDER", split)
"""


def test_data_of_ones_own_is_kept_while_its_code_and_its_files_are_the_same(tmp_path, cache, monkeypatch, capsys):
    write(tmp_path / "data/a.jpg")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def load(side, name="mine"):
        write(tmp_path / "my_data.py", OWN.replace("SIDE", str(side)).replace("FOLDER", str(tmp_path / "data")))
        monkeypatch.delitem(sys.modules, "my_data", raising=False)
        importlib.invalidate_caches()
        index = load_index(Data(format=f"my_data:{name}", root=str(tmp_path / "data")), "train")
        return index.annotations(0).boxes[0, 3], capsys.readouterr().out.split()

    assert load(8) == (8, ["read"])
    assert load(8) == (8, [])
    assert load(9) == (9, ["read"])
    write(tmp_path / "data/b.txt", "more")
    assert load(9) == (9, ["read"])
    assert load(9, "elsewhere") == (9, ["read"])
    assert load(9, "elsewhere") == (9, ["read"])  # it does not say where it reads, so that no change would be seen


# ---- real data


def test_voc100_is_the_same_in_three_formats(shared, cache):
    root = str(shared / "data/voc100")
    settings = [
        {"format": "voc", "train_annotations": "Annotations"},
        {"format": "yolo", "train_annotations": "images"},
        {"train_annotations": "instances.json", "train_images": "images"},
    ]
    voc, yolo, coco = (content(load_index(Data(root=root, **each), "train")) for each in settings)
    assert len(voc) == 100
    assert sum(len(objects) for _, objects in voc.values()) == 273
    assert voc == yolo == coco


def test_bccd_needs_its_folder_only(shared, cache):
    for settings in ({"format": "voc"}, {}):
        train, val = (load_index(Data(root=str(shared / "data/bccd"), **settings), split) for split in ("train", "val"))
        assert (len(train), len(val)) == (205, 87)
        assert train.class_names == val.class_names == ("Platelets", "RBC", "WBC")


def test_coco_mini_and_shapes_need_their_folder_only(shared, shapes, cache):
    assert len(load_index(Data(root=str(shared / "data/coco_mini")), "val")) == 254
    assert load_index(Data(root=str(shapes)), "train").class_names == CLASSES


def test_neither_torch_nor_ray_nor_an_image_library_is_imported():
    script = "import raydet.data.formats, sys; sys.exit(any(m in sys.modules for m in ('torch', 'ray', 'cv2', 'PIL')))"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
