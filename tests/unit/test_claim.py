"""Two commands in one folder."""

import errno
import fcntl
import os
import re
import socket
import subprocess
import sys
import time

import pytest

import raydet
from raydet.errors import RaydetError
from raydet.reports.curves import plot
from raydet.reports.run import report
from raydet.runs.folder import LOCK, claimed
from raydet.tuning.sweep import tune

HOLD = "import sys, time; from pathlib import Path; from raydet.runs.folder import claimed\n" + (
    "with claimed(Path(sys.argv[1]), 'raydet train'):\n    print('held', flush=True)\n    time.sleep(600)"
)


@pytest.fixture
def other(tmp_path):
    """Another process that holds a folder."""
    processes = []

    def hold(folder):
        processes.append(subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True))
        assert processes[-1].stdout.readline() == "held\n"
        return processes[-1]

    yield hold
    for process in processes:
        process.kill()
        process.wait()


def train(demo, *overrides):
    return raydet.train("demo", overrides=[*demo, *overrides], debug=True, device="cpu", say=lambda text: None)


def test_a_second_command_in_a_folder_is_told_who_has_it_and_since_when(demo, tmp_path, other):
    folder = tmp_path / "runs" / "demo-debug"
    began = time.strftime("%F %T")
    process = other(folder)
    (folder / "log.txt").write_text("of the first")
    with pytest.raises(RaydetError) as error:
        train(demo)
    found = re.fullmatch(
        rf"{folder} is in use by another command \(raydet train, process {process.pid} on {socket.gethostname()}, "
        r"since (.*)\): wait for its end, or choose another name=…",
        str(error.value),
    )
    assert began <= found[1] <= time.strftime("%F %T")
    assert (folder / "log.txt").read_text() == "of the first"
    train(demo, "train.epochs=1", "name=other")


def test_a_process_that_was_killed_holds_nothing(demo, tmp_path, other):
    process = other(tmp_path / "runs" / "demo-debug")
    process.kill()
    process.wait()
    first = train(demo, "train.epochs=1")
    assert train(demo, "train.epochs=1").metrics == first.metrics, "nor does one that has ended"


def test_what_reads_a_run_needs_no_lock(demo, tmp_path, other):
    folder = train(demo, "train.epochs=1").folder
    other(folder)
    raydet.evaluate(folder, debug=True, device="cpu", say=lambda text: None)
    raydet.load(folder, "cpu")
    plot(folder)
    report(folder)


def test_a_sweep_is_refused_too(demo, tmp_path, other):
    other(tmp_path / "runs" / "demo-tune")
    with pytest.raises(RaydetError, match=r"demo-tune is in use by another command \(raydet train, process"):
        tune("demo", overrides=demo, say=print)


def test_waiting_for_one_that_is_ending(tmp_path, other):
    process = other(tmp_path)
    with pytest.raises(RaydetError, match="is in use"), claimed(tmp_path, "raydet tune", wait_s=0.6):
        pass
    process.kill()
    with claimed(tmp_path, "raydet tune", wait_s=10):
        assert (tmp_path / LOCK).read_text().startswith(f"raydet tune, process {os.getpid()} on ")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_where_the_file_system_has_no_locks_nothing_is_refused(number, tmp_path, monkeypatch):
    def none(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", none)
    with claimed(tmp_path, "raydet train"), claimed(tmp_path, "raydet train"):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(RaydetError, match=r"storage: .*file/run cannot be made or written"),
        claimed(tmp_path / "file" / "run", "raydet train"),
    ):
        pass
