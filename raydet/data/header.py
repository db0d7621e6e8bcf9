"""The size of an image, read from the file's header before anything is decoded."""

from __future__ import annotations

import io

from raydet.errors import RaydetError

# Pillow's own limit. A file of 70 kB can decode to gigabytes, which ends the process that decodes it.
MAX_PIXELS = 178_956_970
# Markers of a JPEG's frame, whose segment begins with the size; the three left out are no frames.
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


def stored_size(content: bytes) -> tuple[int, int] | None:
    """Return the width and height of an image in pixels as it is stored, not turned as EXIF says; None: unknown.

    JPEG and PNG, which most images are, are read here in some microseconds; Pillow takes forty.
    """
    if content.startswith(b"\xff\xd8"):
        return _of_jpeg(content)
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")
    from PIL import Image

    try:  # Pillow raises whatever broken bytes lead it to
        with Image.open(io.BytesIO(content)) as image:
            return image.size
    except Exception:
        return None


def check_pixels(size: tuple[int, int], name: str, most: int) -> None:
    """Raise RaydetError where an image has more pixels than are to be decoded.

    Args:
        size: (width, height) in pixels.
        name: path of the file, for the message.
        most: largest number of pixels.
    """
    if size[0] * size[1] > most:
        raise RaydetError(
            f"{name} has {size[0]}x{size[1]} pixels, more than the {most:,} that are decoded at most; "
            "max_pixels sets another limit (in a recipe data.max_pixels)"
        )


def _of_jpeg(content: bytes) -> tuple[int, int] | None:
    place = 2
    while place + 9 < len(content) and content[place] == 0xFF:
        marker = content[place + 1]
        if marker in _FRAMES:
            height, width = (int.from_bytes(content[at : at + 2], "big") for at in (place + 5, place + 7))
            return width, height
        # A marker may be preceded by any number of fill bytes; each segment says its own length.
        place += 1 if marker == 0xFF else 2 + int.from_bytes(content[place + 2 : place + 4], "big")
    return None
