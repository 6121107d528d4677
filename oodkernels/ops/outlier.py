"""Cross entropy of ID samples, uniform cross entropy of OOD samples, in one read of the logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from oodkernels._checks import accumulate_type, check_classes, check_target
from oodkernels.ops._common import (
    check_like,
    register_batch_rule,
    register_composite,
    register_not_differentiable,
)

OOD = -1
"""The target of OOD samples."""


class OutlierCrossEntropyResult(NamedTuple):
    """What :func:`outlier_cross_entropy` returns, each (...,), in nats."""

    loss: Tensor
    """Loss: logsumexp(z) - z_target of an ID sample, logsumexp(z) - mean(z) of an OOD sample: the
    cross entropy of softmax(z) to the target's class, or to the uniform distribution."""
    logsumexp: Tensor
    """Value of logsumexp(z): minus the energy at temperature 1."""


def outlier_cross_entropy(logits: Tensor, target: Tensor) -> OutlierCrossEntropyResult:
    """Cross entropy where the target is a class, uniform cross entropy where it is -1, for OOD.

    What the training objectives of :mod:`oodkernels.nn.losses` are made of.

    Args:
        logits: (..., C), float64, float32, bfloat16 or float16; any strides.
        target: (...,) int64, classes 0..C-1, or -1.

    Returns:
        An :class:`OutlierCrossEntropyResult`; float64 for float64 logits, else float32,
        under autocast too. Both are differentiable once in ``logits``. NaN where the row's softmax
        is.

    Raises:
        ValueError: ``target`` has the wrong shape or is out of range (checked on CPU; on CUDA the
            row's loss is NaN unless ``OODK_VALIDATE=1``), or there are no classes.
        TypeError: ``logits`` is not of a floating-point type above, or ``target`` not int64.
    """
    return OutlierCrossEntropyResult(*torch.ops.oodk.outlier_cross_entropy(logits, target))


def outlier_loss(
    logits: Tensor, target: Tensor, weight: float, absent: bool, mean: bool
) -> Tensor | None:
    """Weighted sum of all rows' cross entropies, its gradient computed in the same read of them.

    Args:
        logits: (..., C), as for :func:`outlier_cross_entropy`.
        target: (...,) int64, classes 0..C-1, or -1.
        weight: Of OOD samples.
        absent: The target of OOD samples is the last column, and all that have it are OOD; else
            it is the uniform distribution.
        mean: The mean of the ID samples plus that of the OOD samples, not the sum.

    Returns:
        A scalar; None where this does not pay or loses accuracy: without gradient, on CUDA, in a
        transform of ``torch.func``, and for float16, whose users scale a loss lest its gradient
        underflow, which must come first.
    """
    if (
        logits.is_cpu
        and logits.dtype != torch.float16
        and logits.requires_grad
        and torch.is_grad_enabled()
        and not torch._C._are_functorch_transforms_active()
    ):
        return _Loss.apply(logits, target, weight, absent, mean)  # type: ignore[no-untyped-call]
    return None


@torch.library.register_fake("oodk::_outlier_cross_entropy")
def _(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    check_classes("outlier_cross_entropy", logits)
    check_target("outlier_cross_entropy", logits, target)
    loss = logits.new_empty(target.shape, dtype=accumulate_type(logits.dtype))
    return loss, torch.empty_like(loss), loss.new_empty((*target.shape, 2))


@torch.library.register_fake("oodk::_outlier_cross_entropy_backward")
def _(
    grad_loss: Tensor, grad_logsumexp: Tensor, logits: Tensor, target: Tensor, stats: Tensor
) -> Tensor:
    op = "_outlier_cross_entropy_backward"
    check_classes(op, logits)
    check_target(op, logits, target)
    rows = logits.new_empty(target.shape, dtype=accumulate_type(logits.dtype))
    check_like(op, "grad_loss", grad_loss, rows)
    check_like(op, "grad_logsumexp", grad_logsumexp, rows)
    check_like(op, "stats", stats, rows.new_empty((*rows.shape, 2)))
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


class _CrossEntropy(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.oodk._outlier_cross_entropy(logits, target)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        stats = output[2]
        ctx.mark_non_differentiable(stats)
        ctx.save_for_backward(*inputs, stats)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_loss: Tensor, grad_logsumexp: Tensor, _: Tensor
    ) -> tuple[Tensor, None]:
        backward = torch.ops.oodk._outlier_cross_entropy_backward
        return backward(grad_loss, grad_logsumexp, *ctx.saved_tensors), None


@torch.library.register_fake("oodk::_outlier_loss")
def _(
    logits: Tensor, target: Tensor, weight: float, absent: bool, mean: bool
) -> tuple[Tensor, Tensor]:
    check_classes("outlier_cross_entropy", logits)
    check_target("outlier_cross_entropy", logits, target)
    loss = logits.new_empty((), dtype=accumulate_type(logits.dtype))
    return loss, torch.empty_like(logits, memory_format=torch.contiguous_format)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, weight: float, absent: bool, mean: bool
    ) -> Tensor:
        loss, grad = torch.ops.oodk._outlier_loss(logits, target, weight, absent, mean)
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        # Most losses are not scaled, and a value on the CPU costs nothing to look at.
        if torch.compiler.is_compiling() or type(scale) is not Tensor or scale.item() != 1:
            grad = grad * scale
        return grad, None, None, None, None


@register_composite("outlier_cross_entropy")
def _(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return _CrossEntropy.apply(logits, target)[:2]  # type: ignore[no-untyped-call]


register_not_differentiable("_outlier_cross_entropy")
register_not_differentiable("_outlier_cross_entropy_backward")
register_not_differentiable("_outlier_loss")

register_batch_rule("outlier_cross_entropy", batched=(0, 1))
register_batch_rule("_outlier_cross_entropy", batched=(0, 1))
register_batch_rule("_outlier_cross_entropy_backward", batched=(0, 1, 2, 3, 4))
