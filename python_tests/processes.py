"""Python in processes of its own."""

from __future__ import annotations

import multiprocessing
import os
import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["hypothesis", "numpy", "pytest", "torch.distributed"])


def python(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python here, beside the tests: at the root it would import the source tree, unbuilt."""
    return subprocess.run(
        [sys.executable, *args],
        cwd=HERE,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def run_code(code: str, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code as ``python -c`` does, forked from a process that has imported torch and no more."""
    with tempfile.TemporaryDirectory() as folder:
        written = [Path(folder, name) for name in ("out", "err")]
        process = started(code, *args, written=written, **environment)
        process.join(600)
        assert process.exitcode is not None, "has not ended after ten minutes"
        return subprocess.CompletedProcess(
            code, process.exitcode, *(path.read_text() for path in written)
        )


def started(code: str, *args: str, written: Sequence[Path] = (), **environment: str) -> BaseProcess:
    """A process that runs code as :func:`run_code` does; what it says is written to files."""
    given = (code, args, {**os.environ, **environment}, written)
    process = SERVER.Process(target=_run, args=given)
    process.start()
    return process


def _run(
    code: str, args: tuple[str, ...], environment: dict[str, str], written: Sequence[Path]
) -> None:
    for descriptor, path in enumerate(written, 1):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY), descriptor)
    os.chdir(HERE)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["-c", *args]
    exec(code, {"__name__": "__main__"})


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

    codes = _children(world, rank)
    store.unlink(missing_ok=True)
    return codes


def as_torchrun(world: int, work: Callable[[], None]) -> list[int]:
    """:func:`forked`, but each rank finds the environment that torchrun gives, and joins itself."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]

    def rank(number: int) -> None:
        torch.set_num_threads(1)
        names = {"LOCAL_RANK": number, "RANK": number, "GROUP_RANK": 0, "MASTER_PORT": port}
        sizes = {"LOCAL_WORLD_SIZE": world, "WORLD_SIZE": world, "TORCHELASTIC_RUN_ID": "none"}
        os.environ.update({k: str(v) for k, v in {**names, **sizes}.items()})
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        work()

    return _children(world, rank)


def _children(world: int, rank: Callable[[int], None]) -> list[int]:
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
    return [child.exitcode or 0 for child in children]


def ranks(folder: Path, world: int, work: Callable[[int, int], Any]) -> list[Any]:
    """What ``work(rank, world)`` gives on each of as many ranks."""

    def save() -> None:
        rank = torch.distributed.get_rank()
        torch.save(work(rank, world), folder / f"{rank}.pt")

    assert forked(world, folder, save) == [0] * world
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]
