from dataclasses import replace

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raydet.data.batch import local_eval_batches, local_train_batches
from raydet.data.samples import Samples, imread
from raydet.data.transforms import HSV, Fit, HorizontalFlip, Pad
from raydet.errors import RaydetError

SIZE = (64, 96)


@pytest.fixture(scope="module")
def samples(shapes_index):
    transforms = (Fit(SIZE), HorizontalFlip(0.5), HSV(1.0, 5, 30, 30), Pad(SIZE))
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
    row = 5
    assert any(
        (samples.sample(position, row).image != other.sample(position, row).image).any() for position in range(4)
    )


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
    for i, (position, row) in enumerate(zip(batch.positions.tolist(), batch.rows.tolist(), strict=True)):
        sample = samples.sample(position, row)
        mine = batch.targets[batch.targets[:, 0] == i].numpy()
        assert (batch.images[i].numpy() == sample.image.transpose(2, 0, 1)).all()
        assert mine[:, 1].tolist() == sample.labels.tolist()
        np.testing.assert_allclose(mine[:, 2:4] - mine[:, 4:] / 2, sample.boxes[:, :2], atol=1e-4)
        np.testing.assert_allclose(mine[:, 2:4] + mine[:, 4:] / 2, sample.boxes[:, 2:], atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 5, 16, 100])
def test_validation_covers_every_image_once_in_order(samples, batch_size):
    validation = replace(samples, shuffle=False, transforms=(Fit(SIZE), Pad(SIZE)))
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


def test_an_image_of_another_size_than_annotated_is_named(tmp_path, shapes_index, samples):
    name = shapes_index.table["path"][0].as_py()
    cv2.imwrite(str(tmp_path / name), np.zeros((10, 20, 3), np.uint8))
    shapes_index = type(shapes_index)(
        shapes_index.table, str(tmp_path), shapes_index.class_names, shapes_index.category_ids
    )
    with pytest.raises(RaydetError, match=f"{name} has 20x10 pixels, its annotation says"):
        replace(samples, index=shapes_index).sample(0, 0)
