import io

import cv2
import numpy as np
import pytest
from PIL import Image

from raydet.data.problems import Problems
from raydet.data.render import decode
from raydet.data.scan import IMAGE_SUFFIXES, each, image_sizes, list_images, present
from raydet.errors import RaydetError
from raydet.store import Store


def orientation_of(number):
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


def encoded(kind, size=(40, 24), orientation=None, **options):
    exif = Image.Exif() if orientation is None else orientation_of(orientation)
    content = io.BytesIO()
    Image.new(options.pop("mode", "RGB"), size).save(content, kind, exif=exif, **options)
    return content.getvalue()


def sizes(folder, problems=None, **files):
    names = [name.replace("__", ".") for name in files]
    for name, content in zip(names, files.values(), strict=True):
        (folder / name).write_bytes(content)
    return image_sizes(Store(folder), names, present(Store(folder), names), problems or Problems())


@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "AVIF", "JPEG2000", "GIF", "PPM"])
def test_a_size_is_that_of_the_decoded_image(tmp_path, kind, orientation):
    content = encoded(kind, orientation=orientation)
    height, width = decode(content, "image").shape[:2]
    assert sizes(tmp_path, image=content) == {"image": (width, height)}


KINDS = {  # Pillow's or OpenCV's names
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".JPG", ".Jpeg"),
    "PNG": (".png", ".apng", ".PNG"),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "PPM": (".ppm", ".pnm"),
    "TIFF": (".tif", ".tiff", ".TIF"),
    "AVIF": (".avif", ".avifs"),
    **{suffix[1:].upper(): (suffix,) for suffix in (".bmp", ".gif", ".webp")},
    **{suffix: (suffix,) for suffix in (".pgm", ".pbm", ".ras", ".sr")},
}
MADE = [(kind, suffix) for kind, suffixes in KINDS.items() for suffix in suffixes]


@pytest.mark.parametrize(("kind", "suffix"), MADE)
def test_what_is_an_image_by_its_name_can_be_decoded_and_measured(tmp_path, kind, suffix):
    pixels = cv2.resize(np.random.default_rng(0).integers(0, 256, (3, 5, 3), np.uint8), (40, 24))
    content = io.BytesIO()
    if kind.startswith("."):
        content.write(cv2.imencode(kind, pixels if kind in (".ras", ".sr") else pixels[..., 0].copy())[1])
    else:
        Image.fromarray(pixels[..., ::-1]).save(content, kind)
    name = f"a{suffix}"
    (tmp_path / name).write_bytes(content.getvalue())
    assert list_images(Store(tmp_path), "", Problems()).keys() == {name}
    assert image_sizes(Store(tmp_path), [name], present(Store(tmp_path), [name]), Problems()) == {name: (40, 24)}
    decoded = decode(content.getvalue(), name, (40, 24))
    assert decoded.shape == (24, 40, 3)
    if kind in ("PNG", "JPEG", "WEBP", "AVIF", "JPEG2000", "PPM", "TIFF", "BMP", ".ras", ".sr"):
        assert np.abs(decoded.astype(int) - pixels).mean() < 8


def test_every_suffix_of_an_image_is_tried():
    assert {suffix.lower() for _, suffix in MADE} == set(IMAGE_SUFFIXES)


def test_an_avif_file_is_turned_as_its_header_says():
    pixels = np.zeros((24, 40, 3), np.uint8)
    pixels[:, :20] = 255  # its left half is bright
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "AVIF", exif=orientation_of(6), quality=100)
    turned = decode(content.getvalue(), "a.avif", (24, 40))
    assert (turned[:18] > 200).all()  # the upper half
    assert (turned[22:] < 50).all()
    np.testing.assert_allclose(decode(content.getvalue(), "a.avif", (40, 24)), pixels, atol=20)
    assert decode(content.getvalue(), "a.avif", (24, 40), 8).shape == (5, 3, 3)
    with pytest.raises(RaydetError, match="40x24 pixels, its annotation says 9x9"):
        decode(content.getvalue(), "a.avif", (9, 9))
    with pytest.raises(RaydetError, match="is not an image that can be decoded"):
        decode(content.getvalue()[:-99], "a.avif")


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
