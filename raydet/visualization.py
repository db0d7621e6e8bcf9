"""Pictures with boxes."""

from __future__ import annotations

import colorsys
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt

from raydet.boxes import cxcywh_to_xyxy, place
from raydet.errors import RaydetError

logger = logging.getLogger(__name__)

Image = npt.NDArray[np.uint8]
Array = npt.NDArray[Any]

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")  # that pictures are written as

_FAR = 1_000_000  # pixels; OpenCV takes neither infinities nor more than 32 bits
_FONT = cv2.FONT_HERSHEY_SIMPLEX
_READABLE = 360  # pixels: pictures whose shorter side is less are enlarged before labels are written on them
_CAPTION = 22  # pixels
_QUALITY = 85  # JPEG quality


def class_colour(label: int) -> tuple[int, int, int]:
    """Return a class's colour in BGR: neighbours in number are far apart in hue."""
    red, green, blue = colorsys.hsv_to_rgb(label * 0.618034 % 1.0, 0.85, 0.95)
    return int(255 * blue), int(255 * green), int(255 * red)


def resized(image: Image, factor: float, interpolation: int) -> Image:
    """Return an image enlarged or made smaller; of a narrow one a pixel stays."""
    if min(image.shape[:2]) * factor > 0.5:  # OpenCV rounds
        return cv2.resize(image, None, fx=factor, fy=factor, interpolation=interpolation)  # type: ignore[return-value]
    size = [max(1, round(side * factor)) for side in (image.shape[1], image.shape[0])]
    return cv2.resize(image, size, interpolation=interpolation)  # type: ignore[return-value]


def text_size(text: str, scale: float) -> tuple[int, int, int]:
    """Return width, height above the baseline and depth below it of a line of text, in pixels.

    Args:
        text: a line.
        scale: size, as OpenCV has it: capitals are 22 pixels high at 1.
    """
    if not text.isascii():
        from raydet import lettering

        return lettering.text_size(text, scale)
    (width, height), below = cv2.getTextSize(text, _FONT, scale, 1)
    return width, height, below


def write_text(
    image: Image, text: str, x: int, baseline: int, scale: float, ink: tuple[int, int, int], paper: tuple[int, int, int]
) -> None:
    """Write a line of text on an image.

    Args:
        image: uint8 [H, W, 3] BGR, which is changed.
        text: a line.
        x: left end of the text, in pixels.
        baseline: row of the image on which the letters stand.
        scale: size, see `text_size`.
        ink: colour of the letters, BGR.
        paper: colour of the image where the text is written, BGR.
    """
    if text.isascii():
        cv2.putText(image, text, (x, baseline), _FONT, scale, ink, 1, cv2.LINE_AA)
        return
    from raydet import lettering

    lettering.write_text(image, text, x, baseline, scale, ink, paper)


def draw_boxes(
    image: Image,
    boxes: Array,
    labels: Sequence[int],
    class_names: Sequence[str],
    scores: Sequence[float] | None = None,
    *,
    thickness: int | None = None,
    prefix: str = "",
) -> Image:
    """Return a copy of an image with boxes, class names and scores on it.

    Args:
        image: uint8 [H, W, 3] BGR.
        boxes: [n, 4] xyxy in its pixels; drawn from the last to the first, so that the first lie on top.
        labels: [n] classes.
        class_names: name of each class.
        scores: [n]; None for ground truth.
        thickness: thickness of the lines in pixels; None: by the size of the image.
        prefix: text in front of each label.
    """
    image = image.copy()
    height, width = image.shape[:2]
    size = max(0.35, min(height, width) / 1000)
    line = thickness or max(1 + (min(height, width) >= 300), round(min(height, width) / 350))
    edges = np.nan_to_num(boxes).clip(-_FAR, _FAR).round().astype(int).tolist()
    for number in reversed(range(len(labels))):
        left, top, right, bottom = edges[number]
        colour = class_colour(labels[number])
        cv2.rectangle(image, (left, top), (right, bottom), colour, line)
        text = prefix + class_names[labels[number]] + (f" {scores[number]:.2f}" if scores is not None else "")
        text_width, text_height, below = text_size(text, size)
        # Above the box, or inside where there is no room; never beyond the picture.
        x = max(0, min(left, width - text_width - 2))
        y = top if top >= text_height + below else min(max(top, 0) + text_height + below, height)
        cv2.rectangle(image, (x, y - text_height - below), (x + text_width + 2, y), colour, -1)
        bright = 0.114 * colour[0] + 0.587 * colour[1] + 0.299 * colour[2] > 140
        ink = (0, 0, 0) if bright else (255, 255, 255)
        write_text(image, text, x + 1, y - below + 1, size, ink, colour)
    return image


def grid(images: Sequence[Image], columns: int, cell: tuple[int, int]) -> Image:
    """Lay images out in rows, each scaled to fit a cell of (height, width) pixels."""
    rows = -(-len(images) // columns)
    sheet = np.full((rows * cell[0], columns * cell[1], 3), 255, np.uint8)
    for number, image in enumerate(images):
        scale = min((cell[0] - 4) / image.shape[0], (cell[1] - 4) / image.shape[1])
        small = resized(image, scale, cv2.INTER_AREA)
        top, left = number // columns * cell[0], number % columns * cell[1]
        sheet[top : top + small.shape[0], left : left + small.shape[1]] = small
    return sheet


@dataclass(frozen=True)
class Shown:
    """An image and what is on it: all boxes xyxy in its pixels.

    Attributes:
        image: uint8 [H, W, 3] BGR.
        truth_boxes: [m, 4] boxes of the ground truth.
        truth_labels: int [m] classes of the ground truth.
        boxes: [n, 4] boxes of the detections, best scores first; None: there are no detections to compare with.
        labels: int [n] classes of the detections.
        scores: [n] scores of the detections.
        caption: caption of the picture.
    """

    image: Image
    truth_boxes: Array
    truth_labels: Array
    boxes: Array | None = None
    labels: Array | None = None
    scores: Array | None = None
    caption: str = ""

    def scaled(self, factor: float) -> Shown:
        """Return it enlarged, or made smaller."""
        image = resized(self.image, factor, cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR)
        across, down = image.shape[1] / self.image.shape[1], image.shape[0] / self.image.shape[0]
        factors = np.array((across, down, across, down))
        boxes = None if self.boxes is None else self.boxes * factors
        truth = self.truth_boxes * factors
        return Shown(image, truth, self.truth_labels, boxes, self.labels, self.scores, self.caption)


def draw(
    shown: Shown, class_names: Sequence[str], gt_alpha: float | None = None, thickness: int | None = None
) -> Image:
    """Return a picture of an image's ground truth and, beside or below it, its detections.

    Args:
        shown: the image.
        class_names: name of each class.
        gt_alpha: opacity of the ground truth, drawn over the detections, 0 to 1; None: it is drawn to their left.
        thickness: thickness of the lines in pixels; None: by the size of the image.
    """
    truth, labels = shown.truth_boxes, shown.truth_labels.tolist()
    if shown.boxes is None or shown.labels is None or shown.scores is None:
        return draw_boxes(shown.image, truth, labels, class_names, thickness=thickness)
    found = shown.boxes, shown.labels.tolist(), class_names, shown.scores.tolist()
    if gt_alpha is None:
        sides = (
            draw_boxes(shown.image, truth, labels, class_names, thickness=thickness),
            np.full((len(shown.image), 4, 3), 255, np.uint8),
            draw_boxes(shown.image, *found, thickness=thickness),
        )
        return np.concatenate(sides, axis=1)
    below = draw_boxes(shown.image, *found, thickness=thickness, prefix="[Pred] ")
    over = draw_boxes(below, truth, labels, class_names, thickness=thickness, prefix="[GT] ")
    return cv2.addWeighted(over, gt_alpha, below, 1 - gt_alpha, 0)  # type: ignore[return-value]


def sheet(
    images: Sequence[Shown],
    class_names: Sequence[str],
    gt_alpha: float | None = None,
    longest: int = 560,
    width: int = 2400,
) -> Image:
    """Return pictures of several images as one, each with its caption.

    Args:
        images: at least one.
        class_names: name of each class.
        gt_alpha: opacity of the ground truth, see `draw`.
        longest: longest side of an image in the picture, in pixels; images too small for labels are enlarged.
        width: largest width of the picture, in pixels; a single image may be wider.
    """
    cells = []
    for shown in images:
        high, wide = shown.image.shape[:2]
        factor = min(longest / max(high, wide), max(1.0, _READABLE / min(high, wide)))
        picture = draw(shown.scaled(factor), class_names, gt_alpha)
        if gt_alpha is None and shown.boxes is not None:
            half = picture.shape[1] // 2
            captions = _caption(f"{shown.caption}  ground truth", half), _caption("detections", picture.shape[1] - half)
            caption = np.concatenate(captions, axis=1)
        else:
            caption = _caption(shown.caption, picture.shape[1])
        cells.append(np.concatenate((caption, picture)))
    across = max(cell.shape[1] for cell in cells) + 8
    columns = max(1, min(len(cells), width // across))
    rows = []
    for first in range(0, len(cells), columns):
        row = cells[first : first + columns]
        high = max(cell.shape[0] for cell in row) + 8
        canvas = np.full((high, columns * across, 3), 255, np.uint8)
        for number, cell in enumerate(row):
            canvas[: cell.shape[0], number * across : number * across + cell.shape[1]] = cell
        rows.append(canvas)
    return np.concatenate(rows)


def _caption(text: str, width: int) -> Image:
    """Return a line of text, cut where there is no room for it."""
    line = np.full((_CAPTION, width, 3), 255, np.uint8)
    shown = text
    while shown and text_size(shown, 0.45)[0] > width - 4:
        shown = shown[:-4] + "..." if shown.endswith("...") else shown[:-3] + "..."
        if shown == "...":
            break
    write_text(line, shown, 2, _CAPTION - 7, 0.45, (40, 40, 40), (255, 255, 255))
    return line


class DetectionVisualization:
    """Draws batches of images with their targets and predictions."""

    @staticmethod
    def visualize_batch(
        image_tensor: Any,
        pred_boxes: Sequence[Any] | None,
        target_boxes: Any,
        batch_name: str | int,
        class_names: Sequence[str],
        checkpoint_dir: str | Path | None = None,
        undo_preprocessing_func: Callable[[Any], Array] | None = None,
        box_thickness: int | None = None,
        image_scale: float = 1.0,
        gt_alpha: float | None = 0.4,
        *,
        target_units: Literal["pixels", "normalized"] = "pixels",
    ) -> list[Image]:
        """Draw a batch, and keep the pictures if a folder is given.

        Args:
            image_tensor: [B, 3, H, W], tensor or array, as the model gets them.
            pred_boxes: for each image [n, 6] = x1, y1, x2, y2 in pixels, score, class; None: no predictions.
            target_boxes: [N, 6] = image in the batch, class, cx, cy, w, h.
            batch_name: beginning of the files' names, which are `{batch_name}_{number of the image}.jpg`.
            class_names: name of each class.
            checkpoint_dir: folder for the pictures; None: they are returned only.
            undo_preprocessing_func: makes uint8 [B, H, W, 3] BGR of `image_tensor`; None: it is [B, 3, H, W] BGR with
                values 0 to 255, as raydet's batches and the input of YOLOX.
            box_thickness: thickness of the lines in pixels; None: by the size of the image.
            image_scale: factor on the size of the pictures.
            gt_alpha: opacity of the targets, drawn over the predictions, 0 to 1; None: they are drawn side by side.
            target_units: unit of `target_boxes`: pixels, or "normalized": fractions of the image's width and height.

        Returns:
            The pictures, uint8 [H, W, 3] BGR.

        Raises:
            RaydetError: the images are not uint8 [B, H, W, 3], no target in pixels has a side above 1, or a picture
                cannot be written.
        """
        images = undo_preprocessing_func(image_tensor) if undo_preprocessing_func else _as_pixels(image_tensor)
        images = np.ascontiguousarray(_array(images))
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise RaydetError(
                f"undo_preprocessing_func: the images must become uint8 [B, H, W, 3], not {images.dtype} "
                f"{list(images.shape)}"
            )
        targets = _array(target_boxes).astype(np.float64).reshape(-1, 6)
        height, width = images.shape[1:3]
        if target_units == "normalized":
            targets = targets * (1, 1, width, height, width, height)
        elif len(targets) and targets[:, 2:].max() <= 1:
            raise RaydetError(
                "target_boxes: no value is above 1, so they look like fractions of the image: pass "
                'target_units="normalized"'
            )
        pictures = []
        for number, image in enumerate(images):
            mine = targets[targets[:, 0] == number]
            given = (image, cxcywh_to_xyxy(mine[:, 2:]), mine[:, 1].astype(int))
            if pred_boxes is not None:
                found = _array(pred_boxes[number]).astype(np.float64).reshape(-1, 6)
                shown = Shown(*given, found[:, :4], found[:, 5].astype(int), found[:, 4])
            else:
                shown = Shown(*given)
            pictures.append(draw(shown.scaled(image_scale), class_names, gt_alpha, box_thickness))
        if checkpoint_dir is not None:
            for number, picture in enumerate(pictures):
                write_picture(Path(checkpoint_dir) / f"{batch_name}_{number}.jpg", picture)
        return pictures


def encode_picture(path: Path, picture: Image) -> bytes:
    """Return a picture as a file's content, in the format that the ending of the file's name says.

    Raises:
        RaydetError: there is no such format, or it does not hold so large a picture.
    """
    if not cv2.haveImageWriter(path.name):
        raise RaydetError(f"{path}: a picture is written in the format that its name ends with, such as .jpg or .png")
    done, encoded = cv2.imencode(path.suffix, picture, [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])
    if not done:
        height, width = picture.shape[:2]
        raise RaydetError(f"{path}: a picture of {width}x{height} pixels cannot be written as {path.suffix}; .png may")
    return encoded.tobytes()


def write_picture(path: Path, picture: Image) -> None:
    """Write a picture, in the format that the name's ending says.

    Raises:
        RaydetError: it cannot be written.
    """
    encoded = encode_picture(path, picture)
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(encoded)
        partial.replace(path)
    except OSError as error:
        raise RaydetError(f"{path}: the picture cannot be written ({error.strerror})") from None


def write_video(
    path: Path, frames: Iterable[Image], fps: float, then: Callable[[Path], Any] = lambda written: None
) -> int:
    """Write frames, uint8 [H, W, 3] BGR, as a video in MPEG-4, and return how many there were.

    The video has the size of the first frame; frames of another size are fitted into it. MPEG-4 takes even sides only
    from OpenCV: an odd one gets a column or a row more, the last one again. A warning says both.

    Args:
        path: path of the video.
        frames: at least one.
        fps: frames per second.
        then: called with the file when it is whole, before it gets its name.

    Raises:
        RaydetError: the name does not end with .mp4, there are no frames, or it cannot be written.
    """
    if path.suffix.lower() != ".mp4":
        raise RaydetError(f"{path}: videos are written as .mp4")
    partial = path.with_name(f".{path.stem}.partial.mp4")
    writer: cv2.VideoWriter | None = None
    count = others = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for frame in frames:
            if writer is None:
                height, width = frame.shape[:2]
                odd = height % 2, width % 2
                size = width + odd[1], height + odd[0]
                if any(odd):
                    logger.warning("%s: %dx%d pixels, as MPEG-4 has no odd sides", path, *size)
                writer = cv2.VideoWriter(str(partial), cv2.VideoWriter.fourcc(*"mp4v"), fps, size)
                if not writer.isOpened():
                    raise RaydetError(f"{path}: the video cannot be written")
            is_other = frame.shape[:2] != (height, width)
            fitted = _fitted(frame, height, width) if is_other else frame
            writer.write(cv2.copyMakeBorder(fitted, 0, odd[0], 0, odd[1], cv2.BORDER_REPLICATE))
            count, others = count + 1, others + is_other
        if writer is None:
            raise RaydetError(f"{path}: the video has no frames")
        if others:
            logger.warning("%s: %d of %d frames had another size and are fitted into it", path, others, count)
        writer.release()
        then(partial)
        partial.replace(path)
    except OSError as error:
        raise RaydetError(f"{path}: the video cannot be written ({error.strerror})") from None
    finally:
        if writer is not None:
            writer.release()
        partial.unlink(missing_ok=True)
    return count


def _fitted(frame: Array, height: int, width: int) -> Array:
    """Return a frame scaled into another size, in the middle of grey, as models get images."""
    canvas = np.full((height, width, 3), 114, np.uint8)
    to = place(frame.shape[1], frame.shape[0], (height, width), "pad_centre")
    inside = canvas[to.top : to.top + to.height, to.left : to.left + to.width]
    cv2.resize(frame, (to.width, to.height), dst=inside, interpolation=cv2.INTER_AREA)
    return canvas


def _array(values: Any) -> Array:
    """Return a tensor of any device, or an array, as an array."""
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


def _as_pixels(images: Any) -> Array:
    pixels = _array(images)
    if pixels.size and (pixels.min() < 0 or 0 < pixels.max() <= 1):
        raise RaydetError(
            "the images are not pixels from 0 to 255: give undo_preprocessing_func, which makes them uint8 BGR again"
        )
    return pixels.transpose(0, 2, 3, 1).round().clip(0, 255).astype(np.uint8)
