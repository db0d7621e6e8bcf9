"""Connects to Ray, and shares its nodes among workers and data tasks."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raydet.errors import RaydetError
from raydet.recipe import Scale
from raydet.store import is_uri

_ANSWER_S = 10.0  # for a cluster to answer; Ray would try for many minutes
_Node = Mapping[str, Any]  # as `ray.nodes()` describes it

_LOOK_S = 60.0  # for all nodes to look for a path
_LOOKS, _LOOK_AGAIN_S = 4, 1.0


def connect(scale: Scale, verbose: bool, groups: int = 1) -> bool:
    """Connect to the cluster that RAY_ADDRESS names, or start Ray on this machine; return whether it was not before.

    Args:
        scale: resources of what will run there.
        verbose: let Ray print what its workers print.
        groups: number of worker groups of this scale at once.

    Raises:
        RaydetError: RAY_ADDRESS names no cluster, or one that does not answer.
    """
    import ray

    if ray.is_initialized():
        return False
    options = {"log_to_driver": verbose, "logging_level": "INFO" if verbose else "ERROR"}
    address = os.environ.get("RAY_ADDRESS", "")
    if address not in ("", "local"):
        _check_answers(address)
        try:
            ray.init(**options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise RaydetError(f"RAY_ADDRESS {address}: {str(error).strip().splitlines()[0]}") from error
        return True
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nobody takes one's own machine away
    # On one's own machine CPUs are only names: workers and data tasks share them, and none must wait for ever.
    cpus = os.cpu_count() or 1
    workers = groups * (scale.workers[1] + scale.async_validation) * (scale.cpus_per_worker or 1)
    names = max(cpus, workers + (scale.data_tasks or max(1, cpus // 2)))
    # Ray's dashboard takes ten seconds of a CPU to start.
    ray.init(address="local", num_cpus=names, include_dashboard=False, **options)
    return True


def _check_answers(address: str) -> None:
    """Raise RaydetError where Ray would wait for a cluster that is not there: for minutes, with words of its own.

    In a thread: the name of a host may be looked up for a minute, and a signal is to end the command at once.
    """
    found: list[str | None] = ["does not answer"]
    thread = threading.Thread(target=lambda: found.append(_why_unreachable(address)), daemon=True)
    thread.start()
    thread.join(_ANSWER_S)
    if found[-1] is not None:
        raise RaydetError(f"RAY_ADDRESS {address} {found[-1]}; unset it to start Ray on this machine")


def _why_unreachable(address: str) -> str | None:
    """Return what is wrong with an address of Ray's; None: a cluster answers there, or only Ray can tell."""
    from ray._private import services
    from ray._raylet import parse_address  # type: ignore[attr-defined]

    scheme, mark, rest = address.rpartition("://")
    if scheme in ("http", "https"):
        return "is the address of a job server: send it the job with ray job submit, or give the cluster's, host:port"
    if mark and (scheme != "ray" or ":" not in rest):
        return None
    try:
        place = parse_address(rest if mark else services.canonicalize_bootstrap_address(address))
    except ConnectionError:
        return "finds no cluster on this machine: ray start --head starts one"
    except ValueError:
        place = None
    if place is None or not place[0] or not place[1].isdecimal():
        return "is none of host:port, ray://host:port, auto and local"
    return _why_silent(*place)


def _why_silent(host: str, port: str) -> str | None:
    """Return why no cluster can be talked to at a place; None: one can."""
    import grpc
    from ray._private import ray_constants
    from ray._private.grpc_utils import init_grpc_channel
    from ray._raylet import build_address  # type: ignore[attr-defined]

    try:
        socket.create_connection((host, int(port)), timeout=_ANSWER_S / 2).close()
    except (OSError, OverflowError) as error:
        return f"cannot be reached ({getattr(error, 'strerror', None) or error})"
    channel = init_grpc_channel(build_address(host, port), ray_constants.GLOBAL_GRPC_OPTIONS)
    try:
        grpc.channel_ready_future(channel).result(timeout=_ANSWER_S)
    except grpc.FutureTimeoutError:
        return "is that of something else than a cluster of Ray"
    finally:
        channel.close()
    return None


def prepare_tune() -> None:
    """Set how Ray Tune behaves, before it is imported: raydet says itself what a person wants to know."""
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # files that nobody would read
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the other prints a table whatever `verbose` is
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")  # not every epoch ends with a validation
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # a recipe may name files and modules of the current folder
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "5")  # a driver that is killed forgets no more


def label_selector(label: str | None) -> dict[str, str] | None:
    """Return what Ray takes for a label of the recipe's, `key=value`."""
    if label is None:
        return None
    key, _, value = label.partition("=")
    return {key: value}


def check_kept(folder: str | Path, what: str) -> None:
    """Raise RaydetError where results would lie in the working directory of a job, which Ray deletes.

    Args:
        folder: path or URI of the folder for the results.
        what: name of the setting that names the folder.
    """
    if not is_uri(folder) and "working_dir_files" in Path(folder).expanduser().resolve().parts:
        raise RaydetError(
            f"{what}: {folder} is in the working directory of this job, which Ray deletes: name a folder that all "
            "nodes share, from its root, or one in an object store"
        )


def check_seen(key: str, path: str, nodes: Sequence[_Node], file: str = "") -> None:
    """Look for a local path from a task on each node that will need it.

    Args:
        key: setting or argument that names the path.
        path: the path; an address in an object store is seen by all.
        nodes: nodes to look from, as `ray.nodes()` describes them.
        file: name of a file below the path that is there now. A folder that only has the same path does not have it.

    Raises:
        RaydetError: a node does not have it; node, path and key are named.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    place = os.path.join(path, file) if file else path
    here = ray.get_runtime_context().get_node_id()
    others = [node for node in nodes if node["NodeID"] != here and node["Resources"].get("CPU")]
    if is_uri(path) or not others or not os.path.exists(place):
        return
    look = ray.remote(num_cpus=0, max_retries=0)(_is_there)
    tasks = {}
    for node in others:
        on_it = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        tasks[look.options(scheduling_strategy=on_it).remote(place)] = node
    done, _ = ray.wait(list(tasks), num_returns=len(tasks), timeout=_LOOK_S)  # a node that is too busy is let off
    for task in done:
        try:
            there = ray.get(task)
        except ray.exceptions.RayError:  # a node that has just gone needs nothing
            continue
        if not there:
            node = tasks[task]
            name = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}, id {node['NodeID'][:12]})"
            raise RaydetError(
                f"{key}: {path} is not on the node {name}, which needs it: give a path that all nodes share, or an "
                "address in an object store, s3://… or gs://…"
            )


def _is_there(path: str) -> bool:
    """Is there such a file? A network's file system may take a moment to show a new one."""
    for _ in range(_LOOKS):
        if os.path.exists(path):
            return True
        time.sleep(_LOOK_AGAIN_S)
    return False


def share_of_cluster(scale: Scale, concurrent: int | None) -> tuple[Scale, int]:
    """Return the resources of each of several trainings at once, and how many of them.

    Args:
        scale: resources of each training.
        concurrent: number of trainings at once; None: as many as there is room for.

    Raises:
        RaydetError: the cluster is too small.
    """
    gpu, cpus, _ = workers_on(scale, concurrent or 1)
    room = _Room(scale)
    workers = scale.workers[1]
    most = (room.cpus - room.kept_for_data) // (workers * cpus)
    if gpu:
        most = min(most, int(room.gpus / scale.gpu_share + 1e-6) // workers)
    if concurrent is not None and concurrent > most:
        raise RaydetError(f"tune.concurrent is {concurrent}, but the cluster has room for {most} trials of that scale")
    resources = {"gpu": gpu, "cpus_per_worker": cpus}
    return scale.model_copy(update=resources), concurrent or most


def workers_on(scale: Scale, groups: int = 1) -> tuple[bool, int, bool]:
    """Return what the workers get of the cluster; a validation beside them gets as much as one.

    Args:
        scale: resources of the workers of a group.
        groups: number of groups at once.

    Returns:
        Whether GPUs; how many CPUs each; whether they wait for nodes that the autoscaler has yet to start.

    Raises:
        RaydetError: the cluster is too small; Ray would wait for ever.
    """
    room = _Room(scale)
    fewest, most = (groups * (count + scale.async_validation) for count in scale.workers)
    what = f"scale.num_workers is {scale.num_workers}{' and scale.async_validation true' * scale.async_validation}"
    what += f", tune.concurrent {groups}" * (groups > 1)
    gpu = room.gpus > 0 if scale.gpu is None else scale.gpu
    if gpu and room.gpus < fewest * scale.gpu_share:
        raise RaydetError(
            f"{what}: that takes {fewest * scale.gpu_share:g} GPU(s), but the cluster has {room.gpus}: lower it, or "
            "set scale.gpu=false to use CPUs only"
        )
    # With a number of workers that changes, each takes a node but for a CPU, which is left to the data tasks.
    one = min(1, room.kept_for_data)
    share = (room.cpus - room.kept_for_data) // most if scale.workers[0] == scale.workers[1] else room.node_cpus - one
    each = scale.cpus_per_worker or (1 if gpu else max(1, min(room.node_cpus, share)))
    if fewest * each + one > room.cpus:
        raise RaydetError(
            f"{what}: {fewest} times {each} CPUs leave no CPU of the cluster's {room.cpus} for the data tasks: "
            "lower scale.num_workers or scale.cpus_per_worker"
        )
    wanted = {"CPU": fewest * each, "GPU": gpu * fewest * scale.gpu_share}
    return gpu, each, any(room.here.get(name, 0) < amount for name, amount in wanted.items())


def alive_nodes() -> list[_Node]:
    """Return the nodes of the cluster."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def worker_nodes(scale: Scale, nodes: Sequence[_Node]) -> list[_Node]:
    """Return those nodes that may run the workers of a recipe."""
    wanted = scale.worker_resources.items()
    return [node for node in nodes if all(node["Resources"].get(name, 0) >= amount for name, amount in wanted)]


def data_nodes(scale: Scale, nodes: Sequence[_Node]) -> list[_Node]:
    """Return those nodes that may run the data tasks of a recipe."""
    selector = label_selector(scale.data_label) or {}
    return [node for node in nodes if selector.items() <= node["Labels"].items()]


class _Room:
    """What the nodes have that may run the workers of a recipe.

    Attributes:
        here: resources of the nodes that are there now.
        gpus, cpus: number of GPUs and CPUs, those of nodes that the autoscaler may start included.
        node_cpus: number of CPUs of the largest node.
        kept_for_data: number of CPUs that must be left to the data tasks.

    Raises:
        RaydetError: there is no node for the workers, or for the data tasks, and no autoscaler that might start one.
    """

    def __init__(self, scale: Scale):
        from ray._private.state import state

        # What there is when the autoscaler has started all nodes it may; Ray publishes it nowhere else, and without
        # the labels of nodes to come. Empty: there is no autoscaler.
        limits: Mapping[str, float] = state.get_max_resources_from_cluster_config() or {}
        alive = alive_nodes()
        mine = worker_nodes(scale, alive)
        theirs = data_nodes(scale, alive)
        if not mine and not limits:
            raise RaydetError(f"scale.worker_resources: no node has {scale.worker_resources}: ray start --resources=…")
        if not theirs and not limits:
            raise RaydetError(f"scale.data_label: no node has the label: ray start --labels={scale.data_label}")
        names = {name for node in mine for name in node["Resources"]}
        self.here = {name: sum(node["Resources"].get(name, 0) for node in mine) for name in names}
        self.gpus, self.cpus = (int(max(self.here.get(name, 0), limits.get(name, 0))) for name in ("GPU", "CPU"))
        self.node_cpus = max((int(node["Resources"].get("CPU", 0)) for node in mine), default=1)
        self.kept_for_data = max(1, scale.data_tasks or 1) if any(node in mine for node in theirs) else 0
