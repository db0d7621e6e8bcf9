import json
import logging
import math

from raydet.training.run import RunLog, SayWarnings


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
    log.resume(20)
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
    logger, handler = logging.getLogger("raydet.data.stream"), SayWarnings(RunLog(tmp_path))
    logging.getLogger("raydet").addHandler(handler)
    try:
        logger.info("nothing to see")
        logger.warning("no batch for %d s", 60)
    finally:
        logging.getLogger("raydet").removeHandler(handler)
    assert (tmp_path / "log.txt").read_text() == "warning: no batch for 60 s\n"
