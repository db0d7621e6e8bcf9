"""Connects to Ray, and shares its nodes among workers and data tasks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raydet.data.store import is_uri
from raydet.errors import RaydetError
from raydet.recipe import Scale


def connect(scale: Scale, verbose: bool, groups: int = 1) -> bool:
    """Connect to the cluster that RAY_ADDRESS names, or start Ray on this machine; return whether it was not before.

    Args:
        scale: what will run there.
        verbose: let Ray print what its workers print.
        groups: of such workers, at once.
    """
    import ray

    if ray.is_initialized():
        return False
    options = {"log_to_driver": verbose, "logging_level": "INFO" if verbose else "ERROR"}
    if "RAY_ADDRESS" in os.environ:
        ray.init(**options)
        return True
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nobody takes one's own machine away
    # On one's own machine CPUs are only names: workers and data tasks share them, and none must wait for ever.
    cpus = os.cpu_count() or 1
    workers = groups * (scale.workers[1] + scale.async_validation) * (scale.cpus_per_worker or 1)
    ray.init(address="local", num_cpus=max(cpus, workers + (scale.data_tasks or max(1, cpus // 2))), **options)
    return True


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
        folder: for the results, path or URI.
        what: the setting that names it.
    """
    if not is_uri(folder) and "working_dir_files" in Path(folder).expanduser().resolve().parts:
        raise RaydetError(
            f"{what}: {folder} is in the working directory of this job, which Ray deletes: name a folder that all "
            "nodes share, from its root, or one in an object store"
        )


def share_of_cluster(scale: Scale, concurrent: int | None) -> tuple[Scale, int]:
    """Return the resources of each of several trainings at once, and how many of them.

    Args:
        scale: of each.
        concurrent: how many; None: as there is room for.

    Raises:
        RaydetError: the cluster is too small.
    """
    gpu, cpus, _ = workers_on(scale, concurrent or 1)
    total, spare = _resources(scale.worker_label), _kept_for_data(scale)
    workers = scale.workers[1]
    room = (int(total["CPU"]) - spare) // (workers * cpus)
    if gpu:
        room = min(room, int(total["GPU"] / scale.gpu_share + 1e-6) // workers)
    if concurrent is not None and concurrent > room:
        raise RaydetError(f"tune.concurrent is {concurrent}, but the cluster has room for {room} trials of that scale")
    resources = {"gpu": gpu, "cpus_per_worker": cpus}
    return scale.model_copy(update=resources), concurrent or room


def workers_on(scale: Scale, groups: int = 1) -> tuple[bool, int, bool]:
    """Return what the workers get of the cluster; a validation beside them gets as much as one.

    Args:
        scale: the workers of a group.
        groups: at once.

    Returns:
        Whether GPUs; how many CPUs each; whether they wait for nodes that the autoscaler has yet to start.

    Raises:
        RaydetError: the cluster is too small; Ray would wait for ever.
    """
    total, spare = _resources(scale.worker_label), _kept_for_data(scale)
    gpus, cpus = int(total.get("GPU", 0)), int(total.get("CPU", 0))
    node = max((int(node["Resources"].get("CPU", 0)) for node in _nodes(scale.worker_label)), default=1)
    fewest, most = (groups * (count + scale.async_validation) for count in scale.workers)
    what = f"scale.num_workers is {scale.num_workers}{' and scale.async_validation true' * scale.async_validation}"
    what += f", tune.concurrent {groups}" * (groups > 1)
    gpu = gpus >= fewest * scale.gpu_share if scale.gpu is None else scale.gpu
    if gpu and gpus < fewest * scale.gpu_share:
        raise RaydetError(f"{what}, but there are {gpus} GPUs; or set scale.gpu=false")
    # With a number of workers that changes, each takes a node but for a CPU, which is left to the data tasks.
    share = (cpus - spare) // most if scale.workers[0] == scale.workers[1] else node - min(1, spare)
    each = scale.cpus_per_worker or (1 if gpu else max(1, min(node, share)))
    if fewest * each + min(1, spare) > cpus:
        raise RaydetError(
            f"{what}: {fewest} times {each} CPUs leave no CPU of the cluster's {cpus} for the data tasks: "
            "lower scale.num_workers or scale.cpus_per_worker"
        )
    here = _sum(_nodes(scale.worker_label))
    wanted = {"CPU": fewest * each, "GPU": gpu * fewest * scale.gpu_share}
    return gpu, each, any(here.get(name, 0) < amount for name, amount in wanted.items())


def _kept_for_data(scale: Scale) -> int:
    """CPUs of the workers' nodes that are left to the data tasks."""
    if scale.data_label is not None:
        theirs = {node["NodeID"] for node in _nodes(scale.data_label)}
        if theirs.isdisjoint(node["NodeID"] for node in _nodes(scale.worker_label)):
            return 0
    return max(1, scale.data_tasks or 1)


def _resources(label: str | None) -> dict[str, float]:
    """Return the resources of the nodes that carry a label: those there are, or that the autoscaler may start.

    Raises:
        RaydetError: there is no such node, and no autoscaler that might start one.
    """
    # Of an autoscaler Ray publishes the idle resources only. Of its nodes to come it does not know the labels.
    from ray._private.state import state

    limits: Mapping[str, float] = state.get_max_resources_from_cluster_config() or {}
    nodes = _nodes(label)
    if not nodes and not limits:
        raise RaydetError(f"no node of the cluster has the label {label}: ray start --labels {label}")
    here = _sum(nodes)
    return {name: max(here.get(name, 0), limits.get(name, 0)) for name in {*here, *limits}}


def _sum(nodes: list[dict[str, Any]]) -> dict[str, float]:
    names = {name for node in nodes for name in node["Resources"]}
    return {name: sum(node["Resources"].get(name, 0) for node in nodes) for name in names}


def _nodes(label: str | None) -> list[dict[str, Any]]:
    """Return Ray's records of the nodes that are alive and carry a label; None: all."""
    import ray

    selector = label_selector(label) or {}
    return [node for node in ray.nodes() if node["Alive"] and selector.items() <= node["Labels"].items()]
