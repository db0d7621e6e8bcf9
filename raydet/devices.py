"""Devices: which one to run on, and what to say when its memory is too small."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from raydet.errors import RaydetError


def pick_device(name: str | None) -> torch.device:
    """Return the named device; None: the first GPU, or without one the CPU.

    Raises:
        RaydetError: there is no such device here.
    """
    if name is None:
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RaydetError(f"device {name!r}: {str(error).splitlines()[0]}") from None
    return device


@contextmanager
def memory_suffices(what: str, remedy: str) -> Iterator[None]:
    """Turn a GPU's lack of memory into an error that names what does not fit and what to set.

    It is the user's error: new workers would not cure it.

    Args:
        what: subject of the message, such as "a batch of 8 images".
        remedy: what to do, such as "lower eval.batch_size".

    Raises:
        RaydetError: the memory of the GPU is too small.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        detail = str(error).partition(". ")[0]
        raise RaydetError(f"the memory of the GPU does not hold {what}: {remedy} ({detail})") from None


def agreed(value: Any) -> Any:
    """Return rank 0's value on every rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gathered(value: Any) -> list[Any] | None:
    """Return every rank's value on rank 0, None elsewhere."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values)
    return values


def everyone(value: Any) -> list[Any]:
    """Return every rank's value, on every rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
