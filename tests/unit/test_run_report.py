"""A run's report, written by its training, and looked at in a browser."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

import raydet
from raydet.errors import RaydetError
from raydet.reports.run import report
from raydet.visualization import write_picture

# In place of the page's own rule that no script runs.
PROBE = """<script>addEventListener("load", () => {
  const images = [...document.images].map(image => image.naturalWidth);
  const sizes = {images, wide: document.documentElement.scrollWidth, window: innerWidth};
  document.title = JSON.stringify(sizes);
});</script>"""


@pytest.fixture(scope="module")
def run(shapes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    options = [f"data.root={shapes}", f"storage={folder}", "data.image_size=96", "name=<b>run"]
    return raydet.train("demo", overrides=options, debug=True, device="cpu", say=print).folder


@pytest.fixture(scope="module")
def browser():
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        if os.environ.get("RAYDET_CHROMIUM_REQUIRED"):
            pytest.fail("there is no chromium")
        pytest.skip("needs chromium, which is not installed")

    def look(page, width):
        """Return the page as the browser has it, and what the browser complained of."""
        switches = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
        command = [path, *switches, f"--window-size={width},900", "--virtual-time-budget=5000", "--dump-dom"]
        done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    return look


def last_validation(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "val/mAP@0.50:0.95" in line][-1]


def test_a_training_leaves_its_report_and_the_browser_complains_of_nothing(run, browser):
    shown, complaints = browser(run / "report.html", 1200)
    assert complaints == []
    for headline in ("Curves", "Metrics", "Classes", "Pictures", "Recipe", "Environment"):
        assert re.search(f'<h2 id="\\d">{headline}</h2>', shown), headline


@pytest.mark.parametrize("width", [1200, 500])
def test_all_pictures_are_there_and_nothing_is_wider_than_the_window(run, browser, width, tmp_path):
    text = (run / "report.html").read_text()
    probed, count = re.subn('<meta http-equiv="Content-Security-Policy"[^>]*>', PROBE, text)
    assert count == 1
    (tmp_path / "probe.html").write_text(probed)
    shown, _ = browser(tmp_path / "probe.html", width)
    seen = json.loads(re.search("<title>(.*?)</title>", shown)[1])
    kinds = {json.loads(line)["name"] for line in (run / "images/pictures.jsonl").read_text().splitlines()}
    assert len(seen["images"]) == len(kinds) + 2 == 7, "the curves and the detections too"
    assert min(seen["images"]) > 100
    assert seen["wide"] <= seen["window"]


def test_tables_have_the_numbers_of_the_best_validation(run):
    text = (run / "report.html").read_text()
    line = last_validation(run)
    rows = dict(re.findall(r"<tr><td>([^<]+)</td><td>([\d.]+|no objects)</td>", text))
    for key, value in line.items():
        if key.startswith("val/"):
            name = key.removeprefix("val/").removeprefix("AP@0.50:0.95_")
            assert rows[name] == ("no objects" if value == -1 else f"{value:.4f}"), key


def test_names_are_text_not_html(run):
    text = (run / "report.html").read_text()
    assert "&lt;b&gt;run" in text
    assert "<b>run" not in text


def test_of_each_kind_the_newest_picture_is_shown_and_thresholds_where_they_were_searched(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    before = report(folder).read_text().count("<img")
    write_picture(folder / "checkpoint_000002" / "tune_nms.png", np.zeros((20, 30, 3), np.uint8))
    (folder / "log.txt").write_text("warning: <slow>\nepoch 1\nleft out of the train data: a.jpg\n")
    with (folder / "images/pictures.jsonl").open("a") as notes:
        notes.write(
            '{"name": "train/batch_0", "title": "lost", "epoch": 9, "step": 9, "picture": "images/none.jpg"}\n{"na'
        )
    text = report(folder).read_text()
    assert text.count("<img") == before  # one more, and one that is lost
    assert "warning: &lt;slow&gt;</li><li>left out of the train data: a.jpg</li></ul>" in text
    (folder / "summary.json").unlink()
    assert " · not finished · " in report(folder).read_text()


def test_a_folder_without_metrics_is_named(tmp_path):
    with pytest.raises(RaydetError, match=r"metrics\.jsonl: no metrics in it"):
        report(tmp_path)


def test_the_command_imports_neither_torch_nor_ray(run, tmp_path):
    code = "import sys; from raydet.cli import main\ntry: main()\nfinally: print({'torch', 'ray'} & set(sys.modules))"
    command = [sys.executable, "-c", code, "report", str(run), "--out", str(tmp_path / "page.html")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "set()"), done.stderr
    assert (tmp_path / "page.html").is_file()
