"""Compiles and runs the programs of cuda_emulation/: the CUDA kernels, on the CPU.

Every run is under AddressSanitizer and UBSan, with the threads of a block in several orders that
must give the same bits, and with shared memory, scratch and outputs filled with a NaN first.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "scripts"))

from cuda_resources import MULTIPROCESSORS, Resources, short_name  # noqa: E402

SOURCES = HERE / "cuda_emulation"
COMPILER = os.environ.get("CXX", "g++")
FLAGS = [
    *("-std=c++20", "-Og", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # as enum DType has them
_NAMES = ("mos", "outlier", "roc", "histogram", "kmeans", "dos", "neighbors")
PROGRAMS = {name: name for name in _NAMES} | {"logit": "logits"}
PROGRAMS |= dict.fromkeys(("feature", "gen", "indexed", "scaled", "shape"), "features")
"""By the first part of a kernel's name; ``faults`` for all others."""
POISON, INDEX_POISON = 0xFF, 0x5A
INDEX = torch.int64, INDEX_POISON
"""Type of an output of indices, which may be -1."""
ORDERS = 3
KEPT = 4
"""Programs of a name that the cache holds."""

needs_compiler = pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no {COMPILER}")


def compiled(name: str, flags: Sequence[str] = FLAGS) -> Path:
    """A program, compiled unless the cache has one of the same sources, flags and compiler.

    Processes that want the same one wait for the first.
    """
    command = [COMPILER, *flags, "-I", str(SOURCES), "-I", str(HERE.parent / "csrc")]
    source = str(SOURCES / f"{name}.cpp")
    rule = subprocess.run([*command, "-MM", source], check=True, capture_output=True, text=True)
    version = subprocess.run([COMPILER, "--version"], check=True, capture_output=True).stdout
    contents = hashlib.sha256(version + " ".join(flags).encode())
    for file in sorted(rule.stdout.replace("\\\n", " ").split()[1:]):
        contents.update(Path(file).read_bytes())
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "oodkernels-tests")
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / f"{name}-{contents.hexdigest()[:24]}"
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists():
            new = program.with_suffix(".new")
            subprocess.run([*command, source, "-o", str(new)], check=True)
            new.rename(program)
        program.touch()
        by_age = sorted(folder.glob(f"{name}-*"), key=lambda file: file.stat().st_mtime)
        for old in by_age[:-KEPT]:
            old.unlink()
    return program


# --- launches: what they ask of a multiprocessor --------------------------------------------------

RESOURCES = json.loads((HERE.parent / "benchmarks/results/cuda_resources.json").read_text())
SHARED_BYTES = 48 << 10  # of a block that has not asked for more


@functools.cache
def kernel_names(program: Path) -> dict[int, str]:
    """Where in a program which kernel is, by its name in ``cuda_resources.json``."""
    done = subprocess.run(["nm", "-C", program], check=True, capture_output=True, text=True)
    lines = (line.split(" ", 2) for line in done.stdout.splitlines() if line[0] != " ")
    return {int(at, 16): short_name(name) for at, kind, name in lines if kind in "tTwWuV"}


@functools.cache
def resources_of(kernel: str) -> tuple[dict[str, Any], ...]:
    return tuple(row for row in RESOURCES["kernels"] if row["kernel"] == kernel)


@functools.cache
def limits_broken(kernel: str, threads: int, dynamic: int) -> tuple[str, ...]:
    """Why a launch with so many threads and bytes of shared memory fails, on any architecture."""
    broken = []
    for row in resources_of(kernel):
        use = Resources(row["registers"], row["shared"] + dynamic, 0, 0, 0)
        where = f"{kernel} on sm_{row['architecture']}"
        if use.shared > SHARED_BYTES:
            broken.append(f"{where}: {use.shared} bytes of shared memory")
        elif threads > (row["threads"] or threads):
            broken.append(f"{where}: {threads} threads, bounds say {row['threads']}")
        elif (
            MULTIPROCESSORS[row["architecture"]].resident_blocks(row["architecture"], threads, use)
            < 1
        ):
            broken.append(f"{where}: {threads} threads with {use.registers} registers each")
    return tuple(broken)


class Emulator:
    """The programs, each compiled when it is first wanted, and a place for their files."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.program = functools.cache(compiled)

    def start(
        self, kernel: str, inputs: dict[str, Tensor], **values: Any
    ) -> subprocess.CompletedProcess[str]:
        program = PROGRAMS.get(kernel.split("_")[0], "faults")
        for file in self.directory.glob("*.out"):
            file.unlink()
        for name, x in inputs.items():
            x.contiguous().view(torch.uint8).numpy().tofile(self.directory / f"{name}.in")
        settings = {"processors": 1, "orders": ORDERS, **values}
        arguments = [f"{name}={value}" for name, value in settings.items()]
        file = self.program(program)
        done = subprocess.run(
            [str(file), kernel, str(self.directory), *arguments], capture_output=True, text=True
        )
        if done.returncode == 0:
            names = kernel_names(file)
            lines = set((self.directory / "launches.txt").read_text().splitlines())
            for at, threads, shared in (map(int, line.split()) for line in lines):
                assert not limits_broken(names[at], threads, shared)
        return done

    def run(
        self,
        kernel: str,
        inputs: dict[str, Tensor],
        outputs: dict[str, torch.dtype | tuple[torch.dtype, int]],
        **values: Any,
    ) -> list[Tensor]:
        """The kernel's outputs, flat, none of which it may have left unwritten."""
        done = self.start(kernel, inputs, **values)
        assert done.returncode == 0, done.stderr
        found = []
        for name, kind in outputs.items():
            dtype, poison = kind if isinstance(kind, tuple) else (kind, POISON)
            x = self.output(name, dtype)
            missing = unwritten(x, poison).nonzero()
            assert not missing.numel(), f"{name} is not written at {missing[:5]}"
            found.append(x)
        return found

    def output(self, name: str, dtype: torch.dtype) -> Tensor:
        raw = np.fromfile(self.directory / f"{name}.out", np.uint8)
        return torch.from_numpy(raw).view(dtype) if raw.size else torch.empty(0, dtype=dtype)


def unwritten(x: Tensor, poison: int = POISON) -> Tensor:
    return (x.view(torch.uint8).view(-1, x.element_size()) == poison).all(1)
