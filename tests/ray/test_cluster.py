"""A cluster that runs is found, whatever its address is written like; nodes that have gone count for no workers."""

import os
import subprocess
import sys

import ray

from raydet.cluster import _why_unreachable
from raydet.training.controller import count_staying_nodes


def test_a_cluster_that_runs_is_not_refused():
    address = ray.get_runtime_context().gcs_address
    assert _why_unreachable(address) is None
    assert _why_unreachable(f"127.0.0.1:{address.rpartition(':')[2]}") is None
    assert _why_unreachable("auto") is None


def test_a_command_elsewhere_joins_it():
    script = (
        "import ray\nfrom raydet.cluster import connect\nfrom raydet.recipe import Scale\n"
        "assert connect(Scale(), verbose=False)\nprint(ray.cluster_resources()['CPU'])"
    )
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False, timeout=120
    )
    assert done.stdout == f"{ray.cluster_resources()['CPU']}\n", done.stderr


def test_workers_are_counted_on_nodes_that_live(monkeypatch):
    """Ray Train hears of a node that has gone up to 20 s late, and restarted the workers to use it."""
    from ray.train import ScalingConfig
    from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy

    (node,) = ray.nodes()
    policy = ElasticScalingPolicy(ScalingConfig(num_workers=(1, 2), resources_per_worker={"CPU": 6}))
    reserved = {node["NodeID"]: {"CPU": 6.0}, "f" * 56: {"CPU": 6.0}}
    assert policy._count_possible_workers(reserved) == 2
    monkeypatch.setattr(ElasticScalingPolicy, "_count_possible_workers", ElasticScalingPolicy._count_possible_workers)
    count_staying_nodes()
    assert policy._count_possible_workers(reserved) == 1
