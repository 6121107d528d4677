"""Cross entropy of ID samples, uniform cross entropy of OOD samples, from one read of the logits."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from oodkernels import reference

OOD = -1
"""The target of OOD samples."""


class OutlierCrossEntropy(NamedTuple):
    """What :func:`outlier_cross_entropy` returns, each (...,), in nats."""

    loss: Tensor
    """logsumexp(z) - z_target of an ID sample, logsumexp(z) - mean(z) of an OOD sample: the cross
    entropy of softmax(z) to the target's class, or to the uniform distribution."""
    logsumexp: Tensor
    """logsumexp(z): minus the energy at temperature 1."""


def outlier_cross_entropy(logits: Tensor, target: Tensor) -> OutlierCrossEntropy:
    """Cross entropy where the target is a class, uniform cross entropy where it is -1, for OOD.

    What the training objectives of :mod:`oodkernels.losses` are made of.

    Args:
        logits: (..., C), float64, float32, bfloat16 or float16; any strides.
        target: (...,) int64, classes 0..C-1, or -1.

    Returns:
        An :class:`OutlierCrossEntropy`; float64 for float64 logits, else float32, under autocast
        too. Both are differentiable once in ``logits``. NaN where the row's softmax is.

    Raises:
        ValueError: ``target`` has the wrong shape or is out of range (checked on CPU; on CUDA the
            row's loss is NaN unless ``OODK_VALIDATE=1``), or there are no classes.
        TypeError: ``logits`` is not of a floating-point type above, or ``target`` not int64.
    """
    return OutlierCrossEntropy(*reference.outlier_cross_entropy(logits, target))
