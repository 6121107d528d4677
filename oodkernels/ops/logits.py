"""The scores that need nothing but logits: MSP, maximum logit, energy, entropy, and GEN."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from oodkernels._checks import accumulate_type, check_classes, check_device, check_dtype
from oodkernels.ops._common import (
    mapped_first,
    register_batch_rule,
    register_not_differentiable,
)


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


def scaled_energy(logits: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Energy of a row's logits times each of its scales, from one read of the row.

    logsumexp over c of scale (z_c - b_c) + b_c, as SCALE (Xu et al., ICLR 2024) and LTS (Djurisic
    et al., MVA 2025) have it: with the head's bias b these are the logits of the scaled features.
    The larger a scale is, the fewer classes count; those that together are below half a unit in
    the last place of the sum may be left out. What is found for a scale does not depend on the
    others.

    Args:
        logits: (..., C), float64, float32, bfloat16 or float16; any strides.
        scale: (..., P), float64 for float64 logits, else float32.
        bias: (C,) of the same type, or None for zeros.

    Returns:
        (..., P), float64 for float64 logits, else float32; special values are those of
        ``torch.logsumexp``. No gradient flows through it.

    Raises:
        ValueError: Shapes or devices do not fit, or there are no classes.
        TypeError: A tensor is not of a type above.
    """
    return torch.ops.oodk.scaled_energy(logits, scale, bias)


@torch.library.register_fake("oodk::scaled_energy")
def _(logits: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    op = "scaled_energy"
    check_classes(op, logits)
    kind = accumulate_type(logits.dtype)
    check_dtype(op, "scale", scale, kind)
    check_device(op, "scale", scale, "logits", logits)
    if scale.dim() != logits.dim() or scale.shape[:-1] != logits.shape[:-1]:
        raise ValueError(
            f"{op}: scale must have shape (..., P) for logits (..., C), got {tuple(scale.shape)} "
            f"for logits {tuple(logits.shape)}"
        )
    if bias is not None:
        check_dtype(op, "bias", bias, kind)
        check_device(op, "bias", bias, "logits", logits)
        if bias.dim() != 1 or bias.shape[0] != logits.shape[-1]:
            raise ValueError(
                f"{op}: bias must have shape (C,) = ({logits.shape[-1]},), got {tuple(bias.shape)}"
            )
    return scale.new_empty(scale.shape)


def _scaled_energy_vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    logits: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
) -> tuple[Any, Any]:
    """Rows more than there are; biases that are mapped over one after the other."""
    n = info.batch_size
    rows = mapped_first(logits, in_dims[0], n), mapped_first(scale, in_dims[1], n)
    at = in_dims[2] if len(in_dims) > 2 else None
    if bias is None or at is None:
        return torch.ops.oodk.scaled_energy(*rows, bias), 0
    each = zip(*rows, bias.movedim(at, 0), strict=True)
    return torch.stack([torch.ops.oodk.scaled_energy(*one) for one in each]), 0


register_not_differentiable("scaled_energy")
torch.library.register_vmap("oodk::scaled_energy", _scaled_energy_vmap)
