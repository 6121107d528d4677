"""Misclassification detection: does the confidence tell right answers from wrong ones.

Figures as in Hendrycks & Gimpel, A Baseline for Detecting Misclassified and Out-of-Distribution
Examples in Neural Networks, ICLR 2017. Confidence is higher = more likely right, such as the
maximum softmax probability (:func:`oodkernels.ops.logit_scores`); right is the positive class:

- ``auroc``: probability that a right answer has more confidence than a wrong one, ties 1/2;
- ``aupr_succ``: average precision, positive = right, score = confidence;
- ``aupr_err``: average precision, positive = wrong, score = -confidence;
- ``fpr95``: share of wrong answers kept at the largest threshold that keeps 95 % of the right;
- base rates, which are the AUPRs of a useless score, and mean confidences beside them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from oodkernels._checks import check_no_nan, check_tpr
from oodkernels.metrics.calibration import check_answers
from oodkernels.metrics.ood import ood_metrics

__all__ = ["MisclassificationResult", "misclassification_metrics"]


@dataclass(frozen=True)
class MisclassificationResult:
    """How well confidence tells right from wrong; see :func:`misclassification_metrics`.

    Figures that need both kinds of answers are NaN where there is only one, and so is the mean
    confidence of none.

    Attributes:
        auroc: Ties counted half.
        aupr_succ: Average precision, positive = right.
        aupr_err: Average precision, positive = wrong, confidence negated.
        fpr_at_tpr: Share of wrong answers with confidence >= ``threshold``.
        threshold: The largest at which a share >= ``tpr`` of the right answers is kept.
        mean_confidence: Of all answers.
        mean_confidence_right: Of the right answers.
        mean_confidence_wrong: Of the wrong answers.
        base_rate_right: Share of right answers: the accuracy.
        base_rate_wrong: Share of wrong answers.
        tpr: The TPR asked for.
        n_right: Number of right answers.
        n_wrong: Number of wrong answers.
    """

    auroc: float
    aupr_succ: float
    aupr_err: float
    fpr_at_tpr: float
    threshold: float
    mean_confidence: float
    mean_confidence_right: float
    mean_confidence_wrong: float
    base_rate_right: float
    base_rate_wrong: float
    tpr: float
    n_right: int
    n_wrong: int

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.base_rate_right


def misclassification_metrics(
    confidence: ArrayLike | Tensor, correct: ArrayLike | Tensor, *, tpr: float = 0.95
) -> MisclassificationResult:
    """How well the confidence of answers tells right ones from wrong ones, exactly.

    By the rules of :func:`oodkernels.metrics.ood_metrics` with right for ID and wrong for OOD.

    Args:
        confidence: Of each answer, higher = more likely right: any shape, float64, float32,
            bfloat16 or float16. It need not be a probability.
        correct: Bool, of that shape and on that device: whether the answer is right.
        tpr: 0 < tpr <= 1, read as the decimal it prints as.

    Returns:
        A :class:`MisclassificationResult`; sums are made in float64.

    Raises:
        ValueError: There are no answers, a confidence is NaN (with the number and the first index),
            shapes or devices differ, or ``tpr`` is out of range.
        TypeError: ``confidence`` is not of a type above, or ``correct`` not bool.
    """
    where = "misclassification_metrics"
    tpr = check_tpr(where, tpr)
    confidence, correct = check_answers(where, confidence, correct)
    n = confidence.numel()
    if n == 0:
        raise ValueError(f"{where}: confidence must not be empty")
    check_no_nan(where, "confidence", confidence)
    right, wrong = confidence[correct], confidence[~correct]
    figures = dict.fromkeys(("auroc", "aupr_in", "aupr_out", "fpr_at_tpr", "threshold"), math.nan)
    if right.numel() and wrong.numel():
        result = ood_metrics(right, {"wrong": wrong}, tpr=tpr)["wrong"]
        figures = {name: getattr(result, name) for name in figures}

    def mean(values: Tensor) -> float:
        return float(values.mean(dtype=torch.float64))

    return MisclassificationResult(
        auroc=figures["auroc"],
        aupr_succ=figures["aupr_in"],
        aupr_err=figures["aupr_out"],
        fpr_at_tpr=figures["fpr_at_tpr"],
        threshold=figures["threshold"],
        mean_confidence=mean(confidence),
        mean_confidence_right=mean(right),
        mean_confidence_wrong=mean(wrong),
        base_rate_right=right.numel() / n,
        base_rate_wrong=wrong.numel() / n,
        tpr=tpr,
        n_right=right.numel(),
        n_wrong=wrong.numel(),
    )
