"""What a person sees of a run: the table in the terminal, the lines of text, the summary."""

import io
import json
import re
import sys
import threading
import time

import click
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from raydet.reports.terminal import LiveTable, follow, summary
from raydet.runs.log import RunLog, best_validation, drop_metrics_after, read_metrics


def trained(step, **values):
    """A training line of a run of 15 epochs in 300 steps."""
    return {
        "step": step,
        "epoch": step // 20,
        "train/loss": 9.125,
        "train/YoloXFastDetectionLoss/iou": 3.25,
        "train/YoloXFastDetectionLoss/obj": 4.5,
        "train/YoloXFastDetectionLoss/Loss": 9.125,
        "train/lr": 0.00125,
        "train/grad_norm": 12.0,
        "perf/images_per_s": 31.04,
        "perf/data_wait": 0.02,
        "perf/memory_gb": 1.34,
        "perf/eta_s": 3723.9,
    } | values


def validated(step, accuracy, prefix="val/", **classes):
    values = {
        "mAP@0.50:0.95": accuracy,
        "mAP@0.50": accuracy + 0.2,
        "mAP@0.75": accuracy + 0.05,
        **{f"AP@0.50:0.95_{name}": value for name, value in classes.items()},
    }
    return {"step": step, "epoch": step // 20, **{prefix + name: value for name, value in values.items()}}


class Terminal:
    """A table of 15 epochs in 300 steps on a terminal, of which `rows` is what a person sees."""

    def __init__(self, width=120, height=40):
        self._output = io.StringIO()
        console = Console(file=self._output, force_terminal=True, width=width, height=height, _environ={})
        self.table = LiveTable(epochs=15, total_steps=300, console=console)

    @property
    def output(self):
        return self._output.getvalue()

    @property
    def rows(self):
        """Do what the output asks of a terminal: it writes, starts lines, goes up and erases."""
        rows, row, column = [""], 0, 0
        for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", self.output):
            if part == "\n":
                row, column = row + 1, 0
                rows += [""] * (row == len(rows))
            elif part == "\r":
                column = 0
            elif part == "\x1b[2K":
                rows[row] = ""
            elif part == "\x1b[1A":
                row -= 1
            elif not part.startswith("\x1b"):
                rows[row] = rows[row][:column].ljust(column) + part + rows[row][column + len(part) :]
                column += len(part)
            else:
                assert part[-1] == "m" or part in {"\x1b[?25l", "\x1b[?25h"}, repr(part)  # colours, the cursor
        return [row.rstrip() for row in rows]

    @property
    def cells(self):
        return [row.split() for row in self.rows]


def test_a_training_line_is_a_row_with_units():
    terminal = Terminal()
    with terminal.table as table:
        table.metrics(trained(64))
    assert " ".join(terminal.cells[0]) == "epoch step loss iou obj lr images/s waiting memory ETA"
    assert " ".join(terminal.cells[2]) == "3.20/15 64 9.125 3.250 4.500 0.00125 31.0 2% 1.3 GB 1:02:03"


def test_the_last_ten_training_lines_stay_and_are_redrawn_in_place():
    terminal = Terminal()
    with terminal.table as table:
        for step in range(10, 310, 10):
            table.metrics(trained(step))
            assert sum("epoch" in row for row in terminal.rows) == 1
    assert [row[1] for row in terminal.cells[2:] if row] == [str(step) for step in range(210, 310, 10)]


def test_what_is_not_logged_has_no_column_and_what_is_not_finite_is_a_dash():
    terminal = Terminal()
    bare = {"step": 10, "epoch": 0, "train/loss": 2.0, "train/lr": 0.1}
    with terminal.table as table:
        table.metrics(bare)
        table.metrics({"step": 20, "epoch": 1, "train/loss": float("nan"), "train/lr": 0.1})
    assert terminal.cells[0] == ["epoch", "step", "loss", "lr"]
    assert [row[2] for row in terminal.cells[2:4]] == ["2.000", "-"]


def test_validations_are_below_and_the_best_of_them_is_marked():
    terminal = Terminal()
    with terminal.table as table:
        table.metrics(trained(20))
        for step, accuracy in ((20, 0.1), (40, 0.3), (60, 0.2), (80, 0.3)):
            table.metrics(validated(step, accuracy) | {"perf/val_s": 3.21})
    rows = terminal.cells[terminal.rows.index("") + 1 :]
    assert rows[0] == ["epoch", "mAP@0.50:0.95", "mAP@0.50", "mAP@0.75", "seconds"]
    assert rows[2] == ["1", "0.1000", "0.3000", "0.1500", "3.2"]
    assert [row[0] for row in rows if row[-1:] == ["best"]] == ["4"], "the later of equals"


def test_the_best_validation_stays_in_sight():
    terminal = Terminal()
    with terminal.table as table:
        for step, accuracy in ((20, 0.9), *((step, 0.2) for step in range(40, 200, 20))):
            table.metrics(validated(step, accuracy))
    assert [row[0] for row in terminal.cells[2:] if row] == ["1", "6", "7", "8", "9"]
    assert terminal.cells[2][-1] == "best"


def test_averaged_weights_are_a_validation_of_their_own_and_never_the_best_epoch():
    terminal = Terminal()
    with terminal.table as table:
        table.metrics(validated(300, 0.3))
        table.metrics(validated(300, 0.4, "average/"))
    assert terminal.cells[2][0::5] == ["15", "best"]
    assert terminal.cells[3] == ["average", "0.4000", "0.6000", "0.4500", "-"]


def test_after_a_restart_the_steps_that_come_again_replace_those_shown():
    terminal = Terminal()
    with terminal.table as table:
        for line in (trained(20), validated(20, 0.1), trained(40), validated(40, 0.8), trained(50), trained(40)):
            table.metrics(line)
    assert [row[1] for row in terminal.cells[2:4]] == ["20", "40"]
    assert "0.1000" in terminal.output
    assert not any("0.8000" in row for row in terminal.rows)


def test_lines_are_printed_above_and_are_no_markup():
    terminal = Terminal()
    with terminal.table as table:
        table.line("before")
        table.metrics(trained(10))
        table.line("[bold]no markup[/oops], no \x1b[2Jcleared screen")
        table.metrics(trained(20))
    assert terminal.rows[:2] == ["before", "[bold]no markup[/oops], no ?[2Jcleared screen"]
    assert terminal.cells[2][0] == "epoch"


def test_what_others_print_is_above_too(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", out := io.TextIOWrapper(io.BytesIO(), "utf-8"))
    with terminal.table as table:
        table.metrics(trained(10))
        print("printed")
        click.echo("by click")
        print("to the error stream", file=sys.stderr)
        print("no end of line", end="", flush=True)
        table.metrics(trained(20))
    assert terminal.rows[:4] == ["printed", "by click", "to the error stream", "no end of line"]
    assert terminal.cells[4][0] == "epoch"
    assert sys.stdout is out
    out.flush()
    assert out.buffer.getvalue() == b""


def test_printing_from_another_thread_does_not_tear_the_table():
    terminal = Terminal()
    with terminal.table as table:
        printer = threading.Thread(target=lambda: [print(f"line {number}") for number in range(30)])
        printer.start()
        for step in range(1, 31):
            table.metrics(trained(step))
        printer.join()
    assert terminal.rows[:30] == [f"line {number}" for number in range(30)]
    assert terminal.cells[30][0] == "epoch"
    assert len([row for row in terminal.rows[30:] if row]) == 12


@pytest.mark.parametrize(
    ("width", "columns"),
    [
        (80, "epoch step loss iou obj lr images/s waiting memory ETA"),
        (62, "epoch step loss lr images/s waiting ETA"),
        (40, "epoch loss images/s ETA"),
        (27, "epoch loss ETA"),
    ],
)
def test_a_narrow_terminal_has_fewer_columns_and_none_is_cut(width, columns):
    terminal = Terminal(width)
    with terminal.table as table:
        table.metrics(trained(300, **{"train/YoloXFastDetectionLoss/a_long_name": 1.0}))
        table.metrics(validated(300, 0.25))
    assert terminal.cells[0] == columns.split()
    assert max(map(len, terminal.rows)) <= width
    assert not any("…" in row for row in terminal.rows)


@pytest.mark.parametrize(
    ("height", "training", "validations"), [(40, 10, 5), (24, 10, 5), (14, 3, 5), (12, 3, 3), (8, 5, 0)]
)
def test_the_table_is_no_higher_than_the_terminal(height, training, validations):
    terminal = Terminal(height=height)
    with terminal.table as table:
        for step in range(20, 300, 20):
            table.metrics(trained(step))
            table.metrics(validated(step, 0.1))
    shown = [row for row in terminal.rows if row]
    assert len(terminal.rows) <= height
    assert sum("GB" in row for row in shown) == training
    assert sum(row.endswith(("-", "best")) for row in shown) == validations


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_the_table_and_gives_the_terminal_back(error):
    terminal, before = Terminal(), (sys.stdout, sys.stderr)

    def fail():
        with terminal.table as table:
            table.metrics(trained(10))
            raise error

    with pytest.raises(error):
        fail()
    assert terminal.cells[2][1] == "10"
    assert terminal.output.rindex("\x1b[?25h") > terminal.output.rindex("\x1b[?25l"), "the cursor is shown"
    assert (sys.stdout, sys.stderr) == before


def test_where_there_is_no_terminal_only_the_last_table_is_written():
    output = io.StringIO()
    with LiveTable(15, 300, Console(file=output, width=120)) as table:
        for step in (10, 20):
            table.metrics(trained(step))
    assert output.getvalue().count("epoch") == 1
    assert "\x1b" not in output.getvalue()


def test_following_without_a_table_says_every_new_line(tmp_path):
    log, said = RunLog(tmp_path), []
    log.say("an earlier run's")
    with follow(tmp_path, said.append, None):
        log.say("epoch 0.50/15  step 10/300  loss 9.125")
        log.say("warning: größer")
        wait_for(lambda: len(said) == 2)
        log.say("the last")
    assert said == ["epoch 0.50/15  step 10/300  loss 9.125", "warning: größer", "the last"]


def test_following_with_a_table_shows_metrics_and_no_lines_of_progress(tmp_path):
    log, said, terminal = RunLog(tmp_path), [], Terminal()
    log.metrics(**trained(5))
    with terminal.table as table, follow(tmp_path, said.append, table):
        log.say("epoch 0.50/15  step 10/300  loss 9.125")
        log.metrics(**trained(10))
        log.say("warning: slow")
        wait_for(lambda: "warning: slow" in terminal.output)
        log.metrics(**trained(20))
    assert said == []
    assert terminal.rows[0] == "warning: slow"
    assert [row[1] for row in terminal.cells[3:5]] == ["10", "20"]


def test_following_waits_for_files_that_are_not_there_yet(tmp_path):
    said = []
    with follow(tmp_path / "run", said.append, None):
        time.sleep(0.6)  # it has looked once
        RunLog(tmp_path / "run").say("one")
    assert said == ["one"]


def test_following_goes_on_where_a_resumed_run_has_cut_its_metrics(tmp_path):
    log, terminal = RunLog(tmp_path), Terminal()
    with terminal.table as table, follow(tmp_path, print, table):
        for step in (10, 20, 30, 40):
            log.metrics(**trained(step))
        wait_for(lambda: "40" in terminal.cells[-1])
        drop_metrics_after(tmp_path, 20)
        time.sleep(0.6)  # it has seen the shorter file
        log.metrics(**trained(30, **{"train/loss": 7.0}))
    assert [row[1:3] for row in terminal.cells[2:] if row] == [["10", "9.125"], ["20", "9.125"], ["30", "7.000"]]


def test_following_a_file_that_cannot_be_read_does_not_stop_the_training(tmp_path):
    said = []
    (tmp_path / "log.txt").symlink_to("log.txt")
    with follow(tmp_path, said.append, None):
        time.sleep(0.6)
        (tmp_path / "log.txt").unlink()
        RunLog(tmp_path).say("better")
    assert said == ["better"]


def test_following_ends_with_the_training_that_fails(tmp_path):
    said = []

    def fail():
        with follow(tmp_path, said.append, None):
            RunLog(tmp_path).say("the last words")
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fail()
    assert said == ["the last words"]
    assert "raydet-follow" not in [thread.name for thread in threading.enumerate()]


@settings(max_examples=5, deadline=None)
@given(
    lines=st.lists(st.text(st.characters(exclude_characters="\n", codec="utf-8"), max_size=8), max_size=8),
    data=st.data(),
)
def test_lines_are_whole_wherever_the_writing_was_cut(tmp_path_factory, lines, data):
    path, said = tmp_path_factory.mktemp("cut") / "log.txt", []
    content = "".join(line + "\n" for line in lines).encode()
    cut = data.draw(st.integers(0, len(content)))
    with follow(path.parent, said.append, None), path.open("ab", buffering=0) as file:
        file.write(content[:cut])
        complete = content[:cut].count(b"\n")
        time.sleep(0.6)
        assert said == lines[:complete]
        file.write(content[cut:])
    assert said == lines


def test_the_summary_names_best_last_and_averaged_accuracy_and_all_of_a_few_classes(tmp_path):
    write(
        tmp_path,
        trained(20),
        validated(20, 0.3, dog=0.9),
        validated(40, 0.3, dog=0.1, cat=0.5),
        validated(60, 0.25, dog=0.8),
        validated(60, 0.35, "average/"),
    )
    assert summary(tmp_path) == [
        "best: epoch 2 with mAP@0.50:0.95 0.3000 and mAP@0.50 0.5000",
        "last: epoch 3 with mAP@0.50:0.95 0.2500 and mAP@0.50 0.4500",
        "average of the best checkpoints' weights: mAP@0.50:0.95 0.3500 and mAP@0.50 0.5500",
        "AP of the classes: cat 0.500  dog 0.100",
    ]


@pytest.mark.parametrize("count", [9, 10, 80])
def test_of_many_classes_the_summary_names_the_extremes(tmp_path, count):
    write(tmp_path, validated(20, 0.3, **{f"class{number}": number / 100 for number in range(count)}))
    lines = summary(tmp_path)[1:]
    if count < 10:
        assert len(lines) == 1
        assert lines[0].startswith("AP of the classes: class8 0.080  class7 0.070")
        return
    named = [re.findall(r"class(\d+)", line) for line in lines]
    assert [line.partition(":")[0] for line in lines] == ["highest AP", "lowest AP"]
    assert named == [[str(count - 1 - place) for place in range(5)], ["0", "1", "2", "3", "4"]]


@pytest.mark.parametrize("lines", [[], [trained(20)], [validated(20, -1.0)]])
def test_where_nothing_was_measured_there_is_no_summary(tmp_path, lines):
    assert summary(tmp_path) == []
    write(tmp_path, *lines)
    assert summary(tmp_path) == []


def test_damaged_lines_of_metrics_are_left_out(tmp_path):
    good = trained(10)
    damaged = ['{"step": 4', "", "7", "[1]", '{"epoch": 1}', '{"step": "x", "epoch": 0}', "\0\0"]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*damaged, json.dumps(good), '{"step": 20, "ep']))
    assert read_metrics(tmp_path) == [good]
    assert best_validation([good]) is None


def write(folder, *lines):
    log = RunLog(folder)
    for line in lines:
        log.metrics(**line)


def wait_for(happened):
    ends = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < ends, "it did not happen"
        time.sleep(0.02)
