"""Measures of answering and rejecting together: risk and coverage, open-set classification.

A classifier that may decline answers where its confidence is high. *Risk and coverage* ask how
wrong the answers are that are given; *open-set* measures ask how many ID samples are both accepted
and classified right while few OOD samples are accepted. Scores and confidences are higher = rather
answer. All figures come from exact integer counts, and no order among ties changes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from oodkernels._checks import check_device, check_no_nan, check_tpr
from oodkernels.metrics.calibration import check_answers
from oodkernels.metrics.ood import Scores, as_tensor
from oodkernels.ops.roc import exact_ceil, roc_counts, sort_keys

__all__ = ["OpenSetResult", "RiskCoverageResult", "open_set_metrics", "risk_coverage"]


@dataclass(frozen=True)
class RiskCoverageResult:
    """How wrong the answers are that are given; returned by :func:`risk_coverage`.

    Attributes:
        aurc: Area under the risk-coverage curve: mean over i = 1..n of the share of wrong answers
            among the i most confident. Answers of equal confidence come in every order alike.
        e_aurc: ``aurc`` less ``optimal``: what the ranking costs, 0 for one that is right first.
        optimal: The least ``aurc`` of any ranking of as many right and wrong answers. For n without
            end it is r + (1 - r) log(1 - r), the form in the paper.
        risk: Share r of wrong answers among all.
        n: Number of answers.
    """

    aurc: float
    e_aurc: float
    optimal: float
    risk: float
    n: int


@dataclass(frozen=True)
class OpenSetResult:
    """How well samples are accepted and classified at once; see :func:`open_set_metrics`.

    Attributes:
        oscr: Area under the open-set classification rate curve: probability that an ID sample is
            classified right and scores higher than an OOD sample, ties counted half.
        oscr_strict: The same with ties counted as lost, as an OOD sample is accepted at its own
            score and an ID sample only above it.
        ccr: FPR -> correct classification rate: share of ID samples that are classified right and
            score higher than the ceil(FPR n_ood)-th highest OOD score.
        accuracy: Share of ID samples that are classified right: what both tend to.
        n_id: Number of ID samples.
        n_ood: Number of OOD samples.
    """

    oscr: float
    oscr_strict: float
    ccr: dict[float, float]
    accuracy: float
    n_id: int
    n_ood: int


def risk_coverage(
    confidence: ArrayLike | Tensor, correct: ArrayLike | Tensor
) -> RiskCoverageResult:
    """Area under the risk-coverage curve (AURC) and its excess over the best ranking (E-AURC).

    As in Geifman, Uziel & El-Yaniv, Bias-Reduced Uncertainty Estimation for Deep Neural
    Classifiers, ICLR 2019. The authors' code divides by one answer too many and takes ties in the
    order of an unstable sort; here both are exact.

    Args:
        confidence: Of each answer, higher = more likely right, any shape and type of number. It
            need not be a probability.
        correct: Bool, of that shape and on that device: whether the answer is right.

    Returns:
        A :class:`RiskCoverageResult`.

    Raises:
        ValueError: There are no answers, a confidence is NaN (with the number and the first index),
            or shapes or devices differ.
        TypeError: ``confidence`` is bool or complex, or ``correct`` not bool.
    """
    where = "risk_coverage"
    confidence, correct = check_answers(where, confidence, correct)
    n = confidence.numel()
    if n == 0:
        raise ValueError(f"{where}: confidence must not be empty")
    check_no_nan(where, "confidence", confidence)
    _, group = torch.unique(-confidence.double(), return_inverse=True)
    size = torch.bincount(group).cpu().numpy()
    wrong = torch.bincount(group[~correct], minlength=len(size)).cpu().numpy()
    harmonic = np.concatenate(([0.0], np.cumsum(1 / np.arange(1, n + 1))))
    before, wrong_before = np.cumsum(size) - size, np.cumsum(wrong) - wrong
    # Of a group's j-th answer, wrong_before + j wrong / size are wrong among before + j.
    excess = wrong_before - before * (wrong / size)
    aurc = float((wrong + excess * (harmonic[before + size] - harmonic[before])).sum()) / n
    errors = int(wrong.sum())
    optimal = (errors - (n - errors) * float(harmonic[n] - harmonic[n - errors])) / n
    return RiskCoverageResult(aurc, aurc - optimal, optimal, errors / n, n)


def open_set_metrics(
    id_scores: Scores,
    correct: ArrayLike | Tensor,
    ood_scores: Scores,
    *,
    fprs: Sequence[float] = (1e-4, 1e-3, 1e-2, 1e-1),
) -> OpenSetResult:
    """Open-set classification: OSCR, and the correct classification rate at given FPRs.

    By Dhamija, Günther & Boult, Reducing Network Agnostophobia, NeurIPS 2018; the rates at an FPR
    by OpenOOD's rule, with the share of OOD samples read as the decimal it prints as.

    Args:
        id_scores: Scores of ID samples, as for :func:`oodkernels.metrics.ood_metrics`.
        correct: Bool, of their shape and on their device: whether each is classified right.
        ood_scores: Scores of OOD samples.
        fprs: Each in (0, 1].

    Returns:
        An :class:`OpenSetResult`.

    Raises:
        ValueError: Scores are empty or hold NaN, shapes or devices differ, or an FPR is out of
            range.
        TypeError: Scores are not numbers, or ``correct`` not bool.
    """
    where = "open_set_metrics"
    shares = [check_tpr(where, share, "fprs") for share in fprs]
    inside, right = check_answers(where, id_scores, correct, name="id_scores")
    outside = as_tensor(where, "ood_scores", ood_scores)
    check_device(where, "ood_scores", outside, "id_scores", inside)
    dtype = torch.promote_types(inside.dtype, outside.dtype)
    n, ood_keys = inside.numel(), sort_keys(outside.to(dtype), where, "ood_scores")
    m = len(ood_keys)
    sort_keys(inside, where, "id_scores")  # which looks at all of them
    if not bool(right.any()):
        return OpenSetResult(0.0, 0.0, dict.fromkeys(shares, 0.0), 0.0, n, m)
    right_keys = sort_keys(inside[right].to(dtype), where, "id_scores")
    counts, _ = roc_counts(right_keys, ood_keys)
    ccr = {}
    for share in shares:
        edge = ood_keys[m - exact_ceil(share, m)].reshape(1)
        ccr[share] = (len(right_keys) - int(torch.searchsorted(right_keys, edge, right=True))) / n
    return OpenSetResult(
        oscr=counts.wins / (2 * n * m),
        oscr_strict=(counts.wins - counts.ties) / (2 * n * m),
        ccr=ccr,
        accuracy=len(right_keys) / n,
        n_id=n,
        n_ood=m,
    )
