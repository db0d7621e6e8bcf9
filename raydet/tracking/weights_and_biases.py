"""A run on Weights & Biases: recipe, metrics, pictures with boxes, AP of the classes, and checkpoints if asked for.

Key and mode come from the environment, as W&B documents them: WANDB_API_KEY, WANDB_MODE=offline and so on. What fails
there is said once, and stops no training.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raydet.recipe import Recipe
from raydet.reports.curves import plot
from raydet.runs import checkpoint
from raydet.visualization import Array, Shown

_ID = "wandb_id"  # file in the run's folder
_PATIENCE_S = 600.0  # for what is still to be sent at the end; it stays on the disk for `wandb sync`
_CLASSES = "val/AP@0.50:0.95_"


class WandbRun:
    """A run, which a training that is resumed goes on with.

    Args:
        recipe: the settings.
        folder: folder of the run.
        say: takes a line when W&B fails.
    """

    def __init__(self, recipe: Recipe, folder: Path, say: Callable[[str], Any]):
        self._say, self._recipe, self._folder = say, recipe, folder
        self._run: Any = None
        self._try(self._start)

    def metrics(self, values: Mapping[str, float]) -> None:
        """Send a line of metrics.jsonl; what a validation found of each class is a table besides."""
        if self._run is None:
            return
        sent: dict[str, Any] = dict(values)
        classes = [[key.removeprefix(_CLASSES), value] for key, value in values.items() if key.startswith(_CLASSES)]
        if classes:
            from wandb import Table

            sent["val/AP_of_classes"] = Table(columns=["class", "AP@0.50:0.95"], data=classes)
        self._try(lambda: self._run.log(sent))

    def pictures(self, name: str, images: Sequence[Shown], class_names: Sequence[str], at: Mapping[str, float]) -> None:
        """Send images whose boxes can be switched on and off there."""
        if self._run is not None:
            self._try(lambda: self._run.log({**at, name: [_image(shown, class_names) for shown in images]}))

    def finish(self, *, failed: bool) -> None:
        """Send the curves and, if the recipe has it so, the best checkpoint; end the run."""
        if self._run is not None and not failed:
            self._try(self._leave)
        if self._run is not None:
            self._try(lambda: self._run.finish(exit_code=int(failed)))

    def _start(self) -> None:
        import wandb

        note, track = self._folder / _ID, self._recipe.track
        if not note.is_file():
            note.write_text(secrets.token_hex(8))
        self._run = wandb.init(
            project=track.wandb_project,
            group=track.wandb_group,
            name=self._recipe.name,
            id=note.read_text(),
            resume="allow",
            dir=self._folder,
            config=self._recipe.model_dump(mode="json"),
            settings=wandb.Settings(silent=True, console="off", finish_timeout=_PATIENCE_S, finish_timeout_raises=True),
        )
        for metrics, axis in (("train/*", "step"), ("perf/*", "step"), ("valid/*", "step"), ("val/*", "epoch")):
            self._run.define_metric(metrics, step_metric=axis)

    def _leave(self) -> None:
        import wandb

        try:
            curves = plot(self._folder)
        except Exception as error:  # a picture less
            self._say(f"warning: the curves are not on Weights & Biases: {error}")
        else:
            self._run.log({"curves": wandb.Image(str(curves))})
        if self._recipe.track.wandb_checkpoints:
            artifact = wandb.Artifact(f"{self._run.id}-best", type="model")
            best = checkpoint.find(self._folder)
            for file in (checkpoint.CONFIG, checkpoint.WEIGHTS):
                artifact.add_file(str(best / file))
            self._run.log_artifact(artifact)

    def _try(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # whatever it is, the training is worth more
            self._run = None
            self._say(
                f"warning: Weights & Biases failed, the training goes on without: {type(error).__name__}: {error}"
            )


def _image(shown: Shown, class_names: Sequence[str]) -> Any:
    import wandb

    labels = dict(enumerate(class_names))
    boxes = {"ground_truth": {"box_data": _boxes(shown.truth_boxes, shown.truth_labels), "class_labels": labels}}
    if shown.boxes is not None and shown.labels is not None and shown.scores is not None:
        found = _boxes(shown.boxes, shown.labels)
        for box, score in zip(found, shown.scores.tolist(), strict=True):
            box |= {"box_caption": f"{class_names[box['class_id']]} {score:.2f}", "scores": {"score": score}}
        boxes["predictions"] = {"box_data": found, "class_labels": labels}
    pixels = np.ascontiguousarray(shown.image[..., ::-1])
    return wandb.Image(pixels, caption=shown.caption, boxes=boxes, file_type="jpg")


def _boxes(boxes: Array, labels: Array) -> list[dict[str, Any]]:
    return [
        {
            "position": dict(zip(("minX", "minY", "maxX", "maxY"), box, strict=True)),
            "domain": "pixel",
            "class_id": label,
        }
        for box, label in zip(boxes.astype(float).tolist(), labels.tolist(), strict=True)
    ]
