"""Detection in any number of images on Ray: what is done is kept, and only the rest is done again.

    {out}/manifest.json         what is detected with which weights and thresholds; another start must agree with it
    {out}/part-00000.parquet …  a row for each of the next images in the order of their names: file, width, height,
                                boxes (xyxy in pixels), scores, labels, names, error (why it could not be read, or null)
    {out}/errors.json           the images that could not be read, where there are any
    {out}/detections.json       with form="coco": COCO's results

A part is written aside and renamed: one that is there is whole, and is not made again.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raydet.boxes import coco_results, xyxy_to_xywh
from raydet.data.header import MAX_PIXELS
from raydet.data.probe import check_attempts
from raydet.data.problems import Problems
from raydet.data.scan import IMAGE_SUFFIXES, list_images
from raydet.errors import RaydetError, user_error
from raydet.store import Store, read_parquet

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import nn

    from raydet.recipe import Eval
    from raydet.runs.checkpoint import Config

MANIFEST, RESULTS, ERRORS = "manifest.json", "detections.json", "errors.json"
SAY_EVERY_S = 5.0
FORMS = ("parquet", "coco")
_THRESHOLDS = {"score", "iou", "nms_top_k", "max_detections", "multi_label", "class_agnostic"}
# Reads at once by an actor: an object store takes tens of milliseconds to begin to answer.
_READERS = 16
# CPUs that an actor reserves: all CPUs have one, and something is left for what else Ray runs.
_ACTOR_CPUS = 0.9
_SCHEMA = pa.schema(
    [
        ("file", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("boxes", pa.list_(pa.list_(pa.float32(), 4))),
        ("scores", pa.list_(pa.float32())),
        ("labels", pa.list_(pa.int32())),
        ("names", pa.list_(pa.string())),
        ("error", pa.string()),
    ]
)


@dataclass(frozen=True)
class BatchPredicted:
    """What is in a folder of detections.

    Attributes:
        images: number of images that were given, those that could not be read included.
        failed: number of images that could not be read.
        done: number of images of this start; the others were done before.
        seconds: time that it took.
        out: folder of the detections.
    """

    images: int
    failed: int
    done: int
    seconds: float
    out: str

    def __str__(self) -> str:
        new = f"{self.done:,} in {self.seconds:.1f} s" if self.done else "all were done before"
        failed = f"; {self.failed:,} could not be read: {ERRORS}" if self.failed else ""
        return f"{self.images:,} images, {new}{failed}; detections: {self.out}"


@dataclass(frozen=True)
class _PredictJob:
    """What the actors get, once a node."""

    model: Any
    config: Config
    thresholds: Eval
    source: Store
    files: Sequence[str]
    out: Store
    shard_images: int
    batch_size: int
    max_pixels: int

    def part(self, number: int) -> Sequence[str]:
        """Return the files of a part."""
        return self.files[number * self.shard_images : (number + 1) * self.shard_images]


def batch_predict(
    checkpoint: str | Path,
    source: str,
    out: str,
    *,
    model: nn.Module | None = None,
    trust_code: bool = False,
    form: str = "parquet",
    conf: float | None = None,
    iou: float | None = None,
    batch_size: int = 16,
    shard_images: int = 128,
    actors: int | None = None,
    max_pixels: int = MAX_PIXELS,
    verbose: bool = False,
    say: Callable[[str], Any] = print,
) -> BatchPredicted:
    """Detect in all images below a folder, or go on where that was interrupted.

    Args:
        checkpoint: folder of a checkpoint, or of a run, whose best checkpoint is taken.
        source: folder of images, a URI or a path that all nodes share.
        out: folder for the detections, a URI or a path that all nodes share.
        model: a detector of your own, where the checkpoint is of one.
        trust_code: in its place, run the `package.module:function` that the checkpoint names as its model.
        form: "parquet", or "coco": COCO's results besides.
        conf: lowest score of a detection; None: the checkpoint's, but at least 0.25.
        iou: IoU threshold of NMS, in place of the checkpoint's.
        batch_size: number of images in a batch.
        shard_images: number of images in a file of detections, which is what each actor loses when it is killed.
        actors: number of models at once; None: one for each GPU, or without GPUs for each CPU.
        max_pixels: largest image to decode, in pixels; a larger image cannot be read.
        verbose: let Ray print what its actors print.
        say: takes each line of progress.

    Raises:
        RaydetError: a number is below 1, there are no images, `out` holds detections of others, or cannot be written.
    """
    import ray
    import ray.data

    from raydet.cluster import check_kept, connect
    from raydet.predict.predictor import post_prediction, shown_score, with_thresholds
    from raydet.recipe import Scale
    from raydet.runs import checkpoint as checkpoints
    from raydet.runs.mirror import opened

    if form not in FORMS:
        raise RaydetError(f"--format {form}: it is {' or '.join(FORMS)}")
    for name, value in (("batch_size", batch_size), ("shard_images", shard_images), ("actors", actors)):
        if value is not None and value < 1:
            raise RaydetError(f"{name} is {value}: it must be at least 1")
    check_kept(out, "OUT")
    began = time.monotonic()
    with opened(checkpoint) as local:
        folder = checkpoints.find(local)
        config = checkpoints.read_config(folder)
        model = checkpoints.load_model(folder, config, model, trust_code)
    conf = shown_score(config.thresholds) if conf is None else conf
    has_nms = post_prediction(model, config.thresholds).has_nms
    thresholds = with_thresholds(config.thresholds, conf, iou, has_nms)
    images, target = Store(source), Store(out)
    problems = Problems("skip", sys.maxsize)
    listed = list_images(images, "", problems)
    for told in (*problems.messages, *problems.notices):
        say(f"warning: {told}")
    if not listed:
        raise RaydetError(f"{source}: no images in it ({', '.join(IMAGE_SUFFIXES)})")
    manifest = {
        "source": images.root,
        "images": len(listed),
        "listing": hashlib.sha256(json.dumps(list(listed.items())).encode()).hexdigest()[:16],  # names and sizes
        "weights": checkpoints.read_json(folder / checkpoints.CONFIG)["files"][checkpoints.WEIGHTS]["crc32"],
        **thresholds.model_dump(include=_THRESHOLDS),
        "shard_images": shard_images,
    }
    there = _open(target, manifest)
    job = _PredictJob(model, config, thresholds, images, list(listed), target, shard_images, batch_size, max_pixels)
    parts = range(-(-len(listed) // shard_images))
    waiting = [number for number in parts if _name(number) not in there]
    done = 0
    if waiting:
        known = len(listed) - sum(len(job.part(number)) for number in waiting)
        if known:
            say(f"{known:,} of {len(listed):,} images are done already")
        if not verbose:
            logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what it says of errors, we say in a line
        with ExitStack() as stack:
            if connect(Scale(), verbose):
                stack.callback(ray.shutdown)
            done = _run(job, waiting, actors, known, say)
    failed = _finish(job, len(parts), form)
    return BatchPredicted(len(listed), failed, done, time.monotonic() - began, target.root)


def _open(out: Store, ours: dict[str, Any]) -> set[str]:
    """Return the names of the files that the folder has; a new one gets the manifest.

    Raises:
        RaydetError: the folder holds something else.
    """
    there = set(out.files()) if out.kind() else set()
    if MANIFEST in there:
        theirs = json.loads(out.text(MANIFEST))
        different = [
            f"{key}: {theirs.get(key)} there, {new} here" for key, new in ours.items() if theirs.get(key) != new
        ]
        if different:
            raise RaydetError(
                f"{out.root} holds detections of other images or settings ({'; '.join(different)}): "
                "choose another folder"
            )
    elif any(name.endswith((".parquet", ".json")) for name in there):
        raise RaydetError(f"{out.root} holds other files, such as {min(there)}: choose another folder")
    else:
        out.write(MANIFEST, json.dumps(ours, indent=1).encode())
    return there


def _run(job: _PredictJob, numbers: Sequence[int], actors: int | None, known: int, say: Callable[[str], Any]) -> int:
    """Make parts in actors of Ray Data, and return the number of their images."""
    import ray
    import ray.data

    resources = ray.cluster_resources()
    has_gpu = resources.get("GPU", 0) >= 1
    count = min(len(numbers), actors or max(1, int(resources["GPU" if has_gpu else "CPU"])))
    say(f"{len(job.files) - known:,} images, {count} model(s), each with {'a GPU' if has_gpu else 'a CPU'}")
    # A block for each part, made here: tasks that make them would wait for the CPUs that the actors have.
    dataset = ray.data.from_items([{"number": number} for number in numbers], override_num_blocks=len(numbers))
    dataset = dataset.map_batches(
        _Detector,
        fn_constructor_kwargs={"job": ray.put(job), "attempts": ray.remote(num_cpus=0)(_Attempts).remote()},
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=_ACTOR_CPUS,
        num_gpus=int(has_gpu),
        compute=ray.data.ActorPoolStrategy(size=count),
    )
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    done = failed = 0
    began = said = time.monotonic()
    try:
        for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            for row in block.to_pylist():
                if row["error"]:
                    raise RaydetError(row["error"])
                done, failed = done + row["images"], failed + row["failed"]
            if time.monotonic() - said > SAY_EVERY_S:
                said = time.monotonic()
                left_out = f", {failed:,} could not be read" if failed else ""
                say(f"{known + done:,} of {len(job.files):,} images, {done / (said - began):.1f} images/s{left_out}")
    except Exception as error:
        raise user_error(error) or error from None
    return done


class _Attempts:
    """An actor: counts how often each part was begun; the actors that make parts may die."""

    def __init__(self) -> None:
        self._begun: Counter[int] = Counter()

    def begin(self, number: int) -> int:
        """Return how often a part was begun before."""
        self._begun[number] += 1
        return self._begun[number] - 1


class _Detector:
    """An actor: holds the model, and makes parts."""

    def __init__(self, job: Any, attempts: Any):
        import cv2
        import ray
        import torch

        from raydet.predict.predictor import Predictor

        cv2.setNumThreads(0)  # images are read side by side: one thread each
        self.job: _PredictJob = ray.get(job)
        self.attempts = attempts
        device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
        self.predictor = Predictor(self.job.model, self.job.config, device)

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """Make the parts whose numbers are in a batch."""
        import ray

        for number in batch["number"].to_pylist():
            rows, message, files = [], "", self.job.part(number)
            try:
                before, what = ray.get(self.attempts.begin.remote(number)), f"part {number}, from {files[0]} on"
                deadly = check_attempts(before, what, range(len(files)), partial(self._content, files))
                rows = self._rows(files, {files[image]: reason for image, reason in deadly.items()})
                self.job.out.write(_name(number), _encode(rows))
            except RaydetError as error:  # Ray would add its own words to the message
                message = str(error)
            failed = sum(row["error"] is not None for row in rows)
            yield pa.table({"images": [len(rows)], "failed": [failed], "error": [message]})

    def _content(self, files: Sequence[str], number: int) -> bytes:
        return self.job.source.read(files[number])

    def _rows(self, files: Sequence[str], failed: Mapping[str, str]) -> list[dict[str, Any]]:
        """Detect in files, but for those that have failed; return the rows of their part."""
        size = self.job.batch_size
        batches = [files[first : first + size] for first in range(0, len(files), size)]
        rows: list[dict[str, Any]] = []
        with ThreadPoolExecutor(_READERS) as readers:
            following = [readers.submit(self._read, file, failed) for file in batches[0]]
            for batch, after in zip(batches, [*batches[1:], []], strict=True):
                read = [future.result() for future in following]
                following = [readers.submit(self._read, file, failed) for file in after]  # while the model runs
                rows += self._detect(batch, read)
        return rows

    def _read(self, file: str, failed: Mapping[str, str]) -> tuple[npt.NDArray[np.uint8], tuple[int, int]] | str:
        """Return an image fitted into the model's input, and its width and height; or why it cannot be read."""
        from raydet.data.render import decode

        if file in failed:
            return f"{self.job.source.path(file)}: {failed[file]}"
        try:
            image = decode(self.job.source.read(file), self.job.source.path(file), max_pixels=self.job.max_pixels)
        except RaydetError as error:
            return str(error)
        return self.predictor.fit(image), (image.shape[1], image.shape[0])

    def _detect(self, files: Sequence[str], read: Sequence[Any]) -> list[dict[str, Any]]:
        good = [entry for entry in read if not isinstance(entry, str)]
        inputs, sizes = [image for image, _ in good], [size for _, size in good]
        detections = self.predictor.detect_fitted(inputs, sizes, self.job.thresholds) if good else []
        found = iter(zip(sizes, detections, strict=True))
        rows: list[dict[str, Any]] = []
        for file, entry in zip(files, read, strict=True):
            if isinstance(entry, str):
                rows.append({"file": file, "boxes": [], "scores": [], "labels": [], "names": [], "error": entry})
                continue
            (width, height), boxes = next(found)
            labels = boxes[:, 5].astype(int).tolist()
            rows.append(
                {
                    "file": file,
                    "width": width,
                    "height": height,
                    "boxes": boxes[:, :4].tolist(),
                    "scores": boxes[:, 4].tolist(),
                    "labels": labels,
                    "names": [self.job.config.class_names[label] for label in labels],
                    "error": None,
                }
            )
        return rows


def _name(number: int) -> str:
    return f"part-{number:05d}.parquet"


def _encode(rows: Sequence[dict[str, Any]]) -> memoryview:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, _SCHEMA), sink)
    return sink.getbuffer()


def _finish(job: _PredictJob, parts: int, form: str) -> int:
    """Check the parts, write what is made of all of them, and return the number of images that could not be read.

    Raises:
        RaydetError: a part has other images than it should; it is named.
    """
    errors: list[dict[str, str]] = []
    results: list[dict[str, Any]] = []
    stems = [PurePosixPath(file).stem for file in job.files]
    is_numbered = len({int(stem) for stem in stems if stem.isdecimal()}) == len(stems)
    columns = None if form == "coco" else ["file", "error"]
    for number in range(parts):
        table = read_parquet(job.out.read(_name(number)), columns)
        if table["file"].to_pylist() != list(job.part(number)):
            path = job.out.path(_name(number))
            raise RaydetError(f"{path}: its images are not those that belong there; delete it, and start again")
        for place, row in enumerate(table.to_pylist(), start=number * job.shard_images):
            if row["error"] is not None:
                errors.append({"file": row["file"], "error": row["error"]})
            elif form == "coco":
                image_id = int(stems[place]) if is_numbered else place + 1
                categories = (job.config.category_ids[label] for label in row["labels"])
                boxes, scores = np.array(row["boxes"], np.float64).reshape(-1, 4), np.array(row["scores"], np.float64)
                found = coco_results(
                    repeat(image_id, len(boxes)), categories, xyxy_to_xywh(boxes).round(3), scores.round(5)
                )
                results += [{**entry, "file_name": row["file"]} for entry in found]
    if errors:
        job.out.write(ERRORS, json.dumps(errors, indent=1).encode())
    if form == "coco":
        job.out.write(RESULTS, json.dumps(results).encode())
    return len(errors)
