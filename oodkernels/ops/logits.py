"""The scores that need nothing but logits: MSP, maximum logit, energy and entropy."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from oodkernels._checks import accumulate_type, check_classes
from oodkernels.ops._common import register_batch_rule, register_not_differentiable


class LogitScores(NamedTuple):
    """What :func:`logit_scores` returns, each (...,); every score higher = more in-distribution."""

    msp: Tensor
    """Maximum softmax probability of logits / T (Hendrycks & Gimpel, ICLR 2017)."""
    max_logit: Tensor
    """Largest logit, whatever T (Hendrycks et al., ICML 2022)."""
    energy: Tensor
    """Negative free energy, T logsumexp(logits / T) (Liu et al., NeurIPS 2020)."""
    entropy: Tensor
    """Negative Shannon entropy of softmax(logits / T), in nats."""
    label: Tensor
    """Index of the largest logit, int64; ties: the lowest."""


def logit_scores(logits: Tensor, temperature: float = 1.0) -> LogitScores:
    """MSP, maximum logit, energy, entropy and label from one read of the logits.

    Args:
        logits: (..., C), float64, float32, bfloat16 or float16; any strides.
        temperature: T > 0.

    Returns:
        A :class:`LogitScores`; float64 for float64 logits, else float32. Special values are those
        of torch's softmax, amax, logsumexp and argmax: a row that holds NaN is NaN throughout.
        No gradient flows through them.

    Raises:
        ValueError: ``temperature`` is not positive and finite, or there are no classes.
        TypeError: ``logits`` is not of a floating-point type above.
    """
    return LogitScores(*torch.ops.oodk.logit_scores(logits, temperature))


@torch.library.register_fake("oodk::logit_scores")
def _(logits: Tensor, temperature: float = 1.0) -> tuple[Tensor, ...]:
    check_classes("logit_scores", logits)
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(
            f"logit_scores: temperature must be positive and finite, got {temperature}"
        )

    def rows(dtype: torch.dtype) -> Tensor:
        return logits.new_empty(logits.shape[:-1], dtype=dtype)

    score = accumulate_type(logits.dtype)
    return rows(score), rows(score), rows(score), rows(score), rows(torch.int64)


register_not_differentiable("logit_scores")
register_batch_rule("logit_scores", batched=(0,))
