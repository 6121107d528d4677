"""Prints, as JSON, the machine and the versions that a measurement is of.

Imports oodkernels last and survives its absence: whoever asks may be about to build it.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from typing import Any

import torch

PACKAGES = ("numpy", "triton", "torchmetrics", "scikit-learn", "flash-kmeans", "faiss-gpu")


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def first_line(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else None


def device() -> dict[str, Any]:
    if not torch.cuda.is_available():
        why = "torch sees none" if torch.version.cuda else f"torch {torch.__version__} has no CUDA"
        return {"device": None, "why": why}
    found = torch.cuda.get_device_properties(0)
    return {
        "device": found.name,
        "architecture": f"{found.major}{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_gib": round(found.total_memory / 2**30, 1),
        "l2_mib": found.L2_cache_size / 2**20,
        "driver": first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
    }


def package() -> dict[str, Any] | None:
    try:
        import oodkernels
    except ImportError:
        return None
    return oodkernels.build_info()


def describe() -> dict[str, Any]:
    return {
        **device(),
        "commit": first_line("git", "rev-parse", "HEAD"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cores": len(os.sched_getaffinity(0)),
        "packages": {name: version(name) for name in PACKAGES},
        "oodkernels": package(),
    }


if __name__ == "__main__":
    print(json.dumps(describe()))
