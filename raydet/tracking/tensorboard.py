"""A run's metrics and pictures as TensorBoard's event files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from raydet.visualization import Shown, sheet

FOLDER = "tensorboard"  # in the run's


class TensorBoardRun:
    """Event files of a run; those of a training that is resumed take the place of what it does again.

    Args:
        folder: folder of the run.
        say: takes a line when they cannot be written.
    """

    def __init__(self, folder: Path, say: Callable[[str], Any]):
        self._folder, self._say = folder / FOLDER, say
        self._writer: Any = None
        self._failed = False

    def metrics(self, values: Mapping[str, float]) -> None:
        """Write a line of metrics.jsonl."""
        step = int(values["step"])
        self._write(step, lambda writer: [writer.add_scalar(k, v, step) for k, v in values.items() if k != "step"])

    def pictures(self, name: str, images: Sequence[Shown], class_names: Sequence[str], at: Mapping[str, float]) -> None:
        """Write images with their boxes, as one picture."""
        step = int(at["step"])
        picture = sheet(images, class_names)[..., ::-1]  # as RGB
        self._write(step, lambda writer: writer.add_image(name, picture, step, dataformats="HWC"))

    def finish(self, *, failed: bool) -> None:
        """Close the file; a training that failed leaves what it has written."""
        if self._writer is not None:
            self._writer.close()

    def _write(self, step: int, action: Callable[[Any], Any]) -> None:
        if self._failed:
            return
        try:
            if self._writer is None:
                from tensorboardX import SummaryWriter

                self._writer = SummaryWriter(str(self._folder), purge_step=step)
            action(self._writer)
        except Exception as error:  # whatever it is, the training is worth more
            self._failed = True
            self._say(f"warning: TensorBoard's files failed, the training goes on without: {error}")
