"""Ends a worker that hangs, so that Ray replaces it."""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

EXIT_CODE = 70


class Watchdog:
    """A context manager whose thread ends the process where nothing has been done for too long.

    A collective operation waits for ranks that hang for ever, a data task for a file server that does not answer; Ray
    takes both for work.

    Args:
        seconds: without a sign of life.
        report: file for the stacks of all threads, which say where it hangs.
        say: takes a line on that.
    """

    def __init__(self, seconds: float, report: Path, say: Callable[[str], Any]):
        self._seconds, self._report, self._say = seconds, report, say
        self._seen = time.monotonic()
        self._ended = threading.Event()

    def __enter__(self) -> Watchdog:
        self.beat()
        threading.Thread(target=self._watch, name="raydet-watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._ended.set()

    def beat(self) -> None:
        """Give a sign of life."""
        self._seen = time.monotonic()

    def _watch(self) -> None:
        while (left := self._seen + self._seconds - time.monotonic()) > 0:
            if self._ended.wait(left):
                return
        try:
            with self._report.open("a") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            self._say(
                f"warning: a worker has done nothing for {self._seconds:.0f} s (scale.hang_minutes) and ends itself; "
                f"{self._report} says where it hung"
            )
        finally:
            os._exit(EXIT_CODE)  # nothing else ends a thread that waits in a collective operation
