"""What is wrong with a data set: records that cannot be used, and what may be a mistake."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy.typing as npt

from raydet.errors import RaydetError

OnError = Literal["raise", "skip"]

NAMED = 10  # records that a notice names


def refuse_shares(boxes: npt.NDArray[Any], source: str) -> None:
    """Refuse boxes [n, 4], which should be in pixels, if all look like shares of their images.

    Args:
        boxes: boxes, xyxy.
        source: where the boxes are from, for the message.

    Raises:
        RaydetError: all corners are between 0 and 1, and not all of these are whole numbers.
    """
    if len(boxes) and boxes.min() >= 0 and boxes.max() <= 1 and (boxes % 1).any():
        raise RaydetError(
            f"{source}: all {len(boxes):,} boxes are between 0 and 1: are they shares of the image's width and height? "
            "Here they are expected in pixels: multiply what is across by the width, and what is down by the height"
        )


@dataclass(frozen=True)
class Notice:
    """Something about a data set that may be a mistake. Nothing stops for it, and it is said each time.

    Attributes:
        what: what was noticed, with the number of records, such as "6 images have no label file".
        remedy: what follows from it, or what to do.
        count: number of records.
        records: names of the first of these records.
    """

    what: str
    remedy: str
    count: int
    records: list[str]

    def __str__(self) -> str:
        return f"{self.what}, such as {self.records[0]}: {self.remedy}"


class Problems:
    """Collects what is wrong with a data set.

    Each record that cannot be used stops the work, or is skipped, counted and listed.

    Args:
        on_error: "raise": the first problem stops; "skip": the record is left out and listed.
        max_errors: largest number of problems with "skip"; one more stops.

    Attributes:
        messages: the records that were left out.
        notices: what may be a mistake.
    """

    def __init__(self, on_error: OnError = "raise", max_errors: int = 100):
        self.on_error = on_error
        self.max_errors = max_errors
        self.messages: list[str] = []
        self.notices: list[Notice] = []

    def add(self, message: str) -> None:
        """Report a record that cannot be used; it is left out when this returns.

        Args:
            message: names the file and the record, and says what is wrong with it.

        Raises:
            RaydetError: problems are not to be skipped, or there are too many.
        """
        if self.on_error == "raise":
            raise RaydetError(f"{message}; correct it, or leave such records out with data.on_error=skip")
        self.messages.append(message)
        if len(self.messages) > self.max_errors:
            raise RaydetError(
                f"more than data.max_errors = {self.max_errors} records cannot be used, the last: {message}"
            )

    def notice(self, what: str, records: Sequence[str], remedy: str) -> None:
        """Report records that may be a mistake, if there are any; see `Notice` for the arguments."""
        if records:
            self.notices.append(Notice(what, remedy, len(records), list(records[:NAMED])))
