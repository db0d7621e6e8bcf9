"""Detection in whatever shows something."""

import json
import os
import sys
import threading
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import numpy as np
import PIL.Image
import pytest
import torch

from raydet import models
from raydet.data.batch import local_eval_batches
from raydet.data.coco import load_coco
from raydet.data.samples import Samples
from raydet.data.transforms import Letterbox
from raydet.errors import RaydetError
from raydet.models import Preprocessing
from raydet.predict import predictor as predict
from raydet.predict.on_ray import batch_predict
from raydet.predict.predictor import Detections, DetectionStream, Found, Predictor, pick_device, post_prediction
from raydet.predict.save import NOTES, open_target, picture_files, save
from raydet.predict.sources import image_files, open_source
from raydet.recipe import Eval, Recipe
from raydet.runs.checkpoint import Config
from raydet.runs.log import Recorder
from raydet.training.job import Job
from raydet.training.validation import Validation
from raydet.visualization import write_picture, write_video

NAMES = ("person", *(f"class {number}" for number in range(1, 80)))
CONFIG = Config(
    "yolox_n", NAMES, tuple(range(1, 81)), (416, 416), Preprocessing((0.0,) * 3, (1.0,) * 3), Eval(score=0.25)
)


@pytest.fixture(scope="module")
def predictor(shared):
    weights = shared / "weights/yolox_nano/yolox_nano_coco.pth"
    return Predictor(models.get("yolox_n", 80, weights=weights), CONFIG, torch.device("cpu"))


@pytest.fixture(scope="module")
def photo(shared):
    """A photograph with people, and their boxes."""
    content = json.loads((shared / "data/coco_mini/annotations/instances_val2017.json").read_text())
    people = [a for a in content["annotations"] if a["category_id"] == 1 and not a["iscrowd"] and a["area"] > 40000]
    image_id = people[0]["image_id"]
    name = next(image["file_name"] for image in content["images"] if image["id"] == image_id)
    boxes = np.array([a["bbox"] for a in people if a["image_id"] == image_id])
    return shared / "data/coco_mini/val2017" / name, np.concatenate((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), axis=1)


def iou(a, b):
    low, high = np.maximum(a[:2], b[:2]), np.minimum(a[2:], b[2:])
    inter = np.prod((high - low).clip(0))
    return inter / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - inter)


def rgb(path):
    return np.asarray(PIL.Image.open(path).convert("RGB"))


def same(ours, theirs, atol=1e-2):
    assert ours.names == theirs.names
    np.testing.assert_allclose(ours.boxes, theirs.boxes, atol=atol)
    np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-4)


def test_people_are_found_where_they_are(predictor, photo):
    path, boxes = photo
    found = predictor.predict(path)
    assert found.names[0] in NAMES
    assert len(found) == len(found.names)
    assert (np.diff(found.scores) <= 0).all()
    assert found.scores.min() >= 0.25
    people = found.boxes[found.labels == 0]
    assert max(iou(mine, boxes[0]) for mine in people) > 0.7


def test_what_is_found_is_what_evaluate_finds_image_by_image(predictor, shared):
    folder = shared / "data/coco_mini/val2017"
    index = load_coco(shared / "data/coco_mini/annotations/instances_val2017.json", folder).head(48)
    samples = Samples(
        index, (Letterbox(CONFIG.image_size, CONFIG.preprocessing.resize),), CONFIG.image_size, 16, shuffle=False
    )
    callback = post_prediction(predictor.model, CONFIG.thresholds)
    job = Job(Recipe(), Path(), CONFIG, predictor.model, None, 0, index)
    batches = partial(local_eval_batches, samples, 16)
    validation = Validation(job, 0, predictor.device, batches, Recorder(print), lambda: None)
    measured = validation.outputs(predictor.model, callback)
    rows = {row: (placement, found) for row, placement, found in measured}
    predicted = predictor.predict([index.path(row) for row in range(len(index))])
    assert len(predicted) == len(rows) == 48
    for row, found in enumerate(predicted):
        placement, theirs = rows[row]
        np.testing.assert_allclose(found.boxes, placement.undo(theirs[:, :4].numpy()), atol=1e-2)
        np.testing.assert_allclose(found.scores, theirs[:, 4].numpy(), atol=1e-5)
        assert found.labels.tolist() == theirs[:, 5].int().tolist()


@pytest.fixture(scope="module")
def served(photo):
    """Address of a web server in the photograph's folder."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(photo[0].parent))
    handler.log_message = lambda *_: None
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


SINGLE = {
    "path": lambda path, served: path,
    "text": lambda path, served: str(path),
    "address": lambda path, served: f"{served}/{path.name}",
    "array": lambda path, served: rgb(path),
    "PIL image": lambda path, served: PIL.Image.open(path),
    "tensor": lambda path, served: torch.from_numpy(rgb(path).copy()).permute(2, 0, 1),
}


@pytest.mark.parametrize("kind", SINGLE)
def test_every_kind_of_single_image(predictor, photo, served, kind):
    path, _ = photo
    expected = predictor.predict(path)
    found = predictor.predict(SINGLE[kind](path, served))
    assert isinstance(found, Detections)
    same(found, expected, atol=2)  # PIL decodes a JPEG with other rounding than OpenCV
    np.testing.assert_allclose(found.image.astype(int), rgb(path), atol=40)
    (in_list,) = predictor.predict([SINGLE[kind](path, served)])
    same(in_list, found)


def test_every_kind_of_many_images(predictor, photo, tmp_path):
    path, _ = photo
    for name in ("a.jpg", "b.JPG", "inner/c.jpg", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(path.read_bytes())
    pixels = torch.from_numpy(rgb(path).copy()).permute(2, 0, 1)
    expected = predictor.predict(path)
    for source, count in (
        (tmp_path, 3),
        (tmp_path / "*.jpg", 1),
        (f"{tmp_path}/**/*.[jJ]*", 3),
        (torch.stack((pixels, pixels)), 2),
        ([path, rgb(path), tmp_path], 5),
    ):
        found = predictor.predict(source, batch_size=2)
        assert isinstance(found, Found)
        assert len(found) == count
        assert found.failed == {}
        for one in found:
            same(one, expected, atol=2)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((0, 5, 3), np.uint8), r"ndarray of uint8 \[0, 5, 3\]: it has no pixels"),
        (torch.zeros(3, 0, 0, dtype=torch.uint8), r"Tensor of torch.uint8 \[3, 0, 0\]: it has no pixels"),
        (PIL.Image.new("RGB", (0, 4)), r"cannot detect in Image: it has no pixels"),
        (np.zeros((4, 4, 3), np.float32), r"cannot detect in ndarray of float32 \[4, 4, 3\]"),
        (np.zeros((4, 4), np.uint8), r"ndarray of uint8 \[4, 4\]"),
        (torch.zeros(3, 4, 4), r"Tensor of torch.float32 \[3, 4, 4\].* values 0 to 255"),
        (None, "cannot detect in NoneType"),
        ([], "the list is empty"),
        ("/none.mp4", "/none.mp4: no such file or folder"),
        ("/none/*.jpg", r"/none/\*.jpg: no images"),
        ("s3://bucket/photos", "raydet batch-predict"),
        ("http://127.0.0.1:9/a.jpg", "http://127.0.0.1:9/a.jpg: cannot be read"),
        (99, "camera 99: cannot be opened"),
    ],
)
def test_what_is_no_source_is_named(predictor, source, message):
    with pytest.raises(RaydetError, match=message):
        predictor.predict(source)


@pytest.mark.parametrize("kind", ["path", "PIL image"])
def test_the_orientation_that_a_camera_noted_is_applied(predictor, photo, tmp_path, kind):
    turned = PIL.Image.fromarray(rgb(photo[0])).transpose(PIL.Image.Transpose.ROTATE_90)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    found = predictor.predict(SINGLE[kind](tmp_path / "turned.png", None))
    np.testing.assert_array_equal(found.image, rgb(photo[0]))
    same(found, predictor.predict(rgb(photo[0])))


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "L", "RGBA", "P", "1"])
def test_a_pil_image_has_the_pixels_that_its_file_has(tmp_path, mode):
    if mode.startswith("I"):
        ramp = np.arange(65536, dtype=">u2" if mode == "I;16B" else "<u2").reshape(256, 256)
        image = PIL.Image.fromarray(ramp)
    else:
        pixels = np.arange(256 * 96, dtype=np.uint32).view(np.uint8).reshape(256, 96, 4)
        image = PIL.Image.fromarray(pixels).convert(mode)
    assert image.mode == mode
    file = tmp_path / ("a.tif" if mode == "I;16B" else "a.png")
    image.save(file)
    (ours,), (theirs,) = (next(iter(open_source(source).parts)) for source in (image, file))
    np.testing.assert_array_equal(ours.read(), theirs.read())


@pytest.mark.parametrize("mode", ["I", "F"])
def test_a_pil_image_of_unknown_range_is_refused(predictor, mode):
    with pytest.raises(RaydetError, match=f"image is a PIL image of mode {mode}, .*: scale it to 0 … 255"):
        predictor.predict(PIL.Image.new(mode, (40, 20)))


def test_a_large_image_is_seen_as_in_training(predictor, photo, tmp_path):
    """Training decodes it smaller; just to sample it would leave noise."""
    path, _ = photo
    rng = np.random.default_rng(0)
    image = cv2.resize(cv2.imread(str(path)), None, fx=4, fy=4)
    noisy = np.clip(image + rng.normal(0, 60, image.shape), 0, 255).astype(np.uint8)
    cv2.imwrite(str(tmp_path / "1.jpg"), noisy, [cv2.IMWRITE_JPEG_QUALITY, 100])
    reduced = cv2.imread(str(tmp_path / "1.jpg"), cv2.IMREAD_REDUCED_COLOR_4)
    close = np.abs(predictor.fit(cv2.imread(str(tmp_path / "1.jpg"))).astype(int) - predictor.fit(reduced))
    assert close.mean() < 2


def test_images_of_any_size_share_a_batch(predictor, photo):
    image = rgb(photo[0])
    tall = np.asarray(PIL.Image.fromarray(image).resize((image.shape[1] // 2, image.shape[0])))
    together, alone = predictor.predict([image, tall]), [predictor.predict(one) for one in (image, tall)]
    for ours, theirs in zip(together, alone, strict=True):
        same(ours, theirs)


def test_score_and_iou_replace_the_checkpoint_s(predictor, photo):
    few, many = predictor.predict(photo[0], 0.6), predictor.predict(photo[0], 0.05)
    assert 0 < len(few) < len(many)
    assert few.scores.min() >= 0.6
    assert len(predictor.predict(photo[0], 0.05, iou=0.95)) > len(many)
    with pytest.raises(RaydetError, match="iou: 65 is not between 0 and 1"):
        predictor.predict(photo[0], iou=65)


def test_detections_are_those_of_supervision(predictor, photo):
    supervision = pytest.importorskip("supervision")
    found = predictor.predict(photo[0])
    converted = found.to_supervision()
    assert isinstance(converted, supervision.Detections)
    assert len(converted) == len(found) > 0
    assert converted["class_name"].tolist() == list(found.names)
    best = converted[0]
    np.testing.assert_array_equal(best.xyxy[0], found.boxes[0])
    assert (best.confidence[0], best.class_id[0]) == (found.scores[0], found.labels[0])


def test_without_supervision_it_says_what_to_install(predictor, photo, monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(RaydetError, match="supervision is not installed: pip install supervision"):
        predictor.predict(photo[0]).to_supervision()


def test_coco_results_have_the_data_set_s_category_ids(predictor, photo):
    found = predictor.predict(photo[0])
    shifted = replace(found, config=replace(CONFIG, category_ids=tuple(range(101, 181)))).to_coco()
    assert [entry["category_id"] - 101 for entry in shifted] == found.labels.tolist()
    assert {entry["image_id"] for entry in shifted} == {int(photo[0].stem)}
    assert {entry["image_id"] for entry in found.to_coco(7)} == {7}
    x, y, width, height = shifted[0]["bbox"]
    np.testing.assert_allclose([x, y, x + width, y + height], found.boxes[0], atol=2e-3)


def test_detections_are_drawn_and_saved(predictor, photo, tmp_path):
    found = predictor.predict(photo[0])
    found.save(tmp_path / "drawn.png")
    np.testing.assert_array_equal(rgb(tmp_path / "drawn.png"), found.draw())
    assert (found.draw() != found.image).any()


@pytest.mark.parametrize("name", ["o.xyz", "o", "o.jfif"])
def test_a_picture_in_an_unknown_format_is_refused(predictor, photo, tmp_path, name):
    with pytest.raises(RaydetError, match=rf"{name}: a picture is written in the format .* such as \.jpg or \.png"):
        predictor.predict(photo[0]).save(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_picture_that_its_format_does_not_hold_is_refused(tmp_path):
    """Of JPEG: 65500 pixels a side. An empty file was written."""
    with pytest.raises(RaydetError, match=r"wide\.jpg: .* 70000x4 pixels cannot be written as \.jpg"):
        write_picture(tmp_path / "wide.jpg", np.zeros((4, 70000, 3), np.uint8))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("batch_size", [0, -1])
def test_at_least_an_image_is_detected_in_at_once(predictor, photo, batch_size):
    with pytest.raises(RaydetError, match=f"batch_size is {batch_size}: it must be at least 1"):
        predictor.predict([photo[0]], batch_size=batch_size)
    with pytest.raises(RaydetError, match=f"batch_size is {batch_size}: it must be at least 1"):
        batch_predict("nowhere", str(photo[0].parent), "out", batch_size=batch_size)


@pytest.fixture
def broken(photo, tmp_path):
    """A folder with three photographs, of which the second is cut off."""
    content = photo[0].read_bytes()
    for name, kept in (("1.jpg", None), ("2.jpg", 5000), ("3.jpg", None)):
        (tmp_path / "broken" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "broken" / name).write_bytes(content[:kept])
    return tmp_path / "broken"


def test_a_broken_file_among_many_is_left_out_by_name(predictor, broken, caplog):
    found = predictor.predict(broken, batch_size=2)
    assert [os.path.basename(one.picture.name) for one in found] == ["1.jpg", "3.jpg"]
    assert list(found.failed) == [str(broken / "2.jpg")]
    assert f"left out: {broken}/2.jpg is not an image" in caplog.text
    same(found[0], found[1])
    with pytest.raises(RaydetError, match=r"2\.jpg is not an image"):
        predictor.predict(broken / "2.jpg")


def test_what_is_saved_of_a_folder_with_a_broken_file(predictor, broken, tmp_path):
    target = open_target(str(broken), tmp_path / "out")
    saved = save(predictor.stream(target.source), target)
    assert (saved.images, list(saved.failed)) == (2, [str(broken / "2.jpg")])
    assert saved.summary.endswith("; 1 could not be read")
    assert sorted(os.listdir(tmp_path / "out")) == [NOTES, "1.jpg", "3.jpg", "detections.json"]
    results = json.loads((tmp_path / "out/detections.json").read_text())
    assert {(entry["image_id"], entry["file_name"]) for entry in results} == {(1, "1.jpg"), (3, "3.jpg")}


@pytest.fixture(scope="module")
def clip(shared, tmp_path_factory):
    """A video of 21 frames, 7 a second, 320x240 pixels."""
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 7, (320, 240))
    images = sorted((shared / "data/coco_mini/val2017").glob("*.jpg"))[:21]
    for image in images:
        writer.write(cv2.resize(cv2.imread(str(image)), (320, 240)))
    writer.release()
    return path


def properties(path):
    video = cv2.VideoCapture(str(path))
    kinds = (cv2.CAP_PROP_FRAME_COUNT, cv2.CAP_PROP_FPS, cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT)
    return [video.get(kind) for kind in kinds]


def test_a_video_is_read_as_it_is_asked_for(predictor, clip):
    stream = predictor.predict(clip, batch_size=4)
    assert isinstance(stream, DetectionStream)
    first = next(iter(stream))
    assert first.image.shape == (240, 320, 3)
    frames = list(stream)
    assert len(frames) == 21
    same(frames[0], first)
    same(predictor.predict(frames[5].image), frames[5])
    assert len(list(predictor.predict([clip, frames[0].image]))) == 22


def test_a_video_goes_in_and_comes_out(predictor, clip, tmp_path):
    assert properties(clip) == [21, 7, 320, 240]
    predictor.predict(clip).save(tmp_path / "found.mp4")
    assert properties(tmp_path / "found.mp4") == properties(clip)
    assert os.listdir(tmp_path) == ["found.mp4"]
    with pytest.raises(RaydetError, match=r"videos are written as \.mp4"):
        predictor.predict(clip).save(tmp_path / "found.gif")


def tree(folder):
    """Content of all files below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def photos(photo, tmp_path):
    """Folders of photographs, two of which have one of the same name."""
    pixels = cv2.resize(cv2.imread(str(photo[0])), (96, 96))
    for number, name in enumerate(("photos/a/1.jpg", "photos/b/1.jpg", "photos/b/2.jpg", "photos/c/deep/3.jpg")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(tmp_path / name), pixels + number)
    return tmp_path / "photos"


def found_in(predictor, source, out):
    """Names of the results and number of images of a call of the command line."""
    target = open_target(str(source), out)
    saved = save(predictor.stream(target.source, 0.01), target)
    results = json.loads((out / "detections.json").read_text())
    assert {entry["file_name"] for entry in results} <= set(target.names.values())
    return sorted(target.names.values()), saved.images


@pytest.mark.parametrize(
    ("source", "out"),
    [("a/1.jpg", "b"), ("a", "b"), ("a/*.jpg", "b"), ("b", "b"), (".", "."), ("b/2.jpg", "b"), ("*/1.jpg", ".")],
)
def test_no_original_is_replaced(predictor, photos, source, out):
    """A picture with boxes goes where a photograph lies: nothing is written, and the photograph is named."""
    before = tree(photos)
    with pytest.raises(RaydetError, match=r"--out .*: [a-z0-9/]*\.jpg .* is not raydet's.* name another folder"):
        found_in(predictor, photos / source, photos / out)
    assert tree(photos) == before


@pytest.mark.parametrize(
    ("source", "out", "expected"),
    [
        ("photos", ".", ["a/1.jpg", "b/1.jpg", "b/2.jpg", "c/deep/3.jpg"]),
        ("photos/*/*.jpg", "photos/a/found", ["a/1.jpg", "b/1.jpg", "b/2.jpg"]),
        ("photos/**/*.jpg", "photos/c", ["a/1.jpg", "b/1.jpg", "b/2.jpg", "c/deep/3.jpg"]),
        ("photos", "photos/a", ["a/1.jpg", "b/1.jpg", "b/2.jpg", "c/deep/3.jpg"]),
        ("photos/a/../b/*.jpg", "out", ["1.jpg", "2.jpg"]),
        ("photos/a/*/../../b/../../photos/b/2.jpg", "out", ["2.jpg"]),
    ],
)
def test_every_image_that_is_meant_is_detected_in_also_those_in_out(
    predictor, photos, source, out, expected, monkeypatch
):
    """And again: the pictures of the first time are raydet's own, which are replaced and not detected in."""
    monkeypatch.chdir(photos.parent)
    (photos / "a/x").mkdir()
    before = tree(photos)
    for _ in range(2):
        assert found_in(predictor, source, Path(out)) == (expected, len(expected))
        assert {name: content for name, content in tree(photos).items() if name in before} == before
        assert all((Path(out) / name).is_file() for name in expected)


def test_links_lead_to_the_same_pictures_and_no_two_images_share_a_file(predictor, photos, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(photos)
    for _ in range(2):
        assert found_in(predictor, tmp_path / "link/b", photos / "b/found") == (["1.jpg", "2.jpg"], 2)
    monkeypatch.chdir(photos / "c")
    with pytest.raises(RaydetError, match=r"two of the images would be written as 1\.jpg"):
        open_target("*/../../[ab]/1.jpg", tmp_path / "out")


@pytest.mark.parametrize("changed", ["1.jpg", "detections.json"])
def test_what_was_put_in_the_place_of_a_picture_of_raydet_s_is_kept(predictor, photos, changed, tmp_path):
    out = tmp_path / "out"
    found_in(predictor, photos / "a", out)
    (out / changed).write_bytes(b"mine")
    with pytest.raises(RaydetError, match=f"{changed} is there and is not raydet's"):
        found_in(predictor, photos / "a", out)
    assert (out / changed).read_bytes() == b"mine"


def test_pictures_of_images_that_differ_in_their_suffix_have_names_of_their_own():
    """OpenCV writes no .jfif, and a picture of an address may have no suffix at all."""
    names = ["1.jfif", "1.jpg", "2.jfif", "a/3", "a/3.PNG"]
    files = picture_files({f"photos/{name}": name for name in names})
    assert list(files.values()) == ["1.jfif.jpg", "1.jpg", "2.jpg", "a/3.jpg", "a/3.PNG"]


@pytest.mark.parametrize("saves", ["image", "video"])
def test_the_image_or_video_itself_is_not_replaced(predictor, photo, clip, saves, tmp_path):
    source = tmp_path / ("clip.mp4" if saves == "video" else "photo.jpg")
    source.write_bytes((clip if saves == "video" else photo[0]).read_bytes())
    before = tree(tmp_path)
    with pytest.raises(RaydetError, match=f"{source} is what was detected in: save it under another name"):
        predictor.predict(source).save(tmp_path / "." / source.name)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("size", "kept"), [((161, 121), (162, 122)), ((160, 121), (160, 122)), ((160, 120), (160, 120))]
)
def test_a_video_keeps_its_size_but_for_odd_sides(size, kept, tmp_path, caplog):
    """The encoder takes even sides only: a column or a row more, not one less."""
    frame = np.zeros((size[1], size[0], 3), np.uint8)
    frame[:, -8:] = 255
    frame[-8:, :] = 255
    assert write_video(tmp_path / "odd.mp4", iter([frame] * 3), 5) == 3
    assert properties(tmp_path / "odd.mp4") == [3, 5, *kept]
    last = cv2.VideoCapture(str(tmp_path / "odd.mp4")).read()[1]
    assert last[-4:, -4:].min() > 200
    assert last[:-12, :-12].max() < 60
    assert (f"{kept[0]}x{kept[1]}" in caplog.text) == (size != kept)


def test_frames_of_another_size_are_fitted_into_that_of_the_first_and_counted(tmp_path, caplog):
    frames = [np.full((*shape, 3), 200, np.uint8) for shape in ((120, 160), (60, 160), (240, 320), (120, 160))]
    assert write_video(tmp_path / "mixed.mp4", iter(frames), 5) == 4
    assert properties(tmp_path / "mixed.mp4") == [4, 5, 160, 120]
    video = cv2.VideoCapture(str(tmp_path / "mixed.mp4"))
    read = [video.read()[1].astype(int) for _ in frames]
    assert [int(image[60, 80].mean().round(-1)) for image in read] == [200] * 4
    assert [int(image[5, 80].mean().round(-1)) for image in read] == [200, 110, 200, 200], "with grey above it"
    assert "2 of 4 frames" in caplog.text


def test_what_is_saved_of_a_video(predictor, clip, tmp_path):
    target = open_target(str(clip), tmp_path)
    saved = save(predictor.stream(target.source), target)
    assert saved.images == 21
    assert properties(tmp_path / "clip.mp4") == properties(clip)
    results = json.loads((tmp_path / "detections.json").read_text())
    assert {entry["image_id"] for entry in results} <= set(range(1, 22))
    before = clip.read_bytes()
    with pytest.raises(RaydetError, match=r"clip\.mp4 is there and is not raydet's"):
        open_target(str(clip), clip.parent)
    assert clip.read_bytes() == before
    again = open_target(str(clip), tmp_path)
    assert save(predictor.stream(again.source), again).images == 21


def test_files_are_found_below_a_folder(tmp_path):
    (tmp_path / "inner").mkdir()
    for name in ("b.PNG", "inner/a.jpg", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    assert [str(path.relative_to(tmp_path)) for path in image_files(tmp_path)] == ["b.PNG", "inner/a.jpg"]
    assert image_files(tmp_path / "b.PNG") == [tmp_path / "b.PNG"]


def test_what_is_hidden_is_left_out_and_what_is_no_image_is_counted(tmp_path, caplog):
    for name in ("a.jfif", ".a.jpg", "._a.jpg", "@eaDir/a.jpg/T.jpg", ".thumbs/b.jpg", "sub/b.AVIF", "sub/c.heic", "d"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "caf\udce9.jpg").write_bytes(b"")
    (tmp_path / "sub/back").symlink_to(tmp_path)
    for source, other in ((tmp_path, "d"), (f"{tmp_path}/**", f"{tmp_path}/d")):
        caplog.clear()
        assert image_files(source) == [tmp_path / "a.jfif", tmp_path / "sub/b.AVIF"]
        assert f"left out: 2 files that are no images raydet decodes, such as {other}" in caplog.text
        assert r"caf\xe9.jpg: the name is not UTF-8" in caplog.text
    assert image_files(f"{tmp_path}/.*.jpg") == [tmp_path / "._a.jpg", tmp_path / ".a.jpg"]  # they are meant
    assert image_files(f"{tmp_path}/@eaDir/*/*") == [tmp_path / "@eaDir/a.jpg/T.jpg"]


def test_pictures_of_formats_that_are_not_written_are_jpeg(predictor, photo, tmp_path):
    for name in ("a.jpg", "a.gif", "b.jp2", "c.jfif", "inner/c.JPE"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        kind = {".gif": "GIF", ".jp2": "JPEG2000"}.get(name[-4:], "JPEG")
        PIL.Image.open(photo[0]).save(tmp_path / "photos" / name, kind)
    target = open_target(str(tmp_path / "photos"), tmp_path / "out")
    assert save(predictor.stream(target.source), target).images == 5
    written = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.jpg"))
    assert written == ["a.gif.jpg", "a.jpg", "b.jpg", "c.jpg", "inner/c.jpg"]


def test_missing_images_and_devices_are_named(tmp_path):
    with pytest.raises(RaydetError, match="no such file or folder"):
        image_files(tmp_path / "none")
    with pytest.raises(RaydetError, match=r"no images in it \(\.jpg"):
        image_files(tmp_path)
    with pytest.raises(RaydetError, match="device 'gpu7'"):
        pick_device("gpu7")
    with pytest.raises(RaydetError, match="neither a checkpoint"):
        predict.load(tmp_path)
