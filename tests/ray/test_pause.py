"""A training stream that nobody reads must not keep the data tasks of a validation from their CPU.

In a cluster of its own, with one CPU and little memory: there it hung before tasks ran to their end.
"""

import subprocess
import sys

PROGRAM = """
import sys, time
import ray
from raydet.data.formats import load_index
from raydet.data.pipeline import train_samples, val_samples
from raydet.data.stream import eval_batches, train_batches
from raydet.recipe import load

class Alone:
    rank, size = 0, 1
    def share(self, value):
        return value

ray.init(address="local", num_cpus=1, object_store_memory=100 * 2**20, log_to_driver=False, logging_level="ERROR")
recipe = load("demo", ["data.root=" + sys.argv[1], "data.image_size=320"])
train = train_samples(recipe, load_index(recipe.data, "train"), "pad_bottom_right")
val = val_samples(recipe, load_index(recipe.data, "val"), "pad_bottom_right")
batches = train_batches(ray.put(train), train, 0, 8 * 400, 8, Alone())
next(batches)
time.sleep(8)  # the object store fills
print("validated", sum(len(batch.images) for batch in eval_batches(ray.put(val), val, 16, Alone())()))
for _ in range(100):
    next(batches)
print("went on")
"""


def test_validation_runs_while_the_training_stream_waits(shapes):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(shapes)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == ["validated 24", "went on"]
