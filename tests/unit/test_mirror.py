"""A folder and its copy in an object store, a local S3 server."""

import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from raydet.errors import RaydetError
from raydet.recipe import load
from raydet.runs import mirror as mirrors
from raydet.runs.folder import STOP, claimed, local_folder, run_address, run_folder
from raydet.runs.mirror import Mirror, opened, worker_folder
from raydet.store import Store
from tests.s3 import serve


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("s3")) as s3:
        yield s3


@pytest.fixture
def s3(server, request, tmp_path, monkeypatch):
    """The server, the address of a run of this test's own, and nothing in this machine's cache."""
    monkeypatch.setenv("RAYDET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("raydet.store.RETRY_AFTER_S", (0.01, 0.01))
    monkeypatch.setattr(mirrors, "PUSH_EVERY_S", 0.1)
    server.requests.clear()
    server.run = f"runs/{abs(hash(request.node.name))}"
    return server


def fill(folder, **files):
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_json", ".json").replace("_txt", ".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def checkpoint(folder, epoch, weights="weights"):
    fill(folder, **{f"checkpoint_{epoch:06d}__config_json": "{}"})
    (folder / f"checkpoint_{epoch:06d}" / "model.safetensors").write_text(weights)


def stored(s3):
    return sorted(Store(s3.uri(s3.run)).files(recursive=True))


def puts(s3):
    return [
        request.split("?")[0].rpartition(s3.run + "/")[2]
        for request in s3.requests
        if request.startswith("PUT") and not request.endswith("/")
    ]


def test_what_changed_is_brought_and_what_is_gone_is_deleted(s3, tmp_path):
    here = Mirror(tmp_path / "run", s3.uri(s3.run))
    fill(here.folder, log_txt="one", images__a_txt="picture")
    checkpoint(here.folder, 1)
    here.push()
    assert stored(s3) == [
        "checkpoint_000001/config.json",
        "checkpoint_000001/model.safetensors",
        "images/a.txt",
        "log.txt",
    ]
    s3.requests.clear()
    here.push()
    assert s3.requests == []
    fill(here.folder, log_txt="one two")
    (here.folder / "images/a.txt").unlink()
    here.push()
    assert puts(s3) == ["log.txt"]
    assert "images/a.txt" not in stored(s3)
    assert Store(s3.uri(s3.run)).text("log.txt") == "one two"


def test_a_checkpoint_s_config_comes_last_and_goes_first(s3, tmp_path):
    here = Mirror(tmp_path / "run", s3.uri(s3.run))
    checkpoint(here.folder, 1)
    fill(here.folder, log_txt="checkpoint 1 is there", metrics_jsonl="the steps before it")
    here.push()
    files = ["checkpoint_000001/model.safetensors", "checkpoint_000001/config.json"]
    assert puts(s3) == ["metrics.jsonl", *files, "log.txt"]
    for path in (here.folder / "checkpoint_000001").iterdir():
        path.unlink()
    s3.requests.clear()
    here.push()
    deleted = [request.rpartition("/")[2].split("?")[0] for request in s3.requests if request.startswith("DELETE")]
    assert deleted == ["config.json", "model.safetensors"]


def test_what_is_not_whole_stays_here(s3, tmp_path):
    here = Mirror(tmp_path / "run", s3.uri(s3.run), ignored=("log.txt",))
    fill(here.folder, log_txt="rank 1", kept_txt="x")
    for name in (".partial-checkpoint_000001/config.json", "ray/notes.json", ".metrics.jsonl.1.partial", "a.partial"):
        (here.folder / name).parent.mkdir(exist_ok=True)
        (here.folder / name).write_text("x")
    here.push()
    assert stored(s3) == ["kept.txt"]


def test_a_copy_becomes_what_the_store_holds(s3, tmp_path):
    there = Mirror(tmp_path / "there", s3.uri(s3.run))
    fill(there.folder, log_txt="new", recipe_txt="r")
    checkpoint(there.folder, 1)
    checkpoint(there.folder, 2)
    there.push()
    here = Mirror(tmp_path / "here", s3.uri(s3.run))
    fill(here.folder, log_txt="old", gone_txt="x")
    checkpoint(here.folder, 7)
    here.refresh()
    found = sorted(path.relative_to(here.folder).as_posix() for path in here.folder.rglob("*") if path.is_file())
    assert found == ["checkpoint_000001/config.json", "checkpoint_000002/config.json", "log.txt", "recipe.txt"]
    assert (here.folder / "log.txt").read_text() == "new"
    here.pull_checkpoint("checkpoint_000002")
    assert (here.folder / "checkpoint_000002/model.safetensors").read_text() == "weights"
    s3.requests.clear()
    here.refresh()
    here.push()
    assert not [request for request in s3.requests if request.startswith("PUT") or ".safetensors" in request]


def test_a_store_that_fails_now_and_then_is_asked_again(s3, tmp_path):
    here = Mirror(tmp_path / "run", s3.uri(s3.run))
    fill(here.folder, log_txt="one")
    s3.failures = 2
    here.push()
    assert stored(s3) == ["log.txt"]


def test_a_store_that_is_gone_stops_nothing_and_gets_all_when_it_is_back(s3, tmp_path, caplog):
    here = Mirror(tmp_path / "run", s3.uri(s3.run))
    fill(here.folder, log_txt="one")
    s3.failures = 1000
    with here.pushing():
        time.sleep(1.5)
        fill(here.folder, log_txt="one two")
        s3.failures = 0
    assert Store(s3.uri(s3.run)).text("log.txt") == "one two"
    assert sum("not in the store yet" in record.message for record in caplog.records) == 1


def test_at_the_end_all_is_there_or_an_error_says_where_it_is(s3, tmp_path):
    with worker_folder(s3.uri(s3.run), 0) as folder:
        fill(folder, log_txt="one")
    assert stored(s3) == ["log.txt"]
    assert not folder.exists()

    def interrupted():
        with worker_folder(s3.uri(s3.run), 0) as folder:
            fill(folder, more_txt="two")
            s3.failures = 10**6
            kept.append(folder)

    kept = []
    with pytest.raises(RaydetError, match=r"what is not there is in .*raydet-run-.* on "):
        interrupted()
    s3.failures = 0
    assert (kept[0] / "more.txt").read_text() == "two"


def test_what_an_error_left_is_there_too(s3):
    def fails():
        with worker_folder(s3.uri(s3.run), 0) as folder:
            fill(folder, log_txt="the loss was not finite")
            raise RaydetError("the loss was not finite in 5 steps")

    with pytest.raises(RaydetError, match=r"not finite in 5 steps$"):
        fails()
    assert stored(s3) == ["log.txt"]


def test_the_wish_to_stop_gets_from_the_driver_to_the_worker(s3, tmp_path):
    driver = Mirror(tmp_path / "driver", s3.uri(s3.run))
    fill(driver.folder, log_txt="start")
    driver.push()
    with driver.following(), worker_folder(s3.uri(s3.run), 0) as worker:
        fill(worker, log_txt="start\nstep 1")
        threading.Timer(0.5, (driver.folder / STOP).touch).start()
        until = time.monotonic() + 10
        while not (worker / STOP).exists():
            assert time.monotonic() < until
            time.sleep(0.05)
        while (driver.folder / "log.txt").read_text() != "start\nstep 1":
            assert time.monotonic() < until
            time.sleep(0.05)
    (driver.folder / STOP).unlink()
    driver.refresh()
    assert STOP in stored(s3)
    (driver.folder / STOP).unlink()
    driver.push()
    assert STOP not in stored(s3)


def test_what_is_written_into_a_copy_gets_to_the_store(s3, tmp_path):
    there = Mirror(tmp_path / "there", s3.uri(s3.run))
    fill(there.folder, recipe_txt="r")
    checkpoint(there.folder, 1)
    there.push()
    with opened(s3.uri(f"{s3.run}/checkpoint_000001")) as folder:
        assert folder.name == "checkpoint_000001"
        assert (folder / "model.safetensors").read_text() == "weights"
        assert (folder.parent / "recipe.txt").exists()
        fill(folder, config_json='{"thresholds": 1}')
    assert Store(s3.uri(s3.run)).text("checkpoint_000001/config.json") == '{"thresholds": 1}'
    with opened(s3.uri(f"{s3.run}/recipe.txt")) as path:
        assert path.read_text() == "r"
    with opened(tmp_path) as path:
        assert path == tmp_path


def test_nothing_there_is_an_error(s3):
    with pytest.raises(RaydetError, match="no such file or folder"), opened(s3.uri("runs/nothing")):
        pass


@pytest.mark.parametrize("address", ["s3://key:secret@bucket/runs", "gs://me@bucket/x"])
def test_credentials_do_not_get_into_addresses(address):
    with pytest.raises(RaydetError, match="credentials come from the environment or a role") as error:
        local_folder(address)
    assert "secret" not in str(error.value)


def test_a_recipe_knows_where_its_run_is(monkeypatch, tmp_path):
    monkeypatch.setenv("RAYDET_CACHE", str(tmp_path))
    recipe = load("demo", ["storage=s3://bucket/runs?region=eu-west-1", "name=a"])
    assert run_address(recipe) == "s3://bucket/runs/a?region=eu-west-1"
    assert run_folder(recipe).name == "a"
    assert run_folder(recipe).is_relative_to(tmp_path.resolve())
    assert run_address(load("demo", [f"storage={tmp_path}"])) is None
    assert os.environ["RAYDET_CACHE"] == str(tmp_path)


LEAVE = """
import os, signal, sys
from pathlib import Path
from raydet.runs.mirror import worker_folder
with worker_folder(sys.argv[1], 0) as folder:
    Path(folder, "log.txt").write_text("one")
    print(folder, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_worker_left_is_removed_by_the_next_on_that_machine(s3, tmp_path, monkeypatch):
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    environment = os.environ | {"TMPDIR": str(tmp_path / "scratch")}
    killed = subprocess.run(
        [sys.executable, "-c", LEAVE, s3.uri(s3.run)], env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    left = Path(killed.stdout.strip())
    assert (left / "log.txt").exists()
    with worker_folder(s3.uri(s3.run), 0) as first, worker_folder(s3.uri(s3.run), 1) as second:
        assert not left.exists()
        assert first.exists(), "its worker lives"
        assert second.exists()
    assert not list((tmp_path / "scratch").iterdir())


def test_a_worker_that_failed_leaves_nothing_once_all_is_in_the_store(s3, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def fails():
        with worker_folder(s3.uri(s3.run), 0) as folder:
            fill(folder, log_txt="the loss was not finite")
            raise RaydetError("not finite")

    with pytest.raises(RaydetError, match="not finite"):
        fails()
    assert not list(tmp_path.glob("raydet-run-*"))
    assert stored(s3) == ["log.txt"]


def test_copies_that_nothing_has_used_for_a_week_are_removed(s3, tmp_path):
    there = Mirror(tmp_path / "there", s3.uri(s3.run))
    checkpoint(there.folder, 1)
    there.push()
    copies = tmp_path / "cache" / "runs"
    for name in ("old", "held", "new"):
        fill(copies / name / "run", log_txt="x", **{".lock": ""})
    for name in ("old", "held"):
        os.utime(copies / name, times=(time.time() - 8 * 24 * 3600,) * 2)
    with claimed(copies / "held" / "run", "raydet train"), opened(s3.uri(s3.run)) as folder:
        assert {path.name for path in copies.iterdir()} == {"held", "new", folder.parent.name}


def test_a_rank_that_does_not_write_the_log_leaves_it_alone(s3):
    Store(s3.uri(s3.run)).write("log.txt", b"step 1")
    with worker_folder(s3.uri(s3.run), 1) as folder:
        fill(folder, hang_txt="x")
    assert stored(s3) == ["hang.txt", "log.txt"]
    assert not folder.exists()
