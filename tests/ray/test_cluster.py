"""A cluster that runs is found, whatever its address is written like."""

import os
import subprocess
import sys

import ray

from raydet.cluster import _why_unreachable


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
