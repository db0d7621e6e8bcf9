"""Looking through a data set's files: which images there are, their sizes, and many small files at once."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from typing import TypeVar

from raydet.data.problems import Problems
from raydet.errors import RaydetError
from raydet.store import Store

T = TypeVar("T")

# The one list of what is an image, for training, prediction and inspection: `raydet.data.render.decode` decodes it, and
# Pillow knows its size.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    *(".png", ".apng", ".bmp", ".gif", ".webp", ".avif", ".avifs", ".tif", ".tiff"),
    *(".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".ras", ".sr"),
)
# Files that often lie among images and that nobody takes for one.
_COMPANIONS = (
    *(".txt", ".xml", ".json", ".jsonl", ".yaml", ".yml", ".csv", ".names", ".data", ".cache"),
    *(".md", ".html", ".db", ".ini"),
)
HEADER = 64 * 1024  # bytes in which the size of nearly every image is found
THREADS = 16  # they wait for a disk or a network more than they work
SHOW_FROM = 10_000  # files that take long enough for a progress bar

_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)  # EXIF's tag, and its values that exchange rows and columns


def is_image(name: str) -> bool:
    """Has this file name the suffix of an image, in small or capital letters?"""
    return name.lower().endswith(IMAGE_SUFFIXES)


def legible(text: str) -> str:
    """Return a name as it can be printed: bytes of it that are not UTF-8 become `\\xe9`."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def list_images(store: Store, folder: str, problems: Problems) -> dict[str, int]:
    """List the images in a folder and in those below it, sorted: path below the folder → size in bytes.

    What is hidden is left out, see `raydet.store.is_hidden`.

    Args:
        store: store that holds the folder.
        folder: path of the folder below the root.
        problems: gets each image whose name is not UTF-8, which is left out; and notices of the files that are no
            images and of the links that lead nowhere.

    Raises:
        RaydetError: there is no such folder.
    """
    files, start = store.files(folder, recursive=True), os.path.join(folder, "")
    images = sift([start + name for name in files], problems, store.path)
    dead = [legible(start + name) for name in store.dead_links(folder)]
    problems.notice(f"{counted(dead, 'link')} to nothing", dead, "fetch the files, or remove the links")
    return {name: files[name][0] for name in (image.removeprefix(start) for image in images)}


def sift(paths: Iterable[str], problems: Problems, full: Callable[[str], str] = str) -> list[str]:
    """Return the paths of images among those of files.

    Args:
        paths: paths of files.
        problems: gets each image whose name is not UTF-8, and a notice of the files that are no images.
        full: function that makes the path to show of a path.
    """
    images, others = [], []
    for path in paths:
        if not is_image(path):
            others += [] if path.lower().endswith(_COMPANIONS) else [legible(path)]
        elif legible(path) != path:
            problems.add(f"{legible(full(path))}: the name is not UTF-8: rename the file")
        else:
            images.append(path)
    problems.notice(
        f"left out: {counted(others, 'file')} that {'is no image' if len(others) == 1 else 'are no images'} raydet "
        "decodes",
        others,
        "convert them to PNG or JPEG, if they are images",
    )
    return images


def counted(records: Sized, noun: str, nouns: str = "") -> str:
    """Return a number of records in words, such as "6 images"; `nouns`, if not with an s."""
    return f"{len(records):,} {noun if len(records) == 1 else nouns or noun + 's'}"


def present(store: Store, names: Iterable[str]) -> dict[str, int]:
    """List the folders that `names` lie in, each once: path of each file there → its size in bytes."""
    found: dict[str, int] = {}
    for folder in sorted({os.path.dirname(name) for name in names}):
        if store.kind(folder) == "folder":
            listed = store.files(folder, hidden=True)  # they may be named, if they are not looked for
            found |= {os.path.join(folder, name): size for name, (size, _) in listed.items()}
    return found


def each(read: Callable[[str], T], names: Sequence[str], what: str) -> Iterator[T | RaydetError]:
    """Read many files side by side.

    Args:
        read: function that reads the file of a name.
        names: names of the files.
        what: what the files are, for the progress bar.

    Yields:
        What `read` returns for each name, in their order, or the error that it raises.
    """

    def attempt(name: str) -> T | RaydetError:
        try:
            return read(name)
        except RaydetError as error:
            return error

    # Some at a time: to hand a thread one file costs as much as to read it.
    size = max(1, min(64, len(names) // (8 * THREADS)))
    parts = [names[start : start + size] for start in range(0, len(names), size)]
    pool = ThreadPoolExecutor(THREADS)
    try:
        read_parts = pool.map(lambda part: [attempt(name) for name in part], parts)
        results: Iterable[T | RaydetError] = chain.from_iterable(read_parts)
        if len(names) >= SHOW_FROM:
            from rich.console import Console
            from rich.progress import track

            results = track(results, f"reading {what}", len(names), console=Console(stderr=True), transient=True)
        yield from results
    finally:
        pool.shutdown(cancel_futures=True)  # a problem may have stopped it


def image_sizes(
    store: Store, names: Sequence[str], lengths: Mapping[str, int], problems: Problems
) -> dict[str, tuple[int, int]]:
    """Read the width and height of images in pixels from their headers: as decoded, which is turned as EXIF says.

    Args:
        store: store that holds the images.
        names: names of the files.
        lengths: length of each file in bytes, as `present` gives it.
        problems: gets each file that is no image; it is left out.
    """
    from PIL import Image

    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # nothing is decoded here
    try:
        found = {}
        sizes = each(lambda name: _image_size(store, name, lengths[name]), names, "the sizes of images")
        for name, size in zip(names, sizes, strict=True):
            if isinstance(size, RaydetError):
                problems.add(str(size))
            else:
                found[name] = size
        return found
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _image_size(store: Store, name: str, length: int) -> tuple[int, int]:
    for part in sorted({min(HEADER, length), length}):
        with suppress(ValueError):
            return _parse_header(store.read(name, 0, part))
    raise RaydetError(f"{store.path(name)} is not an image ({length} bytes)")


def _parse_header(content: bytes) -> tuple[int, int]:
    from PIL import Image

    exif = Image.Exif()
    try:  # Pillow raises whatever broken bytes lead it to
        with Image.open(io.BytesIO(content)) as image:
            width, height = image.size
    except Exception as error:
        raise ValueError(str(error)) from None
    with suppress(Exception):
        exif.load(image.info.get("exif", b""))  # image.getexif() would decode a PNG
    return (height, width) if exif.get(_ORIENTATION) in _TURNED else (width, height)
