"""The owner of an address in an object store: one command at a time works on a run or a sweep there.

A claim is an object of its own below the address, which its owner writes anew every few seconds. Who wants the address
writes a claim, then lists all claims: it has the address if there is no other. Otherwise it takes its claim back. So of
two that start at the same moment at most one wins, if a list shows all that was written before it, as the lists of S3,
Google Cloud Storage and MinIO do. A claim that does not change for a while has no owner any more, and is removed.
Lamport, "A New Solution of Dijkstra's Concurrent Programming Problem" (1974), is of this kind.
"""

from __future__ import annotations

import logging
import os
import random
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from raydet.errors import RaydetError
from raydet.runs.mirror import repeated
from raydet.store import Store

logger = logging.getLogger(__name__)
CLAIMS = ".claims"  # folder below the address
BEAT_S = 5.0  # from one sign of life to the next
GONE_S = 30.0  # without a sign of life, after which an owner is gone

_State = tuple[int, int]  # size and time of change of a claim


@contextmanager
def owned(address: str | None, what: str, wait_s: float = 0.0) -> Iterator[None]:
    """Hold an address against other commands, on any machine, until the end or the death of this process.

    Args:
        address: address of a run or of a sweep; None: there is nothing to hold.
        what: name of this command, for the message to others.
        wait_s: how long to wait for another owner that is alive, in seconds.

    Raises:
        RaydetError: another command holds it, or the store cannot be reached.
    """
    if address is None:
        yield
        return
    claim = _Claim(Store(address), f"{what}, process {os.getpid()} on {socket.gethostname()}")
    claim.take(wait_s)
    try:
        with repeated(claim.beat, BEAT_S, "raydet-claim"):
            yield
    finally:
        with suppress(RaydetError):  # the next owner sees that it does not change any more
            claim.drop()


class _Claim:
    def __init__(self, store: Store, who: str):
        self._store = store
        self._mine = uuid.uuid4().hex
        self._content = f"{who}, since {time.strftime('%F %T')}".encode()
        self._lost = False
        self._beats = 0
        self._seen: dict[str, _State] = {}  # other claims at the last sign of life

    def take(self, wait_s: float) -> None:
        """Write the claim as soon as there is no other whose owner lives; RaydetError: there is one for too long."""
        deadline = time.monotonic() + wait_s
        while True:
            dead = self._wait(deadline)
            self._write()
            if self._others().keys() <= dead:
                break
            self.drop()  # somebody else has started just now: who comes back first gets it
            time.sleep(random.uniform(0, BEAT_S / 2))
        for name in dead:
            self._store.delete(f"{CLAIMS}/{name}")

    def beat(self) -> None:
        """Give a sign of life."""
        if self._lost:
            return
        with suppress(RaydetError):  # the next one follows
            self._write()
            others = self._others()
            self._lost = any(self._seen.get(name, state) != state for name, state in others.items())
            self._seen = others
            if self._lost:  # another command gives signs of life as well
                self.drop()
                why = f"this command gave no sign of life for {GONE_S:.0f} s"
                logger.warning("%s has another owner now, as %s: end one of the two", self._store.root, why)

    def drop(self) -> None:
        """Give the address back."""
        self._store.delete(f"{CLAIMS}/{self._mine}")

    def _wait(self, deadline: float) -> set[str]:
        """Wait until no other owner is left that lives; return the claims of those that are gone."""
        seen: dict[str, tuple[_State, float]] = {}  # claims as they were first seen, and when
        told = False
        while True:
            now, others = time.monotonic(), self._others()
            alive = {name for name, state in others.items() if name in seen and seen[name][0] != state}
            if alive and now > deadline:
                raise RaydetError(
                    f"{self._store.root} is in use by another command ({self._who(min(alive))}): "
                    "wait for its end, or choose another name=…"
                )
            seen |= {name: (state, now) for name, state in others.items() if name in alive or name not in seen}
            gone = {name for name in others if now - seen[name][1] > GONE_S}
            if gone == others.keys():
                return gone
            if not told:
                told = True
                who = self._who(min(others))
                logger.warning("%s belongs to %s; is it alive? At most %.0f s", self._store.root, who, GONE_S)
            time.sleep(BEAT_S / 10)

    def _who(self, name: str) -> str:
        try:
            return self._store.text(f"{CLAIMS}/{name}").strip()
        except RaydetError:  # it has just been given back
            return "which does not say its name"

    def _others(self) -> dict[str, _State]:
        there: dict[str, _State] = {}
        for again in (True, False):
            if self._store.kind(CLAIMS) != "folder":
                break
            try:
                there = self._store.files(CLAIMS)
                break
            except RaydetError:  # the last claim was given back between the two requests, and the folder went with it
                if not again:
                    raise
        return {name: state for name, state in there.items() if name != self._mine}

    def _write(self) -> None:
        # Its size changes as well: the times of change are whole seconds in some stores.
        self._beats += 1
        self._store.write(f"{CLAIMS}/{self._mine}", self._content + b"\n" * (self._beats % 2))
