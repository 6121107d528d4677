"""K-means beside scikit-learn, faiss and plain torch: cost of an iteration, and of a whole call.

    pytest benchmarks/test_kmeans.py --benchmark-only --benchmark-group-by=group

Group "iteration": equal centroids to start from; a call is as many iterations as it takes the
labels to settle, ITERATIONS at most, the same number for every peer. ``extra_info`` has GFLOP/s of
the products alone, beside the rate of torch's sgemm of that shape in the same run. Group
"call": each peer with its own seeding, with the inertia it reaches. Group
"seeding": greedy k-means++ alone. OODK_BENCH_QUICK=1 only shows that they run.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from clustering import (
    ITERATIONS,
    QUICK,
    directions,
    faiss_kmeans,
    features,
    inertia,
    measure,
    median,
    shapes,
    sklearn_kmeans,
    threads,
    torch_kmeans,
    torch_lloyd,
    torch_seeding,
)

from oodkernels import kmeans, kmeans_init
from oodkernels.ops import kmeans_lloyd as lloyd

SHAPES = (
    (384, 342, 64),
    (384, 256, 64),
    (2048, 512, 64),
    (2048, 512, 256),
    (8192, 512, 256),
    (8192, 2048, 256),
    (300_000, 342, 64),
)
BATCHES = ((16, 1024, 128, 64), (64, 512, 128, 64))


def gflop(shape: tuple[int, ...], iterations: int = 1) -> float:
    n, d, k = shape
    return 2e-9 * n * d * k * iterations


@pytest.mark.parametrize(
    "peer", ["sgemm", "oodkernels", "oodkernels, rows", "torch", "scikit-learn", "faiss"]
)
@shapes(*SHAPES)
def test_iteration(benchmark: Any, shape: tuple[int, int, int], peer: str) -> None:
    """Unstructured points, on which labels settle late."""
    n, d, k = shape
    benchmark.group = f"iteration {shape}"
    x = directions(torch.rand(n, d, generator=torch.Generator().manual_seed(0)).square())
    rows = kmeans_init(x, k, n_trials=1, normalize=False)
    start = x[rows[0]]
    iterations = int(lloyd(x, start, ITERATIONS, 0.0, normalize=False).n_iter)
    calls = {
        "sgemm": lambda: [x @ start.T for _ in range(iterations)],
        "oodkernels": lambda: lloyd(x, start, iterations, 0.0, normalize=False),
        "oodkernels, rows": lambda: lloyd(x, rows, iterations, 0.0, normalize=False),
        "torch": lambda: torch_lloyd(x, start, iterations, 0.0),
        "scikit-learn": lambda: sklearn_kmeans(
            x.numpy(), k, 1, None, init=start.numpy(), max_iter=iterations, tol=0
        ),
        "faiss": lambda: faiss_kmeans(x.numpy(), k, iterations, start.numpy()),
    }
    if peer == "faiss":
        pytest.importorskip("faiss")
    measure(benchmark, calls[peer], peer=peer)
    benchmark.extra_info["iterations"] = iterations
    benchmark.extra_info["ms an iteration"] = 1e3 * median(benchmark) / iterations
    benchmark.extra_info["GFLOP/s"] = gflop(shape, iterations) / median(benchmark)


@pytest.mark.parametrize(
    "peer",
    [
        "oodkernels",
        "oodkernels, n_init 1",
        "scikit-learn",
        "scikit-learn, 1 thread",
        "torch",
        "faiss, 10 iterations",
        "faiss, 25 iterations",
    ],
)
@shapes(*SHAPES)
def test_call(benchmark: Any, shape: tuple[int, int, int], peer: str) -> None:
    n, d, k = shape
    if n * d * k > 1e9 and peer in ("scikit-learn, 1 thread", "torch"):
        pytest.skip("takes minutes")
    benchmark.group = f"call {shape}"
    x = directions(features(n, d))
    calls = {
        "oodkernels": lambda: kmeans(x, k, n_init=5).centroids,
        "oodkernels, n_init 1": lambda: kmeans(x, k).centroids,
        "scikit-learn": lambda: sklearn_kmeans(x.numpy(), k, 5, None).cluster_centers_,
        "scikit-learn, 1 thread": lambda: sklearn_kmeans(x.numpy(), k, 5, 1).cluster_centers_,
        "torch": lambda: torch_kmeans(x, k, 5),
        "faiss, 10 iterations": lambda: faiss_kmeans(x.numpy(), k, 10),
        "faiss, 25 iterations": lambda: faiss_kmeans(x.numpy(), k, 25),
    }
    if peer.startswith("faiss"):
        pytest.importorskip("faiss")
    centroids = measure(benchmark, calls[peer], peer=peer)
    benchmark.extra_info["inertia"] = inertia(x, torch.as_tensor(centroids))


@pytest.mark.parametrize("peer", ["oodkernels", "scikit-learn", "scikit-learn, 1 thread", "torch"])
@shapes(*SHAPES[:5])
def test_seeding(benchmark: Any, shape: tuple[int, int, int], peer: str) -> None:
    n, d, k = shape
    benchmark.group = f"seeding, 5 restarts {shape}"
    x = directions(features(n, d))
    generator = torch.Generator().manual_seed(0)

    def sklearn_seeding(limit: int | None) -> None:
        from sklearn.cluster import kmeans_plusplus

        with threads(limit):
            for seed in range(5):
                kmeans_plusplus(x.numpy(), k, random_state=seed)

    calls = {
        "oodkernels": lambda: kmeans_init(x, k, 5, normalize=False),
        "scikit-learn": lambda: sklearn_seeding(None),
        "scikit-learn, 1 thread": lambda: sklearn_seeding(1),
        "torch": lambda: [torch_seeding(x, k, generator) for _ in range(5)],
    }
    measure(benchmark, calls[peer], peer=peer)


@pytest.mark.parametrize("peer", ["oodkernels", "scikit-learn", "scikit-learn, 1 thread"])
@pytest.mark.parametrize("batch", ((2, 96, 16, 8),) if QUICK else BATCHES, ids=str)
def test_batch(benchmark: Any, batch: tuple[int, int, int, int], peer: str) -> None:
    b, n, d, k = batch
    benchmark.group = f"batch {batch}"
    x = directions(torch.stack([features(n, d, seed) for seed in range(b)]))
    limit = 1 if "1 thread" in peer else None
    calls = {
        "oodkernels": lambda: float(kmeans(x, k, n_init=5).inertia.sum()),
        "scikit-learn": lambda: sum(sklearn_kmeans(p, k, 5, limit).inertia_ for p in x.numpy()),
    }
    total = measure(benchmark, calls[peer.split(",")[0]], peer=peer)
    benchmark.extra_info["inertia"] = total
