"""Published weights on this machine: found, or downloaded once, and checked by their SHA-256 sum before they are read.

    {RAYDET_CACHE or ~/.cache/raydet}/weights/yolox_s.pth           a file whose sum is right
                                              yolox_s.pth.1f2e3d.part  what there is of a download from an address
                                              yolox_s.pth.lock      held by the process that downloads it
                                              FILE.sha256           the sum at the first download, where none is known

`RAYDET_WEIGHTS` names a folder, or a mirror (http://…, https://…, s3://…), that is asked first. Proxies are those of
the environment: `https_proxy`, `no_proxy`.
"""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from raydet.errors import RaydetError
from raydet.models.published import PUBLISHED, Published, backbone, published
from raydet.store import Store, is_uri

logger = logging.getLogger(__name__)

RETRY_AFTER_S = (1.0, 4.0, 15.0)
TIMEOUT_S = 30.0  # without a byte, which is taken for a connection that is lost
_PART = 1 << 20  # bytes read at once
_REQUEST = 8 << 20  # bytes asked of a store at once
_TRY_AGAIN = (408, 429)  # and 500 and more: the server is busy or broken, not without the file


def weights_folder() -> Path:
    """Return the folder of the downloaded files."""
    return Path(os.environ.get("RAYDET_CACHE") or "~/.cache/raydet").expanduser() / "weights"


def is_published(path: str | Path) -> bool:
    """Is this no file or folder, but the name of a model with published weights?"""
    return str(path) in PUBLISHED and not Path(path).exists()


def local_weights(weights: str | Path, model: str) -> str | Path:
    """Return a file's or folder's path or URI as it is, and for published weights the path of their file.

    Args:
        weights: "coco" for the COCO weights of the model; "imagenet" for those of its backbone; or the name of a
            model, where nothing has this path; or a path or URI.
        model: name of the model.

    Raises:
        RaydetError: see `fetch`; or no weights are published for the model.
    """
    if str(weights) == "coco":  # also beside a folder of this name, which is likely the data
        return fetch(published(model))
    if str(weights) == "imagenet":
        return fetch(backbone(model))
    return fetch(published(str(weights))) if is_published(weights) else weights


def present(weights: Published) -> Path | None:
    """Return where a file is on this machine, its sum unchecked: in the folder that RAYDET_WEIGHTS names, or here."""
    mirror = os.environ.get("RAYDET_WEIGHTS", "")
    folders = [Path(mirror).expanduser()] if mirror and not is_uri(mirror) else []
    files = [folder / weights.file for folder in (*folders, weights_folder())]
    return next((file for file in files if file.is_file()), None)


def fetch(weights: Published) -> Path:
    """Return the path of published weights on this machine, downloaded if they are not there yet.

    Processes that ask for a file at the same time download it once.

    Raises:
        RaydetError: the file cannot be had, with its address, its sum and the path to put it; or its sum is another.
    """
    if (found := present(weights)) is None:
        try:
            weights_folder().mkdir(parents=True, exist_ok=True)
            with _locked(weights_folder() / f"{weights.file}.lock"):
                if (found := present(weights)) is None:  # else another process has just brought it
                    return _download(weights)
        except OSError as error:
            raise RaydetError(f"{weights_folder()}: cannot be written ({error.strerror or error})") from None
    _check(found, weights, str(found))
    return found


def _download(weights: Published) -> Path:
    target = weights_folder() / weights.file
    mirror, question, query = os.environ.get("RAYDET_WEIGHTS", "").partition("?")
    addresses = [f"{mirror.rstrip('/')}/{weights.file}{question}{query}"] if is_uri(mirror) else []
    reasons = []
    for address in (*addresses, weights.address):
        part = _part(target, address)
        if weights.sha256 is None:  # nothing would tell that the file has changed since its first bytes came
            part.unlink(missing_ok=True)
        logger.warning("downloading %s; licence: %s", address, weights.licence)
        try:
            with _progress(weights) as tell:
                if address.startswith(("http://", "https://")):
                    _from_http(address, part, tell)
                else:
                    _from_store(address, part, tell)
        except (OSError, ValueError, http.client.HTTPException, RaydetError) as error:
            reasons.append(f"{address}: {_reason(error)}")
            continue
        _check(part, weights, address)
        part.replace(target)
        return target
    raise RaydetError(
        f"the weights of {weights.model} cannot be downloaded ({'; '.join(reasons)}); put the file at {target} "
        f"yourself; its SHA-256 sum is {weights.sha256 or 'not known'}"
    )


def _part(target: Path, address: str) -> Path:
    """Return where what has come from an address is kept: bytes of two addresses must not become one file."""
    return target.with_name(f"{target.name}.{hashlib.sha256(address.encode()).hexdigest()[:6]}.part")


def _check(file: Path, weights: Published, source: str) -> None:
    """Raise RaydetError if a file has another sum than it should; a part of a download is removed then."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while content := opened.read(_PART):
            digest.update(content)
    found = digest.hexdigest()
    record = weights_folder() / f"{weights.file}.sha256"
    expected = weights.sha256
    if expected is None and record.is_file():
        expected = record.read_text().strip()
    if expected is None:
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(f"{found}\n")
        logger.warning("%s: no sum is published; %s is kept in %s, and checked from now on", source, found, record)
    elif not found.startswith(expected):
        if file.suffix == ".part":
            file.unlink()
        should = f"{'be' if len(expected) == len(found) else 'begin with'} {expected}"
        raise RaydetError(
            f"{source} is not the file that was published: its SHA-256 sum is {found}, and should {should}; "
            "it is not used"
        )


def _from_http(address: str, part: Path, tell: Callable[[int, int | None], None]) -> None:
    """Bring a file, from where `part` ends on. It is tried again as long as bytes come, and then some times more."""
    waits, reached = iter(RETRY_AFTER_S), 0
    while True:
        try:
            _rest_of_http(address, part, tell)
            return
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in _TRY_AGAIN:
                raise
            failure: Exception = error
        except (OSError, http.client.HTTPException) as error:
            failure = error
        size = part.stat().st_size if part.is_file() else 0
        if size > reached:
            waits, reached = iter(RETRY_AFTER_S), size
        if (wait := next(waits, None)) is None:
            raise failure
        time.sleep(wait)


def _rest_of_http(address: str, part: Path, tell: Callable[[int, int | None], None]) -> None:
    start = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(address, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        answer = urllib.request.build_opener().open(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        if error.headers.get("Content-Range", "").endswith(f"*/{start}"):
            return  # all of it was there
        part.unlink()
        raise ConnectionError("what was there of the file is longer than the file") from None
    with answer, part.open("ab") as file:
        if answer.status != 206 or not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            file.truncate(start := 0)  # this server sends the whole file
        length = answer.headers.get("Content-Length")
        total = None if length is None else start + int(length)
        done = start
        while content := answer.read1(_PART):
            file.write(content)
            done += len(content)
            tell(done, total)
    if total is not None and done < total:
        raise ConnectionError(f"cut off after {done:,} of {total:,} bytes")


def _from_store(address: str, part: Path, tell: Callable[[int, int | None], None]) -> None:
    """Bring a file out of a store, from where `part` ends on; the store tries again by itself."""
    place, question, query = address.partition("?")
    folder, _, name = place.rpartition("/")
    store = Store(f"{folder}{question}{query}")
    total = store.size(name)
    if part.is_file() and part.stat().st_size > total:
        part.unlink()
    with part.open("ab") as file:
        while (done := file.tell()) < total:
            file.write(store.read(name, done, min(_REQUEST, total - done)))
            tell(file.tell(), total)


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {error.reason}"
    return str(getattr(error, "reason", error)) or type(error).__name__


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that other processes wait for; the system lets go of it when the process ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _progress(weights: Published) -> Iterator[Callable[[int, int | None], None]]:
    """Show a bar with size and speed on standard error; give the function that takes bytes done and bytes in all."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(weights.file, total=weights.size)
        yield lambda done, total: bar.update(task, completed=done, total=total or weights.size)
