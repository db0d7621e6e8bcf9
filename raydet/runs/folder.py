"""The folder of a run: where it is, what a start finds or leaves there, and that one command at a time writes there."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from raydet.data import cache
from raydet.errors import RaydetError, some
from raydet.plugins import is_own
from raydet.recipe import Eval, Recipe, describe, differences, keys_given
from raydet.recipe import load as load_recipe
from raydet.store import Store, is_uri, write_aside

if TYPE_CHECKING:
    from raydet.runs.checkpoint import Config

STOP = "stop"  # a file of this name in the folder of a run ends it after the step, with a checkpoint


def local_folder(address: str) -> Path:
    """Return the folder in which this machine keeps a copy of a folder in a store.

    Raises:
        RaydetError: the address holds a password; it would get into recipes and logs.
    """
    scheme, _, rest = address.partition("://")
    if "@" in rest.partition("/")[0]:
        raise RaydetError(f"{scheme}://…: credentials come from the environment or a role, not from the address")
    place = rest.partition("?")[0].rstrip("/")
    digest = hashlib.sha256(f"{scheme}://{place}".encode()).hexdigest()[:16]
    return (cache.folder() / "runs" / digest / PurePosixPath(place).name).resolve()


def run_address(recipe: Recipe) -> str | None:
    """Return the address of a run's folder in an object store; None: the run is kept in a folder here."""
    return Store(recipe.storage).path(recipe.name) if is_uri(recipe.storage) else None


def run_folder(recipe: Recipe) -> Path:
    """Return the absolute path of a run's folder, or of this machine's copy of it.

    Raises:
        RaydetError: the run has no name.
    """
    if not recipe.name:
        raise RaydetError("name is empty: the run needs one, which its folder gets")
    if (address := run_address(recipe)) is not None:
        return local_folder(address)
    return Path(recipe.storage).expanduser().resolve() / recipe.name


LOCK = ".lock"  # file in the folder; it stays there, and only the system's lock on it means something
_LOOK_EVERY_S = 0.5


@contextmanager
def claimed(folder: Path, what: str, wait_s: float = 0.0) -> Iterator[None]:
    """Hold a folder against other processes, until the end or the death of this one.

    File systems of a network without locks give no such protection: there nothing is held and nothing refused.

    Args:
        folder: folder to claim; it is made if need be.
        what: name of this command, for the message to others.
        wait_s: how long to wait for another process that holds it.

    Raises:
        RaydetError: another process holds it, or the folder cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+")
    except OSError as error:
        raise RaydetError(f"storage: {folder} cannot be made or written ({error.strerror})") from None
    with file:
        deadline = time.monotonic() + wait_s
        while not locked(file.fileno()):
            if time.monotonic() >= deadline:
                file.seek(0)
                raise RaydetError(
                    f"{folder} is in use by another command ({file.read().strip() or 'which does not say its name'}): "
                    "wait for its end, or choose another name=…"
                )
            time.sleep(_LOOK_EVERY_S)
        file.truncate(0)
        file.write(f"{what}, process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%F %T')}\n")
        file.flush()
        yield


def locked(file: int) -> bool:
    """Lock a file; return whether that is done, or cannot be done here."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # no locks on this file system
        return True
    return True


def load_evaluated(
    checkpoint_path: Path, recipe: str | None, overrides: Sequence[str], trust_code: bool = False
) -> Recipe:
    """Return the recipe to evaluate a checkpoint, a run or a weights file with.

    Args:
        checkpoint_path: path of what is evaluated.
        recipe: the user's own recipe; None: the recipe of the run.
        overrides: `section.key=value`.
        trust_code: the recipe of the run may name code that reads the data.

    Raises:
        RaydetError: there is nothing at the path, it does not say which recipe is its own, or that recipe names code
            that is not trusted.
    """
    if not checkpoint_path.exists():
        raise RaydetError(f"{checkpoint_path}: no such file or folder")
    run = checkpoint_path if (checkpoint_path / "recipe.yaml").is_file() else checkpoint_path.parent
    if recipe is not None:
        return load_recipe(recipe, overrides)
    if checkpoint_path.is_dir() and (run / "recipe.yaml").is_file():
        settings = load_recipe(run / "recipe.yaml", overrides)
        if is_own(settings.data.format) and not trust_code and "data.format" not in keys_given(overrides):
            raise RaydetError(
                f"{run / 'recipe.yaml'} names code of its own to read the data, {settings.data.format}, and nothing of "
                "it was run: pass data.format=… or a --recipe of yours, or, if you trust the code, trust_code=True "
                "(--trust-code)"
            )
        if "storage" not in keys_given(overrides):  # that of the training, perhaps on another machine
            settings = settings.model_copy(update={"storage": str(run)})
        return settings
    raise RaydetError(
        f"{checkpoint_path} says neither its model nor its data: add --recipe, such as --recipe coco2017_yolox_s"
    )


def thresholds_of(config: Config, overrides: Sequence[str]) -> Eval:
    """Return the thresholds of a checkpoint, tuned perhaps after its training, with `eval.key=value` on top."""
    mine = [override for override in overrides if override.startswith("eval.")]
    return load_recipe(Recipe(eval=config.thresholds), mine).eval


def image_size_of(
    config: Config, recipe: Recipe, overrides: Sequence[str], say: Callable[[str], Any]
) -> tuple[int, int]:
    """Return the (height, width) to evaluate a checkpoint at: its own, unless the overrides give another.

    Args:
        config: config of the checkpoint.
        recipe: recipe to evaluate with; where its size is another one, a line says that it does not count.
        overrides: `section.key=value`.
        say: takes that line.
    """
    theirs = recipe.data.image_size
    if "data.image_size" in keys_given(overrides):
        return theirs
    if theirs != config.image_size:
        other, own = ("x".join(map(str, size)) for size in (theirs, config.image_size))
        say(
            f"data.image_size is {other} in the recipe, but {own} in the checkpoint, which counts; "
            f"data.image_size=… takes another"
        )
    return config.image_size


def open_run(folder: Path, recipe: Recipe, inputs: Mapping[str, object]) -> None:
    """Make the folder of a run with recipe.yaml, inputs.json and environment.json, or check that it is the same run.

    Args:
        folder: folder of the run, or this machine's copy of it.
        recipe: the settings of the run.
        inputs: what the run was given beside its recipe, such as the names of the classes: name → value.

    Raises:
        RaydetError: the folder has checkpoints of a run with other settings, data, model or loss, or cannot be made.
    """
    if any(folder.glob("checkpoint_*/config.json")):
        changed = differences(recipe, load_recipe(folder / "recipe.yaml"))
        from raydet.runs.checkpoint import read_json  # torch takes seconds, and `raydet plot` does without it

        earlier = read_json(folder / "inputs.json")
        changed += [
            f"{key}: {_short(earlier.get(key))} there, {_short(value)} here"
            for key, value in inputs.items()
            if earlier.get(key) != value
        ]
        if changed:
            raise RaydetError(
                f"{folder} is a run with other settings ({'; '.join(changed)}); "
                "choose another name=…, or remove the folder; to train on from its weights: name=… "
                f"model.weights={recipe.storage}/{recipe.name}"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_aside(folder / "recipe.yaml", describe(recipe))
        write_aside(folder / "inputs.json", json.dumps(inputs, indent=1) + "\n")
        write_aside(folder / "environment.json", json.dumps(environment(), indent=1) + "\n")
    except OSError as error:
        raise RaydetError(f"storage: {folder} cannot be made or written ({error.strerror})") from None


def environment() -> dict[str, str | int]:
    """Return what a run's numbers may depend on beside its recipe."""
    import cv2
    import torch

    packages = ("raydet", "torch", "torchvision", "ray", "numpy", "pyarrow", "hotcoco")
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none on the driver"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count() or 0,
        "gpu": gpu,
        **{name: version(name) for name in packages},
        "opencv": cv2.__version__,  # its package has several names
    }


def _short(value: object) -> str:
    return some(value) if isinstance(value, list) else str(value)
