"""Indexes that were built before, on disk: a file each, found again as long as what they were made of is the same."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from raydet.data.index import Index
from raydet.data.problems import Notice, Problems
from raydet.errors import RaydetError
from raydet.store import Store

logger = logging.getLogger(__name__)


def folder() -> Path:
    """Return the folder of the cache: RAYDET_CACHE of the environment, or ~/.cache/raydet."""
    return Path(os.environ.get("RAYDET_CACHE") or "~/.cache/raydet").expanduser()


def cached(build: Callable[..., Index], store: Store, reads: Iterable[str], settings: Any, problems: Problems) -> Index:
    """Return an index from the cache, or build it and put it there.

    What was left out of it when it was built is reported again each time, and so are the notices.

    Args:
        build: function that makes the index; it is called with `problems`.
        store: store that holds the sources.
        reads: files and folders that `build` reads, or whose names it needs: one that was added, taken away or
            changed (in size or time), here or in a folder below, makes it another index.
        settings: settings of `build`, as JSON; other settings make another index.
        problems: gets what is left out, and the notices.

    Raises:
        RaydetError: see `build`.
    """
    file = folder() / f"{_fingerprint(store, reads, settings)}.index"
    if (found := _read(file)) is None:
        told = Problems(problems.on_error, problems.max_errors)
        index = build(problems=told)
        _write(file, told, index)
        found = told.messages, told.notices, index
    messages, notices, index = found
    for message in messages:
        problems.add(message)
    problems.notices += notices
    return index


def _fingerprint(store: Store, reads: Iterable[str], settings: Any) -> str:
    listings: dict[str, Any] = {}
    for path in reads:
        kind = store.kind(path)
        if kind == "folder":
            listings[path] = _digest(store.each_file(path, recursive=True, hidden=True)), store.dead_links(path)
        elif kind == "file":
            listings[path] = store.files(os.path.dirname(path), hidden=True)[os.path.basename(path)]
    # The code of this package stands for its version: it says more.
    code = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    return hashlib.sha256(json.dumps([store.root, settings, listings]).encode() + code).hexdigest()


def _digest(entries: Iterable[tuple[str, int, int]]) -> int:
    """Digest a listing in any order, without keeping it: the sum of the entries' own digests."""
    total = 0
    for entry in entries:
        total += int.from_bytes(hashlib.blake2b(repr(entry).encode(), digest_size=16).digest(), "big")
    return total


def _read(file: Path) -> tuple[list[str], list[Notice], Index] | None:
    """Return the problems, the notices and the index in a file, or None if it is not there or damaged."""
    try:
        content = file.read_bytes()
        body = memoryview(content)[32:]  # a large one is not copied
        if hashlib.sha256(body).digest() != content[:32]:
            return None
        place = content.index(b"\n", 32)
        messages, notices = json.loads(content[32:place])
        return messages, [Notice(**notice) for notice in notices], Index.load(body[place - 31 :])
    except (OSError, ValueError):
        return None


def _write(file: Path, told: Problems, index: Index) -> None:
    parts: list[bytes | memoryview] = [
        json.dumps([told.messages, [asdict(notice) for notice in told.notices]]).encode(),
        b"\n",
        index.save(),
    ]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    try:
        Store(file.parent).write(file.name, b"".join([digest.digest(), *parts]))
    except (OSError, RaydetError) as error:
        logger.warning("the index is not kept for the next time: %s cannot be written (%s)", file, error)
