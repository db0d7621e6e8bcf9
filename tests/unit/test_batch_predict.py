"""What batch-predict does beside the detection: names, digests and parts, for folders of any size."""

import hashlib
import json

import pyarrow as pa
import pytest

from raydet.errors import RaydetError
from raydet.predict.on_ray import ERRORS, _digest, _encode, _finish, _name, _PredictJob
from raydet.store import Store


def row(file, error=None):
    return {"file": file, "boxes": [], "scores": [], "labels": [], "names": [], "error": error}


@pytest.fixture
def job(tmp_path):
    """150 parts of two images but for the last; every tenth image could not be read."""
    files = [f"{number:04d}.jpg" for number in range(299)]
    job = _PredictJob(None, None, None, Store("/"), pa.array(files, pa.large_string()), Store(tmp_path), 2, 1, 1)
    for number in range(150):
        rows = [row(file, f"{file} is broken" if file[3] == "7" else None) for file in job.part(number)]
        job.out.write(_name(number), _encode(rows))
    return job


def test_each_part_has_the_next_files(job):
    assert [file for number in range(150) for file in job.part(number)] == job.files.to_pylist()
    assert job.part(149) == ["0298.jpg"]


def test_all_parts_are_read_in_order_and_their_errors_listed(job, tmp_path):
    assert _finish(job, 150, "parquet") == 30
    errors = json.loads((tmp_path / ERRORS).read_text())
    assert [error["file"] for error in errors] == [f"{number:04d}.jpg" for number in range(7, 299, 10)]


def test_a_part_with_other_images_is_named(job):
    job.out.write(_name(130), _encode([row("other.jpg")]))
    with pytest.raises(RaydetError, match=r"part-00130.parquet: its images are not those that belong there"):
        _finish(job, 150, "parquet")


@pytest.mark.parametrize("count", [0, 1, 9_999, 10_000, 25_000])
def test_the_digest_of_a_listing_is_that_of_its_json(count):
    listed = {f"{number}.jpg": number for number in range(count)}
    assert _digest(listed) == hashlib.sha256(json.dumps(list(listed.items())).encode()).hexdigest()[:16]
