"""YOLO's annotation format (one txt file an image) → index."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import filterfalse, zip_longest
from typing import Any, NamedTuple

import numpy as np
import yaml

from raydet.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from raydet.data.index import Array, Index, index_of_images
from raydet.data.problems import Problems
from raydet.data.scan import counted, each, image_sizes, is_image, legible, list_images, present
from raydet.errors import RaydetError
from raydet.store import Store, is_hidden

TOLERANCE = 1e-3  # how far coordinates of 0 to 1 may lie outside by rounding

_ALIASES = {"val": ("val", "valid")}

# Where the names of classes are if data.yaml does not say: labelImg leaves them among the labels.
_CLASSES = ("labels/classes.txt", "labels/train/classes.txt", "train/labels/classes.txt")
# What of two files of settings must be the same, or it is not clear which is meant.
_MEANT = ("names", "nc", "kpt_shape", "train", "val", "valid")


class _Config(NamedTuple):
    """A data.yaml or the like."""

    file: str  # its name; "": there is none
    settings: dict[str, Any]


def load_yolo(store: Store, split: str, images: str | None = None, problems: Problems | None = None) -> Index:
    """Read a data set of YOLO's txt files.

    The images of a split are, unless `images` says, those that a *.yaml (or darknet's *.data) in the root names: a
    folder, several, or a txt file that lists images; else those of images/{split}, {split}/images or {split}.txt. The
    classes are those of that file, else of obj.names, classes.txt or another *.names, or a classes.txt among the
    labels; the first line is label 0. A path that leads out of the root is taken from the root on, as such files are
    often copied from elsewhere.

    The objects of an image are in the txt file of its name, in the folder `labels` in place of the last `images` of its
    path, or beside it; without such a file it has none. A line is `class cx cy w h`, or `class x1 y1 x2 y2 x3 y3 …`, a
    polygon, whose bounding box is taken: in shares of the image's width and height, up to 0.001 outside 0 to 1. With
    `kpt_shape: [n, m]` in data.yaml, n keypoints of m numbers may follow the box instead, which are passed over. Image
    ids number the images by path, from 0; sizes are read from the images.

    A problem is a listed image outside the root, or one that is missing or no image: it is left out. So is a line that
    is of none of these forms, has a number that is not finite, farther outside or a negative side, or an unknown class;
    and all lines of a file that is no text. Six numbers of which four are a box within the image and the last is whole
    are a detector's output (`cx cy w h confidence track`), which is a problem too.

    A notice is given of images without a label file, where most have one or label files have no image.

    Args:
        store: the root.
        split: "train" or "val" (also found as "valid").
        images: folder of the split's images, or txt file that lists them; None: found as said above.
        problems: gets what is wrong with images and lines; None: the first problem stops.

    Raises:
        RaydetError: images or classes are not found, two data.yaml differ, or no image has a label file; or see
            `problems`.
    """
    problems = problems or Problems()
    config = _config(store)
    class_names = _class_names(store, config, problems)
    keypoints = _keypoints(store, config)
    sources = _sources(store, split, images, config)
    lengths, there = _images(store, sources, problems)
    sizes = image_sizes(store, list(lengths), lengths, problems)
    places = {image: _labels(image) for image in {*there, *lengths}}
    labels = _label_files(store, sources, (places[image] for image in sizes))
    labels_of = {image: name for image in sizes if (name := next(filter(labels.__contains__, places[image]), None))}
    if sizes and not labels_of:
        looked_for = " and ".join(name for name in places[next(iter(sizes))] if name.endswith(".txt"))
        raise RaydetError(
            f"{store.root}: none of the {len(sizes)} images of {split} has a txt file with its objects; of the first "
            f"image it would be {looked_for}"
        )
    lost = sorted(filterfalse(is_hidden, labels.difference(*places.values())))
    _compare(store, lost, [image for image in sizes if image not in labels_of], len(sizes), problems)
    texts = dict(zip(labels_of, each(store.text, list(labels_of.values()), "labels"), strict=True))
    objects = []
    for name, size in sizes.items():
        text = texts.get(name, "")
        if isinstance(text, RaydetError):
            problems.add(str(text))
            text = ""
        source = store.path(labels_of.get(name, ""))
        objects.append(_objects(text, size, len(class_names), keypoints, source, problems))
    return index_of_images(
        [(image_id, name, *size) for image_id, (name, size) in enumerate(sizes.items())],
        objects,
        root=store.root,
        class_names=class_names,
    )


def _is_config(settings: Any) -> bool:
    """Is this the content of a data.yaml?"""
    return isinstance(settings, dict) and ("names" in settings or isinstance(settings.get("train"), str | list))


def _config(store: Store) -> _Config:
    """Return what the root's data.yaml, or another *.yaml or *.data of that kind, says."""
    found: list[_Config] = []
    broken = ""
    for name in sorted(store.files(), key=lambda name: (name != "data.yaml", name)):
        if name.endswith((".yaml", ".yml")):
            try:
                settings = yaml.load(store.text(name), yaml.BaseLoader)  # all text: a class may be called no, or 007
            except yaml.YAMLError as error:
                broken = broken or _broken_yaml(store.path(name), error)
                if name == "data.yaml":
                    break
                continue
            if _is_config(settings):
                found.append(_Config(name, settings))
        elif name.endswith(".data"):
            pairs = [line.split("=", 1) for line in store.text(name).splitlines() if "=" in line]
            found.append(_Config(name, {key.strip(): value.strip() for key, value in pairs}))
    if not found:
        if broken:
            raise RaydetError(broken)
        return _Config("", {})
    for other in found[1:]:
        differ = [key for key in _MEANT if other.settings.get(key) != found[0].settings.get(key)]
        if differ and not (found[0].file.endswith(".data") or other.file.endswith(".data")):
            raise RaydetError(
                f"{store.root}: which describes the data, {found[0].file} or {other.file}? They differ in "
                f"{', '.join(differ)}: keep one of them in this folder"
            )
    return found[0]


def _broken_yaml(path: str, error: yaml.YAMLError) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
    line = f"line {mark.line + 1}: " if mark else ""
    return (
        f"{path} is not YAML: {line}{' '.join(problem.split())}; indent with spaces, write `key: value`, and put text "
        "with other signs in 'quotes'"
    )


def _class_names(store: Store, config: _Config, problems: Problems) -> list[str]:
    names, source = config.settings.get("names"), store.path(config.file)
    if isinstance(names, dict):
        names = _numbered(names, source)
    elif not isinstance(names, list):
        if names and (file := _find(store, str(names))) is None:
            raise RaydetError(
                f"{source}: names: {names}: no such file or folder; if it is the one class, write names: [{names}]"
            )
        names, source = _listed_names(store, file if names else None, problems)
    count = config.settings.get("nc", config.settings.get("classes", len(names)))
    if not names or len(set(names)) < len(names) or str(count) != str(len(names)):
        raise RaydetError(f"{source}: the names of the {count} classes are not so many different ones: {names}")
    return [str(name).strip() for name in names]


def _numbered(names: dict[str, Any], source: str) -> list[Any]:
    """Return the names of labels 0, 1, 2 …"""
    missing = next((label for label in range(len(names)) if str(label) not in names), None)
    if missing is not None:
        given = ", ".join(f"{label}: {name}" for label, name in [*names.items()][:4])
        raise RaydetError(
            f"{source}: the names of the {len(names)} classes are not so many different ones: label {missing} has none "
            f"({given}{', …' if len(names) > 4 else ''}); number them from 0 without gaps, as the labels are"
        )
    return [names[str(label)] for label in range(len(names))]


def _listed_names(store: Store, file: str | None, problems: Problems) -> tuple[list[str], str]:
    """Return the lines of a file of names, and its path."""
    if file is None:
        files = [name for name in store.files() if name.endswith(".names") or name == "classes.txt"]
        files.sort(key=lambda name: (name != "obj.names", name))
        file = next(iter([*files, *(name for name in _CLASSES if store.kind(name) == "file")]), None)
    if file is None:
        raise RaydetError(
            f"{store.root}: found no names of classes in data.yaml, obj.names, classes.txt, *.names or "
            f"{', '.join(_CLASSES)}"
        )
    names = [line.strip() for line in store.text(file).rstrip().splitlines()]
    blank = [label for label, name in enumerate(names) if not name]
    problems.notice(
        f"{file} has {counted(blank, 'blank line')}",
        [f"line {label + 1}" for label in blank],
        "the first line is the name of label 0, the second that of label 1; remove the line if the labels skip it",
    )
    names = [name or f"(label {label} without a name)" for label, name in enumerate(names)]
    return names, store.path(file)


def _keypoints(store: Store, config: _Config) -> int:
    """Return how many numbers of keypoints are behind each box."""
    shape = config.settings.get("kpt_shape")
    if shape is None:
        return 0
    if not isinstance(shape, list) or len(shape) != 2 or not all(str(side).isdecimal() for side in shape):
        raise RaydetError(
            f"{store.path(config.file)}: kpt_shape: {shape} is not [keypoints, numbers of each], such as [17, 3]"
        )
    return int(shape[0]) * int(shape[1])


def _sources(store: Store, split: str, images: str | None, config: _Config) -> list[str]:
    """Return the folders and lists that the images of a split are in."""
    aliases = _ALIASES.get(split, (split,))
    key = next((key for key in aliases if config.settings.get(key)), "")
    if not images and not key:
        usual = [name for key in aliases for name in (f"images/{key}", f"{key}/images", f"{key}.txt")]
        found = next((name for name in usual if store.kind(name)), None)
        if found is None:
            raise RaydetError(
                f"{store.root}: found no images of {split}; looked for {split} in data.yaml, {', '.join(usual)}; "
                f"name their folder or list with data.{split}_annotations"
            )
        return [found]
    entries = images or config.settings[key]
    sources = []
    for entry in [entries] if isinstance(entries, str) else entries:
        found = _find(store, str(entry), None if images else config.settings.get("path"))
        if found is None:
            said = f"data.{split}_images" if images else f"{store.path(config.file)}: {key}"
            raise RaydetError(f"{said}: {entry}: no such file or folder{_outside(entry, store)}")
        sources.append(found)
    return sources


def _outside(path: str, store: Store) -> str:
    """Say what follows if a path that was not found below the root is elsewhere."""
    remedy = "; set data.root to a folder that holds both" if os.path.isabs(path) and os.path.exists(path) else ""
    return f" in {store.root}{remedy}"


def _candidates(
    store: Store, entry: str, *folders: str | None, real: Callable[[str], str] = os.path.realpath
) -> list[str]:
    """Return where below the root a path may point to that starts from one of some folders, or from the root."""
    path = entry.strip().replace("\\", "/")
    if path.startswith("/") and store.is_local:  # links may lead to the root
        path = posixpath.join(real(posixpath.dirname(path)), posixpath.basename(path))
    path = path.removeprefix(f"{store.root}/")
    starts = [folder or "" for folder in (*folders, "")]
    # An absolute path's ".." end at the root. Darknet's lists start from the folder above `data`.
    return [
        posixpath.normpath(f"/{start}/{name}").lstrip("/")
        for name in (path, path.removeprefix("data/"))
        for start in starts
    ]


def _find(store: Store, entry: str, *folders: str | None) -> str | None:
    return next((name for name in _candidates(store, entry, *folders) if store.kind(name)), None)


def _images(store: Store, sources: Sequence[str], problems: Problems) -> tuple[dict[str, int], set[str]]:
    """Find the images in folders and lists.

    Returns:
        Their paths, sorted, with the lengths of the files in bytes; and the paths of all images in their folders, of
        other splits too.
    """
    found: dict[str, int] = {}
    every: set[str] = set()
    real = cache(os.path.realpath)
    for source in sources:
        if store.kind(source) == "folder":
            files = list_images(store, source, problems)
            found |= {os.path.join(source, name): length for name, length in files.items()}
            continue
        lines = [line for line in store.text(source).splitlines() if line.strip()]
        candidates = [_candidates(store, line, os.path.dirname(source), real=real) for line in lines]
        there = present(store, [name for names in candidates for name in names])
        every.update(filter(is_image, there))
        for line, names in zip(lines, candidates, strict=True):
            name = next((name for name in names if name in there), None)
            if name is None:
                problems.add(f"{store.path(source)}: there is no image {line}{_outside(line, store)}")
            else:
                found[name] = there[name]
    return dict(sorted(found.items())), every


def _label_files(store: Store, sources: Sequence[str], places: Iterable[Sequence[str]]) -> set[str]:
    """Return the paths of the txt files in the folders of `places`, and in those below the labels of a folder."""
    folders = {os.path.dirname(label) for labels in places for label in labels}
    whole = {
        os.path.dirname(_labels(os.path.join(source, "image"))[0])
        for source in sources
        if store.kind(source) == "folder"
    }
    return {
        os.path.join(folder, name)
        for folder in sorted(folders | whole)
        if store.kind(folder) == "folder"
        for name in store.files(folder, recursive=folder in whole, hidden=True)
        if name.lower().endswith(".txt")
    }


def _labels(image: str) -> list[str]:
    """Return where the txt file of an image may be."""
    *folders, name = image.split("/")
    stem = os.path.splitext(name)[0]
    places = [folders]
    if "images" in folders:
        last = len(folders) - 1 - folders[::-1].index("images")
        places.insert(0, [*folders[:last], "labels", *folders[last + 1 :]])
    return ["/".join([*place, stem + suffix]) for suffix in (".txt", ".TXT") for place in places]


def _compare(store: Store, lost: Sequence[str], bare: Sequence[str], count: int, problems: Problems) -> None:
    """Give notice of txt files that belong to no image, and of images, of so many, that have none."""
    lost = [name for name, text in zip(lost, each(store.text, lost, "labels"), strict=True) if _has_labels(text)]
    parts = [f"{counted(bare, 'image')} {'has' if len(bare) == 1 else 'have'} no label file"] if bare else []
    if lost:
        parts.append(f"{counted(lost, 'label file')} {'has' if len(lost) == 1 else 'have'} no image")
    if lost or 2 * len(bare) < count:
        records = [legible(name) for pair in zip_longest(lost, bare) for name in pair if name is not None]
        problems.notice("; ".join(parts), records, "an image without a label file of its name is background")


def _has_labels(text: str | RaydetError) -> bool:
    """Does a txt file that belongs to no image hold labels? Some list images or classes."""
    if isinstance(text, RaydetError):
        return False
    try:
        first = next((line for line in text.splitlines() if line.strip()), "")
        return len([float(part) for part in first.split()]) > 4
    except ValueError:
        return False


def _objects(
    text: str, size: tuple[int, int], num_classes: int, keypoints: int, source: str, problems: Problems
) -> tuple[Array, Array, Array]:
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                rows.append(_parse(line, num_classes, keypoints))
            except ValueError as error:
                problems.add(f"{source}, line {number}: {error}")
    table = np.array(rows).reshape(-1, 5)
    return cxcywh_to_xyxy(table[:, 1:]) * (size * 2), table[:, 0].astype(np.int64), np.zeros(len(table), bool)


def _parse(line: str, num_classes: int, keypoints: int) -> list[float]:
    """Return the class and cx, cy, w, h in shares of the image."""
    parts = line.split()
    label, *numbers = map(float, parts)
    if keypoints and len(numbers) == 4 + keypoints:
        numbers = numbers[:4]
    elif keypoints and len(numbers) != 4:
        raise ValueError(
            f"{line.strip()!r} is neither class cx cy w h nor that with {keypoints} numbers of keypoints, as kpt_shape "
            "in data.yaml says"
        )
    if _is_output(numbers, parts[6:]):
        raise ValueError(
            f"{line.strip()!r} is neither class cx cy w h nor a polygon, but what detectors write: class cx cy w h "
            "confidence and perhaps a track; labels have the first five (and polygons 1.0 for 1)"
        )
    if len(numbers) != 4 and (len(numbers) < 6 or len(numbers) % 2):
        raise ValueError(f"{line.strip()!r} is neither class cx cy w h nor a polygon, class x1 y1 x2 y2 x3 y3 …")
    if label % 1 or not 0 <= label < num_classes:  # nor is NaN
        raise ValueError(f"class {label:g} is not one of 0 to {num_classes - 1}")
    if not all(-TOLERANCE <= number <= 1 + TOLERANCE for number in numbers):  # nor is NaN
        raise ValueError(f"{line.strip()!r} has numbers that are not between 0 and 1")
    numbers = [min(max(number, 0.0), 1.0) for number in numbers]
    if len(numbers) > 4:
        xs, ys = numbers[::2], numbers[1::2]
        numbers = xyxy_to_cxcywh(np.array([min(xs), min(ys), max(xs), max(ys)])).tolist()
    return [label, *numbers]


def _is_output(numbers: Sequence[float], track: Sequence[str]) -> bool:
    """Are these a box within the image, its confidence, and perhaps the number of a track, but no polygon?"""
    if len(numbers) not in (5, 6):
        return False
    x, y, width, height, confidence = numbers[:5]
    within = all(
        side / 2 - TOLERANCE <= centre <= 1 - side / 2 + TOLERANCE for centre, side in ((x, width), (y, height))
    )
    return within and 0 <= confidence <= 1 and all(number.isdecimal() for number in track)
