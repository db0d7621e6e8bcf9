"""What of a validation set enters NMS, computed once by the model and kept as Parquet: a row an image."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from raydet.boxes import place, xyxy_to_xywh
from raydet.data.index import Index
from raydet.devices import gathered
from raydet.errors import RaydetError
from raydet.evaluation.matching import BoxTable, Ints
from raydet.postprocess import Candidates, PostPrediction
from raydet.predict.predictor import post_prediction
from raydet.store import read_parquet
from raydet.training.job import Run
from raydet.training.loop import on_device
from raydet.training.validation import Validation

FLOOR = 0.001  # candidates have a higher score
TOP_K = 2000  # the best so many of an image

_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("boxes", pa.list_(pa.float32())),  # xyxy of each in turn, in pixels of the model's input
        ("scores", pa.list_(pa.float32())),
        ("labels", pa.list_(pa.int32())),
        ("points", pa.list_(pa.int32())),
    ]
)


def candidates_loop(run: Run) -> bytes | None:
    """Compute the candidates of the validation images.

    Returns:
        A Parquet file of all candidates on rank 0, None on the other ranks.
    """
    model, job = on_device(run), run.job
    every = job.recipe.eval.model_copy(update={"score": FLOOR, "multi_label": True, "nms_top_k": None})
    callback = post_prediction(model, every)

    def best(outputs: Any) -> list[Candidates]:
        found = callback.candidates(outputs)
        return [
            Candidates(*(part[one.scores.topk(min(TOP_K, len(one.scores))).indices] for part in one)) for one in found
        ]

    rows = []
    for row, _, one in Validation.of(run).outputs(model, best):
        boxes, scores, labels, points = (part.cpu().numpy() for part in one)
        values = [[row], [boxes.ravel()], [scores], [labels], [points]]
        arrays = [pa.array(value, field.type) for value, field in zip(values, _SCHEMA, strict=True)]
        rows.append(pa.table(arrays, schema=_SCHEMA))
    parts = gathered(_parquet(pa.concat_tables([_SCHEMA.empty_table(), *rows])))
    return None if parts is None else _parquet(pa.concat_tables(map(read_parquet, parts)).sort_by("row"))


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    content: bytes = sink.getvalue().to_pybytes()
    return content


class CandidateSet:
    """The candidates of a validation set. It can be sent to processes on other nodes.

    Args:
        content: Parquet file, as `candidates_loop` returns it.
        name: path of that file, for messages.
        index: index of the images.
        size: (height, width) of the model's input in pixels.
        resize: how images are fitted into it.

    Raises:
        RaydetError: the file is damaged, or of other images.
    """

    def __init__(self, content: bytes, name: str, index: Index, size: tuple[int, int], resize: Any):
        try:
            table = read_parquet(content).combine_chunks()
        except pa.ArrowException as error:
            raise RaydetError(f"{name} cannot be read: {error}; remove it to compute it again") from None
        if table["row"].to_pylist() != list(range(len(index))):
            raise RaydetError(f"{name} is not of the {len(index)} images of the data; remove it to compute it again")
        column = {name: table[name].chunk(0) for name in _SCHEMA.names[1:]}
        ends = column["scores"].offsets.to_numpy()
        values = [column[name].values.to_numpy() for name in _SCHEMA.names[1:]]
        boxes, scores, labels, points = (torch.from_numpy(value.copy()) for value in values)
        parts = (boxes.view(-1, 4), scores, labels.long(), points.long())
        self.index = index
        self._arguments = (content, name, index, size, resize)
        self._images = [Candidates(*(part[low:high] for part in parts)) for low, high in pairwise(ends.tolist())]
        # In pixels of the original image, as detections are measured.
        original = [
            place(*index.size(row), size, resize).undo(found.boxes.numpy()) for row, found in enumerate(self._images)
        ]
        rows = np.repeat(np.arange(len(index)), np.diff(ends))
        xywh = xyxy_to_xywh(np.concatenate(original).astype(np.float64))
        self._boxes = BoxTable(rows, labels.numpy(), xywh, score=scores.numpy().astype(np.float64))
        self._starts = ends[:-1]
        self._best = [_best_of_each_point(found.points.numpy()) for found in self._images]

    def __reduce__(self) -> tuple[Any, ...]:
        return CandidateSet, self._arguments

    def __len__(self) -> int:
        return len(self.index)

    def __iter__(self) -> Iterator[Candidates]:
        """Give each image's candidates, best first."""
        return iter(self._images)

    def detect(self, callback: PostPrediction) -> tuple[BoxTable, Ints]:
        """Return the detections that NMS leaves, as a validation has them, and their places by image."""
        which, places = [], []
        for start, found, best in zip(self._starts, self._images, self._best, strict=True):
            if callback.multi_label_per_box:
                kept = callback.keep(found).numpy()
            else:
                kept = best[callback.keep(Candidates(*(part[best] for part in found))).numpy()]
            which.append(start + kept)
            places.append(np.arange(len(kept)))
        return self._boxes[np.concatenate(which)], np.concatenate(places)


def _best_of_each_point(points: Ints) -> Ints:
    """Return which candidates are their points' best: the first, as they are the best first."""
    first: Ints = np.unique(points, return_index=True)[1]
    return np.sort(first)
