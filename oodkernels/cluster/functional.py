"""K-means on the rows of tensors, which may be spread over processes.

Deterministic: the same data and seed give the same bits on any number of threads. The ops behind
it, with leading batch dimensions and restarts of your own, are in :mod:`oodkernels.ops.kmeans`,
which also says what happens to ties, duplicates and points that are not finite.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch.distributed as dist
from torch import Tensor

from oodkernels._checks import check_at_least, check_flag, check_floating, check_int, plain
from oodkernels.cluster._distributed import DistributedKMeans
from oodkernels.cluster._faiss import faiss_kmeans
from oodkernels.ops import KMeansResult, kmeans_init, kmeans_lloyd
from oodkernels.ops.kmeans import check_tol

__all__ = ["kmeans"]

Backend: TypeAlias = Literal["native", "faiss"]


def kmeans(
    x: Tensor,
    k: int,
    *,
    n_init: int = 1,
    max_iter: int = 300,
    tol: float = 1e-4,
    seed: int = 0,
    normalize: bool = False,
    renormalize: bool = False,
    group: dist.ProcessGroup | None = None,
    backend: Backend = "native",
) -> KMeansResult:
    """K-means: greedy k-means++, Lloyd's iteration, the best of some restarts.

    Args:
        x: (N, d), float64, float32, bfloat16 or float16; leading batch dimensions where neither
            ``group`` nor another backend is asked for. Its mean may be far from 0: with a group or
            faiss as without, unless directions are clustered, it is taken off first.
        k: Number of clusters, >= 1.
        n_init: Restarts, >= 1.
        max_iter: Most iterations, >= 0.
        tol: Stops where the squared shifts of the centroids sum to at most this times the mean
            variance of a feature, as in scikit-learn; >= 0.
        seed: Of all random numbers.
        normalize: Cluster directions, x / |x|.
        renormalize: Divide centroids by their norms after every iteration.
        group: Processes that each hold some of the rows (in order of rank, any number of them) and
            all call this; ``dist.group.WORLD`` for all. Sums are taken in float64 and all-reduced:
            the result is that of one process with all rows, up to the order of summation.
        backend: ``"faiss"`` for faiss's K-means on the same terms (random seeding, always
            ``max_iter`` iterations, no ``tol``, float32; on the GPU where x and faiss are).

    Returns:
        Centroids, labels, inertia and n_iter; with ``group`` the labels are those of this process's
        rows, the rest is the same on all. Not differentiable.

    Raises:
        ValueError: A wrong shape, a number out of range, fewer finite points than ``k`` for faiss.
        TypeError: ``x`` is not of a floating-point type above, or a number is not an integer.
        ImportError: faiss is missing.
    """
    if backend not in ("native", "faiss"):
        raise ValueError(f"kmeans: backend must be native or faiss, got {backend!r}")
    k, n_init, max_iter, seed = (
        check_int("kmeans", name, value)
        for name, value in (("k", k), ("n_init", n_init), ("max_iter", max_iter), ("seed", seed))
    )
    normalize = check_flag("kmeans", "normalize", normalize)
    renormalize = check_flag("kmeans", "renormalize", renormalize)
    tol = plain(tol)
    if backend == "native" and group is None:
        init = kmeans_init(x, k, n_init, seed=seed, normalize=normalize)
        return kmeans_lloyd(x, init, max_iter, tol, normalize, renormalize)
    check_floating("kmeans", "x", x)
    if x.dim() != 2:
        raise ValueError(
            f"kmeans: x must have shape (N, d) with a group or with faiss, got {tuple(x.shape)}"
        )
    for name, value, least in (("k", k, 1), ("n_init", n_init, 1), ("max_iter", max_iter, 0)):
        check_at_least("kmeans", name, value, least)
    check_tol("kmeans", tol)
    if backend == "faiss":
        if group is not None:
            raise ValueError("kmeans: group needs backend='native'")
        return faiss_kmeans(x, k, n_init, max_iter, seed, normalize, renormalize)
    return DistributedKMeans(x, group, normalize, renormalize).fit(k, n_init, max_iter, tol, seed)
