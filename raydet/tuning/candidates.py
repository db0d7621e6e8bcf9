"""What of a validation set enters NMS, computed once by the model and kept as Parquet: a row an image."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from raydet.boxes import Placement, place
from raydet.data.batch import Batch
from raydet.data.index import Index
from raydet.errors import RaydetError
from raydet.postprocess import Candidates
from raydet.training.evaluate import post_prediction, run
from raydet.training.run import Job

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


def collect(
    model: nn.Module, batches: Iterable[Batch], job: Job, rank: int, device: torch.device, say: Callable[[str], Any]
) -> None:
    """Keep the candidates of this rank's images as part-{rank}.parquet in the job's folder.

    Args:
        model: in evaluation mode, on `device`.
        batches: this rank's images.
        job: what is evaluated.
        rank: of this worker.
        device: of the model.
        say: takes a line of progress now and then.
    """
    every = job.recipe.eval.model_copy(update={"score": FLOOR, "multi_label": True, "nms_top_k": None})
    callback = post_prediction(model, every)

    def best(outputs: Any) -> list[Candidates]:
        found = callback.candidates(outputs)
        return [
            Candidates(*(part[one.scores.topk(min(TOP_K, len(one.scores))).indices] for part in one)) for one in found
        ]

    with pq.ParquetWriter(job.folder / f"part-{rank}.parquet", _SCHEMA) as writer:
        preprocessing = job.config.preprocessing
        for row, _, one in run(model, batches, job.val_index, preprocessing, best, device, say):
            boxes, scores, labels, points = (part.cpu().numpy() for part in one)
            values = [[row], [boxes.ravel()], [scores], [labels], [points]]
            arrays = [pa.array(value, field.type) for value, field in zip(values, _SCHEMA, strict=True)]
            writer.write_table(pa.table(arrays, schema=_SCHEMA))


def keep(parts: Path, file: Path) -> None:
    """Join the parts that the ranks have written to one file, which appears whole."""
    tables = [pq.read_table(path) for path in sorted(parts.glob("part-*.parquet"))]
    table = pa.concat_tables(tables).sort_by("row")
    partial = parts / "candidates.parquet"
    pq.write_table(table, partial, compression="zstd")
    file.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(partial, file.with_suffix(".partial"))
    file.with_suffix(".partial").replace(file)


class CandidateSet:
    """The candidates of a validation set.

    Args:
        file: that `keep` wrote.
        index: of the images.
        size: (height, width) of the model's input in pixels.
        resize: how images are fitted into it.

    Raises:
        RaydetError: the file is damaged, or of other images.
    """

    def __init__(self, file: Path, index: Index, size: tuple[int, int], resize: Any):
        try:
            table = pq.read_table(file).combine_chunks()
        except (OSError, pa.ArrowException) as error:
            raise RaydetError(f"{file} cannot be read: {error}; remove it to compute it again") from None
        if table["row"].to_pylist() != list(range(len(index))):
            raise RaydetError(f"{file} is not of the {len(index)} images of the data; remove it to compute it again")
        self.index, self.size, self.resize = index, size, resize
        column = {name: table[name].chunk(0) for name in _SCHEMA.names[1:]}
        self._ends = column["scores"].offsets.to_numpy()
        self._parts = [
            torch.from_numpy(column[name].values.to_numpy().copy()) for name in ("boxes", "scores", "labels", "points")
        ]
        self._parts[0] = self._parts[0].view(-1, 4)

    def __len__(self) -> int:
        return len(self.index)

    def __iter__(self) -> Iterator[tuple[Candidates, Placement]]:
        """Give each image's candidates, best first, and where the image is in the model's input."""
        for row in range(len(self)):
            part = slice(int(self._ends[row]), int(self._ends[row + 1]))
            boxes, scores, labels, points = (values[part] for values in self._parts)
            yield (
                Candidates(boxes, scores, labels.long(), points.long()),
                place(*self.index.size(row), self.size, self.resize),
            )
