"""Records of a data set that cannot be used: each stops the work, or is skipped, counted and listed."""

from __future__ import annotations

from typing import Literal

from raydet.errors import RaydetError

OnError = Literal["raise", "skip"]


class Problems:
    """Collects what is wrong with a data set.

    Args:
        on_error: "raise": the first problem stops; "skip": the record is left out and listed.
        max_errors: with "skip", the most problems that are borne.
    """

    def __init__(self, on_error: OnError = "raise", max_errors: int = 100):
        self.on_error = on_error
        self.max_errors = max_errors
        self.messages: list[str] = []

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
