import io
import time
from dataclasses import replace

import cv2
import numpy as np
import PIL.Image
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from raydet.data.batch import local_eval_batches, local_train_batches
from raydet.data.index import Index, make_index
from raydet.data.render import SourceImages, _is_cut_off, decode, imread
from raydet.data.samples import Samples
from raydet.data.transforms import (
    HSV,
    ChannelSwap,
    HorizontalFlip,
    Letterbox,
    Mixup,
    Mosaic,
    RandomAffine,
    Rotate90,
    VerticalFlip,
)
from raydet.errors import RaydetError

SIZE = (64, 96)


@pytest.fixture(scope="module")
def samples(shapes_index):
    transforms = (
        Mosaic(0.5, Letterbox(SIZE)),
        RandomAffine(SIZE, 10, 0.1, (0.5, 1.5), 2),
        Mixup(0.3, SIZE),
        HSV(1.0, 5, 30, 30),
        HorizontalFlip(0.5),
    )
    return Samples(shapes_index, transforms, SIZE, chunk_size=16, seed=3)


def flat(batches):
    """Every sample of some batches: position, row, pixels, targets without the image's number."""
    return [
        (
            int(batch.positions[i]),
            int(batch.rows[i]),
            batch.images[i].numpy().tobytes(),
            batch.targets[batch.targets[:, 0] == i][:, 1:].numpy().tobytes(),
        )
        for batch in batches
        for i in range(len(batch.images))
    ]


@given(st.integers(0, 300), st.integers(1, 100))
@settings(max_examples=30, deadline=None)
def test_each_epoch_is_a_permutation_and_any_range_is_a_slice_of_it(samples, start, length):
    size = len(samples.index)
    epochs = samples.rows(0, 10 * size).reshape(10, size)
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 10
    assert samples.rows(start, start + length).tolist() == epochs.reshape(-1)[start : start + length].tolist()


def test_another_seed_is_another_order_and_other_pixels(samples):
    other = replace(samples, seed=4)
    assert samples.rows(0, 40).tolist() != other.rows(0, 40).tolist()
    plain = replace(samples, shuffle=False), replace(other, shuffle=False)
    assert any((plain[0].sample(position).image != plain[1].sample(position).image).any() for position in range(4))


def test_a_sample_depends_on_its_position_only(samples):
    """Batch size, start and chunk bounds do not matter: positions 8 to 88 span five chunks and two epochs."""
    reference = flat(local_train_batches(samples, 0, 96, 8))
    assert [position for position, *_ in reference] == list(range(96))
    assert [row for _, row, *_ in reference] == samples.rows(0, 96).tolist()
    for start, batch_size in ((8, 8), (24, 24), (40, 4), (32, 16)):
        stop = start + (88 - start) // batch_size * batch_size
        assert flat(local_train_batches(samples, start, stop, batch_size)) == reference[start:stop]


def test_the_same_image_differs_from_epoch_to_epoch(samples):
    size = len(samples.index)
    first = {row: (pixels, boxes) for _, row, pixels, boxes in flat(local_train_batches(samples, 0, size, 8))}
    second = {row: (pixels, boxes) for _, row, pixels, boxes in flat(local_train_batches(samples, size, 2 * size, 8))}
    assert first.keys() == second.keys()
    assert sum(first[row] != second[row] for row in first) > size / 2


def test_targets_are_the_samples_boxes(samples):
    (batch,) = local_train_batches(samples, 0, 8, 8)
    assert batch.images.shape == (8, 3, *SIZE)
    for i, position in enumerate(batch.positions.tolist()):
        sample = samples.sample(position)
        mine = batch.targets[batch.targets[:, 0] == i].numpy()
        assert (batch.images[i].numpy() == sample.image.transpose(2, 0, 1)).all()
        assert mine[:, 1].tolist() == sample.labels.tolist()
        np.testing.assert_allclose(mine[:, 2:4] - mine[:, 4:] / 2, sample.boxes[:, :2], atol=1e-4)
        np.testing.assert_allclose(mine[:, 2:4] + mine[:, 4:] / 2, sample.boxes[:, 2:], atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 5, 16, 100])
def test_validation_covers_every_image_once_in_order(samples, batch_size):
    validation = replace(samples, shuffle=False, transforms=(Letterbox(SIZE),))
    rows = [row for _, row, *_ in flat(local_eval_batches(validation, batch_size))]
    assert rows == list(range(len(samples.index)))


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), (b"", "is not an image that can be decoded .0 bytes"), (b"text", "is not an image")],
)
def test_a_broken_image_is_named(tmp_path, content, message):
    path = tmp_path / "broken.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RaydetError, match=f"broken.jpg.*{message}|broken.jpg: {message}"):
        imread(str(path))


def index_of(folder, files, sizes, shards=None):
    """An index of files of given (width, height), with one box on each."""
    count = len(files)
    return make_index(
        [(number, name, *size) for number, (name, size) in enumerate(zip(files, sizes, strict=True))],
        np.tile([2.0, 2, 12, 12], (count, 1)),
        np.zeros(count, int),
        np.zeros(count, int),
        np.full(count, 100.0),
        np.arange(count),
        root=str(folder),
        class_names=("thing",),
        category_ids=(1,),
    )


def test_an_image_of_another_size_than_annotated_is_named(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((10, 20, 3), np.uint8))
    samples = Samples(index_of(tmp_path, ["a.png"], [(30, 10)]), (Letterbox(SIZE),), SIZE)
    with pytest.raises(RaydetError, match=r"a\.png has 20x10 pixels, its annotation says 30x10"):
        samples.sample(0)


@pytest.fixture
def folder_with_broken(tmp_path):
    """Ten images, of which the fourth is cut off and the sixth missing."""
    names = [f"{number}.jpg" for number in range(10)]
    for number, name in enumerate(names):
        cv2.imwrite(str(tmp_path / name), np.full((40, 40, 3), 10 * number + 20, np.uint8))
    content = (tmp_path / "3.jpg").read_bytes()
    (tmp_path / "3.jpg").write_bytes(content[: len(content) - 40])
    (tmp_path / "5.jpg").unlink()
    return index_of(tmp_path, names, [(40, 40)] * 10)


def test_a_broken_image_stops_the_stream(folder_with_broken):
    with pytest.raises(RaydetError, match=r"is not an image that can be decoded|cannot be read"):
        list(local_train_batches(Samples(folder_with_broken, (Letterbox(SIZE),), SIZE, 16), 0, 10, 5))


@pytest.mark.parametrize("mosaic", [0.0, 1.0])
def test_a_broken_image_is_skipped_and_listed_and_another_takes_its_place(folder_with_broken, mosaic):
    transforms = (Mosaic(mosaic, Letterbox(SIZE)), RandomAffine(SIZE))
    samples = Samples(folder_with_broken, transforms, SIZE, 16, on_error="skip")
    batches = list(local_train_batches(samples, 0, 16, 8))
    errors = {error for batch in batches for error in batch.errors}
    assert sorted(error.split("/")[-1].split(" ")[0].rstrip(":") for error in errors) == ["3.jpg", "5.jpg"]
    assert all(len(batch.targets) for batch in batches)
    if not mosaic:
        assert sum(len(batch.targets) for batch in batches) == 16
    # The same samples, whatever is found broken first.
    again = [samples.sample(position).image for position in reversed(range(16))][::-1]
    found = [image.permute(1, 2, 0).numpy() for batch in batches for image in batch.images]
    assert all((a == b).all() for a, b in zip(again, found, strict=True))


def test_images_that_earlier_attempts_failed_on_are_not_read_again(folder_with_broken):
    """They are named as others that cannot be read, and where they are skipped, others take their place."""
    good = folder_with_broken.take(np.array([0, 1, 2, 4]))
    failed = {2: "a process that decodes it dies"}
    samples = Samples(good, (Letterbox(SIZE),), SIZE, 4)
    with pytest.raises(RaydetError, match=r"/2\.jpg: a process that decodes it dies"):
        list(samples.blocks(range(4), failed=failed))
    (block,) = replace(samples, on_error="skip").blocks(range(4), failed=failed)
    assert [[error.split("/")[-1] for error in errors] for errors in block["errors"].to_pylist()] == [
        ["2.jpg: a process that decodes it dies"],
        *([[]] * 3),
    ]


def test_in_validation_a_broken_image_is_grey_and_keeps_its_place(folder_with_broken):
    samples = Samples(folder_with_broken, (Letterbox(SIZE),), SIZE, 16, shuffle=False, on_error="skip")
    (batch,) = local_eval_batches(samples, 16)
    assert batch.rows.tolist() == list(range(10))
    assert len(batch.errors) == 2
    assert [bool((image == 114).all()) for image in batch.images] == [row in (3, 5) for row in range(10)]


def test_nothing_but_broken_images_is_an_error(folder_with_broken):
    samples = Samples(folder_with_broken.take(np.array([3, 5])), (Letterbox(SIZE),), SIZE, on_error="skip")
    with pytest.raises(RaydetError):
        samples.sample(0)


def test_transforms_close_by_position(samples):
    """The last epochs, say, are without mosaic: positions before are as ever."""
    closing = replace(samples, close_at=48, closed=(Letterbox(SIZE),))
    before, after = flat(local_train_batches(closing, 0, 48, 8)), flat(local_train_batches(closing, 48, 80, 8))
    assert before == flat(local_train_batches(samples, 0, 48, 8))
    plain = replace(samples, transforms=(Letterbox(SIZE),))
    assert after == flat(local_train_batches(plain, 48, 80, 8))


class Invert:
    """A transform of the user's own: it depends on the generator it is given."""

    def __init__(self, shape=None):
        self.shape = shape

    def __call__(self, sample, rng):
        if self.shape:
            return replace(sample, image=np.zeros(self.shape, np.uint8))
        return replace(
            sample, image=255 - sample.image if rng.random() < 0.5 else sample.image, boxes=sample.boxes - 20
        )


def test_own_transforms_see_pixels_and_their_boxes_are_clipped(samples):
    plain = replace(samples, transforms=(Letterbox(SIZE),))
    own = replace(plain, own=(Invert(),))
    inverted = 0
    for position in range(16):
        sample, before = own.sample(position), plain.sample(position)
        changed = (sample.image == 255 - before.image).all()
        assert changed or (sample.image == before.image).all()
        inverted += changed
        assert (sample.boxes >= 0).all()
        assert len(sample.boxes) <= len(before.boxes)
    assert 0 < inverted < 16


def test_own_transforms_that_break_the_image_are_named(samples):
    with pytest.raises(RaydetError, match=r"augment.transforms: Invert returned an image \(5, 5, 3\)"):
        replace(samples, own=(Invert(shape=(5, 5, 3)),)).sample(0)


@pytest.mark.parametrize("window", [10, 64, 1000])
def test_shards_are_shuffled_by_shard_and_then_within_a_window(shapes_index, window):
    """Twenty shards of 50: an epoch has every image once; each window holds whole neighbours of the order of shards."""
    table = shapes_index.take(np.arange(1000) % len(shapes_index)).table
    shard = (np.arange(1000) * 7919 % 1000) // 50  # neighbours in the index lie in different shards
    table = table.set_column(table.schema.get_field_index("shard"), "shard", [shard])
    index = Index(table, shapes_index.root, shapes_index.class_names, shapes_index.category_ids)
    samples = Samples(index, (), SIZE, window=window)
    epochs = samples.rows(0, 3000).reshape(3, 1000)
    assert all(sorted(epoch) == list(range(1000)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3
    for epoch in epochs:
        for first in range(0, 1000, window):
            seen = np.unique(shard[epoch[first : first + window]])
            assert len(seen) <= -(-window // 50) + 1
    orders = [list(dict.fromkeys(shard[epoch].tolist())) for epoch in epochs]
    assert len({tuple(order) for order in orders}) == 3


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "tiff"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_any_kind_of_image_becomes_bgr(suffix, channels):
    colour = [40] if channels == 1 else [40, 80, 160, 200][:channels]
    image = np.full((32, 48, channels), colour, np.uint8)
    content = cv2.imencode(f".{suffix}", image)[1].tobytes()
    decoded = decode(content, "name")
    assert decoded.shape == (32, 48, 3)
    np.testing.assert_allclose(decoded[0, 0], [40] * 3 if channels == 1 else colour[:3], atol=6)


def test_sixteen_bits_become_eight():
    content = cv2.imencode(".png", np.full((4, 4, 3), 40 * 257, np.uint16))[1].tobytes()
    assert decode(content, "name")[0, 0].tolist() == [40, 40, 40]


def test_cmyk_becomes_bgr():
    image_module = pytest.importorskip("PIL.Image")
    file = io.BytesIO()
    image_module.new("CMYK", (32, 48), (0, 255, 255, 0)).save(file, "JPEG")
    decoded = decode(file.getvalue(), "name")
    assert decoded.shape == (48, 32, 3)
    np.testing.assert_allclose(decoded[0, 0], [0, 0, 255], atol=8)  # no cyan: red


@pytest.mark.parametrize("annotated", [(48, 32), (32, 48)])
def test_exif_rotation_is_as_the_annotation_says(annotated):
    """A camera's note to turn the picture is followed, unless the annotation is of the picture unturned."""
    image_module = pytest.importorskip("PIL.Image")
    image = np.zeros((32, 48, 3), np.uint8)
    image[:, :24] = 255  # its left half is bright
    exif = image_module.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    file = io.BytesIO()
    image_module.fromarray(image).save(file, "JPEG", exif=exif.tobytes(), quality=95)
    decoded = decode(file.getvalue(), "name", annotated)
    assert decoded.shape[:2] == annotated[::-1]
    top, left = decoded[4, 16, 0], decoded[16, 4, 0]
    assert (top > 200) == (annotated == (32, 48)) or decoded[20, 4, 0] > 200
    assert left > 200 or annotated == (32, 48)


JPEG = {
    "plain": {},
    "progressive": {"progressive": True},  # many scans, with tables between them
    "restarts": {"restart_marker_rows": 1},
    "progressive restarts": {"progressive": True, "restart_marker_rows": 1},
    "thumbnail": {"exif": b"Exif\0\0" + cv2.imencode(".jpg", np.zeros((16, 16, 3), np.uint8))[1].tobytes()},
    "profile": {"icc_profile": bytes(range(256)) * 300, "comment": b"\xff\xd9"},
}
BEHIND = {
    "nothing": b"",
    "zeros": bytes(5000),
    "a video": b"MotionPhoto_Data"
    + np.random.default_rng(0).integers(0, 256, 200_000, np.uint8).tobytes()
    + b"\xff\xda" * 2000,
    "another image": cv2.imencode(".jpg", np.zeros((9, 9, 3), np.uint8))[1].tobytes(),
    "half an image": cv2.imencode(".jpg", np.zeros((99, 99, 3), np.uint8))[1].tobytes()[:-50],
    "text": b"\n",
}


def jpeg(**options):
    pixels = cv2.resize(np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8), (64, 48))
    content = io.BytesIO()
    PIL.Image.fromarray(pixels).save(content, "JPEG", **options)
    return content.getvalue()


@pytest.mark.parametrize("behind", BEHIND)
@pytest.mark.parametrize("kind", JPEG)
def test_a_jpeg_is_whole_whatever_is_behind_its_end(kind, behind):
    content = jpeg(**JPEG[kind])
    np.testing.assert_array_equal(decode(content + BEHIND[behind], "a.jpg"), decode(content, "a.jpg"))


@pytest.mark.parametrize("kind", JPEG)
def test_a_jpeg_is_cut_off_wherever_it_ends(kind):
    content = jpeg(**JPEG[kind])
    for end in range(len(content) - 1000, len(content)):
        with pytest.raises(RaydetError, match=rf"a.jpg is not an image that can be decoded \({end} bytes\)"):
            decode(content[:end], "a.jpg")
        assert _is_cut_off(content[:end])  # whatever OpenCV of another version makes of it
        assert _is_cut_off(content[:end] + bytes(5000))


def test_to_see_whether_a_jpeg_is_whole_costs_little(shared):
    images = [path.read_bytes() for path in sorted((shared / "data/coco_mini/val2017").glob("*.jpg"))[:50]]
    started = time.process_time()
    for content in images * 10:
        assert not _is_cut_off(content)
    assert (time.process_time() - started) / 500 < 50e-6  # seconds; to decode it takes 2 ms and more


@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_images_can_be_decoded_smaller(reduction, suffix):
    image = cv2.resize(np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8), (333, 251))
    content = cv2.imencode(f".{suffix}", image)[1].tobytes()
    small = decode(content, "name", (333, 251), reduction)
    expected = cv2.resize(image, (small.shape[1], small.shape[0]), interpolation=cv2.INTER_AREA)
    assert abs(small.shape[1] * reduction - 333) < reduction
    assert np.abs(small.astype(int) - expected).mean() < 6
    with pytest.raises(RaydetError, match="name has 333x251 pixels, its annotation says 600x251"):
        decode(content, "name", (600, 251), reduction)


def test_what_is_shown_small_is_decoded_small(tmp_path):
    """A photo of 24 megapixels shown on 96 pixels: an eighth of its size is decoded, and looks the same."""
    photo = cv2.resize(np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8), (6000, 4000))
    cv2.imwrite(str(tmp_path / "photo.jpg"), photo)
    index = index_of(tmp_path, ["photo.jpg"], [(6000, 4000)])
    samples = Samples(index, (RandomAffine(SIZE, scale=(0.015, 0.015)),), SIZE, chunk_size=1)
    picture = samples.plan(0, [0])
    assert SourceImages(index, [picture], [picture]).image(0).shape == (500, 750, 3)
    expected = cv2.resize(photo, (90, 60), interpolation=cv2.INTER_AREA)
    found = samples.sample(0).image[2:62, 3:93]
    assert np.abs(found.astype(int) - expected)[2:-2, 2:-2].mean() < 3


EVERYTHING = (
    HorizontalFlip(0.5),
    VerticalFlip(0.5),
    Mosaic(0.7, Letterbox(SIZE)),
    RandomAffine(SIZE, 180, 0.5, (0.1, 3), 45),
    Mixup(0.7, SIZE),
    HSV(1.0, 5, 30, 30),
    ChannelSwap(0.5),
)
ONE = (HorizontalFlip(0.5), Rotate90(0.5), Letterbox(SIZE), RandomAffine(SIZE, 180, 0.5, (0.1, 3), 45))


@given(
    sizes=st.lists(
        st.tuples(st.integers(1, 6000), st.integers(1, 12), st.booleans()).map(lambda s: s[1::-1] if s[2] else s[:2]),
        min_size=4,
        max_size=4,
    ),
    suffix=st.sampled_from((".png", ".jpg")),
    transforms=st.sampled_from(
        (EVERYTHING, ONE, *((Letterbox(SIZE, resize),) for resize in ("pad_bottom_right", "pad_centre", "stretch")))
    ),
)
@example(sizes=[(6000, 5), (5000, 1), (1, 5000), (1, 1)], suffix=".png", transforms=EVERYTHING)
@example(sizes=[(5000, 1)] * 4, suffix=".png", transforms=EVERYTHING)
@example(sizes=[(40000, 3), (3, 40000), (33000, 33), (2, 2)], suffix=".png", transforms=EVERYTHING)
@settings(max_examples=40, deadline=None)
def test_images_of_any_size_are_shown(tmp_path_factory, sizes, suffix, transforms):
    folder = tmp_path_factory.mktemp("sizes")
    files = [f"{number}{suffix}" for number in range(len(sizes))]
    for name, (width, height) in zip(files, sizes, strict=True):
        cv2.imwrite(str(folder / name), np.full((height, width, 3), 200, np.uint8))
    samples = Samples(index_of(folder, files, sizes), transforms, SIZE, chunk_size=4)
    for position in range(8):
        sample = samples.sample(position)
        assert sample.image.shape == (*SIZE, 3)
        if len(transforms) == 1:
            assert (sample.image != 114).any()  # there is something to see
