"""Python in processes of its own."""

from __future__ import annotations

import multiprocessing
import os
import secrets
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch


def python(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python here, beside the tests: at the root it would import the source tree, unbuilt."""
    return subprocess.run(
        [sys.executable, *args],
        cwd=Path(__file__).parent,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def forked(world: int, folder: Path, work: Callable[[], None]) -> list[int]:
    """Run a function on ranks of their own, children of this process; gives their exit codes."""
    store = folder / f".store-{secrets.token_hex(4)}"

    def rank(number: int) -> None:
        torch.set_num_threads(1)
        torch.distributed.init_process_group(
            "gloo", rank=number, world_size=world, init_method=f"file://{store}"
        )
        work()
        torch.distributed.destroy_process_group()

    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=rank, args=(number,)) for number in range(world)]
    for child in children:
        child.start()
    while any(child.is_alive() for child in children):
        if any(child.exitcode for child in children):  # as torchrun does
            for child in children:
                child.kill()
        children[0].join(0.05)
    for child in children:
        child.join()
    store.unlink(missing_ok=True)
    return [child.exitcode or 0 for child in children]
