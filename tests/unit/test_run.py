import json
import logging
import math
import os
import signal
import threading

import pytest
import torch

from raydet.data.batch import Batch
from raydet.data.problems import Problems
from raydet.errors import RaydetError
from raydet.recipe import Data
from raydet.runs.log import RunLog, drop_metrics_after, warnings_said
from raydet.training.job import noting_errors
from raydet.training.on_ray import _fit


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_are_flat_json_without_what_is_not_finite(tmp_path):
    log = RunLog(tmp_path / "run")
    log.metrics(step=1, epoch=0, **{"train/loss": 2.5, "train/lr": math.nan})
    log.metrics(step=2, epoch=0, **{"train/loss": math.inf})
    assert lines(tmp_path / "run") == [{"step": 1, "epoch": 0, "train/loss": 2.5}, {"step": 2, "epoch": 0}]


def test_resuming_drops_what_will_be_written_again_and_a_line_cut_off(tmp_path):
    log = RunLog(tmp_path)
    for step in (10, 20, 30):
        log.metrics(step=step)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4')
    drop_metrics_after(tmp_path, 20)
    assert lines(tmp_path) == [{"step": 10}, {"step": 20}]
    log.metrics(step=21)
    assert lines(tmp_path)[-1] == {"step": 21}


def test_lines_of_text_are_kept_and_echoed(tmp_path):
    heard = []
    log = RunLog(tmp_path, echo=heard.append)
    log.say("one")
    log.say("two")
    assert heard == ["one", "two"]
    assert (tmp_path / "log.txt").read_text() == "one\ntwo\n"


def test_a_worker_s_warnings_are_among_its_lines(tmp_path):
    logger = logging.getLogger("raydet.data.stream")
    with warnings_said(RunLog(tmp_path).say):
        logger.info("nothing to see")
        logger.warning("no batch for %d s", 60)
    assert (tmp_path / "log.txt").read_text() == "warning: no batch for 60 s\n"


def test_an_image_left_out_is_named_once_and_too_many_stop(caplog):
    def batch(*errors):
        nothing = torch.empty(0)
        return Batch(nothing, nothing, nothing, nothing, errors)

    beats = []
    batches = [batch(), batch("a.jpg: broken"), batch("a.jpg: broken", "b.jpg: broken")]
    assert list(noting_errors(iter(batches), Data(on_error="skip", max_errors=2), lambda: beats.append(1))) == batches
    assert len(beats) == 3
    assert caplog.messages == ["left out: a.jpg: broken", "left out: b.jpg: broken"]
    with pytest.raises(RaydetError, match=r"more than data.max_errors = 1 .* b.jpg: broken"):
        list(noting_errors(iter(batches), Data(on_error="skip", max_errors=1), lambda: None))


def test_records_left_out_are_listed(tmp_path):
    problems = {"train": Problems("skip"), "val": Problems("skip")}
    problems["train"].add("labels/7.txt: line 3 is broken")
    heard = []
    RunLog(tmp_path, echo=heard.append).left_out(problems)
    assert heard == ["1 records of the train data cannot be used; log.txt names them"]
    problems["val"].notice("2 images have no label file", ["a.jpg", "b.jpg"], "they are background")
    RunLog(tmp_path, echo=heard.append).left_out({"val": problems["val"]})
    assert heard[1:] == ["warning: val data: 2 images have no label file, such as a.jpg: they are background"]
    assert "left out of the train data: labels/7.txt: line 3 is broken" in (tmp_path / "log.txt").read_text()


class Signalled:
    """A training that is sent a signal, and ends when its stop file asks for it."""

    def __init__(self, stop, number):
        self.stop, self.number = stop, number

    def fit(self):
        asked = threading.Event()
        asked.wait(0.3)
        os.kill(os.getpid(), self.number)
        while not self.stop.exists():
            asked.wait(0.01)
        return self

    return_value = "ended"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "what job servers send"])
def test_a_signal_asks_the_workers_to_stop_after_the_step(tmp_path, number):
    said, handler = [], signal.getsignal(number)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    assert _fit(Signalled(tmp_path / "stop", number), tmp_path / "stop", said.append) == "ended"
    assert said == ["stopping after this step, with a checkpoint; once more stops at once"]
    signal.signal(number, handler)
