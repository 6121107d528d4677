"""DOS, diverse outlier sampling (Jiang et al., ICLR 2024): cluster, then take the best of each.

Scores: higher = preferred. DOS prefers the outliers that look most in-distribution, so pass minus
the absent class's probability or logit (``-p`` ranks as ``1 - p`` and never saturates), or where a
model has no absent class its maximum logit or energy score. NaN counts as -inf.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from oodkernels._checks import FLOATS, check_at_least, check_device, check_dtype, check_floating
from oodkernels.ops._common import register_batch_rule, register_not_differentiable
from oodkernels.ops.kmeans import check_points, check_tol, kmeans_outputs


class DOSSelection(NamedTuple):
    """What :func:`dos_select` returns."""

    indices: Tensor
    """(..., n_select) int64: distinct rows, by cluster and the best first, then the random fill;
    -1 where there are fewer finite rows than ``n_select``."""
    labels: Tensor
    """(..., N) int64: cluster of each candidate, -1 for a row with NaN or inf."""
    centroids: Tensor
    """(..., k, d): means of the normalised features."""
    inertia: Tensor
    """(...,) float64."""


def cluster_argmax(labels: Tensor, scores: Tensor, k: int, m: int = 1) -> Tensor:
    """Rows of the m largest scores in every cluster.

    Args:
        labels: (..., N) int64 cluster of each row; outside 0..k-1: in no cluster.
        scores: (..., N), float64, float32, bfloat16 or float16; higher = preferred, NaN as -inf.
        k: Number of clusters, >= 1.
        m: Rows a cluster, >= 1.

    Returns:
        (..., k, m) int64, the best first, ties: the lowest row; -1 where a cluster has fewer.

    Raises:
        ValueError: A wrong shape or a number out of range.
        TypeError: ``labels`` is not int64, or ``scores`` not of a floating-point type above.
    """
    return torch.ops.oodk.cluster_argmax(labels, scores, k, m)


def dos_select(
    features: Tensor,
    scores: Tensor,
    k: int,
    n_select: int,
    n_init: int = 5,
    max_iter: int = 300,
    tol: float = 1e-4,
    seed: int = 0,
    mode: str = "default",
) -> DOSSelection:
    """Select diverse outliers: normalise, K-means, the best of each cluster, random fill.

    K-means is :func:`~oodkernels.kmeans_init` followed by :func:`~oodkernels.ops.kmeans_lloyd`,
    both on directions. With m = 1 if k > n_select, else n_select // k, the m best rows of each
    cluster are taken; if k > n_select, the n_select best of those. The shortfall (small clusters,
    the remainder of n_select / k) is drawn uniformly from the other finite rows.

    Args:
        features: (..., N, d), float64, float32, bfloat16 or float16; any strides. Candidates'
            penultimate features.
        scores: (..., N), of such a type; higher = preferred, NaN as -inf.
        k: Number of clusters, >= 1.
        n_select: Rows to select, 1..N.
        n_init: Restarts of K-means, >= 1.
        max_iter: Most iterations of K-means, >= 0.
        tol: As for :func:`~oodkernels.ops.kmeans_lloyd`.
        seed: Of all random numbers; vary it from step to step of a training.
        mode: ``"default"``, or ``"official"`` for the rule of Jiang et al.'s code: if k > n_select
            it never visits the clusters from n_select on, and takes the fill from them too.

    Returns:
        A :class:`DOSSelection`. Not differentiable.

    Raises:
        ValueError: A wrong shape, ``n_select`` > N or another number out of range, unknown mode.
        TypeError: ``features`` or ``scores`` is not of a floating-point type above.
    """
    return DOSSelection(
        *torch.ops.oodk.dos_select(features, scores, k, n_select, n_init, max_iter, tol, seed, mode)
    )


# --- fake kernels: shapes and types, with the errors of the real ones -----------------------------


@torch.library.register_fake("oodk::cluster_argmax")
def _(labels: Tensor, scores: Tensor, k: int, m: int = 1) -> Tensor:
    op = "cluster_argmax"
    check_dtype(op, "labels", labels, torch.int64)
    check_floating(op, "scores", scores)
    if labels.shape != scores.shape:
        raise ValueError(
            f"{op}: labels must have the shape of scores, {tuple(scores.shape)}, got "
            f"{tuple(labels.shape)}"
        )
    check_device(op, "labels", labels, "scores", scores)
    check_at_least(op, "k", k, 1)
    check_at_least(op, "m", m, 1)
    return labels.new_empty((*labels.shape[:-1], k, m))


@torch.library.register_fake("oodk::dos_select")
def _(
    features: Tensor,
    scores: Tensor,
    k: int,
    n_select: int,
    n_init: int = 5,
    max_iter: int = 300,
    tol: float = 1e-4,
    seed: int = 0,
    mode: str = "default",
) -> tuple[Tensor, ...]:
    op = "dos_select"
    check_points(op, "features", features)
    check_dtype(op, "scores", scores, *FLOATS)
    if scores.shape != features.shape[:-1]:
        raise ValueError(
            f"{op}: scores must have shape features.shape[:-1], got {tuple(scores.shape)} for "
            f"features {tuple(features.shape)}"
        )
    check_device(op, "scores", scores, "features", features)
    check_at_least(op, "k", k, 1)
    check_at_least(op, "n_select", n_select, 1)
    if n_select > features.shape[-2]:
        raise ValueError(
            f"{op}: n_select must be at most the number of features' rows, "
            f"{features.shape[-2]}, got {n_select}"
        )
    if mode not in ("default", "official"):
        raise ValueError(f"{op}: mode must be default or official, got {mode}")
    check_at_least(op, "n_init", n_init, 1)
    check_at_least(op, "max_iter", max_iter, 0)
    check_tol(op, tol)
    centroids, labels, inertia, _ = kmeans_outputs(features, k)
    indices = labels.new_empty((*labels.shape[:-1], n_select))
    return indices, labels, centroids, inertia


register_not_differentiable("dos_select")

register_batch_rule("cluster_argmax", batched=(0, 1))
register_batch_rule("dos_select", batched=(0, 1))
