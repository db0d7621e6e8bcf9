"""The picture of a run's curves."""

import json
import subprocess
import sys

import cv2
import numpy as np
import pytest

from raydet.errors import RaydetError
from raydet.reports.curves import SMOOTHED_ABOVE, plot

BLUE, ORANGE, GREEN = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73)


def run(folder, steps=20, accuracy=(0.1, 0.3, 0.2), average=None, **more):
    """Write the metrics of a run with three epochs: falling losses, a falling learning rate, a validation each."""
    per_epoch = steps / 3
    lines = [
        {"step": step, "epoch": int(step / per_epoch), "train/loss": 8 / step, "train/Loss/iou": 5 / step}
        | {"train/lr": 0.1 - 0.09 * step / steps, "perf/images_per_s": 30.0}
        | more
        for step in range(1, steps + 1)
    ]
    for epoch, value in enumerate(accuracy, start=1):
        at = {"step": round(epoch * per_epoch), "epoch": epoch}
        lines.append({**at, "val/mAP@0.50:0.95": value, "val/mAP@0.50": value * 1.5})
    if average is not None:
        lines.append({"step": steps, "epoch": 3, "average/mAP@0.50:0.95": average, "average/mAP@0.50": average})
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def pixels(path):
    """Return a picture's pixels as RGB."""
    assert path.read_bytes().startswith(b"\x89PNG")
    return cv2.imread(str(path))[:, :, ::-1]


def panels(path):
    """Return the panels: loss, components, AP, and below them learning rate and speed."""
    rows = np.array_split(pixels(path), 2)
    return [part for row in rows for part in np.array_split(row, 3, axis=1)][:5]


def amount(image, colour):
    return int((image == colour).all(-1).sum())


def test_the_picture_is_among_the_run_s_images_and_has_five_panels(tmp_path):
    path = plot(run(tmp_path / "run"))
    assert path == tmp_path / "run" / "images" / "metrics.png"
    loss, parts, accuracy, rate, speed = panels(path)
    for panel in (loss, parts, accuracy, rate, speed):
        assert amount(panel, BLUE) > 200
    assert amount(accuracy, ORANGE) > 200, "mAP@0.50"
    assert amount(loss, ORANGE) == amount(rate, ORANGE) == amount(speed, ORANGE) == 0


def test_it_can_be_put_anywhere_and_is_replaced_as_a_whole(tmp_path):
    out = tmp_path / "some" / "where.png"
    assert plot(run(tmp_path / "run"), out) == out
    before = pixels(out)
    plot(run(tmp_path / "run", accuracy=(0.5, 0.6, 0.7)), out)
    assert not np.array_equal(pixels(out), before)
    assert [path.name for path in out.parent.iterdir()] == ["where.png"], "nothing written aside is left"


def test_the_same_run_gives_the_same_picture(tmp_path):
    folder = run(tmp_path / "run", steps=300)
    assert plot(folder, tmp_path / "a.png").read_bytes() == plot(folder, tmp_path / "b.png").read_bytes()


def test_averaged_weights_are_a_line_across(tmp_path):
    without = plot(run(tmp_path / "run"), tmp_path / "without.png")
    with_them = plot(run(tmp_path / "run", average=0.25), tmp_path / "with.png")

    def widest(path):
        return (panels(path)[2] == BLUE).all(-1).sum(1).max()

    assert widest(with_them) > widest(without) + 200


def test_many_points_are_drawn_pale_with_a_smooth_curve_on_top(tmp_path):
    def solid_and_other(steps):
        folder = run(tmp_path / "run", steps)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        zigzag = [{**line, "train/loss": 5.0 + line["step"] % 2} for line in lines if "train/loss" in line]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, zigzag)))
        loss = panels(plot(folder))[0]
        return amount(loss, BLUE), int((loss != 255).any(-1).sum())

    few, few_in_all = solid_and_other(SMOOTHED_ABOVE)
    many, many_in_all = solid_and_other(SMOOTHED_ABOVE + 1)
    assert few > 5 * many
    assert many_in_all > few_in_all / 2, "the values themselves are still there"


@pytest.mark.parametrize(
    ("steps", "accuracy"), [(1, ()), (3, ()), (3, (-1.0,)), (2, (0.2,))], ids=["one", "none", "empty", "short"]
)
def test_a_run_that_has_just_begun_can_be_drawn(tmp_path, steps, accuracy):
    assert pixels(plot(run(tmp_path / "run", steps, accuracy))).shape[2] == 3


def test_a_loss_without_components_has_no_panel_of_them(tmp_path):
    folder = run(tmp_path / "run")
    text = (folder / "metrics.jsonl").read_text().replace("train/Loss/iou", "perf/other")
    (folder / "metrics.jsonl").write_text(text)
    inside = panels(plot(folder))[1][100:-100, 100:-100]
    assert (inside == 255).all()


def test_names_are_no_formulas_and_many_components_are_still_told_apart(tmp_path):
    components = {f"train/Loss/$x_{number}^$": float(number) for number in range(20)}
    folder = run(tmp_path / "cost $5^ & $6^", **components)
    assert amount(panels(plot(folder))[1], GREEN) > 200


def test_damaged_lines_are_skipped(tmp_path):
    folder = run(tmp_path / "run")
    clean = plot(folder, tmp_path / "clean.png").read_bytes()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('\n[]\n{"step": 1e9}\n{"step": 21, "epoch": 3, "train/lo')
    assert plot(folder, tmp_path / "damaged.png").read_bytes() == clean


@pytest.mark.parametrize("content", [None, "", '{"step": 1, "epoch": 0, "val/mAP@0.50:0.95": 0.5}\n'])
def test_without_a_training_line_the_file_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(RaydetError, match=r"metrics\.jsonl: there is no training step"):
        plot(tmp_path)


def test_another_kind_of_picture_is_refused(tmp_path):
    with pytest.raises(RaydetError, match=r"curves\.pdf: the picture is a PNG"):
        plot(run(tmp_path / "run"), tmp_path / "curves.pdf")


def test_the_command_says_where_the_picture_is_and_leaves_pyplot_alone(tmp_path):
    folder, out = run(tmp_path / "run"), tmp_path / "curves.png"
    command = [sys.executable, "-X", "importtime", "-m", "raydet.cli", "plot", str(folder), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"picture: {out}\n"
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "matplotlib.figure" in modules
    assert not modules & {"matplotlib.pyplot", "torch", "ray"}


def test_the_command_s_help_has_an_example():
    command = [sys.executable, "-m", "raydet.cli", "plot", "--help"]
    assert (
        "Example: raydet plot runs/demo" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    )
