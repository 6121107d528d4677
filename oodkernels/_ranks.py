"""Processes of one run, as torchrun starts them: who does what, and what all have to know."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


class OtherRankError(RuntimeError):
    """What went wrong on the first rank, as the others are told."""


def ranks() -> tuple[int, int]:
    """The rank of this process and their number; (0, 1) for a process by itself."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@contextmanager
def joined(where: str, wait: timedelta = timedelta(days=7)) -> Iterator[tuple[int, int]]:
    """Join the processes that torchrun started beside this one, over gloo; gives :func:`ranks`.

    Args:
        where: Who asks, for messages.
        wait: How long a rank waits for the others, which may be at work.

    Raises:
        ValueError: torchrun started several, and torch has no ``torch.distributed``.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or ranks()[1] > 1:
        yield ranks()
        return
    if not dist.is_available():
        raise ValueError(f"{where}: several processes need torch.distributed, which is not there")
    dist.init_process_group("gloo", timeout=wait)
    try:
        yield ranks()
    finally:
        dist.destroy_process_group()


def on_first(make: Callable[[], T]) -> T:
    """What a function gives on the first rank, on all ranks; it is called on no other.

    Raises:
        OtherRankError: It raised on the first rank, where its own error is raised.
    """
    rank, world = ranks()
    if world == 1:
        return make()
    if rank:
        told: list[tuple[T | None, str | None]] = [(None, None)]
        dist.broadcast_object_list(told, 0)
        found, wrong = told[0]
        if wrong is not None:
            raise OtherRankError(wrong)
        return found  # type: ignore[return-value]
    try:
        found = make()
    except BaseException as error:
        dist.broadcast_object_list([(None, " ".join(str(error).split()) or repr(error))], 0)
        raise
    dist.broadcast_object_list([(found, None)], 0)
    return found


def gathered(value: T) -> list[T]:
    """What every rank gives, in the order of the ranks, on all of them."""
    world = ranks()[1]
    if world == 1:
        return [value]
    found: list[T] = [value] * world
    dist.all_gather_object(found, value)
    return found
