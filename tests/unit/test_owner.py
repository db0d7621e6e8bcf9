"""Two commands on one address in an object store, a local S3 server."""

import itertools
import os
import re
import socket
import subprocess
import sys
import threading
import time

import pytest

from raydet.errors import RaydetError
from raydet.runs import owner
from raydet.runs.mirror import Mirror
from raydet.runs.owner import CLAIMS, owned
from raydet.store import Store
from tests.s3 import serve

HOLD = """
import sys, time
from raydet.runs import owner
owner.BEAT_S = 0.1
with owner.owned(sys.argv[1], "raydet train"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def address(s3, request, monkeypatch):
    """An address of this test's own, and an owner that is soon taken for gone."""
    monkeypatch.setattr(owner, "BEAT_S", 0.1)
    monkeypatch.setattr(owner, "GONE_S", 5.0)
    return s3.uri(f"runs/{abs(hash(request.node.name))}")


@pytest.fixture
def other(address):
    """Another process that holds the address."""
    command = [sys.executable, "-c", HOLD, address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def claims(address):
    return list(Store(address).files(CLAIMS)) if Store(address).kind(CLAIMS) else []


def test_a_second_command_is_told_who_has_it_and_since_when(address, other):
    began = time.strftime("%F %T")
    with pytest.raises(RaydetError) as error, owned(address, "raydet train"):
        pass
    found = re.fullmatch(
        rf"{re.escape(address)} is in use by another command \(raydet train, process {other.pid} on "
        rf"{socket.gethostname()}, since (.*)\): wait for its end, or choose another name=…",
        str(error.value),
    )
    assert found[1] <= began
    assert len(claims(address)) == 1, "the second has left nothing"


def test_the_claim_of_one_that_was_killed_is_taken_over(address, other, caplog):
    other.kill()
    other.wait()
    (dead,) = claims(address)
    with owned(address, "raydet train"):
        (mine,) = claims(address)
        assert mine != dead
        assert f"process {os.getpid()}" in Store(address).text(f"{CLAIMS}/{mine}")
    assert claims(address) == []
    assert f"belongs to raydet train, process {other.pid} on" in caplog.text


def test_waiting_for_one_that_is_ending(address, other):
    threading.Timer(1.5, other.kill).start()
    with owned(address, "raydet tune", wait_s=60):
        assert other.poll() is not None


def test_of_many_that_start_at_once_one_has_it_at_a_time(address):
    """Each waits for the others: all get it in the end."""
    inside, most, done = [], [], []

    def want(number):
        with owned(address, f"command {number}", wait_s=120):
            inside.append(number)
            most.append(len(inside))
            time.sleep(0.3)
            inside.remove(number)
            done.append(number)

    threads = [threading.Thread(target=want, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == [0, 1, 2, 3]
    assert set(most) == {1}
    assert claims(address) == []


def test_an_owner_that_has_lost_it_says_so(address, caplog):
    with owned(address, "raydet train"):
        deadline = time.monotonic() + 60
        for beat in itertools.count():
            Store(address).write(f"{CLAIMS}/other", b"x" * beat)
            if "has another owner now" in caplog.text:
                break
            assert time.monotonic() < deadline
            time.sleep(0.3)
        assert claims(address) == ["other"]


def test_a_copy_of_a_run_has_no_claims(address, tmp_path):
    with owned(address, "raydet train"):
        Store(address).write("log.txt", b"one")
        here = Mirror(tmp_path / "run", address)
        here.refresh()
        here.push()
        assert [path.name for path in (tmp_path / "run").rglob("*") if path.is_file()] == ["log.txt"]
        assert len(claims(address)) == 1


def test_without_an_address_there_is_nothing_to_hold():
    with owned(None, "raydet train"), owned(None, "raydet train"):
        pass
