"""Detection in pictures, with a checkpoint and nothing else."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import torch
from torch import nn

from raydet.boxes import coco_results, place, xyxy_to_xywh
from raydet.data.header import MAX_PIXELS
from raydet.data.render import letterbox
from raydet.devices import pick_device
from raydet.errors import RaydetError
from raydet.models import Detector
from raydet.postprocess import PostPrediction
from raydet.predict.sources import Image, Picture, Source, in_memory, open_source
from raydet.recipe import Eval
from raydet.runs import checkpoint
from raydet.runs.checkpoint import Config
from raydet.runs.mirror import opened
from raydet.visualization import draw_boxes, write_picture, write_video

logger = logging.getLogger(__name__)

METADATA = "raydet"  # key in an ONNX file that has what a checkpoint's config.json says
SHOWN_SCORE = 0.25  # below it are detections that an evaluation counts, but nobody wants to see


@dataclass(frozen=True, eq=False)
class Detections:
    """What was found in an image, best first.

    Attributes:
        boxes: float32 [n, 4] xyxy in pixels of the image.
        scores: float32 [n] scores, descending.
        labels: int64 [n] classes.
        config: config of the model, with the names and ids of the classes.
        picture: the image; a file is read again when its pixels are asked for.
    """

    boxes: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    config: Config = field(repr=False)
    picture: Picture = field(repr=False)

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def names(self) -> tuple[str, ...]:
        """Class name of each."""
        return tuple(self.config.class_names[label] for label in self.labels)

    @property
    def image(self) -> Image:
        """The image, uint8 [H, W, 3] RGB."""
        return np.ascontiguousarray(self.picture.read()[:, :, ::-1])

    def draw(self) -> Image:
        """Return the image with the boxes, uint8 [H, W, 3] RGB."""
        return np.ascontiguousarray(self.draw_bgr()[:, :, ::-1])

    def draw_bgr(self) -> Image:
        """Return the same in OpenCV's order of colours."""
        labels, scores = self.labels.tolist(), self.scores.tolist()
        return draw_boxes(self.picture.read(), self.boxes, labels, self.config.class_names, scores)

    def save(self, path: str | Path) -> None:
        """Write the image with the boxes, in the format that the name's ending says.

        Raises:
            RaydetError: it cannot be written, or would replace the image.
        """
        _check_other(path, self.picture.name)
        write_picture(Path(path), self.draw_bgr())

    def show(self) -> None:
        """Open the image with the boxes in a viewer, or below a notebook's cell."""
        PIL.Image.fromarray(self.draw()).show()

    def to_supervision(self) -> Any:
        """Return them as `supervision.Detections`, with the names of the classes under `class_name`.

        Raises:
            RaydetError: supervision is not installed.
        """
        try:
            from supervision import Detections as Converted
        except ImportError:
            raise RaydetError("supervision is not installed: pip install supervision") from None
        data = {"class_name": np.array(self.names, dtype=str)}
        return Converted(xyxy=self.boxes, confidence=self.scores, class_id=self.labels, data=data)

    def to_coco(self, image_id: int | None = None) -> list[dict[str, Any]]:
        """Return them as COCO's results, in the category ids of the data set the model was trained on.

        Args:
            image_id: id of the image; None: the number that its file is named by, as COCO's are, or 0.
        """
        if image_id is None:
            stem = Path(self.picture.name).stem
            image_id = int(stem) if stem.isdecimal() else 0
        # Coordinates to a thousandth of a pixel: what is beyond is noise, and fills the file.
        boxes, scores = (np.asarray(part, np.float64) for part in (xyxy_to_xywh(self.boxes), self.scores))
        categories = (self.config.category_ids[label] for label in self.labels)
        return coco_results(repeat(image_id, len(self)), categories, boxes.round(3), scores.round(5))


class Found(list[Detections]):
    """Detections of many images, in order.

    Attributes:
        failed: images that could not be read, which are left out: name → what is wrong.
    """

    def __init__(self, found: Iterable[Detections], failed: Mapping[str, str]):
        super().__init__(found)
        self.failed = dict(failed)


class DetectionStream:
    """Detections of a source, made as they are asked for; each iteration begins anew.

    Args:
        predictor: the model that detects.
        source: source of the pictures.
        thresholds: what counts as a detection.
        batch_size: number of images in a batch.

    Attributes:
        source: source of the pictures.
        failed: images of the last iteration that could not be read: name → what is wrong.
    """

    def __init__(self, predictor: Predictor, source: Source, thresholds: Eval, batch_size: int):
        self.source = source
        self.failed: dict[str, str] = {}
        self._predictor = predictor
        self._thresholds = thresholds
        # Those who watch a camera do not wait for a batch.
        self._batch_size = 1 if any(video.is_camera for video in source.videos) else batch_size

    def __iter__(self) -> Iterator[Detections]:
        """Yield what is found; an image that cannot be read is left out with a warning, a single one is an error.

        Raises:
            RaydetError: the one image cannot be read.
        """
        for picture, image, found in self.found():
            yield replace(found, picture=in_memory(picture.name, image))

    def found(self) -> Iterator[tuple[Picture, Image, Detections]]:
        """Yield each picture, its pixels in BGR and its detections, which do not hold the pixels; errors as above."""
        self.failed.clear()
        pictures = self._read()
        while batch := list(islice(pictures, self._batch_size)):
            for (picture, image), found in zip(batch, self._predictor.detect(batch, self._thresholds), strict=True):
                yield picture, image, found

    def save(self, path: str | Path) -> None:
        """Write a video, .mp4, with the boxes on its frames: of the same size, and as many a second.

        See `raydet.visualization.write_video` for odd sizes.

        Raises:
            RaydetError: the source is no single video, or the file cannot be written or would replace it.
        """
        if len(self.source.parts) != 1 or not self.source.videos:
            raise RaydetError(f"{path}: only the detections of one video are saved as a video")
        _check_other(path, self.source.videos[0].name)
        write_video(Path(path), (found.draw_bgr() for found in self), self.source.videos[0].fps)

    def _read(self) -> Iterator[tuple[Picture, Image]]:
        for picture in self.source:
            try:
                yield picture, picture.read()
            except RaydetError as error:
                if self.source.is_single:
                    raise
                self.failed[picture.name] = str(error)
                logger.warning("left out: %s", error)


class Predictor:
    """A trained model with what it needs to detect.

    Args:
        model: the model, with its weights loaded.
        config: config of its checkpoint.
        device: device to run on.
    """

    def __init__(self, model: nn.Module, config: Config, device: torch.device):
        self.model = (model.fuse() if isinstance(model, Detector) else model.eval()).to(device)
        self.config = config
        self.device = device

    def predict(
        self,
        source: Any,
        conf: float | None = None,
        iou: float | None = None,
        batch_size: int = 16,
        max_pixels: int = MAX_PIXELS,
    ) -> Detections | Found | DetectionStream:
        """Detect in anything that shows something.

        Args:
            source: path of an image, a folder (and those below), a pattern such as `photos/*.jpg`, an address http://…
                or https://… of an image or a video, path of a video, number of a camera, array uint8 [H, W, 3] in RGB
                (an image of OpenCV's is BGR: give `image[:, :, ::-1]`), PIL image, tensor uint8 [3, H, W] or
                [B, 3, H, W] in RGB, or a list of any of these. What a camera noted of its orientation is applied to
                files and PIL images.
            conf: lowest score of a detection, in place of the checkpoint's.
            iou: IoU threshold of NMS, in place of the checkpoint's.
            batch_size: number of images in a batch.
            max_pixels: largest image file to decode, in pixels; a larger image cannot be read.

        Returns:
            Of one image its `Detections`; of many a list of them, in which `failed` says which files could not be
            read; of a video, or a list with one in it, a `DetectionStream`, which reads frames as it is iterated.

        Raises:
            RaydetError: there is nothing of the kind, or the one image cannot be read.
        """
        stream = self.stream(source, conf, iou, batch_size, max_pixels)
        if stream.source.videos:
            return stream
        if stream.source.is_single:
            return next(iter(stream))
        found = [detections for _, _, detections in stream.found()]  # whose pixels would fill the memory
        return Found(found, stream.failed)

    def stream(
        self,
        source: Any,
        conf: float | None = None,
        iou: float | None = None,
        batch_size: int = 16,
        max_pixels: int = MAX_PIXELS,
    ) -> DetectionStream:
        """Return the detections of any number of images or frames, made as they are asked for.

        Arguments and errors are those of `predict`.
        """
        if batch_size < 1:
            raise RaydetError(f"batch_size is {batch_size}: it must be at least 1")
        opened = source if isinstance(source, Source) else open_source(source, max_pixels)
        return DetectionStream(
            self, opened, with_thresholds(self.config.thresholds, conf, iou, self._has_nms()), batch_size
        )

    def _has_nms(self) -> bool:
        return post_prediction(self.model, self.config.thresholds).has_nms

    def fit(self, image: Image) -> Image:
        """Return an image [H, W, 3] BGR fitted into the model's input, uint8 [h, w, 3] BGR."""
        return letterbox(image, self.config.image_size, self.config.preprocessing.resize)

    def detect(self, batch: Sequence[tuple[Picture, Image]], thresholds: Eval) -> list[Detections]:
        """Detect in a batch of pictures, each with its pixels, uint8 [H, W, 3] BGR."""
        sizes = [(image.shape[1], image.shape[0]) for _, image in batch]
        rows = self.detect_fitted([self.fit(image) for _, image in batch], sizes, thresholds)
        return [
            Detections(found[:, :4], found[:, 4], found[:, 5].astype(np.int64), self.config, picture)
            for (picture, _), found in zip(batch, rows, strict=True)
        ]

    @torch.no_grad()
    def detect_fitted(
        self, inputs: Sequence[Image], sizes: Sequence[tuple[int, int]], thresholds: Eval
    ) -> list[npt.NDArray[np.float32]]:
        """Detect in a batch of images that `fit` made.

        Args:
            inputs: images that `fit` made.
            sizes: (width, height) of each image before `fit`.
            thresholds: what counts as a detection.

        Returns:
            For each [n, 6]: x1, y1, x2, y2 in pixels of the image before, score, class; best first.
        """
        batch = torch.from_numpy(np.stack(inputs)).permute(0, 3, 1, 2).to(self.device)
        outputs = self.model(self.config.preprocessing(batch))
        results = []
        for (width, height), found in zip(sizes, post_prediction(self.model, thresholds)(outputs), strict=True):
            rows = found.float().cpu().numpy()
            placement = place(width, height, self.config.image_size, self.config.preprocessing.resize)
            rows[:, :4] = placement.undo(rows[:, :4])
            results.append(rows)
        return results


class OnnxPredictor(Predictor):
    """A model that `raydet export` wrote, run by onnxruntime: on a GPU where onnxruntime-gpu is installed.

    Args:
        content: content of the file.
        name: name of the file, for messages.

    Raises:
        RaydetError: onnxruntime is not installed, or the file is damaged or not of `raydet export`.
    """

    def __init__(self, content: bytes, name: str):
        try:
            import onnxruntime
        except ImportError:
            raise RaydetError(f"{name}: onnxruntime is not installed: pip install 'raydet[export]'") from None
        try:
            self._session = onnxruntime.InferenceSession(content, providers=onnxruntime.get_available_providers())
            about = self._session.get_modelmeta().custom_metadata_map[METADATA]
        except KeyError:
            raise RaydetError(f"{name}: not an ONNX file of `raydet export`") from None
        except Exception as error:  # onnxruntime has many
            raise RaydetError(f"{name} is damaged: {str(error).splitlines()[0]}") from None
        self.config = checkpoint.config_of(json.loads(about), name)
        self._name = name

    def _has_nms(self) -> bool:
        return True  # if it has not, another IoU is refused all the same: it is not that of the file

    def detect_fitted(
        self, inputs: Sequence[Image], sizes: Sequence[tuple[int, int]], thresholds: Eval
    ) -> list[npt.NDArray[np.float32]]:
        """Detect in a batch of images that `fit` made; see `Predictor`.

        Raises:
            RaydetError: the thresholds are not those of the file, but for a higher score.
        """
        inside = self.config.thresholds
        if thresholds.iou != inside.iou or thresholds.score < inside.score:
            raise RaydetError(
                f"{self._name} was exported with score {inside.score} and IoU {inside.iou}: the score may be higher; "
                "export it again for others"
            )
        batch = np.ascontiguousarray(np.stack(inputs)[..., ::-1].transpose(0, 3, 1, 2))  # RGB
        outputs = self._session.run(None, {self._session.get_inputs()[0].name: batch})
        if len(outputs) == 1:
            rows = [outputs[0][outputs[0][:, 0] == number, 1:] for number in range(len(inputs))]
        else:
            found = [part[..., None] if part.ndim == 2 else part for part in outputs[1:]]
            every = np.concatenate(found, axis=2, dtype=np.float32)
            rows = [image[:count] for image, count in zip(every, outputs[0][:, 0], strict=True)]
        results = []
        for (width, height), found in zip(sizes, rows, strict=True):
            kept = found[found[:, 4] > thresholds.score]
            placement = place(width, height, self.config.image_size, self.config.preprocessing.resize)
            kept[:, :4] = placement.undo(kept[:, :4])
            results.append(kept)
        return results


def load(
    path: str | Path, device: str | None = None, model: nn.Module | None = None, *, trust_code: bool = False
) -> Predictor:
    """Load a checkpoint, the best one of a run, or what `raydet export` wrote.

    Args:
        path: path of a checkpoint, of the folder of a run, or of an ONNX file.
        device: device such as "cuda:1" or "cpu"; None: the first GPU, or without one the CPU. It has no meaning for an
            ONNX file.
        model: a detector of your own, where the checkpoint is of one.
        trust_code: in its place, run the `package.module:function` that the checkpoint names as its model.

    Raises:
        RaydetError: there is no checkpoint, it is damaged, or it names code that is not trusted.
    """
    with opened(path) as local:
        if local.suffix == ".onnx":
            try:
                return OnnxPredictor(local.read_bytes(), str(path))
            except OSError as error:
                raise RaydetError(f"{path}: cannot be read ({error.strerror})") from None
        folder = checkpoint.find(local)
        config = checkpoint.read_config(folder)
        return Predictor(checkpoint.load_model(folder, config, model, trust_code), config, pick_device(device))


def _check_other(path: str | Path, source: str) -> None:
    """Raise RaydetError where a file would replace what was detected in."""
    if Path(path).exists() and Path(source).exists() and Path(path).samefile(source):
        raise RaydetError(f"{source} is what was detected in: save it under another name")


def shown_score(thresholds: Eval) -> float:
    """Return the lowest score that people want to see: not all that an evaluation counts, unless tuned to be higher."""
    return max(SHOWN_SCORE, thresholds.score)


def with_thresholds(thresholds: Eval, conf: float | None, iou: float | None, has_nms: bool) -> Eval:
    """Return thresholds with another lowest score or IoU, where they are given.

    Raises:
        RaydetError: one is no share, or there is an IoU for a model without NMS.
    """
    if iou is not None and not has_nms:
        raise RaydetError(f"iou: the model has no NMS, so that {iou:g} changes nothing: leave it out")
    given = {name: value for name, value in (("score", conf), ("iou", iou)) if value is not None}
    for name, value in given.items():
        if not 0 <= value <= 1:
            raise RaydetError(f"{name}: {value} is not between 0 and 1")
    return thresholds.model_copy(update=given)


def post_prediction(model: Any, thresholds: Eval) -> PostPrediction:
    """Return the model's post-prediction callback with the thresholds of a recipe."""
    callback: PostPrediction = model.get_post_prediction_callback(
        conf=thresholds.score,
        iou=thresholds.iou,
        max_predictions=thresholds.max_detections,
        multi_label_per_box=thresholds.multi_label,
        class_agnostic_nms=thresholds.class_agnostic,
        nms_top_k=thresholds.nms_top_k,
    )
    return callback
