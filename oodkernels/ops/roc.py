"""ROC figures of two score sets from exact integer counts over their sorted scores."""

from __future__ import annotations

import os
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from oodkernels._checks import (
    check_device,
    check_dtype,
    check_floating,
    check_same_dtype,
    check_tpr,
    plain,
)
from oodkernels.ops._common import register_not_differentiable
from oodkernels.ops.keys import KEY_TYPES, scores_of_keys


class ROCMetricsResult(NamedTuple):
    """What :func:`roc_metrics` returns: float64 scalars on the device of the scores."""

    auroc: Tensor
    """P(ID score > OOD score) + P(equal) / 2."""
    aupr_in: Tensor
    """Average precision with positive = ID, tied scores grouped."""
    aupr_out: Tensor
    """Average precision with positive = OOD and scores negated, tied scores grouped."""
    fpr_at_tpr: Tensor
    """Share of OOD scores >= threshold."""
    fpr_out_at_tpr: Tensor
    """Share of ID scores <= threshold_out."""
    threshold: Tensor
    """The largest score at or above which lies a share >= tpr of the ID scores."""
    threshold_out: Tensor
    """The least score at or below which lies a share >= tpr of the OOD scores."""
    detection_error: Tensor
    """Minimum over thresholds of (1 - TPR) / 2 + FPR / 2."""
    base_rate_in: Tensor
    """Share of ID among all scores."""
    base_rate_out: Tensor
    """Share of OOD among all scores."""
    tie_fraction: Tensor
    """Share of the (ID, OOD) pairs that tie."""
    n_id: Tensor
    """Number of ID scores."""
    n_ood: Tensor
    """Number of OOD scores."""


def roc_metrics(id_scores: Tensor, ood_scores: Tensor, tpr: float = 0.95) -> ROCMetricsResult:
    """AUROC, AUPR, FPR at a TPR and more of ID against OOD scores, higher = more ID.

    Exact: integer counts throughout, divisions last, in float64; tied scores are one point of
    every curve. Infinite scores are ordered like any other and -0.0 equals +0.0.
    :func:`oodkernels.metrics.ood_metrics` gives the same with intervals, as Python numbers, for
    many OOD sets and by every convention in use.

    Args:
        id_scores: Scores of ID samples, float64, float32, bfloat16 or float16; any shape with at
            least one dimension, all its values being one set; any strides.
        ood_scores: Scores of OOD samples, of the type and on the device of ``id_scores``.
        tpr: 0 < tpr <= 1, read as the decimal it prints as: 0.95 of 20 scores are 19.

    Returns:
        A :class:`ROCMetricsResult`. Not differentiable.

    Raises:
        ValueError: Scores are empty, on different devices, or hold NaN (with its count and first
            index; on CUDA every figure is NaN instead unless ``OODK_VALIDATE=1``); ``tpr`` is out
            of range.
        TypeError: Scores are not of a floating-point type above, or of two types.
    """
    return ROCMetricsResult(*torch.ops.oodk.roc_metrics(id_scores, ood_scores, plain(tpr)).unbind())


class ROCCounts(NamedTuple):
    """Exact sums over the distinct scores of two sets."""

    wins: int
    """Twice the pairs with ID score > OOD score, plus the ties: the Mann-Whitney U, doubled."""
    ties: int
    """Pairs with equal scores."""
    id_squares: int
    """Sum over ID scores x of (2 #{ood < x} + #{ood = x})^2."""
    ood_squares: int
    """Sum over OOD scores y of (2 #{id > y} + #{id = y})^2."""
    separation: int
    """Maximum over thresholds of n_id n_ood (TPR - FPR), 0 for a threshold that keeps nothing."""


class ROCAreas(NamedTuple):
    """Areas under both precision-recall curves by both rules in use."""

    average_precision_in: float
    average_precision_out: float
    trapezoid_in: float
    trapezoid_out: float


def sort_keys(scores: Tensor, function: str = "sort_keys", argument: str = "scores") -> Tensor:
    """Scores as integers of their own width that order as the scores do, ascending.

    Args:
        scores: Float64, float32, bfloat16 or float16, any shape and strides, not empty.
        function: Whom errors name.
        argument: What errors call the scores.

    Returns:
        (N,) int64, int32 or int16; -0.0 and +0.0 have one key.
        :func:`~oodkernels.ops.keys.scores_of_keys` maps back.

    Raises:
        ValueError: Scores are empty or hold NaN.
        TypeError: Scores are not of a floating-point type above.
    """
    check_scores(function, argument, scores)
    keys: Tensor = torch.ops.oodk._roc_keys(scores)
    if keys[-1] == torch.iinfo(keys.dtype).max:  # NaN's, which comes last
        nan = scores.reshape(-1).isnan().nonzero()
        raise ValueError(
            f"{function}: {argument} must not hold NaN, got {len(nan)}, the first at index "
            f"{int(nan[0])}"
        )
    return keys


def check_scores(function: str, argument: str, scores: Tensor) -> None:
    """Raise unless ``scores`` are floating-point and not empty."""
    check_floating(function, argument, scores)
    if scores.numel() == 0:
        raise ValueError(f"{function}: {argument} must not be empty")


def roc_counts(id_keys: Tensor, ood_keys: Tensor) -> tuple[ROCCounts, ROCAreas]:
    """Exact sums and precision-recall areas of two sets of sorted keys.

    Args:
        id_keys: (N,) from :func:`sort_keys`.
        ood_keys: (M,) likewise, of the same type and device.

    Returns:
        :class:`ROCCounts` and :class:`ROCAreas`.
    """
    counts, areas = torch.ops.oodk._roc_counts(id_keys, ood_keys)
    return ROCCounts(*(high << 62 | low for high, low in counts.tolist())), ROCAreas(
        *areas.tolist()
    )


def exact_ceil(share: float, n: int) -> int:
    """Round share n up, with share the decimal it prints as."""
    exact = Fraction(str(share))  # which of a NumPy number, too, is its decimal
    return -(-exact.numerator * n // exact.denominator)


def _keys_of_set(argument: str, scores: Tensor) -> Tensor:
    # On CUDA looking for NaN would wait for the GPU: it is done on request, else the row is NaN.
    if scores.is_cpu or os.environ.get("OODK_VALIDATE") == "1":
        return sort_keys(scores, "roc_metrics", argument)
    keys: Tensor = torch.ops.oodk._roc_keys(scores)
    return keys


@torch.library.register_fake("oodk::roc_metrics")
def _roc_metrics_args(id_scores: Tensor, ood_scores: Tensor, tpr: float = 0.95) -> Tensor:
    check_tpr("roc_metrics", tpr)
    check_scores("roc_metrics", "id_scores", id_scores)
    check_same_dtype("roc_metrics", "ood_scores", ood_scores, "id_scores", id_scores)
    check_device("roc_metrics", "ood_scores", ood_scores, "id_scores", id_scores)
    check_scores("roc_metrics", "ood_scores", ood_scores)
    return id_scores.new_empty((len(ROCMetricsResult._fields),), dtype=torch.float64)


@torch.library.impl("oodk::roc_metrics", "CompositeExplicitAutograd")
def _(id_scores: Tensor, ood_scores: Tensor, tpr: float = 0.95) -> Tensor:
    _roc_metrics_args(id_scores, ood_scores, tpr)
    id_keys = _keys_of_set("id_scores", id_scores)
    ood_keys = _keys_of_set("ood_scores", ood_scores)
    counts, areas = torch.ops.oodk._roc_counts(id_keys, ood_keys)
    n_id, n_ood = id_keys.shape[0], ood_keys.shape[0]
    sums = counts[:, 0].double() * 2.0**62 + counts[:, 1].double()
    wins, ties, separation = sums[0], sums[1], sums[4]
    n = torch.full_like(wins, n_id)
    m = torch.full_like(wins, n_ood)
    pairs = n * m
    id_key = id_keys[n_id - exact_ceil(tpr, n_id)]
    ood_key = ood_keys[exact_ceil(tpr, n_ood) - 1]
    kept = n_ood - torch.searchsorted(ood_keys, id_key.unsqueeze(0))[0]
    flagged = torch.searchsorted(id_keys, ood_key.unsqueeze(0), right=True)[0]
    thresholds = scores_of_keys(torch.stack([id_key, ood_key]), id_scores.dtype).double()
    figures = torch.stack(
        [
            wins / (2 * pairs),
            areas[0],
            areas[1],
            kept / m,
            flagged / n,
            thresholds[0],
            thresholds[1],
            (pairs - separation) / (2 * pairs),
            n / (n + m),
            m / (n + m),
            ties / pairs,
            n,
            m,
        ]
    )
    # Only on CUDA can NaN come this far; its key is the largest and no score's.
    is_nan = torch.maximum(id_keys[-1], ood_keys[-1]) == torch.iinfo(id_keys.dtype).max
    return torch.where(is_nan, float("nan"), figures)


@torch.library.register_fake("oodk::_roc_keys")
def _(scores: Tensor) -> Tensor:
    check_scores("_roc_keys", "scores", scores)
    return scores.new_empty((scores.numel(),), dtype=KEY_TYPES[scores.dtype])


@torch.library.register_fake("oodk::_roc_counts")
def _(id_keys: Tensor, ood_keys: Tensor) -> tuple[Tensor, Tensor]:
    for name, keys in (("id_keys", id_keys), ("ood_keys", ood_keys)):
        check_dtype("_roc_counts", name, keys, torch.int64, torch.int32, torch.int16)
        if keys.dim() != 1 or keys.shape[0] == 0:
            raise ValueError(
                f"_roc_counts: {name} must have shape (N,), N >= 1, got {tuple(keys.shape)}"
            )
    check_same_dtype("_roc_counts", "ood_keys", ood_keys, "id_keys", id_keys)
    check_device("_roc_counts", "ood_keys", ood_keys, "id_keys", id_keys)
    return (
        id_keys.new_empty((len(ROCCounts._fields), 2), dtype=torch.int64),
        id_keys.new_empty((len(ROCAreas._fields),), dtype=torch.float64),
    )


register_not_differentiable("roc_metrics")
register_not_differentiable("_roc_keys")
register_not_differentiable("_roc_counts")
