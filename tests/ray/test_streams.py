"""A stream for each node: on two made-up nodes, and then on one of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__)


@pytest.fixture(scope="module")
def said():
    done = subprocess.run(
        [sys.executable, "-m", "tests.ray.two_nodes"],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        cwd=HERE.parents[2],
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_each_step_has_its_positions_in_the_order_of_the_ranks_on_two_nodes_and_then_on_one(said):
    trained = []
    for start in said["starts"]:
        for step in zip(*start["trained"], strict=True):
            trained += [position for positions, _ in step for position in positions]
    assert trained == list(range(len(trained)))
    assert len(trained) == 40 * 32 * (4 + 2)


def test_the_dealers_are_on_the_nodes_of_their_ranks(said):
    first, second = nodes = list(said["nodes"])
    for kind in ("_TrainDealer", "_EvalDealer"):
        assert sorted(said["starts"][0]["dealers"][kind]) == sorted(nodes)
        assert sorted(said["starts"][1]["dealers"][kind]) == sorted([first, second, second]), "those before included"


def test_samples_are_made_on_the_node_that_reads_them(said):
    start = said["starts"][0]
    made = [
        (node == said["nodes"][place])
        for place, batches in zip(start["places"], start["trained"], strict=True)
        for _, rows in batches
        for node in rows
    ]
    assert sum(made) / len(made) > 0.8  # another node's CPUs are used where the own ones are not free


def test_a_validation_has_each_image_once_whatever_the_number_of_streams(said):
    for start in said["starts"]:
        for time in (0, 1):
            assert sorted(position for rank in start["validated"] for position in rank[time]) == list(range(5 * 64 + 7))
