"""Connects to Ray."""

from __future__ import annotations

import os

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
