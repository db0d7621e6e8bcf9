"""Runs in an object store: each machine that works on one has a folder of its own, kept the same as the store.

A training needs a folder: it appends to files and renames whole checkpoints. An object store can do neither, and its
files appear one by one. So rank 0 writes into a folder of its own, and a thread brings what has changed to the store,
of a checkpoint config.json last: what has one is whole. A slow store delays no step.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path

from raydet.data import cache
from raydet.errors import RaydetError
from raydet.runs.folder import LOCK, STOP, local_folder, locked
from raydet.store import Store, above, is_uri

logger = logging.getLogger(__name__)
PUSH_EVERY_S = 3.0
_METRICS = "metrics.jsonl"
_LOGS = ("log.txt", _METRICS)
_CONFIG = "config.json"
_PREFIX = "raydet-run-"  # of the folders of workers
_WEIGHTS = "model.safetensors"
_KEPT_S = 7 * 24 * 3600.0  # after its last use a copy of a run stays so long
_LARGE = (_WEIGHTS, "training.pt", ".parquet", ".onnx")


class Mirror:
    """A folder of this machine and one in a store.

    Args:
        folder: folder on this machine.
        address: address of the folder in the store; None: there is none, and nothing to do.
        ignored: names at the top of the folder that are neither brought to the store nor here.
    """

    def __init__(self, folder: Path, address: str | None, ignored: tuple[str, ...] = ()):
        self.folder = folder
        self.store = None if address is None else Store(address)
        self._ignored = ignored
        self._known: dict[str, tuple[int, int]] = {}  # files that are equal here and there: size and time here

    def pull(self, wanted: Callable[[str], bool]) -> None:
        """Bring files of the store here, but for those that are here already.

        Raises:
            RaydetError: the store cannot be reached.
        """
        if self.store is None or self.store.kind() != "folder":
            return
        for name, (size, changed) in self.store.files(recursive=True).items():
            path = self.folder / name
            if not wanted(name) or name.split("/")[0] in self._ignored:
                continue
            if not (path.is_file() and (path.stat().st_size, path.stat().st_mtime_ns) == (size, changed)):
                Store(self.folder).write(name, self.store.read(name))
                os.utime(path, ns=(changed, changed))
            self._known[name] = _state(path)

    def pull_checkpoint(self, name: str, *, training: bool = False) -> None:
        """Bring a checkpoint here: its weights, and what else is needed to go on with its training."""
        files = {f"{name}/{_CONFIG}", f"{name}/{_WEIGHTS}"} | ({f"{name}/training.pt"} if training else set())
        self.pull(files.__contains__)

    def refresh(self) -> None:
        """Make this folder what the store holds, but for large files that are not here yet.

        Raises:
            RaydetError: the store cannot be reached.
        """
        if self.store is None:
            return
        _remove_old_copies(self.folder)
        there = self.store.files(recursive=True) if self.store.kind() == "folder" else {}
        for name, path in list(_files(self.folder)):
            if there.get(name) != _state(path):
                path.unlink()
        self._known.clear()
        self.pull(lambda name: not name.endswith(_LARGE) or (self.folder / name).is_file())

    def push(self) -> None:
        """Bring to the store what has changed here, and delete there what was there and is here no more.

        Raises:
            RaydetError: the store cannot be reached; what is not there yet, the next call brings.
        """
        if self.store is None:
            return
        found = {name: path for name, path in _files(self.folder) if name.split("/")[0] not in self._ignored}
        for name in sorted(found, key=_turn):
            try:
                state = _state(found[name])
                if self._known.get(name) == state:
                    continue
                content = found[name].read_bytes()
            except FileNotFoundError:  # pruned since
                continue
            self.store.write(name, content)
            self._known[name] = state
        for name in sorted(set(self._known) - set(found), key=lambda name: not name.endswith(_CONFIG)):
            self.store.delete(name)
            del self._known[name]

    def is_pushed(self) -> bool:
        """Does the store hold all that is here?"""
        found = {name: _state(path) for name, path in _files(self.folder) if name.split("/")[0] not in self._ignored}
        return found == self._known

    @contextlib.contextmanager
    def pushing(self) -> Iterator[None]:
        """Bring to the store what changes, in a thread, and at the end all of it; look there for the wish to stop.

        Raises:
            RaydetError: at the end the store cannot be reached; it says where the rest is.
        """
        failed = False

        def step() -> None:
            nonlocal failed
            try:
                if self.store is not None and self.store.kind(STOP):
                    (self.folder / STOP).touch()
                    self._known[STOP] = _state(self.folder / STOP)
                self.push()
                failed = False
            except RaydetError as error:
                if not failed:
                    logger.warning("not in the store yet, the next attempt follows: %s", error)
                failed = True

        with repeated(step, PUSH_EVERY_S, "raydet-push"):
            try:
                yield
            except BaseException:
                step()  # what led to it is worth having there
                raise
        try:
            self.push()
        except RaydetError as error:
            where = f"{self.folder} on {socket.gethostname()}"
            raise RaydetError(f"{error}; what is not there is in {where}") from None

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """Bring the lines of progress here, in a thread, and the wish to stop to the store."""
        told = False

        def step() -> None:
            nonlocal told
            with contextlib.suppress(RaydetError):  # the next attempt follows
                if self.store is not None and not told and (self.folder / STOP).exists():
                    self.store.write(STOP, b"")
                    told = True
                self.pull(_LOGS.__contains__)

        with repeated(step, PUSH_EVERY_S, "raydet-pull") if self.store is not None else contextlib.nullcontext():
            yield
        step()


@contextlib.contextmanager
def worker_folder(address: str, rank: int) -> Iterator[Path]:
    """Give a worker a folder with what its run needs to go on, and bring what it writes there to the store.

    The folder is removed at the end, and so are those that workers left here that were killed. It stays where the store
    does not hold all that is in it.

    Args:
        address: address of the run in the store.
        rank: rank of the worker; the log and the metrics are rank 0's.

    Raises:
        RaydetError: the store cannot be reached.
    """
    from raydet.runs import checkpoint

    _remove_left()
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    with (folder / f"{LOCK}.new").open("w") as lock:
        locked(lock.fileno())
        Path(lock.name).rename(folder / LOCK)  # which nobody has seen without the lock on it
        mirror = Mirror(folder, address, () if rank == 0 else _LOGS)
        mirror.refresh()
        for path in sorted(folder.glob("checkpoint_*"), reverse=True):
            mirror.pull_checkpoint(path.name, training=True)
            if (path / checkpoint.TRAINING).exists() and checkpoint.damage(path) is None:
                break
        if rank == 0:  # may have to average the best
            mirror.pull(lambda name: name.startswith("checkpoint_") and name.endswith(_WEIGHTS))
        try:
            with mirror.pushing():
                yield folder
        finally:
            if mirror.is_pushed():
                shutil.rmtree(folder, ignore_errors=True)
            else:
                (folder / LOCK).unlink()  # the next worker lets it be


def _remove_left() -> None:
    """Remove the folders of workers on this machine that were killed: nobody holds their locks."""
    for lock in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{LOCK}"):
        _remove_unless_held(lock.parent, lock)


def _remove_old_copies(used: Path) -> None:
    """Remove this machine's copies of runs that no command has used for a week; `used` is used now."""
    copies = cache.folder().resolve() / "runs"
    if copies not in used.parents:  # a worker's folder
        return
    used.parent.mkdir(parents=True, exist_ok=True)
    os.utime(used.parent)
    for copy in copies.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another command has removed it
            if time.time() - copy.stat().st_mtime > _KEPT_S:
                _remove_unless_held(copy, next(copy.glob(f"*/{LOCK}"), None))


def _remove_unless_held(folder: Path, lock: Path | None) -> None:
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:  # another user's, or removed since
        if lock is None or locked(stack.enter_context(lock.open("a")).fileno()):
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def opened(path: str | Path, *, weights: bool = True, more: str = "") -> Iterator[Path]:
    """Give the local path of a run, a checkpoint or a file; of one in a store that of a copy.

    What is written into the copy is brought to the store at the end.

    Args:
        path: local path or address of a run or a checkpoint; or, where nothing has this path, the name of a model,
            which means its published COCO weights.
        weights: bring the weights of the checkpoint as well; of a run, those of the best checkpoint.
        more: pattern of further files of that checkpoint to bring, such as "candidates-*.parquet".

    Raises:
        RaydetError: there is nothing, or the store cannot be reached.
    """
    if not is_uri(path):
        local = Path(path).expanduser()
        if not local.exists():
            from raydet.models.download import is_published
            from raydet.runs.published import published_checkpoint

            if is_published(path):
                with published_checkpoint(str(path)) as folder:
                    yield folder
                return
        yield local
        return
    from raydet.runs import checkpoint

    address = str(path)
    store = Store(address)
    kind = store.kind()
    if not kind:
        raise RaydetError(f"{address}: no such file or folder")
    name = local_folder(address).name
    if kind == "file":
        parent, _ = above(address)
        mirror = Mirror(local_folder(parent), parent)
        mirror.pull({name, *([_CONFIG] if name == _WEIGHTS else [])}.__contains__)
        yield mirror.folder / name
        return
    inside = store.kind(_CONFIG) == "file"  # a checkpoint, whose run is the folder above
    run = above(address)[0] if inside else address
    mirror = Mirror(local_folder(run), run)
    mirror.refresh()
    local = mirror.folder / name if inside else mirror.folder
    if weights:
        found = checkpoint.find(local).name
        mirror.pull_checkpoint(found)
        if more:
            mirror.pull(lambda name: fnmatch(name, f"{found}/{more}"))
    yield local
    mirror.push()


def address_of(path: str | Path, local: Path) -> str | Path:
    """Return where a file or folder is kept that lies in what `opened(path)` gives: its address, or the path here."""
    if not is_uri(path):
        return local
    for address in (str(path), above(path)[0]):
        folder = local_folder(address)
        if local.is_relative_to(folder):
            return Store(address).path(local.relative_to(folder).as_posix()) if local != folder else address
    return local


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield the files below a folder that are whole."""
    for top, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and (top != str(folder) or name != "ray")]
        for name in names:
            if not name.startswith(".") and not name.endswith(".partial"):
                path = Path(top, name)
                yield path.relative_to(folder).as_posix(), path


def _turn(name: str) -> tuple[int, str]:
    """Sort the files of a run in the order in which they are brought to the store, where a push may end at any of them.

    The metrics go first: a training that resumes from a checkpoint then has the lines of all steps before it, and drops
    those of later steps. A checkpoint's config.json comes after its other files, and what tells of it after both.
    """
    if name == _METRICS:
        return 0, name
    if name.startswith("checkpoint_"):
        return 1 + name.endswith(_CONFIG), name
    return 3, name


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


@contextlib.contextmanager
def repeated(step: Callable[[], None], every_s: float, name: str) -> Iterator[None]:
    """Call `step` every so many seconds in a thread of that name, until the context ends."""
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(every_s):
            step()

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
