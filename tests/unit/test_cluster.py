"""What workers and data tasks get of a cluster. Its nodes are Ray's records, made by hand: no machine here has GPUs."""

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent import futures

import grpc
import pytest
import ray
from ray._private import services
from ray._private.state import state

from raydet.cluster import _why_unreachable, check_kept, connect, share_of_cluster, workers_on
from raydet.errors import RaydetError
from raydet.recipe import Scale


@pytest.fixture
def on(monkeypatch):
    """Make Ray know some nodes, each with its resources and perhaps labels, and the limits of an autoscaler."""

    def known(*nodes, limits=None):
        records = [
            {
                "Alive": True,
                "Resources": {name: float(value) for name, value in node.items() if name != "labels"},
                "Labels": node.get("labels", {}),
            }
            for node in nodes
        ]
        dead = {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 99.0}, "Labels": {}}
        monkeypatch.setattr(ray, "nodes", lambda: [*records, dead])
        monkeypatch.setattr(state, "get_max_resources_from_cluster_config", lambda: limits)

    return known


GPU_NODE = {"CPU": 16, "GPU": 8, "accelerator_type:H100": 1}
DATA_NODE = {"CPU": 32, "labels": {"raydet": "data"}}


@pytest.mark.parametrize(
    ("nodes", "scale", "expected"),
    [
        ([{"CPU": 8}], {}, (False, 7)),
        ([{"CPU": 8}], {"num_workers": 3}, (False, 2)),
        ([{"CPU": 8}, {"CPU": 8}], {"num_workers": (1, 2)}, (False, 7)),
        ([GPU_NODE], {"num_workers": 8}, (True, 1)),
        ([GPU_NODE], {"num_workers": (2, 16)}, (True, 1)),
        ([GPU_NODE], {"num_workers": 9, "gpu": False}, (False, 1)),
        # Where other nodes make the samples, the workers' nodes need no spare CPU.
        ([{"CPU": 4, "GPU": 4}, DATA_NODE], {"num_workers": 4, "data_label": "raydet=data"}, (True, 1)),
        (
            [{"CPU": 4, "x": 1}, DATA_NODE],
            {"num_workers": 1, "data_label": "raydet=data", "worker_resources": {"x": 1}},
            (False, 4),
        ),
        ([GPU_NODE, DATA_NODE], {"num_workers": 8, "worker_resources": {"accelerator_type:H100": 0.001}}, (True, 1)),
    ],
)
def test_workers_get_of_their_nodes(on, nodes, scale, expected):
    on(*nodes)
    assert workers_on(Scale(**scale)) == (*expected, False)


@pytest.mark.parametrize(
    ("limits", "scale", "expected"),
    [
        ({"CPU": 64.0, "GPU": 16.0}, {"num_workers": 16}, (True, 1, True)),
        ({"CPU": 64.0, "GPU": 16.0}, {"num_workers": 1, "gpu": False, "cpus_per_worker": 2}, (False, 2, False)),
        (
            {"CPU": 64.0, "GPU": 16.0},
            {"num_workers": 8, "data_label": "raydet=data", "worker_resources": {"accelerator_type:H100": 0.001}},
            (True, 1, True),
        ),
    ],
)
def test_nodes_that_an_autoscaler_may_start_count(on, limits, scale, expected):
    on({"CPU": 4}, limits=limits)
    assert workers_on(Scale(**scale)) == expected


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        ({"num_workers": 9, "gpu": True}, "num_workers is 9: that takes 9 .* has 8: .* set scale.gpu=false"),
        # A cluster with GPUs trains on its CPUs only if it is told to.
        ({"num_workers": 9}, "num_workers is 9: that takes 9 .* the cluster has 8"),
        ({"num_workers": 8, "async_validation": True}, "async_validation true: that takes 9 .* the cluster has 8"),
        ({"num_workers": (9, 16)}, r"num_workers is \(9, 16\): that takes 9 .* the cluster has 8"),
        ({"num_workers": 50, "gpu": False}, "50 times 1 CPUs leave no CPU of the cluster's 48"),
        ({"data_label": "raydet=dat"}, "scale.data_label: no node has the label: ray start --labels=raydet=dat"),
        ({"worker_resources": {"y": 2}}, "scale.worker_resources: no node has {'y': 2.0}: ray start --resources"),
    ],
)
def test_what_would_wait_for_ever_is_refused(on, scale, message):
    on(GPU_NODE, DATA_NODE)
    with pytest.raises(RaydetError, match=message):
        workers_on(Scale(**scale))


def free_port():
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


@pytest.fixture
def silent():
    """A port that takes connections and says nothing."""
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        yield server.getsockname()[1]


UNREACHABLE = {
    "foo": r"RAY_ADDRESS foo is none of host:port, ray://host:port, auto and local",
    "foo:port": r"is none of host:port",
    ":6379": r"is none of host:port",
    "no-such-host.invalid:6379": r"cannot be reached \(.*[Nn]ame",
    "127.0.0.1:{free}": r"cannot be reached \(Connection refused\); unset it to start Ray on this machine",
    "127.0.0.1:99999": r"cannot be reached",
    "ray://127.0.0.1:{free}": r"cannot be reached \(Connection refused\)",
    "http://127.0.0.1:8265": r"is the address of a job server: send it the job with ray job submit",
    "auto": r"finds no cluster on this machine: ray start --head starts one",
}


@pytest.mark.parametrize("address", UNREACHABLE)
def test_a_cluster_that_is_not_there_is_one_line(address, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", given := address.format(free=free_port()))
    # Where this test runs, others may run Ray.
    monkeypatch.setattr(services, "find_gcs_addresses", set)
    monkeypatch.setattr(services, "find_bootstrap_address", lambda folder: None)
    began = time.monotonic()
    with pytest.raises(RaydetError, match=UNREACHABLE[address]) as error:
        connect(Scale(), verbose=False)
    assert time.monotonic() - began < 15
    assert given in str(error.value)
    assert "\n" not in str(error.value)
    assert not ray.is_initialized()


def test_a_port_that_says_nothing_is_given_up_soon_and_sigterm_ends_the_wait_at_once(silent):
    script = (
        "from raydet.cluster import connect\nfrom raydet.recipe import Scale\nimport ray\n"
        "print('ready', flush=True)\ntry: connect(Scale(), False)\nexcept Exception as error: print(error, flush=True)"
    )
    environment = {**os.environ, "RAY_ADDRESS": f"127.0.0.1:{silent}"}
    waiting = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for _ in range(2)
    ]
    for process in waiting:
        assert process.stdout.readline() == "ready\n"
    began = time.monotonic()
    time.sleep(2)
    waiting[0].terminate()
    assert waiting[0].wait(2) == -signal.SIGTERM
    said, _ = waiting[1].communicate(timeout=20)
    assert time.monotonic() - began < 15
    assert f"RAY_ADDRESS 127.0.0.1:{silent} " in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_whatever_speaks_ray_s_protocol_is_left_to_ray(scheme):
    server = grpc.server(futures.ThreadPoolExecutor(1))
    port = server.add_insecure_port("0.0.0.0:0")
    server.start()
    try:
        assert _why_unreachable(f"{scheme}127.0.0.1:{port}") is None
        assert _why_unreachable(f"{scheme}localhost:{port}") is None
    finally:
        server.stop(None)


@pytest.mark.parametrize("address", ["", "local"])
def test_no_address_is_this_machine(address, monkeypatch):
    given = {}
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(ray, "init", lambda **options: given.update(options))
    assert connect(Scale(num_workers=3, cpus_per_worker=5), verbose=False)
    assert given["address"] == "local"
    assert given["num_cpus"] > 15


@pytest.mark.parametrize(
    ("folder", "kept"),
    [("runs", False), ("./runs/../runs", False), ("/shared/runs", True), ("s3://bucket/runs", True)],
)
def test_results_in_a_job_s_working_directory_are_refused(folder, kept, tmp_path, monkeypatch):
    working = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    working.mkdir(parents=True)
    monkeypatch.chdir(working)
    if kept:
        check_kept(folder, "storage")
        return
    with pytest.raises(RaydetError, match=r"^storage: .* is in the working directory of this job, which Ray deletes"):
        check_kept(folder, "storage")
    os.chdir(tmp_path)
    check_kept(folder, "storage")


@pytest.mark.parametrize(
    ("cluster", "scale", "concurrent", "expected"),
    [
        ({"CPU": 2}, {}, None, (False, 1, 1)),
        ({"CPU": 9}, {"cpus_per_worker": 2}, None, (False, 2, 4)),
        ({"CPU": 9}, {"num_workers": 2}, 2, (False, 2, 2)),
        ({"CPU": 64, "GPU": 8}, {}, None, (True, 1, 8)),
        ({"CPU": 64, "GPU": 8}, {"num_workers": 2}, None, (True, 1, 4)),
        ({"CPU": 64, "GPU": 8}, {"num_workers": 2}, 3, (True, 1, 3)),
        ({"CPU": 64, "GPU": 2}, {"gpu_share": 0.25}, None, (True, 1, 8)),
        ({"CPU": 64, "GPU": 1}, {"gpu_share": 1 / 3}, None, (True, 1, 3)),
        ({"CPU": 4, "GPU": 8}, {"cpus_per_worker": 1}, None, (True, 1, 3)),
        ({"CPU": 64, "GPU": 8}, {"gpu": False, "cpus_per_worker": 8}, None, (False, 8, 7)),
    ],
)
def test_trials_share_the_cluster(on, cluster, scale, concurrent, expected):
    on(cluster)
    found, room = share_of_cluster(Scale(**scale), concurrent)
    assert (found.gpu, found.cpus_per_worker, room) == expected


@pytest.mark.parametrize(
    ("cluster", "scale", "concurrent", "message"),
    [
        ({"CPU": 64, "GPU": 2}, {}, 3, "tune.concurrent 3: that takes 3 .* the cluster has 2"),
        ({"CPU": 64, "GPU": 2}, {"num_workers": 3}, None, "num_workers is 3: that takes 3 .* the cluster has 2"),
        ({"CPU": 64, "GPU": 2}, {"gpu_share": 0.5}, 5, "tune.concurrent 5: that takes 2.5 .* the cluster has 2"),
        ({"CPU": 4}, {"cpus_per_worker": 2}, 2, "leave no CPU of the cluster's 4 for the data tasks"),
    ],
)
def test_more_trials_than_there_is_room_for_are_refused(on, cluster, scale, concurrent, message):
    on(cluster)
    with pytest.raises(RaydetError, match=message):
        share_of_cluster(Scale(**scale), concurrent)
