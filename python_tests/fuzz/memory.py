"""Every op at every limit of memory: a result or an exception, never a crash.

In ``python_tests``: ``python -m fuzz.memory``; each op's name is printed before its calls.
"""

from __future__ import annotations

import resource
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from op_db import OPS

from oodkernels.metrics.streaming._sketch import Layout, Sketch

MEBIBYTE = 1 << 20
WIDE, ROWS = 4 * MEBIBYTE, 60_000


def arguments() -> dict[str, tuple[Any, ...]]:
    """Calls whose outputs, and what they compute them with, are tens of megabytes."""
    f32 = torch.float32
    z = torch.zeros(1, WIDE)
    target = torch.zeros(1, dtype=torch.int64)
    pairs = torch.arange(0, WIDE + 1, 4)
    k = len(pairs) - 1
    stats = torch.ones(1, k, 2)
    x = torch.randn(ROWS, 24, generator=torch.Generator().manual_seed(0))
    score = x[:, 0].contiguous()
    keys = torch.arange(2 * WIDE)
    mos = z, pairs
    loss = z, target, pairs, -100
    outlier = z, target
    table = 13 | torch.arange(65536) << 8
    counts = torch.zeros(2, (65536 << 3) + 4, dtype=torch.int64)
    sketch = Sketch.empty(Layout(1 << 22, 300, False, 1e-5), 3, z.device)
    return {
        "mos_score": mos,
        "mos_predict": mos,
        "mos_log_others": mos,
        "mos_loss": loss,
        "logit_scores": (z,),
        "gen_scores": (z, [0.1], [100]),
        "scaled_energy": (z, z[:, :20]),
        "indexed_distances": (x, x[:64], torch.zeros(ROWS, 10, dtype=torch.int64)),
        "feature_stats": (z, torch.tensor([50.0, 90.0], dtype=torch.float64)),
        "shape_features_": (z.clone(), "scale", 85.0, None, None),
        "outlier_cross_entropy": outlier,
        "kmeans_init": (x, 16, 2),
        "kmeans": (x, torch.arange(64).view(1, 64), 1),
        "nearest_centroid": (x, x[:64], True),
        "nearest_neighbors": (x, x[:64], 20, True),
        "cluster_argmax": (torch.zeros(ROWS, dtype=torch.int64), score, ROWS, 20),
        "dos_select": (x, score, 16, ROWS, 1, 1),
        "_mos_log_others": mos,
        "_mos_log_others_backward": (torch.ones(1, k), z, pairs, stats),
        "_mos_loss": loss,
        "_mos_loss_backward": (torch.ones(1, dtype=f32), z, target, pairs, stats, -100),
        "_outlier_cross_entropy": outlier,
        "_outlier_cross_entropy_backward": (*(torch.ones(1),) * 2, *outlier, torch.ones(1, 2)),
        "_outlier_loss": (*outlier, 0.5, False, True),
        "roc_metrics": (z.expand(2, -1), z),
        "_roc_keys": (z.expand(2, -1),),
        "_roc_counts": (keys, keys),
        "_steer_histogram_": (*vars(sketch).values(), x.flatten(), 0, None, False, False, 1e-5),
        "roc_histogram_": (counts, table, z.expand(3, -1).t(), 0),
    }


def in_use() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def limits() -> Iterator[int | None]:
    """Bytes beyond those in use: none, then more and more, at last any number."""
    yield 0
    for power in range(16, 29):
        yield 1 << power
        yield 3 << power - 1
    yield None


def attempts(call: Callable[..., Any], args: tuple[Any, ...]) -> tuple[int, int]:
    """How many calls were refused for want of memory, and how many went through: at most two."""
    refused = done = 0
    for more in limits():
        if done == 2:
            break
        limit = (1 << 62) if more is None else in_use() + more
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        try:
            call(*args)
            done += 1
        except (MemoryError, RuntimeError):
            refused += 1
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
    return refused, done


def main() -> int:
    torch.set_num_threads(1)
    calls = arguments()
    missing = {op.name for op in OPS} - calls.keys()
    assert not missing, f"fuzz/memory.py has no call of {sorted(missing)}"
    for op in OPS:
        print(op.name, end=": ", flush=True)
        refused, done = attempts(op.overload, calls[op.name])
        print(f"{refused} refused, {done} done", flush=True)
        assert done, "not even with memory enough"
    return 0


if __name__ == "__main__":
    # The main thread's stack grows when it must, which the limit forbids and nothing survives; that
    # of another thread is there from the start.
    threading.stack_size(64 * MEBIBYTE)
    with ThreadPoolExecutor(1) as pool:
        code = pool.submit(main).result()
    sys.exit(code)
