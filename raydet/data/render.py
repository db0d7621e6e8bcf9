"""From a planned picture to pixels: each source image is decoded once and resampled once for each tile."""

from __future__ import annotations

import io
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, cast

import cv2
import numpy as np
import numpy.typing as npt

from raydet.boxes import Resize, place
from raydet.data.header import MAX_PIXELS, check_pixels, stored_size
from raydet.data.index import Index
from raydet.data.transforms import PAD_VALUE, SamplePlan, Tile
from raydet.errors import RaydetError
from raydet.store import store

Array = npt.NDArray[Any]

if "OPENCV_LOG_LEVEL" not in os.environ:  # what OpenCV says of a broken file does not name it; `decode` does
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

# A JPEG can be decoded at these shares of its size for less.
_REDUCED = {2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4, 8: cv2.IMREAD_REDUCED_COLOR_8}
# Markers of a JPEG: the first, the last, and the one before a scan; below them the last and all that have a length.
# Within a scan 0xff00 is a byte of the scan, and 0xffd0 … 0xffd7 restart it.
_START, _END, _SCAN = b"\xff\xd8", b"\xff\xd9", b"\xff\xda"
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")
# Reads at once from an object store, which takes tens of milliseconds to begin to answer.
_READERS = 16


def decode(
    content: bytes,
    name: str,
    size: tuple[int, int] | None = None,
    reduction: int = 1,
    max_pixels: int = MAX_PIXELS,
) -> Array:
    """Decode an image file of any kind as uint8 [H, W, 3] BGR: grey, palette, alpha, CMYK and 16 bits become that.

    The orientation that a camera noted in EXIF is applied, unless `size` is that of the image without it.

    Args:
        content: content of the file.
        name: name of the file, for messages.
        size: (width, height) that the annotation says; None: any.
        reduction: 1, 2, 4 or 8: sides come out so many times shorter, rounded up or down; where that would leave less
            than a pixel, as they are.
        max_pixels: largest number of pixels of an image whose size no annotation says; a larger image is refused before
            it is decoded.

    Raises:
        RaydetError: it is no image, is cut off, has another size, or is too large.
    """
    stored = stored_size(content)
    if stored is not None:
        if size is None:
            check_pixels(stored, name, max_pixels)
        elif size not in (stored, stored[::-1]):
            raise _another_size(name, stored, size)
    flags = _REDUCED.get(reduction, cv2.IMREAD_COLOR)
    image: Any = _imdecode(content, flags)
    if image is not None and size is not None and not _has_size(image, size, reduction):
        image = _imdecode(content, flags | cv2.IMREAD_IGNORE_ORIENTATION)
    if image is None and reduction > 1:  # of a narrow image no pixel may be left
        return decode(content, name, size, max_pixels=max_pixels)
    if image is None or _is_cut_off(content):
        raise RaydetError(f"{name} is not an image that can be decoded ({len(content)} bytes)")
    if size is not None and not _has_size(image, size, reduction):
        whole = _imdecode(content, cv2.IMREAD_COLOR)
        height, width = image.shape[:2] if whole is None else whole.shape[:2]
        raise _another_size(name, (width, height), size)
    return image  # type: ignore[no-any-return]


def imread(path: str, max_pixels: int = MAX_PIXELS) -> Array:
    """Read an image file of this machine as uint8 [H, W, 3] BGR.

    Args:
        path: path of the file.
        max_pixels: largest number of pixels.

    Raises:
        RaydetError: it is missing, not an image, or too large.
    """
    return decode(store("/").read(str(path)), str(path), max_pixels=max_pixels)


def letterbox(image: Array, size: tuple[int, int], resize: Resize) -> Array:
    """Scale an image [H, W, 3] and pad it with grey to `size` = (height, width), as `raydet.boxes.place` says.

    A large one is first made smaller by a whole factor, as training and validation decode it: its detail would become
    noise.
    """
    to = place(image.shape[1], image.shape[0], size, resize)
    if (reduction := _reduction(max(to.scale))) > 1:
        smaller = [max(1, round(side / reduction)) for side in (image.shape[1], image.shape[0])]
        image = cast(Array, cv2.resize(image, smaller, interpolation=cv2.INTER_AREA))
    canvas = np.full((*size, 3), PAD_VALUE, np.uint8)
    inside = canvas[to.top : to.top + to.height, to.left : to.left + to.width]
    cv2.resize(image, (to.width, to.height), dst=inside, interpolation=cv2.INTER_LINEAR)
    return canvas


class SourceImages:
    """The source images of some pictures: each is read and decoded when it is first needed, and let go after the last.

    Args:
        index: index of the images.
        pictures: all pictures that show the images, which decides how large the images are decoded.
        rendered: the pictures that will be rendered, in this order.
    """

    def __init__(self, index: Index, pictures: Iterable[SamplePlan], rendered: Iterable[SamplePlan]):
        self._index = index
        self._scale: dict[int, float] = {}  # the largest at which an image is shown
        for tile in (tile for picture in pictures for tile in _tiles(picture)):
            (a, b, _), (c, d, _) = tile.matrix
            shown = math.sqrt(max(a * a + c * c, b * b + d * d))
            self._scale[tile.source] = max(self._scale.get(tile.source, 0.0), shown)
        self._uses = Counter(tile.source for picture in rendered for tile in _tiles(picture))
        self.failed: dict[int, str] = {}  # row → what is wrong with the image
        self._decoded: dict[int, Array] = {}
        self._bordered: dict[int, Array] = {}
        self._reading: Mapping[int, Future[bytes]] = {}
        self._readers: ThreadPoolExecutor | None = None
        if not store(index.root).is_local:
            self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="raydet-read")
            self._reading = {row: self._readers.submit(index.read, row) for row in self._uses}

    def close(self) -> None:
        """Stop reading ahead."""
        if self._readers is not None:
            self._readers.shutdown(wait=False, cancel_futures=True)

    def size(self, row: int) -> tuple[int, int]:
        """Return an image's width and height in pixels."""
        return self._index.size(row)

    def expect(self, picture: SamplePlan) -> None:
        """Count on one more picture, in place of one that cannot be rendered."""
        self._uses.update(tile.source for tile in _tiles(picture))

    def image(self, row: int) -> Array:
        """Return an image as uint8 [H, W, 3] BGR, perhaps decoded smaller.

        Raises:
            RaydetError: it cannot be read or decoded, or has another size than annotated; `failed` has it from then on.
        """
        if row in self.failed:
            raise RaydetError(self.failed[row])
        if row not in self._decoded:
            # No smaller than it is shown: no detail is lost, and less of it becomes noise.
            reduction = _reduction(self._scale.get(row, 1.0))
            try:
                content = self._reading[row].result() if row in self._reading else self._index.read(row)
                self._decoded[row] = decode(content, self._index.path(row), self._index.size(row), reduction)
            except RaydetError as error:
                self.failed[row] = str(error)
                raise
        return self._decoded[row]

    def bordered(self, row: int) -> Array:
        """Return an image as uint8 [H + 2, W + 2, 4]: BGR and a byte unused, with its edge pixels repeated around it.

        Four bytes a pixel are resampled faster than three, and the border closes the seams of a mosaic: OpenCV leaves
        out pixels that it would have to interpolate with something beyond the edge.
        """
        if row not in self._bordered:
            image = self.image(row)
            bordered = np.empty((image.shape[0] + 2, image.shape[1] + 2, 4), np.uint8)
            cv2.cvtColor(image, cv2.COLOR_BGR2BGRA, dst=bordered[1:-1, 1:-1])
            bordered[0], bordered[-1] = bordered[1], bordered[-2]
            bordered[:, 0], bordered[:, -1] = bordered[:, 1], bordered[:, -2]
            self._bordered[row] = bordered
        return self._bordered[row]

    def done(self, picture: SamplePlan) -> None:
        """Let go of what no other picture needs."""
        for tile in _tiles(picture):
            self._uses[tile.source] -= 1
            if not self._uses[tile.source]:
                self._decoded.pop(tile.source, None)
                self._bordered.pop(tile.source, None)


class Renderer:
    """Renders pictures of one size; it keeps its canvases, which are dear to allocate.

    Args:
        size: (height, width) in pixels.
    """

    def __init__(self, size: tuple[int, int]):
        self._canvases = np.empty((2, *size, 4), np.uint8)

    def __call__(self, picture: SamplePlan, sources: SourceImages, out: Array) -> None:
        """Write a picture to `out`, uint8 [H, W, 3] BGR.

        Raises:
            RaydetError: a source cannot be read or decoded.
        """
        image = out
        if not _fit(picture, sources, out):
            image = self._canvases[0]
            for number, layer in enumerate(picture.layers):
                canvas = self._canvases[min(number, 1)]
                canvas.fill(PAD_VALUE)
                for tile in layer:
                    _paint(tile, sources, canvas)
                if number:
                    cv2.addWeighted(image, number / (number + 1), canvas, 1 / (number + 1), 0, dst=image)
        for change in picture.colours:
            change(image, out)
            image = out
        if image is not out:
            cv2.cvtColor(image, cv2.COLOR_BGRA2BGR, dst=out)


def _tiles(picture: SamplePlan) -> Iterator[Tile]:
    for layer in picture.layers:
        yield from layer


def _fit(picture: SamplePlan, sources: SourceImages, out: Array) -> bool:
    """Show one whole image on whole pixels, as a letterbox does, by OpenCV's resize: faster, and the peers' pixels.

    Returns:
        Whether the picture is such a one; if not, nothing was done.
    """
    tiles = list(_tiles(picture))
    if len(tiles) != 1:
        return False
    width, height = sources.size(tiles[0].source)
    (across, skew_x, x), (skew_y, down, y) = tiles[0].matrix
    edges = [x, x + across * width, y, y + down * height]
    left, right, top, bottom = (round(edge) for edge in edges)
    exact = max(abs(edge - round(edge)) for edge in edges) < 1e-6
    if skew_x or skew_y or not exact or tiles[0].window != (0, 0, width, height):
        return False
    (left, right), (top, bottom) = sorted((left, right)), sorted((top, bottom))
    if left < 0 or top < 0 or right > out.shape[1] or bottom > out.shape[0]:
        return False
    image = sources.image(tiles[0].source)
    out.fill(PAD_VALUE)
    inside = out[top:bottom, left:right]
    cv2.resize(image, (right - left, bottom - top), dst=inside, interpolation=cv2.INTER_LINEAR)
    if across < 0:
        cv2.flip(inside, 1, dst=inside)
    if down < 0:
        cv2.flip(inside, 0, dst=inside)
    return True


def _paint(tile: Tile, sources: SourceImages, canvas: Array) -> None:
    """Resample a tile onto a canvas [H, W, 4], where it shows."""
    (a, b, x), (c, d, y) = tile.matrix
    left, top, right, bottom = tile.window
    corners = [(a * u + b * v + x, c * u + d * v + y) for u in (left, right) for v in (top, bottom)]
    # A pixel more each way: the border's.
    first_x = max(0, math.floor(min(corner[0] for corner in corners)) - 1)
    first_y = max(0, math.floor(min(corner[1] for corner in corners)) - 1)
    last_x = min(canvas.shape[1], math.ceil(max(corner[0] for corner in corners)) + 1)
    last_y = min(canvas.shape[0], math.ceil(max(corner[1] for corner in corners)) + 1)
    determinant = a * d - b * c
    if last_x <= first_x or last_y <= first_y or not determinant:
        return
    image = sources.bordered(tile.source)
    width, height = sources.size(tile.source)
    ratio_x, ratio_y = (
        (image.shape[1] - 2) / width,
        (image.shape[0] - 2) / height,
    )  # below 1: the image was decoded smaller
    roi_x, roi_y = max(0, math.floor(left * ratio_x)), max(0, math.floor(top * ratio_y))
    roi = image[roi_y : math.ceil(bottom * ratio_y) + 2, roi_x : math.ceil(right * ratio_x) + 2]
    # From canvas pixels to the window's, both by their centres, the border counted.
    across_x, across_y = d * ratio_x / determinant, -b * ratio_x / determinant
    down_x, down_y = -c * ratio_y / determinant, a * ratio_y / determinant
    x, y = first_x + 0.5 - x, first_y + 0.5 - y
    shift_x = across_x * x + across_y * y + 0.5 - roi_x
    shift_y = down_x * x + down_y * y + 0.5 - roi_y
    cv2.warpAffine(
        roi,
        np.array(((across_x, across_y, shift_x), (down_x, down_y, shift_y))),
        (last_x - first_x, last_y - first_y),
        dst=canvas[first_y:last_y, first_x:last_x],
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_TRANSPARENT,
    )


def _another_size(name: str, size: tuple[int, int], annotated: tuple[int, int]) -> RaydetError:
    return RaydetError(
        f"{name} has {size[0]}x{size[1]} pixels, its annotation says {annotated[0]}x{annotated[1]}: mend one of them"
    )


def _reduction(scale: float) -> int:
    """Return by how much an image may be made smaller before it is shown at a scale."""
    return max((factor for factor in _REDUCED if scale * factor <= 1), default=1)


def _imdecode(content: bytes, flags: int) -> Any:
    try:
        if content[4:12] in (b"ftypavif", b"ftypavis"):
            return _decode_avif(content, flags)
        return cv2.imdecode(np.frombuffer(content, np.uint8), flags) if content else None
    except cv2.error:  # more pixels than OpenCV takes, or than there is memory for
        return None


def _decode_avif(content: bytes, flags: int) -> Any:
    """Decode by Pillow: OpenCV does not turn the image as the file's header says."""
    from PIL import Image, ImageOps

    reduction = next((factor for factor, flag in _REDUCED.items() if flags & ~cv2.IMREAD_IGNORE_ORIENTATION == flag), 1)
    try:  # Pillow raises whatever broken bytes lead it to
        with Image.open(io.BytesIO(content)) as image:
            upright = image if flags & cv2.IMREAD_IGNORE_ORIENTATION else ImageOps.exif_transpose(image)
            pixels = np.asarray(upright.convert("RGB").reduce(reduction))
    except Exception:
        return None
    return np.ascontiguousarray(pixels[:, :, ::-1])


def _has_size(image: Array, size: tuple[int, int], reduction: int) -> bool:
    (width, height), (across, down) = size, (image.shape[1], image.shape[0])
    return all(
        side // reduction <= decoded <= -(-side // reduction) for side, decoded in ((width, across), (height, down))
    )


def _is_cut_off(content: bytes) -> bool:
    """Does a JPEG lack its end? OpenCV would fill the rest with grey. Anything may follow the end.

    A JPEG is a row of segments: a marker, most with a length that counts itself. Behind the header of a scan (SOS) are
    its bytes up to the next marker; there may be several scans, with tables between them.
    """
    if not content.startswith(_START):
        return False
    place, has_scan = 2, False
    while (found := _MARKER.search(content, place)) is not None:
        marker, place = content[found.start() : found.end()], found.end()
        if marker == _END:
            return not has_scan
        place += int.from_bytes(content[place : place + 2], "big")
        if marker == _SCAN:
            if content.endswith(_END):  # nearly always: the scans need not be searched
                return place >= len(content)
            has_scan = True
    return True
