"""Writes what is found in a source: pictures or a video with boxes, and COCO's results."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from rich.progress import track

from raydet.data.store import Store, is_uri
from raydet.errors import RaydetError
from raydet.predict import Stream
from raydet.sources import Image, Source, open_source
from raydet.visualization import PICTURE_SUFFIXES, write_video

RESULTS = "detections.json"


@dataclass(frozen=True)
class Target:
    """What to detect in, and where to write.

    Attributes:
        source: the pictures, or one video.
        names: of the pictures, below `out` and in the results; of a video its own.
        out: folder for all.
    """

    source: Source
    names: dict[str, str]
    out: Path


@dataclass(frozen=True)
class Saved:
    """What was done: number of images or frames, those left out with the reasons, and a line that says it."""

    images: int
    failed: dict[str, str]
    summary: str


def open_target(source: str, out: Path) -> Target:
    """Return what a source of the command line is; pictures in `out`, which an earlier call drew, are none of it.

    Raises:
        RaydetError: there is nothing to detect in, or `out` would replace it.
    """
    is_camera = source.isdecimal() and not Path(source).exists()
    opened = open_source(int(source) if is_camera else source)
    if opened.videos or is_uri(source):
        name = opened.videos[0].name if opened.videos else source
        own = PurePosixPath(urlsplit(name).path if is_uri(name) else name).name or "image"
        if not is_uri(name) and (out / own).with_suffix(".mp4").resolve() == Path(name).resolve():
            raise RaydetError(f"--out {out} is the folder of the video, which the one with boxes would replace")
        return Target(replace(opened, is_single=False), {name: own}, out)
    root = Path(source) if Path(source).is_dir() else Path(source).parent
    while any(letter in str(root) for letter in "*?["):
        root = root.parent
    pictures = [picture for part in opened.parts for picture in part]
    if out.resolve() == root.resolve():
        raise RaydetError(f"--out {out} is the folder of the images, which the pictures would replace")
    pictures = [picture for picture in pictures if out.resolve() not in Path(picture.name).resolve().parents]
    if not pictures:
        raise RaydetError(f"{source}: no images in it but those in {out}, which are raydet's own")
    names = {picture.name: Path(picture.name).relative_to(root).as_posix() for picture in pictures}
    return Target(replace(opened, parts=(pictures,), is_single=False), names, out)


def save(stream: Stream, target: Target) -> Saved:
    """Detect, write pictures or the video, and detections.json; with a bar that shows how far it is.

    Ctrl-C ends what comes from a camera; the video is kept.

    Raises:
        RaydetError: something cannot be written.
    """
    results: list[dict[str, Any]] = []
    images = 0
    if videos := stream.source.videos:
        name = target.names[videos[0].name]
        path = (target.out / name).with_suffix(".mp4")
        images = write_video(path, _frames(stream, name, results), videos[0].fps)
        summary = f"{len(results)} detections in {images} frames; {path.name} and {RESULTS} in {target.out}"
    else:
        stems = [Path(name).stem for name in target.names.values()]
        is_numbered = len({int(stem) for stem in stems if stem.isdecimal()}) == len(stems)
        numbers = {name: number for number, name in enumerate(target.names, start=1)}
        alike = Counter((target.out / name).with_suffix("") for name in target.names.values())
        for found in track(stream, "detecting", total=len(numbers)):
            name = target.names[found.picture.name]
            path = target.out / name
            found.save(_written_as(path, is_only=alike[path.with_suffix("")] == 1))
            image_id = int(path.stem) if is_numbered else numbers[found.picture.name]
            results += [{**entry, "file_name": name} for entry in found.to_coco(image_id)]
            images += 1
        summary = f"{len(results)} detections in {images} images; pictures and {RESULTS} in {target.out}"
    if stream.failed:
        summary += f"; {len(stream.failed)} could not be read"
    Store(target.out).write(RESULTS, json.dumps(results).encode())
    return Saved(images, stream.failed, summary)


def _written_as(path: Path, *, is_only: bool) -> Path:
    """Return the path for the picture of an image: as a JPEG, if pictures are not written in the image's format."""
    if path.suffix.lower() in PICTURE_SUFFIXES:
        return path
    return path.with_suffix(".jpg") if is_only else path.with_name(f"{path.name}.jpg")  # a.gif and a.jpg


def _frames(stream: Stream, name: str, results: list[dict[str, Any]]) -> Iterator[Image]:
    """Yield frames with their boxes, and put those in COCO's form into `results`."""
    video = stream.source.videos[0]
    try:
        for number, found in enumerate(track(stream, "detecting", total=video.frames), start=1):
            results += [{**entry, "file_name": name} for entry in found.to_coco(number)]
            yield found.draw_bgr()
    except KeyboardInterrupt:
        if not video.is_camera:
            raise
