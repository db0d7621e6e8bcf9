import io
import zlib

import cv2
import PIL.Image
import pytest

from raydet.data.formats import load_index
from raydet.data.header import MAX_PIXELS, stored_size
from raydet.data.problems import Problems
from raydet.data.render import decode
from raydet.errors import RaydetError
from raydet.recipe import Data

FORMATS = ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF"]


def encoded(form, size=(48, 32), **options):
    content = io.BytesIO()
    PIL.Image.new("RGB", size, (200, 30, 30)).save(content, form, **options)
    return content.getvalue()


def png_of(width, height):
    """A PNG of one colour, which is a thousand times smaller than its pixels."""

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    packer, rows = zlib.compressobj(9), []
    for _ in range(height):
        rows.append(packer.compress(bytes(1 + (width + 7) // 8)))
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([1, 0, 0, 0, 0])
    data = b"".join(rows) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("form", FORMATS)
def test_the_size_is_known_before_an_image_is_decoded(form):
    assert stored_size(encoded(form)) == (48, 32)


@pytest.mark.parametrize(
    "options", [{"progressive": True}, {"exif": b"Exif\0\0" + bytes(5000)}, {"comment": b"x" * 900}]
)
def test_the_size_of_a_jpeg_is_behind_its_other_segments(options):
    assert stored_size(encoded("JPEG", **options)) == (48, 32)


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xd8", b"\xff\xd8\xff\xc0\x00", b"\xff\xd8" + b"\xff" * 50, b"text", b"\xff\xd8ab"]
)
def test_what_is_no_image_has_no_size(content):
    assert stored_size(content) is None


def test_a_small_file_of_many_pixels_is_refused_before_it_is_decoded(monkeypatch):
    bomb = png_of(30_000, 30_000)
    assert len(bomb) < 150_000
    monkeypatch.setattr(cv2, "imdecode", None)  # nothing is decoded
    with pytest.raises(RaydetError, match=r"bomb.png has 30000x30000 pixels, more than the 178,956,970 .* max_pixels"):
        decode(bomb, "bomb.png")
    with pytest.raises(RaydetError, match=r"bomb.png has 30000x30000 pixels, its annotation says 640x480"):
        decode(bomb, "bomb.png", (640, 480))


def test_the_limit_can_be_set():
    with pytest.raises(RaydetError, match=r"has 48x32 pixels, more than the 1,535 that"):
        decode(encoded("PNG"), "a.png", max_pixels=1535)
    assert decode(encoded("PNG"), "a.png", max_pixels=1536).shape == (32, 48, 3)


@pytest.fixture
def yolo(tmp_path):
    for split in ("train", "val"):
        for name, content in (("a.png", encoded("PNG")), ("bomb.png", png_of(20_000, 10_000))):
            (tmp_path / f"images/{split}").mkdir(parents=True, exist_ok=True)
            (tmp_path / f"labels/{split}").mkdir(parents=True, exist_ok=True)
            (tmp_path / f"images/{split}/{name}").write_bytes(content)
            (tmp_path / f"labels/{split}/{name}").with_suffix(".txt").write_text("0 0.5 0.5 0.2 0.2\n")
    (tmp_path / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [x]\n")
    return tmp_path


def test_an_image_of_too_many_pixels_is_a_record_that_cannot_be_used(yolo):
    with pytest.raises(RaydetError, match=r"bomb.png has 20000x10000 pixels, more than .* data.max_pixels"):
        load_index(Data(root=str(yolo)), "train")
    problems = Problems("skip")
    index = load_index(Data(root=str(yolo), on_error="skip"), "train", problems)
    assert [path.as_py() for path in index.table["path"]] == ["images/train/a.png"]
    assert [message.split("/")[-1].split(" ")[0] for message in problems.messages] == ["bomb.png"]
    assert len(load_index(Data(root=str(yolo), max_pixels=200_000_000), "train")) == 2


def test_the_default_is_the_same_in_recipes_and_functions():
    assert Data().max_pixels == MAX_PIXELS == 2 * PIL.Image.MAX_IMAGE_PIXELS
