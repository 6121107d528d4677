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


_SHAPES = ("clip", "vra", "ash-p", "ash-b", "ash-s", "scale", "optfs")


def shape_features_(
    features: Tensor,
    shape: str,
    *,
    percentile: float | None = None,
    low: Tensor | None = None,
    high: Tensor | None = None,
) -> Tensor:
    """Shape rows of features in place, as the methods do that then apply the head.

    ========= =====================================================================================
    clip      Values above ``high`` become ``high`` (ReAct, Sun et al., NeurIPS 2021).
    vra       Also those below ``low`` become 0 (Xu et al., NeurIPS 2023).
    ash-p     All but the largest become 0 (Djurisic et al., ICLR 2023); the largest are those above
              the percentile, as :func:`feature_stats` counts them, of equal ones those of lower
              index.
    ash-b     And the largest become the row's sum over their number.
    ash-s     And the largest are multiplied by exp(the row's sum / their sum).
    scale     All are multiplied by that (Xu et al., ICLR 2024).
    optfs     Those from ``low[k]`` to below ``low[k + 1]`` are multiplied by ``high[k]``, others
              become 0 (Zhao et al., ICLR 2024).
    ========= =====================================================================================

    Args:
        features: (..., d), float64, float32, bfloat16 or float16; any strides, but none of 0.
        shape: One of those above.
        percentile: In per cent, in 0..100, for ASH and scale, and only for these.
        low: (1,) or (d,), float64 for float64 features, else float32, for vra; for optfs
            (bins + 1,), ascending.
        high: (1,) or (d,) of the same type, for clip and vra; for optfs (bins,).

    Returns:
        ``features``. ASH and SCALE make a row that holds NaN NaN throughout; the others leave NaN
        as it is. No gradient flows through it.

    Raises:
        ValueError: An argument is none of these, missing or superfluous, or ``features`` require
            gradients, and these are recorded.
        TypeError: A tensor is not of a type above.
    """
    if features.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "shape_features_: features must not require gradients, which do not flow through it: "
            "use torch.no_grad()"
        )
    torch.ops.oodk.shape_features_(features, shape, percentile, low, high)
    return features


@torch.library.register_fake("oodk::shape_features_")
def _(
    features: Tensor,
    shape: str,
    percentile: float | None = None,
    low: Tensor | None = None,
    high: Tensor | None = None,
) -> None:
    op = "shape_features_"
    if shape not in _SHAPES:
        *others, last = _SHAPES
        raise ValueError(f"{op}: shape must be {', '.join(others)} or {last}, got '{shape}'")
    check_features(op, features)
    for i in range(features.dim()):
        if features.shape[i] > 1 and features.stride(i) == 0:
            raise ValueError(
                f"{op}: features must not share memory with each other, got stride 0 in dimension "
                f"{i}"
            )
    binned = shape == "optfs"
    ranked = shape not in ("clip", "vra", "optfs")
    for name, given, wanted in (
        ("percentile", percentile, ranked),
        ("low", low, shape in ("vra", "optfs")),
        ("high", high, not ranked),
    ):
        if (given is not None) != wanted:
            raise ValueError(f"{op}: {name} must {'' if wanted else 'not '}be given for {shape}")
    for name, limit in (("low", low), ("high", high)):
        if limit is None:
            continue
        check_dtype(op, name, limit, accumulate_type(features.dtype))
        if not binned and (limit.dim() != 1 or limit.shape[0] not in (1, features.shape[-1])):
            raise ValueError(
                f"{op}: {name} must have shape (1,) or ({features.shape[-1]},), got "
                f"{tuple(limit.shape)}"
            )
        check_device(op, name, limit, "features", features)
    if binned:
        assert low is not None
        assert high is not None
        if low.dim() != 1 or high.dim() != 1 or not 1 <= high.shape[0] == low.shape[0] - 1:
            raise ValueError(
                f"{op}: low and high must have shapes (bins + 1,) and (bins,) for optfs, got "
                f"{tuple(low.shape)} and {tuple(high.shape)}"
            )
    if percentile is not None and not 0 <= percentile <= 100:
        raise ValueError(f"{op}: percentile must be in per cent, in 0..100, got {percentile}")
