"""Ray Train's controller as raydet wants it: it starts no process, and imports no torch, that a run can do without.

A start of a process costs a CPU two to three seconds, and the import of torch as much again; a training waits for both.
What is in this module is all of raydet that the controller imports.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from raydet.cluster import alive_nodes
from raydet.errors import user_error

_LEAVE_S = 30.0  # for a worker to leave its process group


def make_trainer(run: Callable[[], Any], backend: str, timeout_s: int, *, alone: bool, **settings: Any) -> Any:
    """Return a trainer of Ray Train whose workers are the ranks of a process group of torch.

    Args:
        run: what each worker calls.
        backend: backend of the process group.
        timeout_s: seconds that a collective operation may take.
        alone: the cluster was started for this run, and ends with it.
        **settings: `scaling_config` and `run_config` of the trainer.
    """
    import ray
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
    from ray.train.v2._internal.constants import get_env_vars_to_propagate
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    # Each of these callbacks starts an actor. The first shards data sets of Ray Train's own; raydet has its stream. The
    # second tidies up after a controller that was killed; where that is needed, `_cleaner` takes its place.
    unwanted = (DatasetsCallback, PlacementGroupCleanerCallback)

    class Trainer(DataParallelTrainer):  # type: ignore[misc]
        def _create_default_callbacks(self) -> list[Any]:
            given = [callback for callback in super()._create_default_callbacks() if not isinstance(callback, unwanted)]
            return given if alone else [*given, _cleaner()]

        def _initialize_and_run_controller(self, **given: Any) -> Any:
            if not _has_our_environment():
                return super()._initialize_and_run_controller(**given)
            here = {ray._raylet.RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}  # it goes where this goes
            start = ray.remote(num_cpus=0, label_selector=here)(_controller()).remote
            controller = start(get_env_vars_to_propagate(), **given)
            ray.get(controller.run.remote())
            return ray.get(controller.get_result.remote())

    return Trainer(run, backend_config=_process_group(backend, timeout_s), **settings)


def _has_our_environment() -> bool:
    """Do processes that start now get the environment variables of this one, without a runtime environment?

    They do if this is a worker of Ray, such as a trial of a sweep, or if this process has started the cluster and it
    has no other node.
    """
    import ray

    worker = ray._private.worker
    if worker.global_worker.mode == worker.WORKER_MODE:
        return True
    node = worker._global_node
    return node is not None and node.head and len(alive_nodes()) == 1


def _controller() -> type:
    """Return Ray Train's controller without the runtime environment that Ray Train hands its environment variables in.

    A worker with a runtime environment is a process that imports Ray, only to replace itself by another that does.
    """
    from ray.train.v2._internal.execution.controller import TrainController
    from ray.train.v2._internal.execution.worker_group import WorkerGroup

    class Controller(TrainController):  # type: ignore[misc]
        def __init__(self, variables: dict[str, str], **given: Any):
            # As Ray Train sets it: its controller gets values inside coroutines.
            os.environ.update(variables, RAY_WARN_BLOCKING_GET_INSIDE_ASYNC="0")
            WorkerGroup._get_worker_runtime_env = staticmethod(lambda custom_runtime_env: custom_runtime_env)
            super().__init__(**given)

    return Controller


def _cleaner() -> Any:
    """Return Ray Train's callback for an actor that removes the placement group of a controller that was killed.

    Ray Train's own actor does not say which cluster it means when it asks whether the controller lives. Ray then asks
    the cluster that was started last on the machine, perhaps another person's, which does not know the controller.
    """
    import ray
    from ray.train.v2._internal.callbacks import placement_group_callback as callbacks
    from ray.train.v2._internal.execution.controller.placement_group_cleaner import PlacementGroupCleaner

    class Cleaner(PlacementGroupCleaner):  # type: ignore[misc]
        def __init__(self, **given: Any):
            os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
            super().__init__(**given)

    class Callback(callbacks.PlacementGroupCleanerCallback):  # type: ignore[misc]
        def after_controller_start(self, train_run_context: Any) -> None:
            callbacks.PlacementGroupCleaner = Cleaner
            super().after_controller_start(train_run_context)

    return Callback()


def _process_group(backend: str, timeout_s: int) -> Any:
    """Return what starts a process group of torch on the workers, and ends it there."""
    import ray
    from ray.train._internal.utils import get_address_and_port
    from ray.train.backend import Backend, BackendConfig

    class ProcessGroup(Backend):  # type: ignore[misc]
        share_cuda_visible_devices = True  # NCCL's ranks on a node see each other's GPUs

        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            address, port = worker_group.execute_single(0, get_address_and_port)
            given = (address, port, backend, len(worker_group), timeout_s)
            ray.get([worker_group.execute_single_async(rank, _join, rank, *given) for rank in range(len(worker_group))])

        def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
            with suppress(ray.exceptions.GetTimeoutError):  # the processes end next, whatever they do
                ray.get(worker_group.execute_async(_leave, len(worker_group) > 1), timeout=_LEAVE_S)

    class Config(BackendConfig):  # type: ignore[misc]
        backend_cls = ProcessGroup

        @property
        def train_func_context(self) -> Any:
            from ray.train.torch.config import TorchConfigContextManager  # makes the worker's GPU that of its thread

            return TorchConfigContextManager

    return Config()


def _join(rank: int, address: str, port: int, backend: str, size: int, timeout_s: int) -> None:
    """Runs in a worker: make it a rank of the process group, the way Ray Train does."""
    from ray.train.torch import config

    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    config._set_torch_distributed_env_vars()
    config._setup_torch_process_group(backend, rank, size, "env://", timeout_s)


def _leave(destroy: bool) -> None:
    """Runs in a worker: end its part in the process group."""
    from ray.train.torch import config

    config._shutdown_torch(destroy)


def after_failures() -> Any:
    """Return a callback of Ray Train for workers that fail.

    An error that no new worker would cure ends the run at once. Otherwise new workers are placed on nodes that stay.
    """
    from ray.train import UserCallback

    class AfterFailures(UserCallback):  # type: ignore[misc]
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            for error in worker_exceptions.values():
                if (mine := user_error(error)) is not None:
                    raise mine
            count_staying_nodes()

    return AfterFailures()


def count_staying_nodes() -> None:
    """Let Ray Train's controller, this process, count only nodes that live and stay among those for workers.

    Ray places no worker on a node that is about to be taken away. Ray Train counts such a node as long as it lives, and
    up to 20 s longer, because it asks for the list of nodes only every 20 s. It would wait for a worker there, or
    restart all workers to use the node.
    """
    import ray
    from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy

    def count(policy: Any, reserved: dict[str, Any]) -> Any:
        staying = {node["NodeID"] for node in alive_nodes()} - set(ray._private.state.state.get_draining_nodes())
        return counted(policy, {node: resources for node, resources in reserved.items() if node in staying})

    counted = ElasticScalingPolicy._count_possible_workers
    if counted.__module__ != __name__:
        ElasticScalingPolicy._count_possible_workers = count
