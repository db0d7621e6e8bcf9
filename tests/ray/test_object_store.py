"""Training from an object store, as files and as shards: the same run as from a disk, also when it is killed."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import raydet
from raydet.data.shards import ingest
from raydet.recipe import Data
from tests.s3 import serve

SETTINGS = [
    "data.max_num_samples=48",
    "data.image_size=96",
    "data.chunk_size=16",
    "data.shuffle_window=32",
    "augment.mosaic=1.0",
    "augment.scale=[0.5, 1.5]",
    "train.batch_size=8",
    "train.epochs=2",
    "track.log_every=1",
    "scale.num_workers=1",
    "scale.cpus_per_worker=1",
]


@pytest.fixture(scope="module")
def bucket(shared, tmp_path_factory):
    """A bucket with coco_mini as it is, and as shards."""
    with serve(tmp_path_factory.mktemp("s3")) as s3:
        shutil.copytree(shared / "data/coco_mini", s3.folder / "files")
        ingest(Data(root=str(shared / "data/coco_mini")), str(s3.folder / "shards"), shard_mb=4, say=print)
        yield s3


@pytest.mark.parametrize("kind", ["files", "shards"])
def test_a_run_from_a_bucket_is_the_run_from_a_disk(bucket, kind, tmp_path, one_thread):
    """Of shards also when it is killed and resumed. The run from a disk is one without Ray."""
    options = [f"storage={tmp_path}", f"data.format={'coco' if kind == 'files' else 'shards'}", *SETTINGS]
    local = raydet.train(
        "demo", overrides=[*options, f"data.root={bucket.folder / kind}", "name=disk"], debug=True, device="cpu"
    )
    remote = [*options, f"data.root={bucket.uri(kind)}", "name=bucket"]
    if kind == "shards":
        log = Path(tmp_path, "bucket", "log.txt")
        command = [sys.executable, "-m", "raydet.cli", "train", "demo", *remote]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as driver:
            deadline = time.monotonic() + 120
            while not (log.exists() and "step 8/12" in log.read_text()):
                assert driver.poll() is None, log.read_text() if log.exists() else "it did not start"
                assert time.monotonic() < deadline
                time.sleep(0.01)
            driver.send_signal(signal.SIGKILL)
    before = len(bucket.requests)
    said = []
    result = raydet.train("demo", overrides=remote, say=said.append)
    if kind == "shards":
        assert "resumed after step 6" in said
        assert not any("step 6/12" in line for line in said)
    assert any("step 12/12" in line for line in said)
    asked = bucket.requests[before:]
    assert any(".jpg" in request if kind == "files" else "shard-" in request for request in asked)
    assert result.metrics == local.metrics
    ours, theirs = (load_file(run.folder / "checkpoint_000002/model.safetensors") for run in (result, local))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
