"""Published weights by name: the table, the download from a local server, and what a name gives."""

import hashlib
import multiprocessing
import socket
import threading
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import torchvision
from typer.testing import CliRunner

import raydet
from raydet import models
from raydet.cli import app
from raydet.data.coco import load_coco
from raydet.errors import RaydetError
from raydet.models import download
from raydet.models.published import BACKBONES, PUBLISHED, backbone, published
from raydet.recipe import load as load_recipe
from raydet.tuning.nms import TABLE, tune_nms

CONTENT = bytes(range(256)) * 2000
SUM = hashlib.sha256(CONTENT).hexdigest()


class Server:
    """Serves one file; `status` and `cut` say how the next answers fail."""

    def __init__(self, content=CONTENT):
        self.content, self.status, self.cut, self.ranges = content, [], [], True
        self.asked = []
        self.pause = 0.0

    @contextmanager
    def run(self):
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                asked = self.headers.get("Range")
                server.asked.append((self.path, asked))
                threading.Event().wait(server.pause)
                if server.status and (status := server.status.pop(0)) != 200:
                    self.send_error(status)
                    return
                start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and server.ranges else 0
                if asked and start >= len(server.content):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(server.content)}")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                rest = server.content[start:]
                self.send_response(206 if start else 200)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
                self.send_header("Content-Length", str(len(rest)))
                self.end_headers()
                self.wfile.write(rest[: server.cut.pop(0)] if server.cut else rest)

            def log_message(self, *args): ...

        http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=http.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{http.server_port}"
        try:
            yield self
        finally:
            http.shutdown()
            http.server_close()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of downloaded files, empty; no mirror, no waiting, no proxy."""
    monkeypatch.setenv("RAYDET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("RAYDET_WEIGHTS", raising=False)
    monkeypatch.setattr(download, "RETRY_AFTER_S", (0.0, 0.0))
    return tmp_path / "cache/weights"


@pytest.fixture
def server():
    with Server().run() as running:
        yield running


def row(address, sha256=SUM):
    return replace(published("yolox_s"), address=f"{address}/yolox_s.pth", sha256=sha256, size=len(CONTENT))


def test_whole(folder, server):
    path = download.fetch(row(server.address))
    assert path == folder / "yolox_s.pth"
    assert path.read_bytes() == CONTENT
    assert sorted(file.name for file in folder.iterdir()) == ["yolox_s.pth", "yolox_s.pth.lock"]
    assert download.fetch(row(server.address)) == path
    assert len(server.asked) == 1


@pytest.mark.parametrize("ranges", [True, False], ids=["the rest", "a server without ranges"])
def test_cut_off_and_resumed(folder, server, ranges):
    server.cut, server.ranges = [100_000, 200_000], ranges
    assert download.fetch(row(server.address)).read_bytes() == CONTENT
    starts = [None, "bytes=100000-", "bytes=300000-" if ranges else "bytes=200000-"]
    assert [asked for _, asked in server.asked] == starts


@pytest.mark.parametrize("there", [100, len(CONTENT)], ids=["a part", "all"])
def test_what_an_earlier_process_left_is_kept(folder, server, there):
    folder.mkdir(parents=True)
    download._part(folder / "yolox_s.pth", server.address + "/yolox_s.pth").write_bytes(CONTENT[:there])
    assert download.fetch(row(server.address)).read_bytes() == CONTENT
    assert [asked for _, asked in server.asked] == [f"bytes={there}-"]


def test_a_part_that_is_longer_than_the_file_is_begun_anew(folder, server):
    folder.mkdir(parents=True)
    download._part(folder / "yolox_s.pth", server.address + "/yolox_s.pth").write_bytes(CONTENT + b"more")
    assert download.fetch(row(server.address)).read_bytes() == CONTENT


def test_a_wrong_sum_names_both_and_leaves_nothing(folder, server):
    with pytest.raises(RaydetError, match=f"sum is {SUM}, and should be {'0' * 64}; it is not used"):
        download.fetch(row(server.address, "0" * 64))
    assert [file.name for file in folder.iterdir()] == ["yolox_s.pth.lock"]


def test_a_file_that_is_there_is_checked_too(folder, server):
    download.fetch(row(server.address)).write_bytes(b"something else")
    with pytest.raises(RaydetError, match=rf"{folder}/yolox_s.pth is not the file that was published"):
        download.fetch(row(server.address))


def test_an_unknown_sum_is_kept_and_checked_from_then_on(folder, server, caplog):
    path = download.fetch(row(server.address, None))
    assert (folder / "yolox_s.pth.sha256").read_text().strip() == SUM
    assert f"no sum is published; {SUM} is kept" in caplog.text
    assert download.fetch(row(server.address, None)) == path
    path.write_bytes(CONTENT[1:])
    with pytest.raises(RaydetError, match=f"should be {SUM}"):
        download.fetch(row(server.address, None))


@pytest.mark.parametrize(
    ("status", "requests", "reason"),
    [([503, 429, 200], 3, None), ([404], 1, "HTTP 404 Not Found"), ([500, 500, 500], 3, "HTTP 500")],
)
def test_what_is_tried_again(folder, server, status, requests, reason):
    server.status = status
    if reason is None:
        download.fetch(row(server.address))
    else:
        with pytest.raises(RaydetError, match=reason):
            download.fetch(row(server.address))
    assert len(server.asked) == requests


def test_as_long_as_bytes_come_it_goes_on(folder, server):
    server.cut = [100_000] * 5
    assert download.fetch(row(server.address)).read_bytes() == CONTENT
    assert len(server.asked) == 6, "with two retries"


def test_where_no_sum_is_known_nothing_of_an_earlier_process_is_used(folder, server):
    folder.mkdir(parents=True)
    download._part(folder / "yolox_s.pth", server.address + "/yolox_s.pth").write_bytes(b"an older version")
    assert download.fetch(row(server.address, None)).read_bytes() == CONTENT


def test_a_server_that_says_nothing(folder, server, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT_S", 0.05)
    monkeypatch.setattr(download, "RETRY_AFTER_S", ())
    server.pause = 0.5
    with pytest.raises(RaydetError, match="timed out"):
        download.fetch(row(server.address))


def test_no_network_says_what_to_do(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(RaydetError) as raised:
        download.fetch(row(address))
    for part in (f"{address}/yolox_s.pth: ", "refused", f"put the file at {folder}/yolox_s.pth", SUM):
        assert part in str(raised.value)


@pytest.mark.parametrize(("given", "query"), [("/", ""), ("?token=1", "?token=1")])
def test_a_mirror_is_asked_first(folder, server, monkeypatch, given, query):
    with Server().run() as mirror:
        monkeypatch.setenv("RAYDET_WEIGHTS", f"{mirror.address}/models{given}")
        download.fetch(row(server.address))
    assert (mirror.asked, server.asked) == ([(f"/models/yolox_s.pth{query}", None)], [])


def test_what_a_mirror_began_is_not_gone_on_with_elsewhere(folder, server, monkeypatch):
    with Server(b"x" * len(CONTENT)).run() as mirror:
        mirror.cut = [100, 0, 0, 0]
        monkeypatch.setenv("RAYDET_WEIGHTS", mirror.address)
        assert download.fetch(row(server.address)).read_bytes() == CONTENT
    assert server.asked == [("/yolox_s.pth", None)]


def test_what_a_mirror_lacks_comes_from_the_address(folder, server, monkeypatch):
    with Server().run() as mirror:
        mirror.status = [404]
        monkeypatch.setenv("RAYDET_WEIGHTS", mirror.address)
        assert download.fetch(row(server.address)).read_bytes() == CONTENT
    assert len(server.asked) == 1


def test_a_folder_is_a_mirror(folder, server, monkeypatch, tmp_path):
    (tmp_path / "yolox_s.pth").write_bytes(CONTENT)
    monkeypatch.setenv("RAYDET_WEIGHTS", str(tmp_path))
    assert download.fetch(row(server.address)) == tmp_path / "yolox_s.pth"
    assert not server.asked


@pytest.mark.parametrize("there", [None, CONTENT[:70_000], CONTENT + b"more"], ids=["whole", "the rest", "too long"])
def test_a_store_is_a_mirror(folder, server, monkeypatch, tmp_path, there):
    """It is read in pieces, never as a whole."""
    (tmp_path / "yolox_s.pth").write_bytes(CONTENT)
    monkeypatch.setenv("RAYDET_WEIGHTS", tmp_path.as_uri())
    monkeypatch.setattr(download, "_REQUEST", 100_000)
    folder.mkdir(parents=True)
    if there is not None:
        download._part(folder / "yolox_s.pth", f"{tmp_path.as_uri()}/yolox_s.pth").write_bytes(there)
    read, lengths = download.Store.read, []

    def counted(store, name, offset=0, length=None):
        lengths.append(length)
        return read(store, name, offset, length)

    monkeypatch.setattr(download.Store, "read", counted)
    assert download.fetch(row(server.address)).read_bytes() == CONTENT
    assert max(lengths) == 100_000
    assert sum(lengths) == len(CONTENT) - (70_000 if there == CONTENT[:70_000] else 0)
    assert not server.asked


def test_a_proxy_of_the_environment_is_used(folder, server, monkeypatch):
    monkeypatch.setenv("http_proxy", server.address)
    monkeypatch.setenv("no_proxy", "")
    assert download.fetch(row("http://weights.invalid")).read_bytes() == CONTENT
    assert server.asked == [("http://weights.invalid/yolox_s.pth", None)]


def test_two_processes_fetch_it_once(folder, server):
    server.pause = 0.3
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=download.fetch, args=(row(server.address),)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert len(server.asked) == 1


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_table(name):
    weights = published(name)
    assert name in models.family_of(name).models
    assert weights.address.startswith("https://")
    assert weights.sha256 is None or len(bytes.fromhex(weights.sha256)) == 32
    assert load_recipe(f"coco2017_{name}").data.image_size == (weights.image_size, weights.image_size)
    assert ("non-commercial" in weights.licence) == name.startswith("yolo_nas")


@pytest.mark.parametrize("name", BACKBONES)
def test_the_table_of_backbones(name):
    assert name in models.family_of(name).models
    assert backbone(name).address.startswith("https://")
    assert not backbone(name).ap


def test_a_backbone_by_name_leaves_the_rest_as_it_was(folder, monkeypatch):
    """torchvision's own MobileNetV2 gives the maps that ours does with its file; the table gets the file's sum."""
    theirs = torchvision.models.mobilenet_v2().eval()
    row = backbone("ssd_lite_mobilenet_v2")
    folder.mkdir(parents=True)
    torch.save(theirs.state_dict(), folder / row.file)
    first = hashlib.sha256((folder / row.file).read_bytes()).hexdigest()[:8]
    monkeypatch.setitem(BACKBONES, "ssd_lite_mobilenet_v2", replace(row, sha256=first))
    torch.manual_seed(0)
    ours = models.get("ssd_lite_mobilenet_v2", 3, weights="imagenet").eval()
    torch.manual_seed(0)
    fresh = models.get("ssd_lite_mobilenet_v2", 3)
    images = torch.randn(2, 3, 64, 96)
    torch.testing.assert_close(ours.backbone(images)[-1], theirs.features(images))
    rest = {name: tensor for name, tensor in fresh.state_dict().items() if not name.startswith("backbone.")}
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in rest.items())
    assert ours.licence == "BSD-3-Clause (torchvision)"
    monkeypatch.setitem(BACKBONES, "ssd_lite_mobilenet_v2", row)
    with pytest.raises(RaydetError, match=f"its SHA-256 sum is {first}.*, and should begin with b0353104; it is not"):
        models.get("ssd_lite_mobilenet_v2", 3, weights="imagenet")


def test_no_backbone_is_published():
    with pytest.raises(RaydetError, match="no backbone is published for yolox_s, but for dfine_n, "):
        models.get("yolox_s", weights="imagenet")


def test_the_list_says_what_is_here(folder, monkeypatch):
    lines = CliRunner().invoke(app, ["weights"]).output
    rows = [*PUBLISHED.values(), *BACKBONES.values()]
    assert all(f"{row.model} " in lines and row.address in lines for row in rows)
    assert lines.count("not on this machine") == len(rows)
    folder.mkdir(parents=True)
    (folder / "yolox_tiny.pth").touch()
    assert f"here: {folder}/yolox_tiny.pth" in CliRunner().invoke(app, ["weights"]).output


@pytest.fixture
def nano(shared, tmp_path, monkeypatch, folder):
    """A mirror with yolox_nano. The file is another one than Megvii's, so the table gets its sum."""
    file = shared / "weights/yolox_nano/yolox_nano_coco.pth"
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror/yolox_nano.pth").symlink_to(file)
    monkeypatch.setenv("RAYDET_WEIGHTS", str(tmp_path / "mirror"))
    weights = replace(published("yolox_n"), sha256=hashlib.sha256(file.read_bytes()).hexdigest())
    monkeypatch.setitem(PUBLISHED, "yolox_n", weights)
    return file


@pytest.mark.parametrize("arguments", [{"weights": "coco"}, {"weights": "yolox_n"}, {"pretrained_weights": "coco"}])
def test_a_model_by_name(nano, arguments, tmp_path, monkeypatch):
    (tmp_path / "coco").mkdir()
    monkeypatch.chdir(tmp_path)  # beside a folder of images that is named like the weights
    named, given = models.get("yolox_n", **arguments), models.get("yolox_n", weights=nano)
    assert all(torch.equal(tensor, given.state_dict()[name]) for name, tensor in named.state_dict().items())
    assert named.licence == "Apache-2.0 (Megvii YOLOX)"


def test_the_file_of_another_sum_is_no_model(nano, monkeypatch):
    monkeypatch.setitem(PUBLISHED, "yolox_n", replace(PUBLISHED["yolox_n"], sha256="0" * 64))
    with pytest.raises(RaydetError, match="it is not used"):
        models.get("yolox_n", pretrained_weights="coco")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pretrained_weights": "imagenet"}, "'imagenet' is not 'coco'"),
        ({"pretrained_weights": "coco", "weights": "mine.pth"}, "both given"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(RaydetError, match=message):
        models.get("yolox_n", **arguments)


def test_a_file_of_the_name_goes_first(nano, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("yolox_n").touch()
    with pytest.raises(RaydetError, match="yolox_n is neither a checkpoint"):
        raydet.load("yolox_n")


def test_fine_tuning_by_name(nano, demo):
    overrides = [*demo, "model.name=yolox_n", "model.weights=coco", "data.image_size=64", "train.epochs=1"]
    result = raydet.train("demo", overrides=overrides, debug=True, device="cpu", say=lambda text: None)
    assert raydet.load(result.folder).config.licence == "Apache-2.0 (Megvii YOLOX)"


def test_evaluation_by_name(nano, shared):
    """The AP that the file has by its path: see tests/parity."""
    metrics = raydet.evaluate(
        "yolox_n",
        overrides=[f"data.root={shared / 'data/coco_mini'}"],
        debug=True,
        device="cpu",
        say=lambda text: None,
    )
    assert metrics["mAP@0.50:0.95"] == pytest.approx(0.3063, abs=0.0005)


def test_thresholds_by_name_are_found_and_not_stored(nano, shared, tmp_path):
    settings = [f"data.root={shared / 'data/coco_mini'}", "data.max_num_samples=16"]
    given = {"trials": 2, "out": tmp_path, "debug": True, "device": "cpu", "say": lambda text: None}
    tuned = tune_nms("yolox_n", overrides=settings, **given)
    assert (tmp_path / TABLE).is_file()
    assert not tuned.comparison.is_better or tuned.not_stored == "a weights file keeps no thresholds"


def test_prediction_by_name(nano, shared, tmp_path):
    """The same AP from the detections of `raydet predict` in the 254 images."""
    data = shared / "data/coco_mini"
    arguments = ["--out", str(tmp_path / "found"), "--score", "0.001", "--device", "cpu"]
    assert CliRunner().invoke(app, ["predict", "yolox_n", str(data / "val2017"), *arguments]).exit_code == 0
    metrics = raydet.evaluate(
        tmp_path / "found/detections.json", recipe="coco2017_yolox_n", overrides=[f"data.root={data}"]
    )
    assert metrics["mAP@0.50:0.95"] == pytest.approx(0.3063, abs=0.0005)


def test_export_by_name(nano, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["export", "yolox_n"])
    assert done.exit_code == 0, done.output
    exported, named = raydet.load("yolox_n.onnx"), raydet.load("yolox_n", "cpu")
    assert exported.config.class_names == named.config.class_names


def test_a_name_is_a_checkpoint_of_coco_s_classes(nano, shared):
    config = raydet.load("yolox_n", "cpu").config
    index = load_coco(shared / "data/coco_mini/annotations/instances_val2017.json", shared / "data/coco_mini/val2017")
    assert (config.class_names, config.category_ids) == (index.class_names, index.category_ids)
    assert config.image_size == (416, 416)
