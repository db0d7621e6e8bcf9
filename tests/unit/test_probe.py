import os
import sys

import pytest

from raydet.data.probe import check_attempts, deadly
from raydet.errors import RaydetError

# Stands for a decoder that an image breaks: no image that does so is at hand.
DEADLY = b"ends the process"
DECODER = """
import os
import cv2
decode = cv2.imdecode
def dies(content, flags):
    return os.kill(os.getpid(), 9) if content.tobytes() == {deadly!r} else decode(content, flags)
cv2.imdecode = dies
"""


@pytest.fixture
def decoder_that_dies(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(DECODER.format(deadly=DEADLY))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))


@pytest.mark.parametrize("dead", [[], [0], [3], [1, 2, 4]])
def test_images_that_end_a_process_are_found_among_others(decoder_that_dies, shapes, dead):
    good = next((shapes / "train").iterdir()).read_bytes()
    files = [DEADLY if number in dead else good for number in range(5)]
    assert deadly(range(5), files.__getitem__) == dead


def test_broken_and_missing_images_end_no_process(decoder_that_dies):
    def read(number):
        if number == 1:
            raise RaydetError("1.jpg: cannot be read (No such file)")
        return b"no image"

    assert deadly(range(3), read) == []


def test_a_task_looks_for_such_images_after_its_second_death(decoder_that_dies):
    files = [b"no image", DEADLY]
    assert check_attempts(1, "samples 0 to 1", range(2), files.__getitem__) == {}
    assert check_attempts(2, "samples 0 to 1", range(2), files.__getitem__) == {1: "a process that decodes it dies"}


def test_a_task_that_dies_of_something_else_is_given_up():
    nothing = [b"no image"].__getitem__
    assert check_attempts(5, "samples 0 to 1", range(1), nothing) == {}
    with pytest.raises(RaydetError, match=r"samples 0 to 1: 6 processes have died of it, and no image ends one alone"):
        check_attempts(6, "samples 0 to 1", range(1), nothing)
