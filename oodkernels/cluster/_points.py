"""Rows of points, piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from oodkernels import reference

CHUNK = 1 << 16  # rows that are converted to float64 at once


def chunks(x: Tensor, normalize: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows as they are clustered, and which are valid, piece by piece."""
    for chunk in x.split(CHUNK):
        yield reference.kmeans_points(chunk, normalize)


def centred(x: Tensor, reduce: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Take the mean off: float32 far from 0 has no digits left for distances.

    Args:
        x: (N, d).
        reduce: Sums a float64 tensor over the processes that have rows.

    Returns:
        The rows, in the type that they are accumulated in, NaN where they are left out; and the
        mean of the others, (d,) float64. Where a row would overflow it is 0.
    """
    total = x.new_zeros(x.shape[1] + 1, dtype=torch.float64)
    for points, valid in chunks(x, False):
        total[:-1] += points[valid].double().sum(0)
        total[-1] += valid.sum()
    total = reduce(total)
    mean = total[:-1] / total[-1].clamp(min=1)
    moved, left_out = [], x.new_zeros((), dtype=torch.float64)
    for points, valid in chunks(x, False):
        rows = torch.where(valid[:, None], points.double() - mean, torch.nan).to(points.dtype)
        moved.append(rows)
        left_out += (~rows[valid].square().sum(1).isfinite()).sum()
    if reduce(left_out) > 0:
        return x, torch.zeros_like(mean)
    return torch.cat(moved), mean
