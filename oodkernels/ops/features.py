"""Statistics of rows of features: norms, and what lies above percentiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from oodkernels._checks import accumulate_type, check_device, check_dtype, check_floating
from oodkernels.ops._common import register_not_differentiable


class FeatureStats(NamedTuple):
    """What :func:`feature_stats` returns, float64 for float64 features, else float32."""

    l1: Tensor
    """(...,) sum of absolute values."""
    l2: Tensor
    """(...,) Euclidean norm."""
    sum: Tensor
    """(...,) sum of the features."""
    threshold: Tensor
    """(..., P) least of the features that lie above each percentile."""
    top_sum: Tensor
    """(..., P) sum of those features."""


def feature_stats(
    features: Tensor, percentiles: Sequence[float] | Tensor, rectified: bool = False
) -> FeatureStats:
    """Norms and sum of each row, and for each percentile the sum of what lies above it.

    As the authors of ASH, SCALE, LTS and AdaSCALE count them, the d - round(d p / 100) largest of d
    features lie above the percentile p, one at least; .5 is rounded to the even number. All are
    found while the row is in cache, and what is found for one does not depend on the others.

    Args:
        features: (..., d), float64, float32, bfloat16 or float16; any strides.
        percentiles: P of them in per cent, in 0..100; or float64 (P,), or (..., P), each row's own.
        rectified: Whether negative features count as 0.

    Returns:
        A :class:`FeatureStats`. Sums are added up in float64. A row that holds NaN is NaN
        throughout. No gradient flows through it.

    Raises:
        ValueError: There are no features, ``percentiles`` have another shape or device, or, on the
            CPU, one is outside 0..100 (on CUDA it gives NaN).
        TypeError: A tensor is not of a type above.
    """
    if not isinstance(percentiles, Tensor):
        percentiles = torch.tensor(percentiles, dtype=torch.float64, device=features.device)
    return FeatureStats(*torch.ops.oodk.feature_stats(features, percentiles, rectified))


def check_features(op: str, features: Tensor) -> None:
    """Raise unless features are of a floating-point type and at least one a row."""
    check_floating(op, "features", features)
    if features.shape[-1] < 1:
        raise ValueError(
            f"{op}: features must have at least one feature, got shape {tuple(features.shape)}"
        )


@torch.library.register_fake("oodk::feature_stats")
def _(features: Tensor, percentiles: Tensor, rectified: bool = False) -> tuple[Tensor, ...]:
    op = "feature_stats"
    check_features(op, features)
    check_dtype(op, "percentiles", percentiles, torch.float64)
    batch = features.shape[:-1]
    if percentiles.dim() != 1 and (percentiles.dim() == 0 or percentiles.shape[:-1] != batch):
        raise ValueError(
            f"{op}: percentiles must have shape (P,), or (..., P) for features (..., d), got "
            f"{tuple(percentiles.shape)} for features {tuple(features.shape)}"
        )
    check_device(op, "percentiles", percentiles, "features", features)

    def rows(*more: int) -> Tensor:
        return features.new_empty((*batch, *more), dtype=accumulate_type(features.dtype))

    count = percentiles.shape[-1]
    return rows(), rows(), rows(), rows(count), rows(count)


def _vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    features: Tensor,
    percentiles: Tensor,
    rectified: bool = False,
) -> tuple[Any, Any]:
    """Rows more than there are; percentiles that are mapped over become each row's own."""
    at, other = in_dims[:2]
    if at is None:
        features = features.expand(info.batch_size, *features.shape)
    else:
        features = features.movedim(at, 0)
    if other is not None:
        p = percentiles.movedim(other, 0)
        own = p if p.dim() == features.dim() else p.view(len(p), *[1] * (features.dim() - 2), -1)
        percentiles = own.expand(*features.shape[:-1], own.shape[-1])
    elif percentiles.dim() > 1:
        percentiles = percentiles.expand(*features.shape[:-1], percentiles.shape[-1])
    out = torch.ops.oodk.feature_stats(features, percentiles, rectified)
    return out, tuple(0 for _ in out)


register_not_differentiable("feature_stats")
torch.library.register_vmap("oodk::feature_stats", _vmap)
