import pickle

import numpy as np
import pytest

from raydet.data.index import make_index


def index_of(counts):
    """An index of images with so many boxes each, given in falling order of id."""
    images = [(10 - i, f"{i}.jpg", 20 + i, 30) for i in range(len(counts))]
    image_of_box = np.repeat(np.arange(len(counts)), counts)
    boxes = np.arange(4 * len(image_of_box), dtype=float).reshape(-1, 4)
    return make_index(
        images,
        boxes,
        labels=np.arange(len(boxes)) % 3,
        crowd=np.arange(len(boxes)) % 2,
        area=boxes[:, 0],
        image_of_box=image_of_box,
        root="/data",
        class_names=("a", "b", "c"),
        category_ids=(1, 2, 3),
    )


def content(index):
    return [
        (int(index.image_ids[row]), index.path(row), index.size(row), *(v.tolist() for v in index.annotations(row)))
        for row in range(len(index))
    ]


@pytest.mark.parametrize("counts", [[2, 0, 3], [0], [0, 0], [1]])
def test_rows_are_sorted_and_keep_their_boxes(counts):
    index = index_of(counts)
    assert index.image_ids.tolist() == sorted(index.image_ids.tolist())
    assert [len(index.annotations(row).labels) for row in range(len(index))] == counts[::-1]
    assert content(pickle.loads(pickle.dumps(index))) == content(index)


def test_boxes_of_an_image_stay_in_their_order():
    index = index_of([2, 0, 3])
    assert index.annotations(2).boxes.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert index.annotations(0).boxes[:, 0].tolist() == [8, 12, 16]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 9])
def test_head(count):
    index = index_of([2, 0, 3])
    assert content(index.head(count)) == content(index)[:count]
    assert index.head(count).table.nbytes <= index.table.nbytes
