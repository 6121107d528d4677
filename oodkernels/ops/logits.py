"""The scores that need nothing but logits: MSP, maximum logit, energy, entropy, and GEN."""

from __future__ import annotations

import math
from collections.abc import Sequence
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


def gen_scores(logits: Tensor, gamma: Sequence[float], m: Sequence[int]) -> Tensor:
    """Negative generalised entropy of the largest probabilities, for each of several settings.

    Liu, Lochman & Zach, GEN: Pushing the Limits of Softmax-Based Out-of-Distribution Detection,
    CVPR 2023: -sum_j (p_j (1 - p_j))^gamma, j running over the m largest of p = softmax(logits).
    Both factors are kept as logarithms, that of 1 - p from the sum of all other exponentials:
    ``1 - softmax`` in float32 is wrong by up to all of it. The row is read once for all settings.

    Args:
        logits: (..., C), float64, float32, bfloat16 or float16; any strides.
        gamma: Of each of S settings, positive.
        m: Of each of S settings, at least 1; of fewer classes, all.

    Returns:
        (..., S), higher = more in-distribution, in [-m / 4^gamma, 0]; float64 for float64 logits,
        else float32. A row that holds NaN, whose largest is infinite or that is -inf throughout is
        NaN. No gradient flows through it.

    Raises:
        ValueError: ``gamma`` or ``m`` is none of these, or there are no classes.
        TypeError: ``logits`` is not of a floating-point type above.
    """
    return torch.ops.oodk.gen_scores(logits, gamma, m)


@torch.library.register_fake("oodk::gen_scores")
def _(logits: Tensor, gamma: Sequence[float], m: Sequence[int]) -> Tensor:
    op = "gen_scores"
    check_classes(op, logits)
    if len(gamma) != len(m):
        raise ValueError(f"{op}: gamma and m must be as many, got {len(gamma)} and {len(m)}")
    for g in gamma:
        if not (g > 0 and math.isfinite(g)):
            raise ValueError(f"{op}: gamma must be positive and finite, got {g}")
    for one in m:
        if one < 1:
            raise ValueError(f"{op}: m must be at least 1, got {one}")
    return logits.new_empty((*logits.shape[:-1], len(m)), dtype=accumulate_type(logits.dtype))


register_not_differentiable("gen_scores")
register_batch_rule("gen_scores", batched=(0,))
