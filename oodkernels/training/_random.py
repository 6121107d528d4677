"""Random numbers that follow from a seed, and leave the global ones as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def rng_state(device: torch.device | None = None) -> dict[str, Any]:
    """State of torch's, NumPy's and Python's global random numbers, of tensors and plain values.

    Args:
        device: A CUDA device, for that of its generator too.
    """
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    version, words, gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "python": [version, torch.tensor(words), gauss],
    }
    if device is not None and device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Any], device: torch.device | None = None) -> None:
    """Go back to what :func:`rng_state` gave."""
    name, keys, *rest = state["numpy"]
    version, words, gauss = state["python"]
    torch.set_rng_state(state["torch"])
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    random.setstate((version, tuple(words.tolist()), gauss))
    if device is not None and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextmanager
def seeded(key: tuple[int, ...]) -> Iterator[None]:
    """The CPU's random numbers follow from ``key``; on leaving they are as they were."""
    state = rng_state()
    bits = entropy(key)
    torch.default_generator.manual_seed(bits)
    np.random.seed(bits % 2**32)  # noqa: NPY002
    random.seed(bits)
    try:
        yield
    finally:
        set_rng_state(state)


def entropy(key: tuple[int, ...]) -> int:
    """63 random bits that follow from ``key``."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> 1


@contextmanager
def global_seed(seed: int, device: torch.device) -> Iterator[None]:
    """Seed all global random numbers; on leaving they are as they were."""
    state = rng_state(device)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    random.seed(seed)
    try:
        yield
    finally:
        set_rng_state(state, device)


@contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """Seed torch on the CPU and use one thread; on leaving, put both back as they were.

    One thread, because the reductions of some CPU layers depend on how many there are.
    """
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
