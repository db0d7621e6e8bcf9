"""Writes what is found in a source: pictures or a video with boxes, and COCO's results.

What is written into a folder is noted there: no file is replaced that is not raydet's.
"""

from __future__ import annotations

import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from rich.progress import track

from raydet.data.header import MAX_PIXELS
from raydet.errors import RaydetError
from raydet.predict.predictor import DetectionStream
from raydet.predict.sources import Image, Source, open_source
from raydet.store import Store, is_uri
from raydet.visualization import PICTURE_SUFFIXES, encode_picture, write_video

RESULTS = "detections.json"
NOTES = ".raydet-predict.jsonl"


@dataclass(frozen=True)
class Target:
    """What to detect in, and where to write.

    Attributes:
        source: the pictures, or one video.
        names: name of each picture, or of the video, in the results.
        files: file that each is written to, below `out`.
        out: folder for all files.
    """

    source: Source
    names: dict[str, str]
    files: dict[str, str]
    out: Path


@dataclass(frozen=True)
class Saved:
    """What was done: number of images or frames, those left out with the reasons, and a line that says it."""

    images: int
    failed: dict[str, str]
    summary: str


class Notes:
    """What was written into a folder, by name and checksum, in a file there.

    Args:
        folder: folder that holds the files.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._sums: dict[str, set[int]] = {}
        if (folder / NOTES).is_file():
            for line in (folder / NOTES).read_text().splitlines():
                try:
                    note = json.loads(line)
                    self._sums.setdefault(note["file"], set()).add(note["crc32"])
                except (ValueError, KeyError, TypeError):  # a line that was cut off
                    continue

    def has(self, name: str) -> bool:
        """Is there a file of this name, as it was written?"""
        path = self._folder / name
        return name in self._sums and path.is_file() and _checksum(path) in self._sums[name]

    def write(self, name: str, content: bytes) -> None:
        """Write a file, and note it first: a process that is killed leaves none that is not noted.

        Raises:
            RaydetError: it cannot be written.
        """
        self.note(name, zlib.crc32(content))
        Store(self._folder).write(name, content)

    def note(self, name: str, checksum: int) -> None:
        """Note a file that is about to be there."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / NOTES).open("a") as file:
                file.write(json.dumps({"file": name, "crc32": checksum}) + "\n")
        except OSError as error:
            raise RaydetError(f"{self._folder}: cannot be written ({error.strerror})") from None


def open_target(source: str, out: Path, max_pixels: int = MAX_PIXELS) -> Target:
    """Return what a source of the command line is; pictures that an earlier call drew into `out` are none of it.

    Args:
        source: the source, as it was typed.
        out: folder for what is found.
        max_pixels: largest image to decode, in pixels.

    Raises:
        RaydetError: there is nothing to detect in, or a file would be replaced that is not raydet's.
    """
    is_camera = source.isdecimal() and not Path(source).exists()
    opened = open_source(int(source) if is_camera else source, max_pixels)
    notes = Notes(out)
    if opened.videos or is_uri(source):
        name = opened.videos[0].name if opened.videos else source
        names = {name: PurePosixPath(urlsplit(name).path if is_uri(name) else name).name or "image"}
        if opened.videos:
            files = {name: PurePosixPath(names[name]).with_suffix(".mp4").as_posix()}
        else:
            files = picture_files(names)
    else:
        root = Path(source) if Path(source).is_dir() else Path(source).parent
        while any(letter in str(root) for letter in "*?["):
            root = root.parent
        pictures = [picture for part in opened.parts for picture in part]
        pictures = [picture for picture in pictures if not notes.has(_in_folder(out, picture.name))]
        if not pictures:
            raise RaydetError(f"{source}: no images in it but those in {out}, which are raydet's own")
        names = {picture.name: _below(root, Path(picture.name)) or Path(picture.name).name for picture in pictures}
        files = picture_files(names)
        if twice := [file for file, count in Counter(files.values()).items() if count > 1]:
            raise RaydetError(f"{source}: two of the images would be written as {twice[0]}: give the folder of all")
        opened = replace(opened, parts=(pictures,))
    strange = [
        (name, file)
        for name, file in [*files.items(), (source, RESULTS)]
        if os.path.lexists(out / file) and not notes.has(file)
    ]
    if strange:
        name, file = strange[0]
        raise RaydetError(
            f"--out {out}: {file} is there and is not raydet's, and what is found in {name} would replace it"
            f"{f', as {len(strange) - 1} others' * (len(strange) > 1)}: name another folder"
        )
    return Target(replace(opened, is_single=False), names, files, out)


def picture_files(names: Mapping[str, str]) -> dict[str, str]:
    """Return what pictures are written as: by their own names, with .jpg for a suffix that cannot be written."""
    files = {key: name for key, name in names.items() if PurePosixPath(name).suffix.lower() in PICTURE_SUFFIXES}
    taken = set(files.values())
    for key, name in names.items():
        if key not in files:
            file = PurePosixPath(name).with_suffix(".jpg").as_posix()
            files[key] = file if file not in taken else f"{name}.jpg"
            taken.add(files[key])
    return {key: files[key] for key in names}


def save(stream: DetectionStream, target: Target) -> Saved:
    """Detect, write pictures or the video, and detections.json; with a bar that shows how far it is.

    Ctrl-C ends what comes from a camera; the video is kept.

    Raises:
        RaydetError: something cannot be written.
    """
    results: list[dict[str, Any]] = []
    images = 0
    notes = Notes(target.out)
    if videos := stream.source.videos:
        name, file = target.names[videos[0].name], target.files[videos[0].name]
        images = write_video(
            target.out / file,
            _frames(stream, name, results),
            videos[0].fps,
            lambda written: notes.note(file, _checksum(written)),
        )
        summary = f"{len(results)} detections in {images} frames; {file} and {RESULTS} in {target.out}"
    else:
        stems = [Path(name).stem for name in target.names.values()]
        is_numbered = len({int(stem) for stem in stems if stem.isdecimal()}) == len(stems)
        numbers = {name: number for number, name in enumerate(target.names, start=1)}
        for found in track(stream, "detecting", total=len(numbers)):
            name, file = target.names[found.picture.name], target.files[found.picture.name]
            notes.write(file, encode_picture(target.out / file, found.draw_bgr()))
            image_id = int(Path(name).stem) if is_numbered else numbers[found.picture.name]
            results += [{**entry, "file_name": name} for entry in found.to_coco(image_id)]
            images += 1
        summary = f"{len(results)} detections in {images} images; pictures and {RESULTS} in {target.out}"
    if stream.failed:
        summary += f"; {len(stream.failed)} could not be read"
    notes.write(RESULTS, json.dumps(results).encode())
    return Saved(images, stream.failed, summary)


def _frames(stream: DetectionStream, name: str, results: list[dict[str, Any]]) -> Iterator[Image]:
    """Yield frames with their boxes, and put those in COCO's form into `results`."""
    video = stream.source.videos[0]
    try:
        for number, found in enumerate(track(stream, "detecting", total=video.frames), start=1):
            results += [{**entry, "file_name": name} for entry in found.to_coco(number)]
            yield found.draw_bgr()
    except KeyboardInterrupt:
        if not video.is_camera:
            raise


def _below(folder: Path, path: Path) -> str | None:
    """Return a path relative to a folder; None: it is not below it."""
    inner, outer = Path(os.path.abspath(path)), Path(os.path.abspath(folder))
    return inner.relative_to(outer).as_posix() if inner.is_relative_to(outer) else None


def _in_folder(folder: Path, path: str) -> str:
    """Return the name below a folder of a file there, whatever links lead to it; empty: it is elsewhere."""
    return _below(folder.resolve(), Path(path).parent.resolve() / Path(path).name) or ""


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            checksum = zlib.crc32(part, checksum)
    return checksum
