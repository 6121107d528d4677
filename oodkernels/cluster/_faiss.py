"""K-means by faiss."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from oodkernels import reference
from oodkernels._checks import accumulate_type
from oodkernels._optional import require
from oodkernels.cluster._points import centred
from oodkernels.ops import KMeansResult, nearest_centroid


def faiss_kmeans(
    x: Tensor, k: int, n_init: int, max_iter: int, seed: int, normalize: bool, renormalize: bool
) -> KMeansResult:
    """K-means of the rows of x with faiss, on its terms; arguments as in :func:`kmeans`."""
    extra = "faiss-gpu" if x.is_cuda else "faiss"
    faiss = require("faiss", extra, "kmeans: backend='faiss'")
    dtype = accumulate_type(x.dtype)
    mean: Tensor | float = 0.0
    if not (normalize or renormalize):
        x, mean = centred(x, lambda total: total)
    points, valid = reference.kmeans_points(x, normalize)
    points = points[valid].float().contiguous()
    if len(points) < k:
        raise ValueError(f"kmeans: faiss needs at least k = {k} finite points, got {len(points)}")
    fitted = faiss.Kmeans(
        x.shape[1],
        k,
        niter=max_iter,
        nredo=n_init,
        seed=seed & 0x7FFFFFFF,
        spherical=renormalize,
        gpu=x.is_cuda and hasattr(faiss, "StandardGpuResources"),
        min_points_per_centroid=1,
        max_points_per_centroid=max(256, -(-len(points) // k)),  # all points, no sample of them
    )
    fitted.train(points.cpu().numpy())
    centroids = torch.from_numpy(np.array(fitted.centroids)).to(x.device, dtype)
    labels, distance = nearest_centroid(x, centroids, normalize)
    inertia = torch.where(labels >= 0, distance, 0).double().sum()
    n_iter = torch.tensor(max_iter, device=x.device)
    return KMeansResult((centroids.double() + mean).to(dtype), labels, inertia, n_iter)
