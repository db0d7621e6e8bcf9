"""Images that end the process which decodes them: too large for the memory, or made to break a decoder.

Ray starts a task whose process has died again, without end. So a task asks how often it was tried before, and from the
third attempt on has its images decoded in a process of its own, one after the other: where that dies, the image it was
given last is named, as any other image that cannot be read.

    python -m raydet.data.probe    decodes what comes on its standard input: a length in 8 bytes, then the file
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

from raydet.errors import RaydetError

_DONE = b"."
_SUSPICIOUS, _HOPELESS = 2, 6  # attempts of a task before this one


def check_attempts(before: int, what: str, images: Sequence[int], read: Callable[[int], bytes]) -> dict[int, str]:
    """Return what is wrong with images by which earlier attempts at a task may have ended: image → why.

    Args:
        before: number of attempts whose process has died.
        what: what the task makes, for messages.
        images: numbers of the images that it decodes.
        read: returns the file of an image.

    Raises:
        RaydetError: too many attempts have ended, and by none of the images alone.
    """
    found = dict.fromkeys(deadly(images, read), "a process that decodes it dies") if before >= _SUSPICIOUS else {}
    if not found and before >= _HOPELESS:
        raise RaydetError(
            f"{what}: {before} processes have died of it, and no image ends one alone: is the memory too small for so "
            "many data tasks at once (scale.data_tasks), or does a transform of your own end its process?"
        )
    return found


def deadly(images: Sequence[int], read: Callable[[int], bytes]) -> list[int]:
    """Return those of some images whose decoding ends a process.

    Args:
        images: numbers of the images, such as rows of an index.
        read: returns the file of an image; one that cannot be read is not deadly.
    """
    left, found = list(images), []
    while left:
        with subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            while left and _decoded(process, left[0], read):
                left.pop(0)
            process.kill()
        if left:
            found.append(left.pop(0))
    return found


def _decoded(process: subprocess.Popen[bytes], image: int, read: Callable[[int], bytes]) -> bool:
    """Has the process survived an image?"""
    try:
        content = read(image)
    except RaydetError:
        return True
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(len(content).to_bytes(8, "big") + content)
        process.stdin.flush()
    except BrokenPipeError:
        return False
    return process.stdout.read(1) == _DONE


def _main() -> None:
    from raydet.data.render import decode

    while length := sys.stdin.buffer.read(8):
        with suppress(RaydetError):
            decode(sys.stdin.buffer.read(int.from_bytes(length, "big")), "", max_pixels=sys.maxsize)
        sys.stdout.buffer.write(_DONE)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    _main()
