"""Benchmarks: one file a feature, peers and ceilings in the same run.

``pytest benchmarks --benchmark-only`` runs ours and the best peer of each within ten minutes, and
says what it leaves out; ``--full`` runs them all. ``OODK_BENCH_QUICK=1`` shrinks every shape, so
that a run shows only that they still work. Medians count; each result carries its achieved rate.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import selection
import torch
from shapes import QUICK


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run every benchmark, for about an hour")


def short(config: pytest.Config) -> bool:
    """Whether the run is one of ten minutes; benchmarks that are named are run as they are."""
    here = os.path.dirname(os.path.abspath(__file__))
    whole = [arg for arg in config.args if os.path.abspath(arg) == here]
    return bool(whole) and not (config.getoption("full") or QUICK)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.stash[STARTED], config.stash[LEFT_OUT] = time.monotonic(), []
    if short(config):  # a benchmark's time, and rounds for those that take longer
        config.option.benchmark_max_time, config.option.benchmark_min_rounds = "0.5", 2


STARTED, LEFT_OUT = pytest.StashKey[float](), pytest.StashKey[list[str]]()
TOTAL = pytest.StashKey[int]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[TOTAL] = len(items)
    if short(config):
        items[:], out = selection.chosen(items, selection.recorded_times())
        config.stash[LEFT_OUT] += [item.nodeid for item in out]
        config.hook.pytest_deselected(items=out)


def pytest_runtest_setup(item: pytest.Item) -> None:
    since = time.monotonic() - item.config.stash[STARTED]
    if short(item.config) and since > 60 * selection.MINUTES:
        item.config.stash[LEFT_OUT].append(item.nodeid)
        pytest.skip("no time was left: --full runs it")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    text = selection.left_out(config.stash[LEFT_OUT], config.stash.get(TOTAL, 0))
    session = getattr(config, "_benchmarksession", None)
    done = [
        one.as_dict(include_data=False) for one in (session.benchmarks if session else ()) if one
    ]
    shares = {} if QUICK else selection.ceiling_shares(done)
    for lines in (selection.share_lines(shares), text):
        if lines:
            terminalreporter.write_line("\n" + lines)


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
