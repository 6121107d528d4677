"""What the K-means and DOS benchmarks share: data, peers, and how a call is measured."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

QUICK = os.environ.get("OODK_BENCH_QUICK") == "1"
"""One round on a tiny shape: that everything runs, and no more."""

ITERATIONS = 10
"""Of a timed call, where the cost of one iteration is measured."""


def shapes(*all_shapes: tuple[int, ...]) -> Any:
    """Parametrises ``shape`` = (N, d, K)."""
    chosen = ((96, 20, 8),) if QUICK else all_shapes
    return pytest.mark.parametrize("shape", chosen, ids=lambda s: "x".join(map(str, s)))


def features(n: int, d: int, seed: int = 0, classes: int = 300) -> Tensor:
    """Like a network's penultimate features: not negative, clustered, overlapping."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, d, generator=generator)
    x = centres[torch.randint(classes, (n,), generator=generator)]
    return x.add_(torch.randn(n, d, generator=generator)).add_(0.5).relu_()


def directions(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


def measure(benchmark: Any, call: Callable[[], Any], seconds: float = 2.0, **info: Any) -> Any:
    """Median of as many rounds as fit into some seconds, and at least 3 of a call below 20 s."""
    start = time.perf_counter()
    result = call()
    once = time.perf_counter() - start
    rounds = 1 if once > 20 else max(3, min(1000, int(seconds / once)))
    benchmark.pedantic(call, rounds=1 if QUICK else rounds, iterations=1, warmup_rounds=0)
    benchmark.extra_info.update(info, threads=torch.get_num_threads())
    return result


def inertia(x: Tensor, centroids: Tensor) -> float:
    """In float64, of the nearest centroids; x and centroids as they were clustered."""
    total = 0.0
    for rows in x.split(8192):
        total += float(torch.cdist(rows.double(), centroids.double()).amin(1).square().sum())
    return total


# --- peers ----------------------------------------------------------------------------------------


def threads(n: int | None) -> AbstractContextManager[Any]:
    """Limits scikit-learn's and NumPy's threads; None leaves them all."""
    if n is None:
        return nullcontext()
    from threadpoolctl import threadpool_limits

    return threadpool_limits(n)


def sklearn_kmeans(x: np.ndarray, k: int, n_init: int, limit: int | None, **options: Any) -> Any:
    from sklearn.cluster import KMeans

    with threads(limit):
        return KMeans(n_clusters=k, n_init=n_init, **options).fit(x)


def faiss_kmeans(
    x: np.ndarray, k: int, iterations: int, start: np.ndarray | None = None, gpu: bool = False
) -> Tensor:
    """Centroids (k, d): from random points, or from `start`."""
    faiss = pytest.importorskip("faiss")

    n, d = x.shape
    clustering = faiss.Clustering(d, k)
    clustering.niter = iterations
    clustering.max_points_per_centroid = n
    clustering.min_points_per_centroid = 1
    if start is not None:
        faiss.copy_array_to_vector(start.ravel(), clustering.centroids)
    flat = faiss.GpuIndexFlatL2(faiss.StandardGpuResources(), d) if gpu else faiss.IndexFlatL2(d)
    clustering.train(x, flat)
    return torch.from_numpy(faiss.vector_to_array(clustering.centroids).reshape(k, d))


def torch_seeding(x: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Greedy k-means++ in careful torch: one product a step. Rows (k,)."""
    trials = 2 + int(math.log(k))
    norm2 = x.square().sum(1)
    first = int(torch.randint(len(x), (1,), generator=generator, device=x.device))
    rows = [first]
    d2 = (norm2 + norm2[first] - 2 * (x @ x[first])).clamp_(min=0)
    for _ in range(k - 1):
        candidates = torch.multinomial(d2, trials, replacement=True, generator=generator)
        distance = torch.addmm(norm2, x[candidates], x.T, alpha=-2)
        distance = distance.add_(norm2[candidates, None]).clamp_(min=0)
        left = torch.minimum(distance, d2)
        best = int(left.sum(1).argmin())
        rows.append(int(candidates[best]))
        d2 = left[best]
    return torch.tensor(rows)


def torch_nearest(x: Tensor, centroids: Tensor) -> Tensor:
    """Squared distances to all centroids (N, k), less the point's own square: one product."""
    return torch.addmm(centroids.square().sum(1), x, centroids.T, alpha=-2)


def torch_lloyd_step(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """mm + argmin + index_add: labels, and the centroids that follow."""
    labels = torch_nearest(x, centroids).argmin(1)
    sums = torch.zeros_like(centroids).index_add_(0, labels, x)
    counts = x.new_zeros(len(centroids)).index_add_(0, labels, x.new_ones(len(x)))
    new = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centroids)
    return labels, new


def torch_lloyd(x: Tensor, centroids: Tensor, max_iter: int, tol: float) -> tuple[Tensor, float]:
    """Centroids and inertia."""
    limit = tol * float(x.var(0, correction=0).mean())
    before = None
    for _ in range(max_iter):
        labels, new = torch_lloyd_step(x, centroids)
        if before is not None and torch.equal(labels, before):
            break
        before = labels
        shift = float((new - centroids).square().sum())
        centroids = new
        if shift <= limit:
            break
    return centroids, float(torch_nearest(x, centroids).amin(1).sum() + x.square().sum())


def torch_kmeans(x: Tensor, k: int, n_init: int, tol: float = 1e-4, seed: int = 0) -> Tensor:
    """The best centroids of some restarts."""
    generator = torch.Generator(x.device).manual_seed(seed)
    fits = [torch_lloyd(x, x[torch_seeding(x, k, generator)], 300, tol) for _ in range(n_init)]
    return min(fits, key=lambda fit: fit[1])[0]


def median(benchmark: Any) -> float:
    """Seconds; NaN where benchmarks are disabled."""
    return math.nan if benchmark.disabled else benchmark.stats.stats.median
