"""Benchmarks: one file a feature, peers and ceilings in the same run.

``pytest benchmarks --benchmark-only`` runs them all; ``OODK_BENCH_QUICK=1`` shrinks every shape so
that a run shows only that they still work. Medians count; each result carries its achieved rate.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from shapes import QUICK


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    gc.collect()
    yield
    torch._dynamo.reset()


@pytest.fixture
def measure(benchmark: Any) -> Callable[..., None]:
    """measure(fn, nbytes=..., exps=..., scores=...): median time, and the rates beside it."""

    def run(fn: Callable[[], Any], nbytes: int = 0, exps: int = 0, scores: int = 0) -> None:
        fn()  # compilation and first-touch stay out
        if QUICK:
            benchmark.pedantic(fn, rounds=1, iterations=1)
        else:
            benchmark(fn)
        if benchmark.disabled:
            return
        median = benchmark.stats.stats.median
        benchmark.extra_info["threads"] = torch.get_num_threads()
        if nbytes:
            benchmark.extra_info["GB/s"] = round(nbytes / median / 1e9, 2)
        if exps:
            benchmark.extra_info["Gexp/s"] = round(exps / median / 1e9, 2)
        if scores:
            benchmark.extra_info["Mscores/s"] = round(scores / median / 1e6, 2)

    return run


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    import oodkernels

    machine_info["oodkernels"] = oodkernels.build_info()
    machine_info["cores"] = len(os.sched_getaffinity(0))
