"""Compiles and runs the programs of cuda_emulation/: the CUDA kernels, on the CPU.

Every run is under AddressSanitizer and UBSan, with the threads of a block in several orders that
must give the same bits, and with shared memory, scratch and outputs filled with a NaN first.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent
SOURCES = HERE / "cuda_emulation"
COMPILER = os.environ.get("CXX", "g++")
FLAGS = [
    *("-std=c++20", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # as enum DType has them
_NAMES = ("mos", "outlier", "roc", "histogram", "kmeans", "dos")
PROGRAMS = {name: name for name in _NAMES} | {"logit": "logits"}
"""By the first part of a kernel's name; ``faults`` for all others."""
POISON, INDEX_POISON = 0xFF, 0x5A
INDEX = torch.int64, INDEX_POISON
"""Type of an output of indices, which may be -1."""
ORDERS = 3

needs_compiler = pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no {COMPILER}")


class Emulator:
    """Compiled programs, and a place for their files."""

    def __init__(self, directory: Path, programs: Sequence[str]) -> None:
        self.directory = directory

        def build(name: str) -> None:
            include = ["-I", str(SOURCES), "-I", str(HERE.parent / "csrc")]
            files = [str(SOURCES / f"{name}.cpp"), "-o", str(directory / name)]
            subprocess.run([COMPILER, *FLAGS, *include, *files], check=True)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(build, programs))

    def start(
        self, kernel: str, inputs: dict[str, Tensor], **values: Any
    ) -> subprocess.CompletedProcess[str]:
        program = PROGRAMS.get(kernel.split("_")[0], "faults")
        for file in self.directory.glob("*.out"):
            file.unlink()
        for name, x in inputs.items():
            x.contiguous().view(torch.uint8).numpy().tofile(self.directory / f"{name}.in")
        settings = {"processors": 1, "shared_bytes": 228 << 10, "orders": ORDERS, **values}
        arguments = [f"{name}={value}" for name, value in settings.items()]
        return subprocess.run(
            [str(self.directory / program), kernel, str(self.directory), *arguments],
            capture_output=True,
            text=True,
        )

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
