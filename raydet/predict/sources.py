"""What to detect in: files, folders, patterns, web addresses, videos, cameras, arrays, PIL images and tensors."""

from __future__ import annotations

import logging
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from glob import glob
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import cv2
import numpy as np
import numpy.typing as npt
import PIL.Image
import PIL.ImageOps
import torch

from raydet.data.header import MAX_PIXELS
from raydet.data.problems import Problems
from raydet.data.render import decode, imread
from raydet.data.scan import IMAGE_SUFFIXES, list_images, sift
from raydet.errors import RaydetError
from raydet.store import SYSTEM_FOLDERS, Store, is_uri

logger = logging.getLogger(__name__)

Image = npt.NDArray[np.uint8]

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")
_TIMEOUT_S = 30.0  # wait for a web server
_FPS = 25.0  # frames per second of a video that does not say


@dataclass(frozen=True)
class Picture:
    """An image, read when it is needed.

    Attributes:
        name: path, address, or what else tells it from others.
        read: returns uint8 [H, W, 3] BGR, or raises a RaydetError that names it.
    """

    name: str
    read: Callable[[], Image]


@dataclass(frozen=True)
class Video:
    """A video or a camera; its frames are read one by one, from the beginning each time it is iterated.

    Attributes:
        name: path, address, or number of the camera.
        address: what OpenCV opens.
        fps: frames per second.
        frames: number of frames as the file says; None: unknown.
    """

    name: str
    address: str | int
    fps: float
    frames: int | None

    @property
    def is_camera(self) -> bool:
        """Does it go on until it is stopped?"""
        return isinstance(self.address, int)

    def __iter__(self) -> Iterator[Picture]:
        capture = _capture(self.name, self.address)
        try:
            number = 0
            while (frame := capture.read()[1]) is not None:
                number += 1
                yield in_memory(f"{self.name}, frame {number}", frame)
        finally:
            capture.release()


@dataclass(frozen=True)
class Source:
    """Pictures to detect in, one after the other; it can be iterated again.

    Attributes:
        parts: where they come from.
        is_single: is it one image, and not a list or a folder of one?
    """

    parts: tuple[Sequence[Picture] | Video, ...]
    is_single: bool = False

    def __iter__(self) -> Iterator[Picture]:
        for part in self.parts:
            yield from part

    @property
    def videos(self) -> list[Video]:
        """The videos and cameras among the parts."""
        return [part for part in self.parts if isinstance(part, Video)]

    @property
    def count(self) -> int | None:
        """Number of pictures; None: unknown."""
        counts = [part.frames if isinstance(part, Video) else len(part) for part in self.parts]
        return None if None in counts else sum(count or 0 for count in counts)


def in_memory(name: str, image: Any) -> Picture:
    """Return the picture of pixels that are there, uint8 [H, W, 3] BGR."""
    return Picture(name, lambda: image)


def open_source(source: Any, max_pixels: int = MAX_PIXELS) -> Source:
    """Return the pictures that are meant by a source.

    Args:
        source: see `raydet.predict.predictor.Predictor.predict` for what it may be.
        max_pixels: largest image file to decode, in pixels.

    Raises:
        RaydetError: it is nothing that can be detected in, or nothing is there.
    """
    if isinstance(source, list | tuple):
        if not source:
            raise RaydetError("there is nothing to detect in: the list is empty")
        return Source(tuple(part for entry in source for part in open_source(entry, max_pixels).parts))
    if isinstance(source, int):
        return Source((_video(f"camera {source}", source),))
    if isinstance(source, str | Path):
        return _open_path(str(source), max_pixels)
    if isinstance(source, PIL.Image.Image):
        _check_pixels("Image", source.width * source.height)
        return Source(([Picture("image", partial(_from_pil, source))],), is_single=True)
    if isinstance(source, torch.Tensor) and source.ndim == 4:
        return open_source(list(source))
    image = source.detach().cpu().permute(1, 2, 0).numpy() if _is_chw(source) else source
    given = type(source).__name__
    if isinstance(source, np.ndarray | torch.Tensor):
        given += f" of {source.dtype} {list(source.shape)}"
        _check_pixels(given, image.size if isinstance(image, np.ndarray) else image.numel())
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        return Source(([Picture("image", partial(_from_rgb, image))],), is_single=True)
    raise RaydetError(
        f"cannot detect in {given}: give paths, PIL images, arrays uint8 [H, W, 3] or tensors uint8 [3, H, W] or "
        "[B, 3, H, W] with values 0 to 255, in RGB"
    )


def _check_pixels(given: str, pixels: int) -> None:
    if not pixels:
        raise RaydetError(f"cannot detect in {given}: it has no pixels")


def image_files(source: str | Path) -> list[Path]:
    """Return the image files meant by a path: itself, all below a folder, or those that fit a pattern, sorted.

    What is hidden is left out, unless the pattern names it. Of files that are no images a warning is logged.

    Raises:
        RaydetError: there are none.
    """
    path, problems = Path(source), Problems("skip", sys.maxsize)
    if path.is_file():
        return [path]
    if path.is_dir():
        found = [path / name for name in list_images(Store(path), "", problems)]
    elif any(letter in str(source) for letter in "*?["):
        unwanted = SYSTEM_FOLDERS.difference(path.parts)  # names with a dot are hidden from patterns too
        matched: dict[Path, str] = {}
        for name in sorted(glob(str(source), recursive=True), key=len):  # ** also goes through links that lead back
            if Path(name).is_file() and unwanted.isdisjoint(Path(name).parts):
                matched.setdefault(Path(name).parent.resolve() / Path(name).name, name)
        found = [Path(name) for name in sift(matched.values(), problems)]
    else:
        raise RaydetError(f"{source}: no such file or folder")
    for told in (*problems.messages, *problems.notices):
        logger.warning("%s", told)
    if not found:
        raise RaydetError(f"{source}: no images in it ({', '.join(IMAGE_SUFFIXES)})")
    return sorted(found)


def _open_path(source: str, max_pixels: int) -> Source:
    is_web = source.startswith(("http://", "https://"))
    if is_uri(source) and not is_web:
        raise RaydetError(f"{source}: images in an object store are detected in by `raydet batch-predict`")
    name = urlsplit(source).path if is_web else source
    if PurePosixPath(name).suffix.lower() in VIDEO_SUFFIXES:
        if not is_web and not Path(source).is_file():
            raise RaydetError(f"{source}: no such file or folder")
        return Source((_video(source, source),))
    if is_web:
        return Source(([Picture(source, partial(_from_web, source, max_pixels))],), is_single=True)
    pictures = [Picture(str(path), partial(imread, str(path.absolute()), max_pixels)) for path in image_files(source)]
    return Source((pictures,), is_single=Path(source).is_file())


def _video(name: str, address: str | int) -> Video:
    capture = _capture(name, address)
    fps, frames = capture.get(cv2.CAP_PROP_FPS), int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    capture.release()
    return Video(name, address, fps if fps > 0 else _FPS, frames if frames > 0 else None)


def _capture(name: str, address: str | int) -> cv2.VideoCapture:
    capture = cv2.VideoCapture(address)
    if not capture.isOpened():
        raise RaydetError(f"{name}: cannot be opened as a video")
    return capture


def _from_rgb(image: Image) -> Image:
    return np.ascontiguousarray(image[:, :, ::-1])


def _from_pil(image: PIL.Image.Image) -> Image:
    name = getattr(image, "filename", "") or "image"
    if image.mode in ("I", "F"):
        raise RaydetError(
            f"{name} is a PIL image of mode {image.mode}, whose range of values nobody knows: scale it to 0 … 255 and "
            "make it 8 bits"
        )
    try:
        image = PIL.ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):  # the upper byte, as of files; Pillow would clip
            image = PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return _from_rgb(np.asarray(image.convert("RGB")))
    except OSError as error:  # it is decoded only now
        raise RaydetError(f"{name} cannot be decoded ({error})") from None


def _from_web(address: str, max_pixels: int) -> Image:
    try:
        with urllib.request.urlopen(address, timeout=_TIMEOUT_S) as answer:
            content = answer.read()
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise RaydetError(f"{address}: cannot be read ({error})") from None
    return decode(content, address, max_pixels=max_pixels)


def _is_chw(source: Any) -> bool:
    return isinstance(source, torch.Tensor) and source.ndim == 3 and source.shape[0] == 3
