"""A data set made of nothing: shapes in COCO format, to try raydet on without downloading anything.

Five classes differ in shape and texture, never in colour; objects span a factor of 8 in size, overlap, are cut by the
edge, and stand among clutter; some pictures have none. The same seed gives the same files.

    python -m raydet.data.synthetic data/shapes
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from raydet.store import write_aside

Array = npt.NDArray[Any]

CLASSES = ("disc", "ring", "square", "triangle", "cross")
SIZES = ((192, 192), (192, 144), (144, 192))  # width, height in pixels
SMALLEST, LARGEST = 16, 128  # side of an object in pixels
EMPTY = 0.06  # share of pictures without objects


def make_dataset(folder: str | Path, train: int = 480, val: int = 120, seed: int = 0) -> Path:
    """Write `train` and `val` pictures in the layout of COCO.

    The folder gets annotations/instances_{train,val}.json beside the folders train and val.
    """
    folder = Path(folder)
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    for number, (split, count) in enumerate((("train", train), ("val", val))):
        (folder / split).mkdir(exist_ok=True)
        content: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": []}
        content["categories"] = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
        for image_id in range(1, count + 1):
            image, objects = make_picture(np.random.default_rng((seed, number, image_id)))
            name = f"{image_id:06d}.jpg"
            cv2.imwrite(str(folder / split / name), image, [cv2.IMWRITE_JPEG_QUALITY, 92])
            height, width = image.shape[:2]
            content["images"].append({"id": image_id, "file_name": name, "width": width, "height": height})
            for label, (x, y, w, h), area in objects:
                content["annotations"].append(
                    {
                        "id": len(content["annotations"]) + 1,
                        "image_id": image_id,
                        "category_id": label + 1,
                        "bbox": [x, y, w, h],
                        "area": area,
                        "iscrowd": 0,
                    }
                )
        # Last and renamed, so that a file that is there belongs to a whole data set.
        write_aside(folder / "annotations" / f"instances_{split}.json", json.dumps(content))
    return folder


def make_picture(rng: np.random.Generator) -> tuple[Array, list[tuple[int, tuple[int, int, int, int], float]]]:
    """Draw one picture.

    Returns:
        uint8 [H, W, 3] BGR, and its objects: label, (left, top, width, height) and visible area in pixels.
    """
    width, height = SIZES[rng.integers(len(SIZES))]
    image = _background(rng, width, height)
    _clutter(rng, image)
    owner = np.full((height, width), -1)  # which object a pixel shows
    drawn: list[tuple[int, tuple[int, int, int, int], int]] = []  # label, box, pixels before others covered it
    wanted = 0 if rng.random() < EMPTY else int(rng.integers(2, 12))
    for _ in range(wanted):
        label = int(rng.integers(len(CLASSES)))
        window, inside, colours = _shape(rng, label, image)
        box = _bounds(inside, window)
        if box is None or min(box[2:]) < SMALLEST / 2 or _hides_another(inside, owner[window], owner, drawn):
            continue
        image[window][inside] = colours[inside]
        owner[window][inside] = len(drawn)
        drawn.append((label, box, int(inside.sum())))
    image = np.clip(image + rng.normal(0, 4, image.shape), 0, 255).astype(np.uint8)
    return image, [(label, box, float((owner == i).sum())) for i, (label, box, _) in enumerate(drawn)]


def _shape(rng: np.random.Generator, label: int, image: Array) -> tuple[tuple[slice, slice], Array, Array]:
    """Return a window of the picture, where in it the object is, bool [h, w], and its colours, float [h, w, 3]."""
    height, width = image.shape[:2]
    # Every size, the large ones more often: small ones take longer to learn than the demo has.
    side = SMALLEST * (LARGEST / SMALLEST) ** rng.random() ** 0.45
    angle, stretch = rng.uniform(-0.3, 0.3), rng.uniform(0.85, 1.18)
    x0, y0 = rng.uniform(0, width), rng.uniform(0, height)
    window = tuple(slice(max(0, int(at - side)), int(at + side) + 1) for at in (y0, x0))
    y, x = np.mgrid[:height, :width][:, window[0], window[1]]
    dx, dy = (x - x0) * 2 / side / stretch, (y - y0) * 2 / side * stretch
    u, v = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
    radius = np.hypot(u, v)
    a, b = np.abs(u), np.abs(v)
    name = CLASSES[label]
    pattern = {  # 0 … 1 between two colours
        "disc": u * 0.5 + 0.5,
        "ring": radius > 0.5,
        "square": (np.floor(u * 2) + np.floor(v * 2)) % 2,
        "triangle": np.sin(u * 12) > 0,
        "cross": np.zeros_like(u),
    }[name]
    inside = {
        "disc": radius < 1,
        "ring": radius < 1,
        "square": np.maximum(a, b) < 0.85,
        "triangle": (v > -0.7) & (v < 0.9) & (a < (0.9 - v) * 0.6),
        "cross": (np.minimum(a, b) < 0.28) & (np.maximum(a, b) < 1),
    }[name]
    first, second = _two_colours(rng, behind=image[window].mean((0, 1)))
    share = np.clip(pattern, 0, 1)[..., None]
    return (window[0], window[1]), inside, first * share + second * (1 - share)


def _background(rng: np.random.Generator, width: int, height: int) -> Array:
    blocks = rng.uniform(40, 210, (int(rng.integers(2, 5)), int(rng.integers(2, 5)), 3))
    smooth: Array = cv2.resize(blocks, (width, height), interpolation=cv2.INTER_CUBIC)
    return smooth


def _clutter(rng: np.random.Generator, image: Array) -> None:
    height, width = image.shape[:2]
    for _ in range(int(rng.integers(2, 7))):
        colour = rng.uniform(20, 235, 3).tolist()
        points = rng.integers(0, (width, height), (2, 2)).tolist()
        if rng.random() < 0.6:
            cv2.line(image, points[0], points[1], colour, int(rng.integers(1, 4)), cv2.LINE_AA)
        else:
            axes = rng.integers(3, 40, 2).tolist()
            cv2.ellipse(image, points[0], axes, rng.uniform(0, 360), 0, rng.uniform(60, 200), colour, 2, cv2.LINE_AA)


def _two_colours(rng: np.random.Generator, behind: Array) -> tuple[Array, Array]:
    """Return two colours that differ from each other and from what is behind."""
    while True:
        first, second = rng.uniform(0, 255, (2, 3))
        if min(np.abs(first - second).sum(), *(np.abs(c - behind).sum() for c in (first, second))) > 160:
            return first, second


def _bounds(inside: Array, window: tuple[slice, slice]) -> tuple[int, int, int, int] | None:
    columns, rows = np.flatnonzero(inside.any(0)), np.flatnonzero(inside.any(1))
    if not len(columns):
        return None
    left, top = int(columns[0]), int(rows[0])
    return left + window[1].start, top + window[0].start, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1


def _hides_another(inside: Array, below: Array, owner: Array, drawn: list[Any]) -> bool:
    """Would less than 80 % of an object that is already there remain to be seen?"""
    return any(
        (owner == i).sum() - ((below == i) & inside).sum() < 0.8 * drawn[i][2]
        for i in np.unique(below[inside])
        if i >= 0
    )


def main() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(description="Write a data set of shapes in COCO format.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=480, help="training pictures (default: %(default)s)")
    parser.add_argument("--val", type=int, default=120, help="validation pictures (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another data set (default: %(default)s)")
    arguments = parser.parse_args()
    make_dataset(arguments.folder, arguments.train, arguments.val, arguments.seed)
    print(f"{arguments.train} + {arguments.val} pictures of {', '.join(CLASSES)} in {arguments.folder}")


if __name__ == "__main__":
    main()
