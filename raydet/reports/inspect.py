"""What a person wants to see of a data set before training on it: numbers, what is broken, pictures; one HTML page.

Numbers and checks come from the index alone and take about a second for COCO. Only `decode_all` opens every image.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from raydet.boxes import cxcywh_to_xyxy
from raydet.data.index import Index
from raydet.data.problems import Notice
from raydet.data.render import decode
from raydet.data.scan import present
from raydet.errors import RaydetError
from raydet.evaluation.coco import beyond
from raydet.store import store
from raydet.visualization import draw_boxes

if TYPE_CHECKING:
    from raydet.data.batch import Batch

Array = npt.NDArray[Any]

# Edges of the histograms, ten bins a decade: 1, 2, 5 and 10 are edges.
RELATIVE_SIZES: Array = 10 ** np.linspace(-2, 0, 21)  # square root of a box's share of its image
ASPECT_RATIOS: Array = 10 ** np.linspace(-1, 1, 21)  # width / height
COCO_SIZES = ("small", "medium", "large")
COCO_AREAS = (32**2, 96**2)  # pixels², where the next begins
CELLS = 24  # cells of the map of centres, each way

BEYOND = 1.0  # pixels by which a box may leave its image: rounding does that
TINY = 4.0  # pixels in the model's input: half of the finest stride
SAME_PLACE = 0.95  # IoU from which on two boxes are one
EXTREME = 20.0  # ratio of the sides
RARE = 10  # objects of a class
DRIFT, DRIFT_Z = 2.0, 4.0  # factor between the splits' shares of images, and standard errors: more than chance gives

SHOWN, SHOWN_RARE = 12, 6  # pictures of a split, and of rare classes
SIDE = 480  # pixels, the longer one of a picture
EXAMPLES = 10  # records that a finding names
AT_ONCE = 256  # images that wait for a thread
_HARMLESS = "libpng warning: "
SKIP = "mend or remove them; data.on_error=skip trains without them"


@dataclass(frozen=True)
class Statistics:
    """Numbers of a split. Crowds are counted as crowds and nowhere else.

    Attributes:
        class_names: name of each label.
        images: number of images.
        objects: number of objects.
        crowds: number of crowds.
        empty: number of images without objects.
        objects_of_class: [classes] number of objects.
        images_of_class: [classes] number of images that have such an object.
        coco_sizes: [3] number of objects of each of `COCO_SIZES`, by their area.
        relative_sizes: histogram of the square root of a box's share of its image, over `RELATIVE_SIZES`; what lies
            beyond is in the outer bins.
        aspect_ratios: histogram of width / height over `ASPECT_RATIOS`; what lies beyond is in the outer bins.
        objects_an_image: [most objects + 1] number of images with this many objects.
        image_sizes: (width, height) in pixels → images, most frequent first.
        centres: [`CELLS`, `CELLS`] number of objects by where in their image the centre is, rows first.
    """

    class_names: tuple[str, ...]
    images: int
    objects: int
    crowds: int
    empty: int
    objects_of_class: Array
    images_of_class: Array
    coco_sizes: Array
    relative_sizes: Array
    aspect_ratios: Array
    objects_an_image: Array
    image_sizes: dict[tuple[int, int], int]
    centres: Array


Level = Literal["error", "warning", "note"]
LEVELS: tuple[Level, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """Something about a split that a person should know.

    Attributes:
        level: "error": training stops or learns what is wrong; "warning": probably a mistake; "note": good to know.
        split: name of the split, or names of several.
        what: description of the records.
        count: number of these records.
        remedy: what to do, or what it means.
        examples: names of the first of these records.
    """

    level: Level
    split: str
    what: str
    count: int
    remedy: str
    examples: tuple[str, ...]

    @staticmethod
    def of(
        level: Level,
        split: str,
        what: str,
        records: Sequence[Any] | Array,
        remedy: str,
        name: Callable[[Any], str] = str,
    ) -> Finding:
        """Make a finding of the records that it is about, perhaps none."""
        return Finding(level, split, what, len(records), remedy, tuple(map(name, records[:EXAMPLES])))


class Figure(NamedTuple):
    """A picture, uint8 [H, W, 3] BGR, and a line about it."""

    image: Array
    caption: str


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found.

    Attributes:
        root: folder or URI of the data set.
        splits: name of a split → its numbers.
        findings: what a person should know, worst first.
        galleries: headline → pictures.
    """

    root: str
    splits: dict[str, Statistics]
    findings: list[Finding]
    galleries: dict[str, list[Figure]]


class Decoded(NamedTuple):
    """What `decode_all` learnt of an image.

    Attributes:
        digest: digest of its file; empty if it cannot be used.
        problem: why it cannot be used, or empty.
        warning: what the library that decoded it printed, or empty.
    """

    digest: bytes
    problem: str
    warning: str = ""


def inspect(
    root: str,
    splits: Mapping[str, Index],
    problems: Mapping[str, Sequence[str]],
    *,
    notices: Mapping[str, Sequence[Notice]] | None = None,
    image_size: tuple[int, int] = (640, 640),
    counted: tuple[int, int] = (100, 300),
    decoded: Mapping[str, Sequence[Decoded]] | None = None,
    augmented: Batch | None = None,
    seed: int = 0,
) -> Inspection:
    """Look at a data set.

    Args:
        root: the data set's folder or URI.
        splits: name → images; the first is the one to train on.
        problems: name → records that its loader had to leave out; or why it could not be read, if it is no split.
        notices: name → what its loader takes for a mistake.
        image_size: (height, width) of the model's input in pixels, which tells what is tiny.
        counted: number of detections of each class in an image that an evaluation counts, and number of detections
            that it keeps in an image.
        decoded: name → what `decode_all` gives.
        augmented: samples as the model will get them.
        seed: seed of the choice of pictures.
    """
    decoded = decoded or {}
    statistics = {split: measure(index) for split, index in splits.items()}
    findings = [*_records(splits, problems, decoded), *_classes(statistics), *_copies(splits, decoded)]
    for split, told in (notices or {}).items():
        findings += [
            Finding("warning", split, each.what, each.count, each.remedy, tuple(each.records)) for each in told
        ]
    for split, index in splits.items():
        findings += [*_files(split, index), *_boxes(split, index, image_size)]
    for split, index in list(splits.items())[1:] or splits.items():  # what is validated on
        findings += [Finding.of("warning", split, *found) for found in beyond(index, *counted)]
    findings = [finding for finding in findings if finding.count]
    findings.sort(key=lambda finding: (LEVELS.index(finding.level), -finding.count))

    rng = np.random.default_rng(seed)
    first, train = next(iter(splits.items()))
    galleries = {f"Images of {split}": _random_figures(index, rng) for split, index in splits.items()}
    galleries[f"Rarest classes of {first}"] = _rare_figures(train, rng)
    if augmented is not None:
        galleries["Training samples as the model gets them"] = _augmented_figures(augmented, train.class_names)
    return Inspection(root, statistics, findings, galleries)


def measure(index: Index) -> Statistics:
    """Count and measure the images and objects of a split."""
    flat = _flat(index)
    real = ~flat.crowd
    image, label, classes = flat.image[real], flat.label[real], len(index.class_names)
    an_image = np.bincount(image, minlength=len(index))
    pairs = np.sort(image * classes + label)  # np.unique takes six times as long
    sound = real & _is_sound(flat)
    sides, frames = flat.sides[sound], flat.frames[flat.image[sound]]
    centres = (flat.boxes[sound, :2] + flat.boxes[sound, 2:]) / 2
    column, row = (centres / frames * CELLS).clip(0, CELLS - 1).astype(int).T
    sizes = Counter(map(tuple, flat.frames.astype(int).tolist()))
    return Statistics(
        class_names=index.class_names,
        images=len(index),
        objects=len(label),
        crowds=int(flat.crowd.sum()),
        empty=int((an_image == 0).sum()),
        objects_of_class=np.bincount(label, minlength=classes),
        images_of_class=np.bincount(pairs[np.diff(pairs, prepend=-1) > 0] % classes, minlength=classes),
        coco_sizes=np.bincount(np.digitize(flat.area[real], COCO_AREAS), minlength=3),
        relative_sizes=_histogram(np.sqrt(sides.prod(1) / frames.prod(1)), RELATIVE_SIZES),
        aspect_ratios=_histogram(sides[:, 0] / sides[:, 1], ASPECT_RATIOS),
        objects_an_image=np.bincount(an_image),
        image_sizes=dict(sizes.most_common()),
        centres=np.bincount(row * CELLS + column, minlength=CELLS**2).reshape(CELLS, CELLS),
    )


def decode_all(index: Index) -> Iterator[Decoded]:
    """Decode every image as training would, in a pool of threads; the results are in order.

    libjpeg and libpng print what is wrong with an image that they decode all the same, without its name. What is
    printed while a number of images are decoded is caught; if it is anything, halves of them are decoded again, until
    it is known which image it was.
    """

    def check(row: int) -> Decoded:
        try:
            content = index.read(row)
            decode(content, index.path(row), index.size(row))
        except RaydetError as error:
            return Decoded(b"", str(error))
        return Decoded(hashlib.blake2b(content, digest_size=16).digest(), "")

    def check_all(rows: range) -> list[Decoded]:
        with printed() as lines:
            found = list(pool.map(check, rows))
        if not lines:
            return found
        if len(rows) > 1:
            half = len(rows) // 2
            return check_all(rows[:half]) + check_all(rows[half:])
        return [found[0] if found[0].problem else found[0]._replace(warning=f"{index.path(rows[0])}: {lines[0]}")]

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(index), AT_ONCE):
            yield from check_all(range(start, min(start + AT_ONCE, len(index))))


class _Flat(NamedTuple):
    """An index as arrays: of all n boxes, image [n], boxes [n, 4], sides [n, 2], label, crowd and area [n].

    frames [images, 2] is width and height of each image.
    """

    image: Array
    boxes: Array
    sides: Array
    label: Array
    crowd: Array
    area: Array
    frames: Array


def _flat(index: Index) -> _Flat:
    column = {name: index.table[name].combine_chunks() for name in index.table.column_names}
    counts = column["labels"].value_lengths().to_numpy()
    boxes = column["boxes"].flatten().flatten().to_numpy().reshape(-1, 4)
    label, crowd, area = (column[name].flatten().to_numpy() for name in ("labels", "crowd", "area"))
    frames = np.column_stack([column[name].to_numpy() for name in ("width", "height")]).astype(float)
    image = np.repeat(np.arange(len(counts)), counts)
    return _Flat(image, boxes, boxes[:, 2:] - boxes[:, :2], label, crowd.astype(bool), area, frames)


def _is_sound(flat: _Flat) -> Array:
    """Which boxes have an area? Those with swapped corners or NaN have none."""
    return np.asarray(np.isfinite(flat.boxes).all(1) & (flat.sides > 0).all(1))


def _histogram(values: Array, edges: Array) -> Array:
    return np.histogram(values.clip(edges[0], edges[-1]), edges)[0]


def _records(
    splits: Collection[str], problems: Mapping[str, Sequence[str]], decoded: Mapping[str, Sequence[Decoded]]
) -> Iterator[Finding]:
    for split, messages in problems.items():
        if split in splits:
            yield Finding.of("error", split, "records that cannot be used", messages, SKIP)
        else:
            yield Finding.of("error", split, "splits that cannot be read", messages, "training needs both")
    for split, images in decoded.items():
        broken = [image.problem for image in images if image.problem]
        yield Finding.of("error", split, "images that cannot be used", broken, SKIP)
        warnings = [image.warning for image in images if image.warning]
        passed_over = [warning for warning in warnings if _HARMLESS in warning]
        damaged = [warning for warning in warnings if _HARMLESS not in warning]
        remedy = "look at them: a part may be grey or shifted; fetch them again, or remove them"
        yield Finding.of("warning", split, "images that are damaged but can be decoded", damaged, remedy)
        remedy = "nothing of the picture is lost"
        yield Finding.of("note", split, "PNG files of which the decoder passes over a part", passed_over, remedy)


def _files(split: str, index: Index) -> Iterator[Finding]:
    """See what the listings of the folders say, without opening a file."""
    names: list[str] = index.table["path"].to_pylist()
    if (index.shards >= 0).all():
        sizes = dict(zip(names, index.table["length"].to_pylist(), strict=True))
    else:
        sizes = present(store(index.root), names)
    missing = [name for name in names if name not in sizes]
    hollow = [name for name in names if sizes.get(name) == 0]
    twice = [name for name, count in Counter(names).items() if count > 1]
    yield Finding.of("error", split, "images that are not there", missing, "fetch them, or remove their records")
    yield Finding.of("error", split, "image files of 0 bytes", hollow, "fetch them again, or remove their records")
    yield Finding.of("warning", split, "images listed more than once", twice, "give each image one record")


def _boxes(split: str, index: Index, image_size: tuple[int, int]) -> Iterator[Finding]:
    flat = _flat(index)
    frames = flat.frames[flat.image]
    short, long = flat.sides.min(1), flat.sides.max(1)
    sound = _is_sound(flat)
    outside = sound & ((flat.boxes[:, :2] >= frames) | (flat.boxes[:, 2:] <= 0)).any(1)
    beyond = ((flat.boxes[:, :2] < -BEYOND) | (flat.boxes[:, 2:] > frames + BEYOND)).any(1)
    shown = sound & ~outside
    real = shown & ~flat.crowd
    thin = real & (short * (np.array(image_size[::-1]) / frames).min(1) < TINY)
    first, second = _same_place(flat, np.flatnonzero(real))
    alike = flat.label[first] == flat.label[second]

    def name(box: int) -> str:
        corners = ", ".join(f"{value:g}" for value in flat.boxes[box].round(2))
        file = index.table["path"][int(flat.image[box])].as_py()
        return f"{file}: {index.class_names[flat.label[box]]} [{corners}]"

    def finding(level: Level, what: str, boxes: Array, remedy: str) -> Finding:
        return Finding.of(level, split, what, boxes, remedy, name)

    yield finding(
        "error",
        "boxes without area",
        np.flatnonzero(~sound),
        "mend or remove them: training leaves them out, and validation counts each as missed",
    )
    yield finding(
        "error", "boxes outside their image", np.flatnonzero(outside), "mend or remove them: there is nothing to see"
    )
    yield finding(
        "warning",
        "boxes drawn twice",
        np.unique(second[alike]),
        "keep one of each: the other counts as missed",
    )
    yield finding(
        "warning",
        "boxes drawn twice, as two classes",
        np.unique(second[~alike]),
        "keep the class that is meant, if not both are",
    )
    yield finding(
        "note",
        f"boxes that leave their image by more than {BEYOND:g} px",
        np.flatnonzero(shown & beyond),
        "training cuts them at the edge; where they are many, look whether units and image sizes are right",
    )
    yield finding(
        "note",
        f"objects thinner than {TINY:g} px in the model's input",
        np.flatnonzero(thin),
        f"hard to learn at {image_size[1]}x{image_size[0]}: raise data.image_size, or leave them out",
    )
    yield finding(
        "note",
        f"objects more than {EXTREME:g} times as long as wide",
        np.flatnonzero(real & (long > EXTREME * short)),
        "look whether they are slips",
    )


def _same_place(flat: _Flat, chosen: Array) -> tuple[Array, Array]:
    """Find the pairs of chosen boxes in one image whose IoU is at least `SAME_PLACE`, by a sweep from the left."""
    order = chosen[np.lexsort((flat.boxes[chosen, 0], flat.image[chosen]))]
    boxes, sides, image = flat.boxes[order], flat.sides[order], flat.image[order]
    reach = boxes[:, 0] + sides[:, 0] * (1 / SAME_PLACE - 1)  # further right starts no box with such an IoU
    first = np.arange(len(order))
    pairs = [np.empty((2, 0), int)]
    step = 0
    while len(first):
        step += 1
        first = first[first + step < len(order)]
        near = (image[first + step] == image[first]) & (boxes[first + step, 0] <= reach[first])
        first = first[near]
        one, other = boxes[first], boxes[first + step]
        shared = (np.minimum(one[:, 2:], other[:, 2:]) - np.maximum(one[:, :2], other[:, :2])).clip(min=0).prod(1)
        union = sides[first].prod(1) + sides[first + step].prod(1) - shared
        found = first[shared >= SAME_PLACE * union]
        pairs.append(np.stack((found, found + step)))
    first, second = order[np.concatenate(pairs, axis=1)]
    return first, second


def _classes(splits: Mapping[str, Statistics]) -> Iterator[Finding]:
    (train, learnt), *others = splits.items()
    for split, numbers in splits.items():
        absent = [name for name, count in zip(numbers.class_names, numbers.objects_of_class, strict=True) if not count]
        remedy = "add some, or leave the class out: nothing can learn it"
        if split != train:
            remedy = "add some, or bear that the mean AP is without the class"
        yield Finding.of("warning", split, "classes without objects", absent, remedy)
    few = (learnt.objects_of_class > 0) & (learnt.objects_of_class < RARE)
    rare = [
        f"{learnt.class_names[label]}: {learnt.objects_of_class[label]}"
        for label in np.argsort(learnt.objects_of_class, kind="stable")
        if few[label]
    ]
    yield Finding.of("note", train, f"classes with fewer than {RARE} objects", rare, "expect little of them; add some")
    for split, numbers in others:
        both = f"{train}, {split}"
        if numbers.class_names != learnt.class_names:
            strange = sorted(set(learnt.class_names) ^ set(numbers.class_names)) or ["the same, in another order"]
            remedy = "list the same classes in the same order, or name those to keep in data.class_inclusion_list"
            yield Finding.of("error", both, "classes that the splits do not share", strange, remedy)
            continue
        images = np.array([[max(1, one.images)] for one in (learnt, numbers)])
        having = np.stack((learnt.images_of_class, numbers.images_of_class))
        shares, pooled = having / images, having.sum(0) / images.sum()
        error = np.sqrt(pooled * (1 - pooled) * (1 / images).sum())
        low, high = shares.min(0), shares.max(0)
        drifted = np.flatnonzero((low > 0) & (high > DRIFT * low) & (high - low > DRIFT_Z * error))
        named = [f"{learnt.class_names[k]}: in {shares[0][k]:.1%} and {shares[1][k]:.1%} of images" for k in drifted]
        yield Finding.of(
            "warning", both, "classes much more frequent in one split", named, "see whether both show the same world"
        )


def _copies(splits: Mapping[str, Index], decoded: Mapping[str, Sequence[Decoded]]) -> Iterator[Finding]:
    """Find images that are there twice: by content where the files were read, else by path."""
    names = {split: index.table["path"].to_pylist() for split, index in splits.items()}
    keys: dict[str, list[Any]] = {
        split: [image.digest for image in decoded[split]]
        if split in decoded
        else [(index.root, name) for name in names[split]]
        for split, index in splits.items()
    }
    train, *others = splits
    for split in decoded:
        first = dict(zip(reversed(keys[split]), reversed(names[split]), strict=True))
        pairs = zip(keys[split], names[split], strict=True)
        copies = [f"{name} = {first[key]}" for key, name in pairs if key and first[key] != name]
        yield Finding.of("warning", split, "images that are copies of others", copies, "keep one of each")
    for split in others:
        known = dict(zip(keys[train], names[train], strict=True))
        pairs = zip(keys[split], names[split], strict=True)
        both = [f"{name} = {known[key]}" for key, name in pairs if key and key in known]
        remedy = "remove them from one: what was trained on says nothing about the model"
        yield Finding.of("warning", f"{train}, {split}", "images in both splits", both, remedy)


def _random_figures(index: Index, rng: np.random.Generator) -> list[Figure]:
    return [_figure(index, row) for row in rng.permutation(len(index))[:SHOWN].tolist()]


def _rare_figures(index: Index, rng: np.random.Generator) -> list[Figure]:
    """Show an image of each of the classes with the fewest objects, with nothing else marked."""
    flat = _flat(index)
    image, label = flat.image[~flat.crowd], flat.label[~flat.crowd]
    counts = np.bincount(label, minlength=len(index.class_names))
    rare = [one for one in np.argsort(counts, kind="stable").tolist() if counts[one]][:SHOWN_RARE]
    return [_figure(index, int(rng.choice(image[label == one])), one, int(counts[one])) for one in rare]


def _figure(index: Index, row: int, only: int | None = None, count: int = 0) -> Figure:
    """Draw an image with its objects, or those of one class."""
    name, (width, height) = index.table["path"][row].as_py(), index.size(row)
    try:
        with printed() as lines:
            image = decode(index.read(row), index.path(row), (width, height))
    except RaydetError as error:
        return Figure(np.full((SIDE * 3 // 4, SIDE, 3), 128, np.uint8), str(error))
    objects = index.annotations(row)
    shown = objects.labels == only if only is not None else np.full(len(objects.labels), True)
    caption = f"{name} · {width}x{height} · {_objects(int((~objects.crowd).sum()))}"
    if only is not None:
        caption = f"{index.class_names[only]} · {_objects(count)} · {name}"
    caption = " · ".join((caption, *lines[:1]))
    labels = objects.labels + len(index.class_names) * objects.crowd
    names = [*index.class_names, *(f"{one} (crowd)" for one in index.class_names)]
    return _draw(image, objects.boxes[shown], labels[shown], names, caption)


def _augmented_figures(batch: Batch, class_names: Sequence[str]) -> list[Figure]:
    figures = []
    targets = batch.targets.numpy()
    for number, image in enumerate(batch.images.numpy()):
        own = targets[targets[:, 0] == number]
        caption = f"sample {int(batch.positions[number])} · {_objects(len(own))}"
        pixels = np.ascontiguousarray(image.transpose(1, 2, 0))
        figures.append(_draw(pixels, cxcywh_to_xyxy(own[:, 2:]), own[:, 1].astype(int), class_names, caption))
    return figures


def _draw(image: Array, boxes: Array, labels: Array, class_names: Sequence[str], caption: str) -> Figure:
    height, width = image.shape[:2]
    scale = min(1.0, SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small: Any = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return Figure(draw_boxes(small, boxes * scale, labels.tolist(), class_names), caption)


def _objects(count: int) -> str:
    return f"{count:,} object{'' if count == 1 else 's'}"


@contextmanager
def printed() -> Iterator[list[str]]:
    """Catch what is printed to this process' standard error; at the end the list has its lines."""
    lines: list[str] = []
    with TemporaryFile() as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            lines += file.read().decode(errors="replace").splitlines()
