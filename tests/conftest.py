"""Fixtures of all tests: the shared reference data, a data set of shapes, and one Ray cluster a session."""

import os
import tempfile
from pathlib import Path

# Before anything imports Ray, which reads some of these only then.
os.environ.update(
    RAY_AUTH_MODE="disabled",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.1",
    RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="60",
    RAY_DEDUP_LOGS="0",
    LOG_NAME_UPDATE_INTERVAL_S="10",  # Ray's log monitor lists its folder this often, by default twice a second
    RAY_TRAIN_ENABLE_PREEMPTION_WATCHER="0",  # a process more for each worker group
    RAY_worker_niceness="0",  # by default anything else that runs on the machine takes the workers' CPU
    RAYDET_CACHE=tempfile.mkdtemp(prefix="raydet-cache-"),
)

import pytest
import torch

from raydet.data.coco import load_coco
from raydet.data.synthetic import make_dataset


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of reference data and numbers; the tests that need it are skipped where it is missing."""
    folder = Path(os.environ.get("RAYDET_SHARED", "../shared")).resolve()
    if not (folder / "golden").is_dir():
        if os.environ.get("RAYDET_SHARED_REQUIRED"):
            pytest.fail(f"RAYDET_SHARED: {folder} holds no reference data")
        pytest.skip(f"needs the reference data, and RAYDET_SHARED ({folder}) holds none")
    return folder


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> Path:
    """A small data set of shapes in COCO format: 40 training and 24 validation pictures."""
    return make_dataset(tmp_path_factory.mktemp("shapes"), train=40, val=24, seed=7)


@pytest.fixture(scope="session")
def shapes_index(shapes):
    return load_coco(shapes / "annotations/instances_train.json", shapes / "train")


@pytest.fixture(scope="module")
def one_thread():
    """A single thread for PyTorch, as Ray's workers and other processes of the tests have: others round differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def demo(shapes, tmp_path):
    """Overrides that train the demo recipe on `shapes` in seconds."""
    return [
        f"data.root={shapes}",
        f"storage={tmp_path}/runs",
        "data.image_size=96",
        "data.chunk_size=16",
        "train.batch_size=8",
        "train.epochs=2",
        "scale.num_workers=1",
        "track.log_every=2",
    ]
