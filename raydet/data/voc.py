"""Pascal VOC's annotation format (one XML file an image) → index."""

from __future__ import annotations

import math
import os
import xml.etree.ElementTree as ET
from collections.abc import Container, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from raydet.data.index import Array, Index, index_of_images
from raydet.data.problems import Problems, refuse_shares
from raydet.data.scan import counted, each, image_sizes, legible, list_images
from raydet.errors import RaydetError, did_you_mean
from raydet.store import Store, check_encoding, inside

Difficult = Literal["keep", "ignore", "drop"]


class _Object(NamedTuple):
    number: int  # in its file, from 1
    name: str
    box: tuple[float, ...]  # xyxy in pixels
    difficult: bool


class _Picture(NamedTuple):
    """What an XML file says."""

    filename: str
    size: tuple[int, int] | None  # width and height in pixels
    objects: list[_Object]
    errors: list[str]  # what is wrong with objects that cannot be used


def load_voc(
    store: Store,
    split_file: str | None = None,
    annotations: str = "Annotations",
    images: str = "JPEGImages",
    difficult: Difficult = "keep",
    problems: Problems | None = None,
    class_names: Sequence[str] | None = None,
    folders: Sequence[str] = (),
) -> Index:
    """Read a folder of Pascal VOC's XML files, and those below it.

    The corners are taken as they stand, as the edges of the box. (The devkit's own files call the first pixel 1, most
    tools that write the format today call it 0, no file says which, and converters to COCO and YOLO subtract nothing.)
    Boxes without area or outside their image stay as annotated. Image ids number the images by name, from 0.

    The image of an XML file has its path below the folder of images, with the suffix of an image, or else is the one
    in <filename>. Its size is that in <size>; where that is missing or 0, it is read from the image.

    A problem is a file that is listed but not there, that is no XML or declares a document type (its entities could
    expand without end), or whose image is missing, no image, or outside the folder: the image is left out. So is an
    object without a name or a corner, with one that is not finite, with corners that are swapped, or of a class that is
    not in `class_names`. A notice is given of images without an XML file, where most have one and no list says which
    are meant.

    Args:
        store: what the paths start from.
        split_file: list of names, one a line, such as ImageSets/Main/train.txt; None: all files of the folder.
        annotations: folder of the XML files.
        images: folder of the images.
        difficult: what to do with difficult objects: "keep" them, "ignore" them like COCO's crowds, or "drop" them.
        problems: gets what is wrong with files and objects; None: the first problem stops.
        class_names: name of each label; None: all that occur in `folders`, sorted, so that the splits agree.
        folders: the folders of XML files of all splits; none: `annotations`.

    Raises:
        RaydetError: a folder or the list is missing, or all boxes look like shares of their images; or see `problems`.
    """
    problems, folder = problems or Problems(), store.below(images)
    folders = folders or [annotations]
    class_names = class_names_in(store, *folders) if class_names is None else class_names
    xml_of = _xml_files(store, annotations)
    listed = sorted(xml_of) if split_file is None else _listed(store.text(split_file), xml_of)
    lengths = list_images(folder, "", problems)
    image_of = {_stem(name): name for name in reversed(lengths)}

    found = []
    paths = [xml_of.get(name, os.path.join(annotations, f"{name}.xml")) for name in listed]
    for name, path, picture in zip(listed, paths, _read_all(store, paths), strict=True):
        if isinstance(picture, RaydetError):
            problems.add(str(picture))
            continue
        source = legible(store.path(path))
        try:
            check_encoding(name)
            image = image_of.get(name) or inside(picture.filename)
            if image not in lengths:
                image = os.path.join(os.path.dirname(name), image)
            if image not in lengths:
                raise ValueError(f"its image, {image}, is not in {folder.root}")
            found.append((source, image, picture))
        except ValueError as error:
            problems.add(f"{source}: {error}")
    if split_file is None:
        known = {name for each in folders for name in _xml_files(store, each)} | {_stem(image) for _, image, _ in found}
        bare = [image for image in lengths if _stem(image) not in known]
        if 2 * len(bare) < len(lengths):
            what = f"{counted(bare, 'image has', 'images have')} no XML file"
            problems.notice(what, bare, "they are left out; an image without objects has a file that says so")
    sizes = image_sizes(folder, [image for _, image, picture in found if not picture.size], lengths, problems)

    kept: list[tuple[int, str, int, int]] = []
    objects = []
    for source, image, picture in found:
        size = picture.size or sizes.get(image)
        if size is not None:
            kept.append((len(kept), image, *size))
            objects.append(_objects(picture, class_names, difficult, source, problems))
    refuse_shares(np.concatenate([np.empty((0, 4)), *(boxes for boxes, *_ in objects)]), store.path(annotations))
    return index_of_images(kept, objects, root=folder.root, class_names=class_names)


def class_names_in(store: Store, *folders: str) -> list[str]:
    """Return the names of the classes in all usable XML files of some folders, sorted."""
    paths = [path for folder in folders for path in _xml_files(store, folder).values()]
    usable = [picture for picture in _read_all(store, paths) if isinstance(picture, _Picture)]
    return sorted({thing.name for picture in usable for thing in picture.objects})


def _xml_files(store: Store, folder: str) -> dict[str, str]:
    """Return path below the folder without suffix → path."""
    files = store.files(folder, recursive=True)
    return {_stem(name): os.path.join(folder, name) for name in files if name.lower().endswith(".xml")}


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _listed(text: str, known: Container[str]) -> list[str]:
    """Return the names in a list, sorted; in that of a class, each has a number behind it, 1, 0 or -1."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return sorted({line if line in known else line.split()[0] for line in lines})


def _read_all(store: Store, paths: Sequence[str]) -> Iterator[_Picture | RaydetError]:
    return each(lambda path: _read(store, path), paths, "annotations")


def _read(store: Store, name: str) -> _Picture:
    try:
        root = ET.fromstring(store.read(name), ET.XMLParser(target=_WithoutDoctype()))
    except (ET.ParseError, ValueError, LookupError) as error:  # the last: of an unknown encoding
        raise RaydetError(f"{legible(store.path(name))} is not valid XML: {error}") from None
    if "}" in root.tag:  # a namespace, in front of each name
        for element in root.iter():
            element.tag = element.tag.rpartition("}")[2]
    objects, errors = [], []
    for number, element in enumerate(root.iterfind("object"), 1):
        try:
            objects.append(_object(number, element))
        except ValueError as error:
            errors.append(f"object {number}: {error}")
    try:
        width, height = (int(_text(root, f"size/{side}")) for side in ("width", "height"))
        size = (width, height) if 0 < width < 2**31 and 0 < height < 2**31 else None
    except ValueError:
        size = None
    return _Picture(root.findtext("filename", "").strip(), size, objects, errors)


class _WithoutDoctype(ET.TreeBuilder):
    def doctype(self, *_: Any) -> None:
        raise ValueError("it declares a document type, which is refused")


def _object(number: int, element: ET.Element) -> _Object:
    corners = {corner: float(_text(element, f"bndbox/{corner}")) for corner in ("xmin", "ymin", "xmax", "ymax")}
    x1, y1, x2, y2 = corners.values()
    if not all(map(math.isfinite, corners.values())):
        raise ValueError(f"a corner of {corners} is not finite")
    if x2 < x1 or y2 < y1:
        raise ValueError(f"the corners {corners} are swapped")
    return _Object(number, _text(element, "name"), (x1, y1, x2, y2), element.findtext("difficult", "").strip() == "1")


def _text(element: ET.Element, path: str) -> str:
    text = element.findtext(path, "").strip()
    if not text:
        raise ValueError(f"it has no <{path.replace('/', '><')}>")
    return text


def _objects(
    picture: _Picture, class_names: Sequence[str], difficult: Difficult, source: str, problems: Problems
) -> tuple[Array, Array, Array]:
    for error in picture.errors:
        problems.add(f"{source}: {error}")
    kept = []
    for thing in picture.objects:
        if thing.name not in class_names:
            near = did_you_mean(thing.name, class_names)
            problems.add(f"{source}: object {thing.number}: there is no class {thing.name}{near}")
        elif not (thing.difficult and difficult == "drop"):
            kept.append(thing)
    return (
        np.array([thing.box for thing in kept]).reshape(-1, 4),
        np.array([class_names.index(thing.name) for thing in kept], np.int64),
        np.array([thing.difficult and difficult == "ignore" for thing in kept], bool),
    )
