"""MOS, minimum others score (Huang & Li, CVPR 2021): group-softmax scores, prediction and loss.

The head has C + K columns for C classes in K groups: group k owns the columns
``[offsets[k], offsets[k + 1])``; the first of them is its "others", the classes of the group
follow. p^k is the softmax over all columns of group k, others included.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from oodkernels._checks import (
    accumulate_type,
    check_device,
    check_dtype,
    check_floating,
    check_target,
)
from oodkernels.ops._common import (
    check_like,
    register_batch_rule,
    register_composite,
    register_not_differentiable,
)


class HasOffsets(Protocol):
    """What an op takes as ``groups`` beside a tensor, such as :class:`oodkernels.Groups`."""

    @property
    def offsets(self) -> Tensor:
        """(K + 1,) int32 or int64."""


OffsetsLike: TypeAlias = HasOffsets | Tensor


def as_offsets(op: str, groups: OffsetsLike, like: Tensor) -> Tensor:
    """The offsets that an op takes as ``groups``.

    Args:
        op: Whom errors name.
        groups: Offsets, which are returned as they are, or what has them.
        like: A tensor on the device where they have to be. What has a method ``to`` is asked for
            its copy there, which it may keep.

    Returns:
        (K + 1,) offsets.

    Raises:
        TypeError: ``groups`` is neither.
    """
    if isinstance(groups, Tensor):
        return groups
    offsets = getattr(groups, "offsets", None)
    if not isinstance(offsets, Tensor):
        raise TypeError(
            f"{op}: groups must be a tensor of offsets, or have one as .offsets, as Groups do, got "
            f"{type(groups).__name__}"
        )
    if offsets.device == like.device:
        return offsets
    if hasattr(groups, "to"):
        return groups.to(like.device).offsets
    return offsets.to(like.device)


class MOSPrediction(NamedTuple):
    """What :func:`mos_predict` returns, each of shape (...,)."""

    score: Tensor
    """S_MOS = -min_k p^k_others, in [-1, 0]; higher = more in-distribution."""
    log_odds: Tensor
    """Log-odds, max_k (logsumexp of group k's class logits - its others logit). Ranks as ``score``
    does and never saturates; ``score = -sigmoid(-log_odds)``."""
    label: Tensor
    """Predicted class, int64, an index 0..C-1 in grouped order (``Groups.to_class`` maps back)."""
    group: Tensor
    """Group of the predicted class, int64."""
    prob: Tensor
    """Probability p^group of the predicted class."""


def mos_score(logits: Tensor, groups: OffsetsLike) -> Tensor:
    """Minimum others score, S_MOS = -min_k p^k_others (Huang & Li, section 3).

    Args:
        logits: (..., C + K), float64, float32, bfloat16 or float16; any strides.
        groups: Offsets (K + 1,), int32 or int64, on the device of ``logits``; or what has them as
            ``.offsets``, such as :class:`~oodkernels.Groups`, on any device.

    Returns:
        (...,) scores in [-1, 0], higher = more in-distribution; float64 for float64 logits, else
        float32 (half precision is accumulated in float32). NaN where a group's softmax is NaN, as
        in ``torch.softmax``: it holds NaN or +inf, or nothing but -inf. No
        gradient flows through it, as through an argmax: use :func:`mos_log_others` for one.

    Raises:
        ValueError: ``groups`` does not start at 0, end at C + K, or has a group narrower than 2.
        TypeError: ``logits`` is not of a floating-point type above, or ``groups`` not integer, or
            neither a tensor nor with offsets.
    """
    return torch.ops.oodk.mos_score(logits, as_offsets("mos_score", groups, logits))


def mos_predict(logits: Tensor, groups: OffsetsLike) -> MOSPrediction:
    """Predicted class with both forms of the score, from one read of the logits.

    The class is the largest p^k_c over each group's classes (others excluded), then over the
    groups (Huang & Li, section 3), told apart by its odds, p / (1 - p), which go on where
    probabilities round to 1. Ties: the lowest index.

    Args:
        logits: (..., C + K), as for :func:`mos_score`.
        groups: As for :func:`mos_score`.

    Returns:
        A :class:`MOSPrediction`. Where a group's softmax is NaN, so are score, log_odds and prob,
        and the label is the first class of the first such group. No
        gradient flows through it, as for :func:`mos_score`.

    Raises:
        ValueError: As :func:`mos_score`.
        TypeError: As :func:`mos_score`.
    """
    return MOSPrediction(
        *torch.ops.oodk.mos_predict(logits, as_offsets("mos_predict", groups, logits))
    )


def mos_log_others(logits: Tensor, groups: OffsetsLike) -> Tensor:
    """Log probability of "others" in every group, log p^k_others.

    Args:
        logits: (..., C + K), as for :func:`mos_score`.
        groups: As for :func:`mos_score`.

    Returns:
        (..., K), <= 0; float64 for float64 logits, else float32. Differentiable once in ``logits``.

    Raises:
        ValueError: As :func:`mos_score`.
        TypeError: As :func:`mos_score`.
    """
    return torch.ops.oodk.mos_log_others(logits, as_offsets("mos_log_others", groups, logits))


def mos_loss(
    logits: Tensor,
    target: Tensor,
    groups: OffsetsLike,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    """Group-softmax loss: the sum over the groups of each group's cross entropy.

    In the group of its class a sample's target is that class, in every other group "others". The
    sum is unweighted (Huang & Li, section 3).

    Args:
        logits: (..., C + K), as for :func:`mos_score`.
        target: (...,) int64, class indices 0..C-1 in grouped order (``Groups.to_grouped`` maps
            from your own class ids), or ``ignore_index``.
        groups: As for :func:`mos_score`.
        reduction: ``"none"``, ``"sum"`` or ``"mean"``, the mean over the rows not ignored (NaN
            where there are none), as in ``torch.nn.functional.cross_entropy``.
        ignore_index: Rows with this target have loss and gradient 0.

    Returns:
        The loss, >= 0, in nats: (...,) for ``"none"``, else a scalar; float64 for float64 logits,
        else float32, under autocast too. Differentiable once in ``logits``.

    Raises:
        ValueError: As :func:`mos_score`; ``target`` has the wrong shape or a class out of range
            (checked on CPU; on CUDA the row's loss is NaN unless ``OODK_VALIDATE=1``).
        TypeError: As :func:`mos_score`; ``target`` is not int64.
    """
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"mos_loss: reduction must be none, sum or mean, got {reduction!r}")
    loss = torch.ops.oodk.mos_loss(
        logits, target, as_offsets("mos_loss", groups, logits), ignore_index
    )
    if reduction == "none":
        return loss
    total = loss.sum()
    return total if reduction == "sum" else total / (target != ignore_index).sum()


# --- fake kernels: shapes and types, with the errors of the real ones -----------------------------


def _check(op: str, logits: Tensor, groups: Tensor) -> None:
    check_floating(op, "logits", logits)
    check_dtype(op, "groups", groups, torch.int32, torch.int64)
    if groups.dim() != 1:
        raise ValueError(f"{op}: groups must have shape (K + 1,), got {tuple(groups.shape)}")
    if groups.shape[0] < 2:
        raise ValueError(f"{op}: groups must hold K + 1 >= 2 offsets, got {groups.shape[0]}")
    check_device(op, "groups", groups, "logits", logits)


def _rows(logits: Tensor, *tail: int, dtype: torch.dtype | None = None) -> Tensor:
    dtype = dtype or accumulate_type(logits.dtype)
    return logits.new_empty((*logits.shape[:-1], *tail), dtype=dtype)


@torch.library.register_fake("oodk::mos_score")
def _(logits: Tensor, groups: Tensor) -> Tensor:
    _check("mos_score", logits, groups)
    return _rows(logits)


@torch.library.register_fake("oodk::mos_predict")
def _(logits: Tensor, groups: Tensor) -> tuple[Tensor, ...]:
    _check("mos_predict", logits, groups)
    score, log_odds, prob = _rows(logits), _rows(logits), _rows(logits)
    label, group = _rows(logits, dtype=torch.int64), _rows(logits, dtype=torch.int64)
    return score, log_odds, label, group, prob


@torch.library.register_fake("oodk::_mos_log_others")
def _(logits: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    _check("mos_log_others", logits, groups)
    k = groups.shape[0] - 1
    return _rows(logits, k), _rows(logits, k, 2)


@torch.library.register_fake("oodk::_mos_loss")
def _(logits: Tensor, target: Tensor, groups: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    _check("mos_loss", logits, groups)
    check_target("mos_loss", logits, target)
    return _rows(logits), _rows(logits, groups.shape[0] - 1, 2)


@torch.library.register_fake("oodk::_mos_log_others_backward")
def _(grad: Tensor, logits: Tensor, groups: Tensor, stats: Tensor) -> Tensor:
    op, k = "_mos_log_others_backward", groups.shape[0] - 1
    _check(op, logits, groups)
    check_like(op, "grad", grad, _rows(logits, k))
    check_like(op, "stats", stats, _rows(logits, k, 2))
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.register_fake("oodk::_mos_loss_backward")
def _(
    grad: Tensor, logits: Tensor, target: Tensor, groups: Tensor, stats: Tensor, ignore_index: int
) -> Tensor:
    op = "_mos_loss_backward"
    _check(op, logits, groups)
    check_target(op, logits, target)
    check_like(op, "grad", grad, _rows(logits))
    check_like(op, "stats", stats, _rows(logits, groups.shape[0] - 1, 2))
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


# --- differentiation ------------------------------------------------------------------------------


class _LogOthers(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.oodk._mos_log_others(logits, groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        stats = output[1]
        ctx.mark_non_differentiable(stats)
        ctx.save_for_backward(*inputs, stats)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None]:
        return torch.ops.oodk._mos_log_others_backward(grad, *ctx.saved_tensors), None


class _Loss(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        logits: Tensor, target: Tensor, groups: Tensor, ignore_index: int
    ) -> tuple[Tensor, Tensor]:
        return torch.ops.oodk._mos_loss(logits, target, groups, ignore_index)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.ignore_index = inputs
        stats = output[1]
        ctx.mark_non_differentiable(stats)
        ctx.save_for_backward(*tensors, stats)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        out = torch.ops.oodk._mos_loss_backward(grad, *ctx.saved_tensors, ctx.ignore_index)
        return out, None, None, None


@register_composite("mos_log_others")
def _(logits: Tensor, groups: Tensor) -> Tensor:
    return _LogOthers.apply(logits, groups)[0]  # type: ignore[no-untyped-call]


@register_composite("mos_loss")
def _(logits: Tensor, target: Tensor, groups: Tensor, ignore_index: int = -100) -> Tensor:
    return _Loss.apply(logits, target, groups, ignore_index)[0]  # type: ignore[no-untyped-call]


register_not_differentiable("_mos_log_others")
register_not_differentiable("_mos_log_others_backward")
register_not_differentiable("_mos_loss")
register_not_differentiable("_mos_loss_backward")
register_not_differentiable("mos_score")
register_not_differentiable("mos_predict")

register_batch_rule("mos_score", batched=(0,), shared=(1,))
register_batch_rule("mos_predict", batched=(0,), shared=(1,))
register_batch_rule("mos_log_others", batched=(0,), shared=(1,))
register_batch_rule("mos_loss", batched=(0, 1), shared=(2,))
register_batch_rule("_mos_log_others", batched=(0,), shared=(1,))
register_batch_rule("_mos_log_others_backward", batched=(0, 1, 3), shared=(2,))
register_batch_rule("_mos_loss", batched=(0, 1), shared=(2,))
register_batch_rule("_mos_loss_backward", batched=(0, 1, 2, 4), shared=(3,))
