"""Which samples reach which worker at which step: read off in the workers."""

import hashlib
import sys
from dataclasses import replace

import pytest
from ray import cloudpickle

from raydet.data.batch import local_train_batches
from raydet.data.coco import load_coco
from raydet.data.pipeline import train_samples, val_samples
from raydet.data.stream import DataTasks
from raydet.recipe import load
from raydet.training.on_ray import on_ray
from raydet.training.prepare import make_job

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module

GLOBAL_BATCH, STOP = 16, 336
# Chunks have 64 positions: 208 = 3 * 64 + 16 is in the middle of the fourth.
CASES = {
    "from the beginning, 1 task at once": {"tasks": 1, "start": 0},
    "from the beginning, 3 tasks at once": {"tasks": 3, "start": 0},
    "restarted in mid-chunk, 3 tasks": {"tasks": 3, "start": 208},
    "restarted in mid-chunk, 1 task, in two segments": {"tasks": 1, "start": 208, "segment_chunks": 1},
    "segments of two chunks": {"tasks": 3, "start": 0, "segment_chunks": 2},
    "a batch that divides neither chunk nor segment": {"tasks": 3, "start": 48, "segment_chunks": 2, "batch": 48},
    "restarted at an odd position, a batch of 10 a rank": {"tasks": 3, "start": 37, "batch": 20, "stop": 337},
}
RUNS = [(2, case) for case in CASES] + [(1, case) for case, how in CASES.items() if how["tasks"] == 1 or "batch" in how]


def digests(batch):
    """Position and a digest of pixels and targets of each sample of a batch."""
    return [
        (
            int(batch.positions[i]),
            hashlib.sha256(
                batch.images[i].numpy().tobytes() + batch.targets[batch.targets[:, 0] == i][:, 1:].numpy().tobytes()
            ).hexdigest(),
        )
        for i in range(len(batch.images))
    ]


@pytest.fixture(scope="module")
def settings(shapes, tmp_path_factory):
    storage = tmp_path_factory.mktemp("runs")
    return lambda workers: load(
        "demo",
        [
            f"data.root={shapes}",
            f"storage={storage}",
            "data.image_size=64",
            "augment.hsv=1.0",
            f"train.batch_size={GLOBAL_BATCH}",
            f"scale.num_workers={workers}",
            "scale.cpus_per_worker=1",
        ],
    )


@pytest.fixture(scope="module")
def indices(shapes):
    return [load_coco(shapes / f"annotations/instances_{split}.json", shapes / split) for split in ("train", "val")]


@pytest.fixture(scope="module")
def reference(settings, indices):
    """Position → digest, made in this process."""
    samples = train_samples(settings(1), indices[0], "pad_bottom_right")
    return dict(entry for batch in local_train_batches(samples, 0, STOP + 16, 16) for entry in digests(batch))


@pytest.fixture(scope="module")
def streams(settings, indices):
    """What the workers of each group got: case → rank → step → samples; and the rows of two validations."""
    found = {}

    def record(run):
        import torch.distributed as dist

        from raydet.data import stream
        from raydet.training.worlds import RayWorld

        def beat():
            """Nothing watches this test's workers."""

        job, handed = run.job, run.world.handed
        mine = [CASES[case] for workers, case in RUNS if workers == dist.get_world_size()]
        seen = []
        for case in mine:
            stream.SEGMENT_CHUNKS = case.get("segment_chunks", 2000)
            train = job.recipe.train.model_copy(update={"batch_size": case.get("batch", GLOBAL_BATCH)})
            recipe = job.recipe.model_copy(update={"train": train})
            world = RayWorld(replace(handed, data=DataTasks(case["tasks"])), replace(job, recipe=recipe), beat)
            batches = world.train_batches(case["start"], case.get("stop", STOP))
            seen.append([digests(batch) for batch in batches])
        world = RayWorld(replace(handed, data=DataTasks(3)), job, beat)
        val_batches = world.val_batches()
        rows = [[row for batch in val_batches() for row in batch.rows.tolist()] for _ in range(2)]
        everyone = [None] * world.size
        dist.all_gather_object(everyone, (seen, rows))
        return everyone

    for workers in (1, 2):
        recipe = settings(workers)
        job = make_job(recipe, *indices)
        job.folder.mkdir(parents=True, exist_ok=True)
        pair = (
            train_samples(recipe, indices[0], "pad_bottom_right"),
            val_samples(recipe, indices[1], "pad_bottom_right"),
        )
        found[workers] = on_ray(record, job, pair, verbose=False, say=print)
    return found


@pytest.mark.parametrize(("workers", "case"), RUNS)
def test_step_k_is_positions_kg_to_k_plus_1_g_and_the_same_samples_everywhere(streams, reference, workers, case):
    number = [other for count, other in RUNS if count == workers].index(case)
    start, stop = CASES[case]["start"], CASES[case].get("stop", STOP)
    batch_size = CASES[case].get("batch", GLOBAL_BATCH)
    ranks = [seen[number] for seen, _ in streams[workers]]
    assert len(ranks) == workers
    assert {len(steps) for steps in ranks} == {(stop - start) // batch_size}
    for step, batches in enumerate(zip(*ranks, strict=True)):
        assert {len(batch) for batch in batches} == {batch_size // workers}
        samples = dict(entry for batch in batches for entry in batch)
        due = range(start + step * batch_size, start + (step + 1) * batch_size)
        assert sorted(samples) == list(due)
        assert all(samples[position] == reference[position] for position in due)


@pytest.mark.parametrize("workers", [1, 2])
def test_validation_covers_every_image_once_each_time(streams, indices, workers):
    for time in (0, 1):
        rows = [row for _, rows in streams[workers] for row in rows[time]]
        assert sorted(rows) == list(range(len(indices[1])))
