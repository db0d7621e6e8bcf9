import json
import shutil
from html.parser import HTMLParser
from itertools import combinations

import cv2
import hotcoco
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from raydet.data.index import make_index
from raydet.data.problems import Notice
from raydet.reports.inspect import (
    ASPECT_RATIOS,
    CELLS,
    LEVELS,
    RELATIVE_SIZES,
    SAME_PLACE,
    SHOWN,
    Finding,
    _flat,
    _same_place,
    decode_all,
    inspect,
    measure,
)
from raydet.reports.inspect_page import render
from tests.command import raydet

VOID = {"meta", "img"}


def index_of(objects, sizes=((100, 100),), root="/nowhere", classes=("a", "b"), names=None):
    """An index of images of the given (width, height); an object is (image, label, box, crowd)."""
    image, label, boxes, crowd = zip(*objects, strict=True) if objects else ((), (), (), ())
    boxes = np.array(boxes, float).reshape(-1, 4)
    return make_index(
        [(i, names[i] if names else f"{i}.jpg", *size) for i, size in enumerate(sizes)],
        boxes,
        np.array(label, int),
        np.array(crowd, bool),
        (boxes[:, 2:] - boxes[:, :2]).prod(1),
        np.array(image, int),
        root=str(root),
        class_names=classes,
        category_ids=range(len(classes)),
    )


def findings(*indexes, **options):
    """What `inspect` finds: what → (level, split, count)."""
    splits = dict(zip(("train", "val"), indexes, strict=False))
    found = inspect("data", splits, options.pop("problems", {}), **options).findings
    return {finding.what: (finding.level, finding.split, finding.count) for finding in found}


@pytest.fixture(scope="module")
def numbers():
    objects = [
        (0, 0, (0, 0, 10, 18), False),  # small
        (0, 0, (10, 10, 50, 32), False),
        (0, 1, (0, 0, 100, 100), True),  # a crowd
        (1, 1, (0, 0, 300, 200), False),  # the whole image; large
        (1, 0, (30, 30, 30, 60), False),  # no area: counted, not measured
    ]
    return measure(index_of(objects, sizes=[(100, 100), (300, 200), (100, 100)], classes=("a", "b", "c")))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("images", 3),
        ("objects", 4),
        ("crowds", 1),
        ("empty", 1),
        ("objects_of_class", [3, 1, 0]),
        ("images_of_class", [2, 1, 0]),
        ("coco_sizes", [3, 0, 1]),
        ("objects_an_image", [1, 0, 2]),
        ("image_sizes", {(100, 100): 2, (300, 200): 1}),
    ],
)
def test_what_is_counted(numbers, name, expected):
    found = getattr(numbers, name)
    assert (found.tolist() if isinstance(found, np.ndarray) else found) == expected


def test_boxes_are_measured_against_their_image(numbers):
    def bins(histogram, edges):
        return [(round(edges[i], 2), round(edges[i + 1], 2)) for i in np.repeat(np.arange(len(histogram)), histogram)]

    # 10 x 18 and 40 x 22 of 100 x 100 pixels, and the whole of 300 x 200.
    assert bins(numbers.relative_sizes, RELATIVE_SIZES) == [(0.13, 0.16), (0.25, 0.32), (0.79, 1.0)]
    assert bins(numbers.aspect_ratios, ASPECT_RATIOS) == [(0.5, 0.63), (1.26, 1.58), (1.58, 2.0)]
    where = np.zeros((CELLS, CELLS), int)
    for x, y in ((0.05, 0.09), (0.3, 0.21), (0.5, 0.5)):
        where[int(y * CELLS), int(x * CELLS)] += 1
    assert (numbers.centres == where).all()


@pytest.mark.parametrize(
    ("boxes", "what", "level", "count"),
    [
        ([(10, 10, 10, 40)], "boxes without area", "error", 1),
        ([(40, 10, 10, 40)], "boxes without area", "error", 1),  # corners swapped
        ([(10, 10, float("nan"), 40)], "boxes without area", "error", 1),
        ([(100, 10, 140, 40), (-30, 0, 0, 20)], "boxes outside their image", "error", 2),
        ([(-5, 10, 40, 40), (10, 10, 40, 100.5)], "boxes that leave their image by more than 1 px", "note", 1),
        ([(10, 10, 40, 40), (10, 10, 40, 40.5), (9.8, 10, 40, 40)], "boxes drawn twice", "warning", 2),
        ([(10, 10, 11, 40), (10, 10, 12, 40)], "objects thinner than 4 px in the model's input", "note", 1),
        ([(10, 10, 90, 13)], "objects more than 20 times as long as wide", "note", 1),
    ],
)
def test_boxes_that_cannot_be_right_are_found(boxes, what, level, count):
    sound = (60, 60, 80, 80)
    train = index_of([(0, 0, box, False) for box in (*boxes, sound)])
    assert findings(train, image_size=(256, 256))[what] == (level, "train", count)
    assert what not in findings(index_of([(0, 0, sound, False)]), image_size=(256, 256))


def test_one_object_as_two_classes_is_found_and_a_crowd_around_an_object_is_fine():
    box = (10, 10, 60, 60)
    assert findings(index_of([(0, 0, box, False), (0, 1, box, False)]))["boxes drawn twice, as two classes"][2] == 1
    assert not [what for what in findings(index_of([(0, 0, box, False), (0, 0, box, True)])) if "twice" in what]


def _iou(one, other):
    width, height = (min(one[i + 2], other[i + 2]) - max(one[i], other[i]) for i in (0, 1))
    shared = max(width, 0) * max(height, 0)
    return shared / (sum((b[2] - b[0]) * (b[3] - b[1]) for b in (one, other)) - shared)


# Boxes of few places and sizes, so that many are nearly the same.
BOX = st.tuples(*[st.integers(0, 3)] * 2, *[st.integers(58, 62)] * 2).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)


@given(st.lists(st.tuples(st.integers(0, 2), BOX), max_size=25))
@settings(max_examples=200, deadline=None)
def test_pairs_in_one_place_are_those_that_trying_all_finds(objects):
    flat = _flat(index_of([(image, 0, box, False) for image, box in objects], sizes=[(100, 100)] * 3))
    pairs = {tuple(sorted(pair)) for pair in np.transpose(_same_place(flat, np.arange(len(flat.label)))).tolist()}
    assert pairs == {
        (i, j)
        for i, j in combinations(range(len(flat.label)), 2)
        if flat.image[i] == flat.image[j] and _iou(flat.boxes[i], flat.boxes[j]) >= SAME_PLACE
    }


def test_hotcoco_s_health_check_finds_the_same(tmp_path):
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 8, (300, 2)) * 20
    sides = rng.choice([0, 3, 61, 62, 63], (300, 2), p=[0.05, 0.1, 0.3, 0.3, 0.25])
    boxes, label = np.concatenate((corners, corners + sides), axis=1), np.arange(300) % 3
    image = np.arange(300) // 30
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 240, "height": 240} for i in range(10)],
        "categories": [{"id": i, "name": str(i)} for i in range(3)],
        "annotations": [
            {"id": i, "image_id": image[i], "category_id": label[i], "bbox": [*corners[i], *sides[i]], "area": 1.0}
            for i in range(300)
        ],
    }
    (tmp_path / "a.json").write_text(json.dumps(content, default=int))
    warnings = hotcoco.COCO(str(tmp_path / "a.json")).healthcheck()["warnings"]
    theirs = {warning["code"]: warning["affected_ids"] for warning in warnings}

    objects = [(image[i], label[i], boxes[i], False) for i in range(300)]
    index = index_of(objects, sizes=[(240, 240)] * 10, classes=("0", "1", "2"))
    ours = findings(index)
    assert ours["boxes without area"][2] == len(theirs["degenerate_bbox"])
    assert ours["objects more than 20 times as long as wide"][2] == len(theirs["extreme_aspect_ratio"])
    first, second = _same_place(_flat(index), np.flatnonzero(sides.all(1)))
    alike = label[first] == label[second]
    assert set(first[alike]) | set(second[alike]) == set(theirs["near_duplicate"])
    assert ours["boxes drawn twice"][2] == len(set(second[alike])) > 10


def many(counts, images):
    """An index of `images` images, the first counts[k] of which have one object of class k."""
    objects = [(i, k, (10 * k, 10, 10 * k + 40, 40), False) for k, count in enumerate(counts) for i in range(count)]
    return index_of(objects, sizes=[(100, 100)] * images, classes=[f"class {k}" for k in range(len(counts))])


def test_classes_that_are_absent_rare_or_elsewhere_in_another_proportion_are_found():
    found = findings(many([90, 9, 0, 5], 100), many([90, 40, 3, 0], 100))
    assert found["classes with fewer than 10 objects"] == ("note", "train", 2)
    assert found["classes without objects"] == ("warning", "val", 1)  # and one of train's, tested next
    assert found["classes much more frequent in one split"] == ("warning", "train, val", 1)
    assert findings(many([0, 5], 5))["classes without objects"] == ("warning", "train", 1)


def test_more_objects_than_an_evaluation_counts_are_found_in_the_validation_split():
    crowded = index_of(
        [(0, 0, (x, 0, x + 4, 4), False) for x in range(9)] + [(1, 1, (0, 0, 4, 4), False)], [(99, 9)] * 2
    )
    of_a_class = "images have more objects of a class than the 5 that AP counts"
    of_an_image = "images have more objects than the 7 detections of an image that are kept"
    found = findings(crowded, crowded, counted=(5, 7))
    assert found[of_a_class] == found[of_an_image] == ("warning", "val", 1)
    assert not {of_a_class, of_an_image} & set(findings(crowded, index_of([], [(9, 9)]), counted=(5, 7)))


def test_lists_of_classes_that_differ_are_an_error():
    train, val = (index_of([], classes=classes) for classes in (("cat", "dog"), ("dog", "cat", "cow")))
    (found,) = (
        f for f in inspect("", {"train": train, "val": val}, {}).findings if f.level == "error" and "share" in f.what
    )
    assert (found.what, found.examples) == ("classes that the splits do not share", ("cow",))
    other = index_of([], classes=("dog", "cat"))
    assert findings(train, other)["classes that the splits do not share"] == ("error", "train, val", 1)


@pytest.fixture
def folder(tmp_path):
    """Pictures of noise 0.jpg to 5.jpg: 3 is cut off, 4 is larger than annotated, 5 is a copy of 0."""
    for i in range(5):
        side = 40 if i == 4 else 32
        pixels = np.random.default_rng(i).integers(0, 255, (side, side, 3), np.uint8)
        content = cv2.imencode(".jpg", pixels)[1].tobytes()
        (tmp_path / f"{i}.jpg").write_bytes(content[: 500 if i == 3 else None])
    (tmp_path / "5.jpg").write_bytes((tmp_path / "0.jpg").read_bytes())
    return tmp_path


def files(folder, *names):
    return index_of([(0, 0, (2, 2, 20, 20), False)], sizes=[(32, 32)] * len(names), root=folder, names=names)


def test_missing_empty_and_repeated_files_are_found_without_opening_any(folder):
    (folder / "empty.jpg").touch()
    found = findings(
        files(folder, "0.jpg", "gone.jpg", "a/gone.jpg", "empty.jpg", "1.jpg", "1.jpg"), files(folder, "0.jpg")
    )
    assert found["images that are not there"] == ("error", "train", 2)
    assert found["image files of 0 bytes"] == ("error", "train", 1)
    assert found["images listed more than once"] == ("warning", "train", 1)
    assert found["images in both splits"] == ("warning", "train, val", 1)


def test_decoding_finds_what_cannot_be_used_and_copies(folder):
    train, val = files(folder, "0.jpg", "1.jpg", "3.jpg", "4.jpg", "5.jpg", "gone.jpg"), files(folder, "5.jpg", "2.jpg")
    decoded = {"train": list(decode_all(train)), "val": list(decode_all(val))}
    problems = [image.problem for image in decoded["train"]]
    assert [bool(problem) for problem in problems] == [False, False, True, True, False, True]
    for problem, name in zip(problems, ("0", "1", "3", "4", "5", "gone"), strict=True):
        assert not problem or f"{folder}/{name}.jpg" in problem
    assert "40x40" in problems[3]
    found = findings(train, val, decoded=decoded)
    assert found["images that cannot be used"] == ("error", "train", 3)
    assert found["images that are copies of others"] == ("warning", "train", 1)
    assert found["images in both splits"] == ("warning", "train, val", 1)


def test_what_libraries_print_of_an_image_is_a_finding_with_its_name(folder, capfd):
    content = (folder / "1.jpg").read_bytes()
    (folder / "damaged.jpg").write_bytes(content[:900] + b"\xff\xd3\0\0" + content[900:])
    pixels = Image.fromarray(np.zeros((32, 32, 3), np.uint8))
    pixels.save(folder / "profile.png", icc_profile=b"no profile" * 20)
    pixels.save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:60])
    index = files(folder, *["0.jpg", "1.jpg"] * 5, "damaged.jpg", "profile.png", "cut.png", "2.jpg")
    decoded = list(decode_all(index))
    assert [number for number, image in enumerate(decoded) if image.warning] == [10, 11]
    assert decoded[10].warning == f"{folder}/damaged.jpg: Corrupt JPEG data: premature end of data segment"
    assert decoded[11].warning == f"{folder}/profile.png: libpng warning: iCCP: too short"
    assert "cut.png is not an image that can be decoded" in decoded[12].problem
    assert [image.digest for image in decoded[:2]] * 5 == [image.digest for image in decoded[:10]]
    found = findings(index, decoded={"train": decoded})
    assert found["images that are damaged but can be decoded"] == ("warning", "train", 1)
    assert found["PNG files of which the decoder passes over a part"] == ("note", "train", 1)
    assert capfd.readouterr().err == ""  # nor does OpenCV print lines of its own


def test_records_that_were_left_out_are_counted_and_the_worst_comes_first(folder):
    index = files(folder, "0.jpg")
    problems = {"train": [f"a.txt: line {i} is broken" for i in range(25)]}
    found = inspect("data", {"train": index}, problems).findings
    assert [LEVELS.index(finding.level) for finding in found] == sorted(LEVELS.index(f.level) for f in found)
    assert (found[0].what, found[0].count) == ("records that cannot be used", 25)
    page = render(inspect("data", {"train": index}, problems))
    assert "a.txt: line 9 is broken" in page
    assert "and 15 more" in page


def test_notices_are_findings(folder):
    notice = Notice("6 images have no label file", "they are background", 6, ["a.jpg", "b.jpg"])
    found = inspect("data", {"train": files(folder, "0.jpg")}, {}, notices={"train": [notice]}).findings
    assert Finding("warning", "train", notice.what, 6, notice.remedy, ("a.jpg", "b.jpg")) in found


def test_a_split_that_cannot_be_read_is_an_error_beside_the_other(folder):
    made = inspect("data", {"train": files(folder, "0.jpg")}, {"train": [], "val": ["no such file"]})
    assert (made.findings[0].split, made.findings[0].what) == ("val", "splits that cannot be read")
    assert made.findings[0].examples == ("no such file",)


class Page(HTMLParser):
    """Reads a page strictly: each tag closes, nothing comes from elsewhere."""

    def __init__(self, page):
        super().__init__()
        self.open, self.text, self.images = [], [], []
        self.feed(page)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        assert tag not in {"script", "link", "iframe", "object"}
        for name, value in attributes:
            assert not name.startswith("on")
            if name in {"src", "href"}:
                assert value.startswith(("data:image/jpeg;base64,", "#")), value
        self.images += [attributes] if tag == "img" else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert tag in {"rect", "line", "path"}

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_shows_all_there_is_and_is_well_formed(shapes_index):
    val = shapes_index.take(np.arange(20, 40))
    made = inspect("/data/shapes", {"train": shapes_index.head(20), "val": val}, {})
    page = render(made)
    read = Page(page)
    shown = " ".join(read.text)
    for part in ("shapes", "Findings", "Images of train", "Images of val", "Rarest classes of train", "Centres"):
        assert part in shown
    for name in shapes_index.class_names:
        assert name in shown
    assert len(read.images) == 2 * SHOWN + len(shapes_index.class_names)
    assert "http" not in page.partition("<body>")[2]
    assert render(inspect("/data/shapes", {"train": shapes_index.head(20), "val": val}, {})) == page, "it is seeded"


HOSTILE = "<script>alert('1')</script>\"&amp;[red]"


def test_names_from_strangers_are_text(folder):
    index = index_of([(0, 0, (2, 2, 2, 20), False)], [(32, 32)], folder, (HOSTILE, "b"), ["<b>.jpg"])
    page = Page(render(inspect(f"/{HOSTILE}", {HOSTILE: index, "val": index}, {"val": [HOSTILE]})))
    assert page.text.count(HOSTILE) >= 5
    assert any("<b>.jpg" in text for text in page.text)


def test_a_set_without_objects_or_images_still_gives_a_page():
    Page(render(inspect("data", {"train": index_of([]), "val": index_of([], sizes=[])}, {})))


def test_broken_pictures_have_their_place_and_say_why(folder):
    made = inspect("data", {"train": files(folder, "3.jpg", "gone.jpg")}, {})
    captions = sorted(figure.caption for figure in made.galleries["Images of train"])
    assert [caption.partition(" (")[0] for caption in captions] == [
        f"{folder}/3.jpg is not an image that can be decoded",
        f"{folder}/gone.jpg: cannot be read",
    ]


def test_the_command_writes_a_page_and_prints_the_numbers(shapes, tmp_path):
    done = raydet("inspect", shapes, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    printed = [line.split() for line in done.stdout.replace("│", " ").splitlines()]
    assert ["images", "40", "24"] in printed
    assert ["page:", "inspect.html"] in printed
    read = Page((tmp_path / "inspect.html").read_text())
    assert len(read.images) == 2 * SHOWN + 5


@pytest.mark.parametrize("arguments", [["{broken}", "--recipe", "demo"], ["demo", "data.root={broken}"]])
def test_with_a_recipe_it_shows_training_samples_also_of_broken_data(shapes, tmp_path, arguments):
    broken = shutil.copytree(shapes, tmp_path / "broken")
    for name in ("000003.jpg", "000004.jpg"):
        (broken / "train" / name).write_bytes((broken / "train" / name).read_bytes()[:300])
    arguments = [argument.format(broken=broken) for argument in arguments]
    done = raydet("inspect", *arguments, "--decode", "--out", "pages/shapes.html", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for part in ("images that cannot be used", "mend or remove them", "page: pages/shapes.html"):
        assert part in done.stdout
    page = (tmp_path / "pages" / "shapes.html").read_text()
    assert f"{broken}/train/000004.jpg is not an image" in page
    read = Page(page)
    assert "Training samples as the model gets them" in read.text
    assert len(read.images) == 3 * SHOWN + 5


def test_a_data_set_without_a_validation_split_is_shown_too(shapes, tmp_path):
    done = raydet("inspect", shapes, "data.val_annotations=nothing.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "splits that cannot be read" in done.stdout
    assert "nothing.json" in (tmp_path / "inspect.html").read_text()


def test_a_folder_s_name_is_taken_as_it_is_typed(shapes, tmp_path):
    shutil.copytree(shapes, tmp_path / "batch #2")
    (tmp_path / "batch").mkdir()
    done = raydet("inspect", "batch #2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert ["images", "40", "24"] in [line.split() for line in done.stdout.replace("│", " ").splitlines()]


def test_names_from_strangers_do_nothing_to_the_terminal(shapes, tmp_path):
    copy = shutil.copytree(shapes, tmp_path / "copy")
    file = copy / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    content["categories"].append({"id": 9, "name": "[red]\x1b[2J"})  # a class without objects is named
    file.write_text(json.dumps(content))
    done = raydet("inspect", copy, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "[red]?[2J" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere"], "/nowhere is neither a folder"),
        (["demo", "--recipe", "demo"], "demo is neither a folder nor the URI of one"),
        (["{shapes}", "--out", "{shapes}"], "cannot be written"),
        (["{shapes}", "data.rooot=x"], "did you mean data.root?"),
        (["{data_yaml}"], "data.yaml describes a data set and is no recipe: name its folder"),
    ],
)
def test_a_mistake_is_one_line(shapes, tmp_path, arguments, message):
    data_yaml = tmp_path / "data.yaml"
    data_yaml.write_text("train: images\nnames: [a]")
    arguments = [argument.format(shapes=shapes, data_yaml=data_yaml) for argument in arguments]
    done = raydet("inspect", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_its_help_has_an_example(tmp_path):
    assert "Example: raydet inspect " in raydet("inspect", "--help", cwd=tmp_path).stdout
