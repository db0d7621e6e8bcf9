"""How many CPUs a Ray Data execution may use."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.data._internal.execution.execution_callback import ExecutionCallback

_LOOK_EVERY_S = 10.0  # how soon nodes that come or go are taken note of


def use_part_of_cluster(part: float, labels: dict[str, str] | None) -> type[ExecutionCallback]:
    """Return a callback of Ray Data's that lets an execution use a part of the cluster's CPUs.

    Ray Data itself divides the CPUs of each node by the number of executions in the cluster, and rounds down. With more
    streams than a node has CPUs none would get any: each would run one task at a time. A stream that waits, such as the
    training's during a validation, would keep its CPUs from the others. Here each execution may have as many tasks as
    its part of the cluster runs, and the nodes run the tasks of all executions in the order in which they come.

    Args:
        part: fraction of the CPUs, above 0, at most 1.
        labels: labels of the nodes whose CPUs count; None: all nodes.
    """
    from ray.data._internal.execution.execution_callback import ExecutionCallback

    class PartOfCluster(ExecutionCallback):  # type: ignore[misc]
        def before_execution_starts(self, executor: Any) -> None:
            # Ray Data has no public setting for this: its own limits on resources can only lower what it has divided.
            manager = executor._resource_manager
            divided, cpus = manager._get_total_resources, _Cpus(labels or {})
            manager._get_total_resources = lambda: divided().copy(cpu=part * cpus.now())

    return PartOfCluster


class _Cpus:
    """Counts the CPUs of the nodes with given labels, now and then."""

    def __init__(self, labels: dict[str, str]):
        self._labels = labels
        self._count, self._until = 0.0, 0.0

    def now(self) -> float:
        from raydet.cluster import alive_nodes

        if time.monotonic() > self._until:
            nodes = [node for node in alive_nodes() if self._labels.items() <= node["Labels"].items()]
            self._count = sum(node["Resources"].get("CPU", 0.0) for node in nodes)
            self._until = time.monotonic() + _LOOK_EVERY_S
        return self._count
