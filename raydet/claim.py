"""One command at a time writes into the folder of a run or a sweep."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raydet.errors import RaydetError

LOCK = ".lock"  # file in the folder; it stays there, and only the system's lock on it means something
_LOOK_EVERY_S = 0.5


@contextmanager
def claimed(folder: Path, what: str, wait_s: float = 0.0) -> Iterator[None]:
    """Hold a folder against other processes, until the end or the death of this one.

    File systems of a network without locks give no such protection: there nothing is held and nothing refused.

    Args:
        folder: to hold; made if need be.
        what: this command, for the message to others.
        wait_s: how long to wait for another process that holds it.

    Raises:
        RaydetError: another process holds it, or the folder cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+")
    except OSError as error:
        raise RaydetError(f"storage: {folder} cannot be made or written ({error.strerror})") from None
    with file:
        deadline = time.monotonic() + wait_s
        while not _locked(file.fileno()):
            if time.monotonic() >= deadline:
                file.seek(0)
                raise RaydetError(
                    f"{folder} is in use by another command ({file.read().strip() or 'which does not say its name'}): "
                    "wait for its end, or choose another name=…"
                )
            time.sleep(_LOOK_EVERY_S)
        file.truncate(0)
        file.write(f"{what}, process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%F %T')}\n")
        file.flush()
        yield


def _locked(file: int) -> bool:
    """Lock a file; return whether that is done, or cannot be done here."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # no locks on this file system
        return True
    return True
