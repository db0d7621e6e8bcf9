"""Shards: a data set as a few large files, for object stores, which take as long to find a small file as a large one.

    {out}/{split}/shard-00000.parquet …   the images as they were, each a random sample; any Parquet reader reads them
    {out}/{split}/index.parquet           where each image is; written last: where it is, the split is whole
    {out}/{split}/.ingest/                what is to be written, and what is in each shard that is done

The column `image` is neither compressed nor encoded: an image is the bytes at an offset of its shard, which training
reads in one request and without Parquet. A shard is done when it was read back and every image found in it.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raydet.data.index import Index, shard_name
from raydet.data.probe import check_attempts
from raydet.data.problems import OnError, Problems
from raydet.data.render import decode
from raydet.data.scan import THREADS, present
from raydet.data.stream import attempts_before
from raydet.errors import RaydetError
from raydet.recipe import Data, Scale
from raydet.store import Store, read_parquet, store

INDEX = "index.parquet"
ROWS_A_GROUP = 100  # what a reader of Parquet takes at a time
SAY_EVERY_S = 5.0
_STATE = ".ingest"
_PLAN = f"{_STATE}/plan.json"
_ANNOTATIONS = ["image_id", "path", "width", "height", "boxes", "labels", "crowd", "area"]


@dataclass(frozen=True)
class Ingested:
    """What is in a split's folder.

    Attributes:
        images: number of images.
        boxes: number of boxes, crowds included.
        shards: number of shards.
        megabytes: size of all shards.
        written: megabytes of the shards that were missing or damaged, and were written now.
        seconds: time that it took.
    """

    images: int
    boxes: int
    shards: int
    megabytes: float
    written: float
    seconds: float

    def __str__(self) -> str:
        new = f"{self.written:,.1f} MB written in {self.seconds:.1f} s, {self.written / self.seconds:.0f} MB/s"
        return (
            f"{self.images:,} images with {self.boxes:,} boxes in {self.shards:,} shard(s), {self.megabytes:,.1f} MB; "
            f"{new if self.written else 'all were there before'}"
        )


@dataclass(frozen=True)
class _Plan:
    """What is to be written; it decides every byte."""

    images: int
    boxes: int
    annotations: str  # a digest
    seed: int
    shard_mb: float
    shards: int

    def order(self) -> npt.NDArray[np.int64]:
        """Return the rows of the index in the order in which they are dealt to the shards."""
        return np.random.default_rng(self.seed).permutation(self.images)


@dataclass(frozen=True)
class _Part:
    """A shard that is done: its size in bytes, and which row of the index is at which bytes of it."""

    size: int
    crc32: int
    rows: list[int]
    offsets: list[int]
    lengths: list[int]
    problems: list[str]  # images that were left out


def ingest(
    data: Data,
    out: str,
    *,
    splits: Sequence[str] = ("train", "val"),
    shard_mb: float = 128,
    seed: int = 0,
    verify: bool = False,
    verbose: bool = False,
    say: Callable[[str], Any] = print,
) -> dict[str, Ingested]:
    """Write a data set as shards, or go on where that was interrupted.

    To train from them: `data.format=shards data.root={out}`.

    Args:
        data: the data set. Each image is decoded once, as training will; one that cannot be is an error, or is left out
            and counted, as `data.on_error` says.
        out: folder for the shards, a URI or a path that all nodes share.
        splits: "train", "val" or both.
        shard_mb: size of a shard in megabytes, about; a task needs three times as much memory.
        seed: seed of the images' places in the shards.
        verify: read finished shards once more, and rewrite those that are damaged.
        verbose: let Ray print what its tasks print.
        say: takes each line of progress.

    Returns:
        What there is of each split.

    Raises:
        RaydetError: the data cannot be used, or `out` cannot be written or holds something else.
    """
    import ray
    import ray.data

    from raydet.cluster import check_kept, connect
    from raydet.data.formats import Split, load_index

    check_kept(out, "OUT")
    if not verbose:
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what it says of errors, we say in a line
    known: tuple[Split, ...] = ("train", "val")
    if unknown := set(splits).difference(known):
        raise RaydetError(f"there is no split {unknown.pop()}: it is train or val")
    problems = {split: Problems(data.on_error, data.max_errors) for split in known if split in splits}
    indices = {split: load_index(data, split, problems[split]) for split in problems}
    started = connect(Scale(), verbose)
    try:
        summaries: dict[str, Ingested] = {}
        for split, index in indices.items():
            target = Store(out).below(split)
            say(f"{split}: {len(index):,} images to {target.root}")
            summaries[split] = ingest_index(
                index, target, problems[split], shard_mb=shard_mb, seed=seed, verify=verify, say=say
            )
            for message in problems[split].messages:
                say(f"left out: {message}")
            for notice in problems[split].notices:
                say(f"warning: {split} data: {notice}")
            say(f"{split}: {summaries[split]}")
        return summaries
    finally:
        if started:
            ray.shutdown()


def ingest_index(
    index: Index,
    out: Store,
    problems: Problems,
    *,
    shard_mb: float = 128,
    seed: int = 0,
    verify: bool = False,
    say: Callable[[str], Any] = print,
) -> Ingested:
    """Write the images of an index as shards in tasks of Ray Data, then the index of the shards.

    Args:
        index: the images.
        out: folder for the shards.
        problems: gets each image that cannot be used; it is left out.

    The other arguments and the errors are those of `ingest`. Ray must be connected.
    """
    began = said = time.monotonic()
    plan = _open(index, out, shard_mb, seed)
    known = _done(out, plan)
    parts = {} if verify else dict(known)
    for part in parts.values():
        _report(part, problems)
    waiting = [number for number in range(plan.shards) if number not in parts]
    if parts and waiting:
        say(f"{len(parts)} of {plan.shards} shards are done already")
    sums = {number: known[number].crc32 for number in waiting if number in known}
    job = _IngestJob(index, out, plan.shards, plan.order(), sums, problems.on_error, problems.max_errors)
    seen = written = 0
    for number, made in _run(job, waiting):
        part = made or known[number]
        seen += part.size
        written += made.size if made else 0
        parts[number] = part
        _report(part, problems)
        if time.monotonic() - said > SAY_EVERY_S and len(parts) < plan.shards:
            said = time.monotonic()
            say(f"{len(parts)} of {plan.shards} shards, {seen / 1e6 / (said - began):.0f} MB/s")
    shards = _index_of_shards(index, out, [parts[number] for number in range(plan.shards)])
    if written or verify or out.kind(INDEX) != "file":
        out.write(INDEX, shards.save())
    return Ingested(
        images=len(shards),
        boxes=shards.num_boxes,
        shards=plan.shards,
        megabytes=sum(part.size for part in parts.values()) / 1e6,
        written=written / 1e6,
        seconds=time.monotonic() - began,
    )


def _open(index: Index, out: Store, shard_mb: float, seed: int) -> _Plan:
    """Return the plan that the folder has, or give it one.

    Raises:
        RaydetError: the folder holds something else.
    """
    ours = _Plan(len(index), index.num_boxes, _digest(index), seed, shard_mb, shards=0)
    if out.kind(_PLAN) == "file":
        theirs = _Plan(**json.loads(out.text(_PLAN)))
        new = asdict(replace(ours, shards=theirs.shards))
        different = [f"{key}: {old} there, {new[key]} here" for key, old in asdict(theirs).items() if old != new[key]]
        if different:
            raise RaydetError(
                f"{out.root} holds shards of other data or settings ({'; '.join(different)}): choose another folder"
            )
        return theirs
    if out.kind() and out.files():
        raise RaydetError(f"{out.root} holds other files, such as {next(iter(out.files()))}: choose another folder")
    plan = replace(ours, shards=max(1, ceil(_size(index) / (shard_mb * 1e6))))
    out.write(_PLAN, json.dumps(asdict(plan), indent=1).encode())
    return plan


def _size(index: Index) -> int:
    """Return the bytes of all images."""
    if (index.shards >= 0).all():
        return sum(index.table["length"].to_pylist())
    paths = index.table["path"].to_pylist()
    sizes = present(store(index.root), paths)
    return sum(sizes.get(path, 0) for path in paths)


def _digest(index: Index) -> str:
    """Digest what an index says of images and objects, wherever they are."""
    digest = hashlib.sha256(json.dumps([index.class_names, index.category_ids]).encode())
    digest.update("\n".join(index.table["path"].to_pylist()).encode())
    digest.update(pc.list_value_length(index.table["labels"]).to_numpy())
    for name in ("image_id", "width", "height", "boxes", "labels", "crowd", "area"):
        values = index.table[name]
        while not pa.types.is_primitive(values.type):
            values = pc.list_flatten(values)
        digest.update(values.to_numpy())
    return digest.hexdigest()[:16]


def _done(out: Store, plan: _Plan) -> dict[int, _Part]:
    """Return the shards that are done: number → what is in it."""
    sizes = {name: size for name, (size, _) in out.files().items()}
    recorded = out.files(_STATE).keys()
    numbers = [number for number in range(plan.shards) if _record_name(number) in recorded]
    with ThreadPoolExecutor(THREADS) as readers:
        records = readers.map(lambda number: out.text(f"{_STATE}/{_record_name(number)}"), numbers)
        parts = {number: _Part(**json.loads(record)) for number, record in zip(numbers, records, strict=True)}
    return {number: part for number, part in parts.items() if sizes.get(shard_name(number)) == part.size}


def _record_name(number: int) -> str:
    return f"{shard_name(number)}.json"


def _report(part: _Part, problems: Problems) -> None:
    for message in part.problems:
        problems.add(message)


def _index_of_shards(index: Index, out: Store, parts: Sequence[_Part]) -> Index:
    """Return the index of what is in the shards.

    Raises:
        RuntimeError: that is not every image but those left out, each once.
    """
    rows = np.array([row for part in parts for row in part.rows], np.int64)
    left_out = sum(len(part.problems) for part in parts)
    if len(np.unique(rows)) != len(rows) or len(rows) + left_out != len(index):
        raise RuntimeError(f"{out.root}: {len(rows)} images in shards, {left_out} left out, of {len(index)}")
    order = np.argsort(rows)
    table = index.table if len(rows) == len(index) else index.take(rows[order]).table
    places = {
        "shard": [number for number, part in enumerate(parts) for _ in part.rows],
        "offset": [offset for part in parts for offset in part.offsets],
        "length": [length for part in parts for length in part.lengths],
    }
    for name, values in places.items():
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(np.array(values, np.int64)[order]))
    return Index(table, out.root, index.class_names, index.category_ids)


@dataclass(frozen=True)
class _IngestJob:
    """What the tasks get, once a node."""

    index: Index
    out: Store
    shards: int
    order: npt.NDArray[np.int64]  # in the tasks a view of the node's one copy
    sums: Mapping[int, int]  # CRC-32 of shards that were done before
    on_error: OnError
    max_errors: int

    def is_whole(self, number: int) -> bool:
        """Read a shard that was done before: is it as it was?"""
        return number in self.sums and zlib.crc32(self.out.read(shard_name(number))) == self.sums[number]

    def make(self, number: int) -> _Part:
        """Write a shard.

        Raises:
            RaydetError: an image cannot be used, or the shard not be written.
        """
        cv2.setNumThreads(0)  # tasks run side by side: one thread each
        problems = Problems(self.on_error, self.max_errors)
        dealt = np.array_split(self.order, self.shards)[number].tolist()
        failed = check_attempts(attempts_before(), f"shard {number}", dealt, self.index.read)
        rows, images = self._read(dealt, failed, problems)
        name, annotations = shard_name(number), self.index.take(np.array(rows, np.int64)).table.select(_ANNOTATIONS)
        self.out.write(name, _encode(annotations, images, self.index))
        content = self.out.read(name)
        if not read_parquet(content, _ANNOTATIONS).equals(annotations):
            raise RaydetError(f"{self.out.path(name)}: what was read back is not what was written")
        part = _Part(
            size=len(content),
            crc32=zlib.crc32(content),
            rows=rows,
            offsets=_find(images, content, self.out.path(name)),
            lengths=[len(image) for image in images],
            problems=problems.messages,
        )
        self.out.write(f"{_STATE}/{_record_name(number)}", json.dumps(asdict(part)).encode())
        return part

    def _read(
        self, rows: Sequence[int], failed: Mapping[int, str], problems: Problems
    ) -> tuple[list[int], list[bytes]]:
        """Read images; return those that can be used, which those that have failed before cannot."""
        kept, images = [], []
        with ThreadPoolExecutor(THREADS) as readers:
            reading = [readers.submit(self.index.read, row) for row in rows]
            for row, future in zip(rows, reading, strict=True):
                try:
                    image = future.result()
                    if row in failed:
                        raise RaydetError(f"{self.index.path(row)}: {failed[row]}")
                    decode(image, self.index.path(row), self.index.size(row))
                except RaydetError as error:
                    problems.add(str(error))
                else:
                    kept.append(row)
                    images.append(image)
        return kept, images


def _encode(annotations: pa.Table, images: Sequence[bytes], index: Index) -> memoryview:
    """Return a shard: the annotations, and the images so that each is one piece."""
    about = json.dumps({"class_names": index.class_names, "category_ids": index.category_ids})
    columns = [("crc32", pa.uint32()), pa.field("image", pa.binary(), nullable=False)]
    schema = pa.schema([*annotations.schema, *columns], {"raydet": about})
    sink = io.BytesIO()  # grows in smaller steps than Arrow's
    with pq.ParquetWriter(
        sink,
        schema,
        compression="none",
        use_dictionary=False,
        column_encoding={"image": "PLAIN"},
        write_statistics=False,
    ) as writer:
        for first in range(0, len(images), ROWS_A_GROUP):
            group = images[first : first + ROWS_A_GROUP]
            arrays = [*annotations.slice(first, ROWS_A_GROUP).columns, [zlib.crc32(image) for image in group], group]
            writer.write_table(pa.table(arrays, schema=schema))
    return sink.getbuffer()


def _find(images: Sequence[bytes], content: bytes, path: str) -> list[int]:
    """Return where in a shard each image begins: they follow each other, each after its length.

    Raises:
        RaydetError: one is not there.
    """
    offsets: list[int] = []
    end = 0
    for image in images:
        start = content.find(struct.pack("<I", len(image)) + image, end)
        if start < 0:
            raise RaydetError(
                f"{path}: image {len(offsets)} is not in it byte for byte; the store has damaged it, or pyarrow "
                f"{pa.__version__} lays Parquet out in a way that raydet does not know"
            )
        offsets.append(start + 4)
        end = start + 4 + len(image)
    return offsets


def _run(job: _IngestJob, numbers: Sequence[int]) -> Iterator[tuple[int, _Part | None]]:
    """Make shards in Ray Data tasks, one each; yield number and what is in it as they are done; None: it was whole."""
    import ray
    import ray.data

    if not numbers:
        return
    dataset = ray.data.range(len(numbers), override_num_blocks=len(numbers)).map_batches(
        _make_shards,
        batch_size=None,
        batch_format="pyarrow",
        fn_kwargs={"job": ray.put(job), "numbers": numbers},
        num_cpus=1,
    )
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        for row in block.to_pylist():
            if row["error"]:
                raise RaydetError(row["error"])
            yield row["number"], _Part(**json.loads(row["part"])) if row["part"] else None


def _make_shards(batch: pa.Table, job: Any, numbers: Sequence[int]) -> Iterator[pa.Table]:
    """Runs in a Ray Data task: makes the shards whose places in `numbers` are in the batch."""
    import ray

    work: _IngestJob = ray.get(job)
    for place in batch["id"].to_pylist():
        number, part, message = numbers[place], "", ""
        try:
            if not work.is_whole(number):
                part = json.dumps(asdict(work.make(number)))
        except RaydetError as error:  # Ray would add its own words to the message
            message = str(error)
        yield pa.table({"number": [number], "part": [part], "error": [message]})
