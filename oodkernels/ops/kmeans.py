"""Deterministic batched K-means: greedy k-means++, Lloyd's iteration, nearest centroid.

A problem is N points of d features; leading dimensions are a batch of independent problems. The
results are the same bits on any number of threads, at any place in a batch and on every call: all
random numbers come from Philox4x32-10 (Salmon et al., SC 2011) and the seed, the same for every
problem. Every tie goes to the lowest index. CPU and CUDA draw the same numbers and differ in
rounding alone; nothing on CUDA waits for the device, nor follows torch's setting for TF32.

Points that hold NaN or inf, or whose squared norm overflows, are left out: their label is -1. With
``normalize`` a point is divided by its Euclidean norm as it is read; zero points stay zero. It is
off everywhere unless asked for; DOS always clusters directions. A cluster without any point (fewer
points than clusters) has NaN as its centroid, and nothing is nearest to it. Half precision is read
as such and accumulated in float32.

Nearest means the largest x.c - |c|^2 / 2 in float32 (float64 for float64 points): the label is that
of exact arithmetic wherever the two least squared distances differ by more than
``2 (d + 2) u (|x| + |c|)^2``, c the longer of the two centroids, u = 2^-24 (2^-53). Where points
that are not normalised lie far from 0, both are taken relative to a center: the mean of the points,
or of the centroids for the labels that are returned, which :func:`nearest_centroid` gives, too.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from oodkernels._checks import (
    FLOATS,
    accumulate_type,
    check_at_least,
    check_device,
    check_dtype,
    check_floating,
)
from oodkernels.ops._common import register_batch_rule, register_not_differentiable


class KMeansResult(NamedTuple):
    """What :func:`kmeans_lloyd` returns."""

    centroids: Tensor
    """(..., k, d), float64 for float64 points, else float32; NaN for a cluster without points."""
    labels: Tensor
    """(..., N) int64: the nearest of ``centroids``, -1 for a point left out."""
    inertia: Tensor
    """(...,) float64: sum of the squared distances of the points to their centroids."""
    n_iter: Tensor
    """(...,) int64: iterations of the restart that won."""


def kmeans_init(
    x: Tensor,
    k: int,
    n_init: int = 1,
    n_trials: int = 0,
    seed: int = 0,
    normalize: bool = False,
) -> Tensor:
    """Seed clusters with greedy k-means++ (Arthur & Vassilvitskii, SODA 2007).

    Each step draws candidates with probability proportional to the squared distance to the centres
    so far, and takes the one that leaves the least sum of squared distances. When every point lies
    on a centre, the lowest rows not taken yet follow. Of more than 65,536 points a stratified
    random sample of 32,768 (or 2 k, if that is more) stands for all.

    Args:
        x: (..., N, d), float64, float32, bfloat16 or float16; any strides.
        k: Number of clusters, >= 1.
        n_init: Number of independent restarts, >= 1.
        n_trials: Candidates a step; 0 for scikit-learn's 2 + floor(ln k).
        seed: Of all random numbers.
        normalize: Cluster directions, x / |x|.

    Returns:
        (..., n_init, k) int64, distinct rows of x; -1 past the number of points.

    Raises:
        ValueError: A wrong shape or a number out of range.
        TypeError: ``x`` is not of a floating-point type above.
    """
    return torch.ops.oodk.kmeans_init(x, k, n_init, n_trials, seed, normalize)


def kmeans_lloyd(
    x: Tensor,
    init: Tensor,
    max_iter: int = 300,
    tol: float = 1e-4,
    normalize: bool = False,
    renormalize: bool = False,
) -> KMeansResult:
    """Cluster with Lloyd's iteration, from each restart of ``init``; the least inertia wins.

    Each iteration labels the points, lets every empty cluster take the point farthest from its
    centroid (of clusters that keep one), and moves the centroids to their means. It stops, as
    scikit-learn's does, when no label changes (or all are those of an iteration before, as equal
    points can have it), when the squared shifts of the centroids sum to at most ``tol`` times the
    variance of a feature averaged over the features, or after ``max_iter`` iterations.

    Args:
        x: (..., N, d), float64, float32, bfloat16 or float16; any strides.
        init: Rows of x, (..., n_init, k) int64, as from :func:`kmeans_init`; -1 or the row of a
            point left out make an unused cluster. Or centroids, (..., k, d) of a floating-point
            type, taken as they are (not normalised): a single restart.
        max_iter: Most iterations, >= 0; 0 only labels. On CUDA problems of more than 1,024 points
            enqueue them all, and those that are not needed pass in microseconds.
        tol: >= 0.
        normalize: Cluster directions, x / |x|.
        renormalize: Divide centroids by their norms after every iteration (spherical K-means). DOS
            does not.

    Returns:
        A :class:`KMeansResult`. Not differentiable.

    Raises:
        ValueError: A wrong shape, a number out of range, or rows in ``init`` that x does not have
            (checked on CPU; on CUDA such clusters are unused unless ``OODK_VALIDATE=1``).
        TypeError: ``x`` or ``init`` of a wrong type.
    """
    return KMeansResult(*torch.ops.oodk.kmeans(x, init, max_iter, tol, normalize, renormalize))


def nearest_centroid(
    x: Tensor, centroids: Tensor, normalize: bool = False
) -> tuple[Tensor, Tensor]:
    """Nearest centroid of every point, without the N x k matrix of distances.

    Args:
        x: (..., d), float64, float32, bfloat16 or float16; any strides.
        centroids: (k, d), or (..., k, d) for x (..., N, d) with the same leading dimensions; of a
            floating-point type. One that holds NaN is nearest to nothing.
        normalize: Divide points (not centroids) by their norms.

    Returns:
        Labels (...,) int64 and squared Euclidean distances (...,), float64 for float64 points, else
        float32: computed from differences, so nothing cancels. -1 and NaN for a point left out.
        Not differentiable.

    Raises:
        ValueError: A wrong shape.
        TypeError: ``x`` or ``centroids`` is not of a floating-point type above.
    """
    return torch.ops.oodk.nearest_centroid(x, centroids, normalize)


# --- fake kernels: shapes and types, with the errors of the real ones -----------------------------


def check_points(op: str, name: str, x: Tensor) -> None:
    """Raise unless x is a batch of problems, (..., N, d) with d >= 1."""
    check_dtype(op, name, x, *FLOATS)
    if x.dim() < 2:
        raise ValueError(f"{op}: {name} must have shape (..., N, d), got {tuple(x.shape)}")
    if x.shape[-1] < 1:
        raise ValueError(f"{op}: {name} must have at least one feature, got shape {tuple(x.shape)}")


def check_tol(op: str, tol: float) -> None:
    """Raise ValueError unless tol is finite and not negative."""
    if not (tol >= 0 and math.isfinite(tol)):
        raise ValueError(f"{op}: tol must be finite and at least 0, got {tol}")


@torch.library.register_fake("oodk::kmeans_init")
def _(
    x: Tensor,
    k: int,
    n_init: int = 1,
    n_trials: int = 0,
    seed: int = 0,
    normalize: bool = False,
) -> Tensor:
    check_points("kmeans_init", "x", x)
    check_at_least("kmeans_init", "k", k, 1)
    check_at_least("kmeans_init", "n_init", n_init, 1)
    check_at_least("kmeans_init", "n_trials", n_trials, 0)
    return x.new_empty((*x.shape[:-2], n_init, k), dtype=torch.int64)


def kmeans_outputs(x: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty centroids, labels, inertia and n_iter."""
    batch = x.shape[:-2]
    return (
        x.new_empty((*batch, k, x.shape[-1]), dtype=accumulate_type(x.dtype)),
        x.new_empty((*batch, x.shape[-2]), dtype=torch.int64),
        x.new_empty(batch, dtype=torch.float64),
        x.new_empty(batch, dtype=torch.int64),
    )


@torch.library.register_fake("oodk::kmeans")
def _(
    x: Tensor,
    init: Tensor,
    max_iter: int = 300,
    tol: float = 1e-4,
    normalize: bool = False,
    renormalize: bool = False,
) -> tuple[Tensor, ...]:
    check_points("kmeans", "x", x)
    rows = init.dtype == torch.int64
    if not rows:
        check_dtype("kmeans", "init (unless int64 rows of x)", init, *FLOATS)
    check_device("kmeans", "init", init, "x", x)
    if (
        init.dim() < 2
        or init.shape[:-2] != x.shape[:-2]
        or init.shape[-1] < 1
        or init.shape[-2] < 1
        or not (rows or init.shape[-1] == x.shape[-1])
    ):
        raise ValueError(
            f"kmeans: init must be int64 rows of x, shape (..., n_init, k), or centroids, shape "
            f"(..., k, d), with the leading dimensions of x, got {tuple(init.shape)} for x "
            f"{tuple(x.shape)}"
        )
    check_at_least("kmeans", "max_iter", max_iter, 0)
    check_tol("kmeans", tol)
    return kmeans_outputs(x, init.shape[-1] if rows else init.shape[-2])


@torch.library.register_fake("oodk::nearest_centroid")
def _(x: Tensor, centroids: Tensor, normalize: bool = False) -> tuple[Tensor, Tensor]:
    op = "nearest_centroid"
    check_floating(op, "x", x)
    check_dtype(op, "centroids", centroids, *FLOATS)
    check_device(op, "centroids", centroids, "x", x)
    if x.shape[-1] < 1:
        raise ValueError(f"{op}: x must have at least one feature, got shape {tuple(x.shape)}")
    if (
        centroids.dim() < 2
        or centroids.shape[-1] != x.shape[-1]
        or centroids.shape[-2] < 1
        or not (centroids.dim() == 2 or (x.dim() >= 2 and centroids.shape[:-2] == x.shape[:-2]))
    ):
        raise ValueError(
            f"{op}: centroids must have shape (k, d), or (..., k, d) with the leading dimensions "
            f"of x, got {tuple(centroids.shape)} for x {tuple(x.shape)}"
        )
    distance = x.new_empty(x.shape[:-1], dtype=accumulate_type(x.dtype))
    return x.new_empty(x.shape[:-1], dtype=torch.int64), distance


register_not_differentiable("kmeans")
register_not_differentiable("nearest_centroid")

register_batch_rule("kmeans_init", batched=(0,))
register_batch_rule("kmeans", batched=(0, 1))


def _nearest_of_batch(
    info: Any,
    in_dims: tuple[int | None, ...],
    x: Tensor,
    centroids: Tensor,
    normalize: bool = False,
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    if in_dims[0] is None:
        x = x.unsqueeze(0).expand(info.batch_size, *x.shape)
    else:
        x = x.movedim(in_dims[0], 0)
    if in_dims[1] is None and centroids.dim() > 2:
        centroids = centroids.unsqueeze(0).expand(info.batch_size, *centroids.shape)
    elif in_dims[1] is not None:
        centroids = centroids.movedim(in_dims[1], 0)
    shape = x.shape[:-1]
    if in_dims[1] is not None and centroids.dim() == 3:  # each has its own (k, d): one problem each
        x = x.reshape(info.batch_size, -1, x.shape[-1])
    labels, distance = torch.ops.oodk.nearest_centroid(x, centroids, normalize)
    return (labels.reshape(shape), distance.reshape(shape)), (0, 0)


torch.library.register_vmap("oodk::nearest_centroid", _nearest_of_batch)
