"""Shards: what is in them, and that nothing is lost, doubled or damaged on the way."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from typer.testing import CliRunner

from raydet.cli import app
from raydet.data.coco import load_coco
from raydet.data.formats import load_index
from raydet.data.index import Index, shard_name
from raydet.data.problems import Problems
from raydet.data.shards import INDEX, _find, ingest, ingest_index
from raydet.errors import RaydetError
from raydet.recipe import Data
from raydet.store import Store
from tests.s3 import serve

SHARD_MB = 0.05


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="module")
def whole(shapes_index, tmp_path_factory):
    """Shards of `shapes`; not to be changed."""
    out = tmp_path_factory.mktemp("whole")
    ingest_index(shapes_index, Store(out), Problems(), shard_mb=SHARD_MB)
    return out


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


def read_index(root):
    return Index.load(Store(root).read(INDEX), str(root))


def same_data(ours, theirs):
    """Are images and objects the same, wherever they are?"""
    columns = ["image_id", "path", "width", "height", "boxes", "labels", "crowd", "area"]
    return (
        ours.table.select(columns).equals(theirs.table.select(columns))
        and (ours.class_names, ours.category_ids) == (theirs.class_names, theirs.category_ids)
        and all(ours.read(row) == theirs.read(row) for row in range(len(theirs)))
    )


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_index_leads_to_the_same_images(whole, shapes_index):
    index = read_index(whole)
    assert same_data(index, shapes_index)
    assert set(index.shards) == set(range(len(list(whole.glob("shard-*.parquet")))))
    assert index.path(0).endswith(f"{shard_name(index.shards[0])}:{shapes_index.table['path'][0]}")


def test_a_shard_is_a_parquet_file_that_anyone_can_read(whole, shapes_index):
    shards = [pq.read_table(path) for path in sorted(whole.glob("shard-*.parquet"))]
    rows = [row for shard in shards for row in shard.to_pylist()]
    assert sorted(row["image_id"] for row in rows) == shapes_index.image_ids.tolist()
    for row in rows:
        number = shapes_index.image_ids.tolist().index(row["image_id"])
        objects = shapes_index.annotations(number)
        assert row["image"] == shapes_index.read(number)
        assert row["crc32"] == zlib.crc32(row["image"])
        assert (row["width"], row["height"]) == shapes_index.size(number)
        assert (row["boxes"], row["labels"]) == (objects.boxes.tolist(), objects.labels.tolist())
    about = json.loads(shards[0].schema.metadata[b"raydet"])
    assert tuple(about["class_names"]) == shapes_index.class_names


def test_each_shard_is_a_random_sample_of_about_the_size(whole, shapes_index):
    index = read_index(whole)
    sizes = [path.stat().st_size / 1e6 for path in whole.glob("shard-*.parquet")]
    assert len(sizes) > 3
    assert 0.5 * SHARD_MB < np.mean(sizes) < 1.5 * SHARD_MB
    by_place = np.lexsort((index.table["offset"].to_numpy(), index.shards))
    steps = np.abs(np.diff(by_place))
    assert np.mean(steps) == pytest.approx(len(index) / 3, rel=0.4), "of a random order"


def test_the_same_input_gives_the_same_bytes_and_another_seed_others(whole, shapes_index, tmp_path):
    ingest_index(shapes_index, Store(tmp_path / "same"), Problems(), shard_mb=SHARD_MB)
    ingest_index(shapes_index, Store(tmp_path / "other"), Problems(), shard_mb=SHARD_MB, seed=1)
    same, other, first = (
        {name: content for name, content in files(folder).items() if name != INDEX}  # which names its folder
        for folder in (tmp_path / "same", tmp_path / "other", whole)
    )
    assert same == first
    assert same_data(read_index(tmp_path / "same"), read_index(whole))
    assert all(other[name] != first[name] for name in first)


def test_shards_can_be_the_source(whole, shapes_index, tmp_path):
    ingest_index(read_index(whole), Store(tmp_path), Problems(), shard_mb=1)
    assert same_data(read_index(tmp_path), shapes_index)
    assert len(list(tmp_path.glob("shard-*.parquet"))) == 1


def test_a_finished_one_is_left_as_it_is_and_says_so(copy, shapes_index):
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    summary = ingest_index(shapes_index, Store(copy), Problems(), shard_mb=SHARD_MB)
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before
    assert summary.written == 0
    assert (summary.images, summary.boxes) == (len(shapes_index), shapes_index.num_boxes)
    assert str(summary).endswith("all were there before")


def lose_record(folder):
    (folder / ".ingest" / f"{shard_name(1)}.json").unlink()


def lose_shard(folder):
    (folder / shard_name(1)).unlink()


def cut_off(folder):
    content = (folder / shard_name(1)).read_bytes()
    (folder / shard_name(1)).write_bytes(content[:-100])


def flip_a_bit(folder):
    content = bytearray((folder / shard_name(1)).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / shard_name(1)).write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "verify"), [(lose_record, False), (lose_shard, False), (cut_off, False), (flip_a_bit, True)]
)
def test_what_is_missing_or_damaged_is_written_again(copy, whole, shapes_index, damage, verify):
    damage(copy)
    assert files(copy) != files(whole)
    others = {path: path.stat().st_mtime_ns for path in copy.glob("shard-*.parquet") if path.name != shard_name(1)}
    said = []
    summary = ingest_index(shapes_index, Store(copy), Problems(), shard_mb=SHARD_MB, verify=verify, say=said.append)
    assert summary.written == pytest.approx((whole / shard_name(1)).stat().st_size / 1e6)
    assert {path: path.stat().st_mtime_ns for path in others} == others
    assert {**files(copy), INDEX: b""} == {**files(whole), INDEX: b""}
    assert same_data(read_index(copy), shapes_index)


INGEST = """
import sys
from raydet.data.shards import ingest_index
from raydet.data.index import Index
from raydet.data.problems import Problems
from raydet.store import Store
import ray
ray.init(log_to_driver=False, logging_level="ERROR")
ingest_index(Index.load(open(sys.argv[1], "rb").read()), Store(sys.argv[2]), Problems(), shard_mb=float(sys.argv[3]))
"""


def test_a_killed_ingest_goes_on(whole, shapes, shapes_index, s3, tmp_path):
    shutil.copytree(shapes / "train", s3.folder / "slow")
    slow = Index(shapes_index.table, s3.uri("slow"), shapes_index.class_names, shapes_index.category_ids)
    (tmp_path / "index").write_bytes(slow.save())
    out = tmp_path / "out"
    s3.delay_s = 0.3
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    running = subprocess.Popen([sys.executable, "-c", INGEST, tmp_path / "index", out, str(SHARD_MB)], env=environment)
    try:
        while not list((out / ".ingest").glob("shard-*.json")):
            assert running.poll() is None
            time.sleep(0.01)
    finally:
        running.send_signal(signal.SIGKILL)
        running.wait()
        s3.delay_s = 0.0
    done = list((out / ".ingest").glob("shard-*.json"))
    assert 0 < len(done) < len(list(whole.glob("shard-*.parquet")))
    assert not (out / INDEX).exists()

    said = []
    summary = ingest_index(slow, Store(out), Problems(), shard_mb=SHARD_MB, say=said.append)
    assert re.match(r"\d+ of \d+ shards are done already", said[0])
    assert 0 < summary.written < summary.megabytes
    for path in whole.glob("shard-*.parquet"):
        assert (out / path.name).read_bytes() == path.read_bytes()
    assert same_data(read_index(out), shapes_index)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"seed": 3}, r"\(seed: 0 there, 3 here\)"),
        ({"shard_mb": 7}, rf"\(shard_mb: {SHARD_MB} there, 7 here\)"),
        ({"index": "fewer"}, r"\(images: 40 there, 39 here; boxes: "),
        ({"index": "moved"}, r"\(annotations: \w+ there, \w+ here\)"),
    ],
)
def test_something_else_in_the_folder_is_refused(copy, whole, shapes_index, changes, difference):
    boxes = shapes_index.table["boxes"].to_pylist()
    boxes[5][0][0] += 1
    moved = shapes_index.table.set_column(4, "boxes", pa.array(boxes, shapes_index.table.schema.field("boxes").type))
    indices = {
        "fewer": shapes_index.head(39),
        "moved": Index(moved, shapes_index.root, shapes_index.class_names, shapes_index.category_ids),
    }
    index = indices.get(changes.pop("index", None), shapes_index)
    with pytest.raises(RaydetError, match=f"{copy} holds shards of other data or settings {difference}"):
        ingest_index(index, Store(copy), Problems(), **{"shard_mb": SHARD_MB, **changes})
    assert files(copy) == files(whole)


def test_a_folder_of_other_files_is_refused(shapes, shapes_index):
    with pytest.raises(RaydetError, match=r"train holds other files, such as \d+.jpg: choose another folder"):
        ingest_index(shapes_index, Store(shapes / "train"), Problems())
    assert not (shapes / "train/.ingest").exists()


@pytest.fixture
def broken(shapes, tmp_path):
    """The training pictures of `shapes`, of which one is cut off, one missing and one of another size."""
    folder = shutil.copytree(shapes / "train", tmp_path / "broken")
    names = sorted(path.name for path in folder.glob("*.jpg"))[:3]
    index = load_coco(shapes / "annotations/instances_train.json", folder)
    (folder / names[0]).write_bytes((folder / names[0]).read_bytes()[:-200])
    (folder / names[1]).unlink()
    cv2.imwrite(str(folder / names[2]), np.zeros((32, 32, 3), np.uint8))
    return index, names


def test_an_image_that_cannot_be_used_stops_it_by_name(broken, tmp_path):
    index, names = broken
    with pytest.raises(RaydetError, match=rf"({'|'.join(names)}).*; correct it, or .* data.on_error=skip") as error:
        ingest_index(index, Store(tmp_path / "out"), Problems(), shard_mb=SHARD_MB)
    assert "\n" not in str(error.value), "no traceback"
    assert not (tmp_path / "out" / INDEX).exists()


def test_or_is_left_out_and_counted(broken, tmp_path):
    index, names = broken
    for _ in range(2):  # a finished one knows what it left out
        problems = Problems("skip", 3)
        summary = ingest_index(index, Store(tmp_path / "out"), problems, shard_mb=SHARD_MB)
        assert sorted(re.search(r"\d+\.jpg", message)[0] for message in problems.messages) == names
    assert summary.images == len(index) - 3
    assert same_data(read_index(tmp_path / "out"), index.take(np.arange(3, len(index))))
    with pytest.raises(RaydetError, match=r"more than data\.max_errors = 2"):
        ingest_index(index, Store(tmp_path / "out"), Problems("skip", 2), shard_mb=SHARD_MB)


def test_to_s3_and_from_there_an_image_is_one_request(shapes_index, s3):
    s3.failures = 2  # bears some
    ingest_index(shapes_index, Store(s3.uri("shards")), Problems(), shard_mb=SHARD_MB)
    index = read_index(s3.uri("shards"))
    assert same_data(index, shapes_index)
    before = len(s3.requests)
    for row in range(len(index)):
        index.read(row)
    assert len(s3.requests) - before == len(index)


@pytest.mark.parametrize(
    "layout",
    [
        {"compression": "snappy"},
        {"use_dictionary": True},
        {"use_dictionary": False, "column_encoding": {"image": "DELTA_LENGTH_BYTE_ARRAY"}},
    ],
    ids=lambda layout: next(iter(layout)),
)
def test_images_that_are_not_in_one_piece_are_noticed(layout):
    images = [bytes([number]) * 1000 for number in (1, 2, 1)]
    schema = pa.schema([pa.field("image", pa.binary(), nullable=False)])
    sink = io.BytesIO()
    pq.write_table(pa.table({"image": images}, schema), sink, **{"compression": "none", **layout})
    with pytest.raises(RaydetError, match=r"x: image .* is not in it byte for byte"):
        _find(images, sink.getvalue(), "x")


@pytest.fixture(scope="module")
def ingested(shapes, tmp_path_factory):
    """Both splits by the command, and what it printed."""
    out = tmp_path_factory.mktemp("ingested") / "out"
    done = CliRunner().invoke(app, ["ingest", "demo", str(out), f"data.root={shapes}", "--shard-mb", "1"])
    assert done.exit_code == 0, done.output
    return out, done.output


def test_the_command_writes_both_splits(ingested, shapes):
    out, printed = ingested
    data = Data(root=str(shapes))
    for split, count in (("train", 40), ("val", 24)):
        index = load_index(Data(format="shards", root=str(out)), split)
        assert same_data(index, load_index(data, split))
        counts = f"{count} images with {index.num_boxes} boxes in 1 "
        assert re.search(rf"^{split}: {counts}.* MB/s$", printed, re.M)
    assert f"next: train with data.format=shards data.root={out}" in printed


def test_what_the_command_cannot_read_is_named(tmp_path):
    done = CliRunner().invoke(app, ["ingest", "nosuch", str(tmp_path)])
    assert isinstance(done.exception, RaydetError)
    assert str(done.exception) == "nosuch is neither a folder nor the URI of one nor a recipe"


def test_the_command_takes_a_folder_and_a_split(shapes, tmp_path):
    done = CliRunner().invoke(app, ["ingest", str(shapes), str(tmp_path / "out"), "--split", "val"])
    assert done.exit_code == 0, done.output
    assert os.listdir(tmp_path / "out") == ["val"]


def test_from_python(shapes, tmp_path):
    data = Data(root=str(shapes), max_num_samples=5)
    for _ in range(2):
        summaries = ingest(data, str(tmp_path), splits=["train"], say=lambda _: None)
        assert summaries["train"].images == 5
    assert summaries["train"].written == 0
    with pytest.raises(RaydetError, match="there is no split test"):
        ingest(data, str(tmp_path), splits=["test"])


def test_the_command_s_help_has_an_example():
    assert "Example: raydet ingest " in CliRunner().invoke(app, ["ingest", "--help"]).output
