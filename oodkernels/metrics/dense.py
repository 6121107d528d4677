"""Scores of pixels, or of anything else with a label each, as scores of ID and of OOD."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from oodkernels._checks import check_device, check_int, check_integers

__all__ = ["id_and_ood"]


def id_and_ood(
    scores: Tensor, labels: Tensor, *, ood: int | Sequence[int], void: int | None = None
) -> tuple[Tensor, Tensor]:
    """The scores of what is in-distribution, and those of what is not; a void label left out.

    For :func:`oodkernels.metrics.ood_metrics`, or a batch at a time for
    :class:`oodkernels.OODMetrics`, whose ``update_id`` and ``update_ood`` take no scores too.

    Args:
        scores: Of any shape, such as (N, H, W) of pixels.
        labels: Integers of that shape.
        ood: The label, or labels, of OOD samples; all others but ``void`` are ID.
        void: The label of what counts as neither, such as 255; None for none.

    Returns:
        (n_id,) and (n_ood,) scores, in their order; either may be empty.

    Raises:
        ValueError: Shapes or devices disagree, or ``void`` is one of ``ood``.
        TypeError: Labels are not integers.
    """
    where = "id_and_ood"
    check_integers(where, "labels", labels)
    if labels.shape != scores.shape:
        raise ValueError(
            f"{where}: labels must have the shape of scores, {tuple(scores.shape)}, got "
            f"{tuple(labels.shape)}"
        )
    check_device(where, "labels", labels, "scores", scores)
    marks = [
        check_int(where, "ood", mark) for mark in (ood if isinstance(ood, Sequence) else [ood])
    ]
    is_ood = torch.zeros_like(labels, dtype=torch.bool)
    for mark in marks:
        is_ood |= labels == mark
    if void is None:
        return scores[~is_ood], scores[is_ood]
    void = check_int(where, "void", void)
    if void in marks:
        raise ValueError(f"{where}: void must be none of the labels of OOD, got {void}")
    return scores[~is_ood & (labels != void)], scores[is_ood]
