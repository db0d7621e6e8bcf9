import io

import cv2
import numpy as np
import pytest
from PIL import Image

from raydet.data.problems import Problems
from raydet.data.scan import each, image_sizes, present
from raydet.data.store import Store
from raydet.errors import RaydetError


def encoded(kind, size=(40, 24), orientation=None, **options):
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    content = io.BytesIO()
    Image.new(options.pop("mode", "RGB"), size).save(content, kind, exif=exif, **options)
    return content.getvalue()


def sizes(folder, problems=None, **files):
    names = [name.replace("__", ".") for name in files]
    for name, content in zip(names, files.values(), strict=True):
        (folder / name).write_bytes(content)
    return image_sizes(Store(folder), names, present(Store(folder), names), problems or Problems())


@pytest.mark.parametrize("orientation", [None, 1, 3, 6, 8])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP"])
def test_a_size_is_that_of_the_decoded_image(tmp_path, kind, orientation):
    content = encoded(kind, orientation=orientation)
    height, width = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR).shape[:2]
    assert sizes(tmp_path, image=content) == {"image": (width, height)}


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_colours(tmp_path, mode):
    assert sizes(tmp_path, image=encoded("JPEG", mode=mode)) == {"image": (40, 24)}


def test_a_header_may_be_long(tmp_path):
    content = encoded("JPEG", icc_profile=bytes(200_000))
    assert sizes(tmp_path, image=content) == {"image": (40, 24)}


def test_no_image_is_too_large_to_measure(tmp_path):
    limit = Image.MAX_IMAGE_PIXELS
    assert sizes(tmp_path, image=encoded("PNG", (20_000, 18_000), mode="1")) == {"image": (20_000, 18_000)}
    assert limit == Image.MAX_IMAGE_PIXELS


def test_exif_that_makes_no_sense_is_none(tmp_path):
    plain = encoded("JPEG")
    broken = plain[:2] + b"\xff\xe1\x00\x10Exif\x00\x00garbage!" + plain[2:]
    assert sizes(tmp_path, image=broken) == {"image": (40, 24)}


@pytest.mark.parametrize("content", [b"", b"text", encoded("JPEG")[:12], encoded("PNG")[:20], bytes(100_000)])
def test_what_is_no_image_is_named_or_left_out(tmp_path, content):
    with pytest.raises(RaydetError, match=rf"b__png is not an image \({len(content)} bytes\)".replace("__", r"\.")):
        sizes(tmp_path, a__jpg=encoded("JPEG"), b__png=content)
    problems = Problems("skip")
    assert sizes(tmp_path, problems, a__jpg=encoded("JPEG"), b__png=content) == {"a.jpg": (40, 24)}
    assert len(problems.messages) == 1


def test_results_are_in_order_with_errors_in_their_place():
    def read(name):
        if name == "3":
            raise RaydetError("no 3")
        return int(name)

    results = list(each(read, [str(i) for i in range(100)], "numbers"))
    assert str(results.pop(3)) == "no 3"
    assert results == [i for i in range(100) if i != 3]


def test_present(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a").write_bytes(b"12")
    (tmp_path / "sub/b").write_bytes(b"123")
    assert present(Store(tmp_path), ["a", "x"]) == {"a": 2}
    assert present(Store(tmp_path), ["sub/b", "none/c", "a/d"]) == {"sub/b": 3}
    assert present(Store(tmp_path), []) == {}
