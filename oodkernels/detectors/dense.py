"""Dense prediction: logits and features of every pixel, as detectors read rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from oodkernels._checks import check_int, check_integers
from oodkernels.detectors.batch import Batch

__all__ = ["is_dense", "pixel_rows", "pixels_of", "without_void"]

_BLOCK = 1 << 20  # numbers of a block's logits and features: some megabytes


def is_dense(tensor: Any) -> bool:
    """Whether logits or features are those of pixels, (N, channels, H, W)."""
    return getattr(tensor, "ndim", 0) == 4


def pixels_of(
    where: str,
    logits: Any,
    features: Any,
    x: Any = None,
    confidence: Any = None,
) -> tuple[int, int, int] | None:
    """The shape (N, H, W) of dense logits (N, C, H, W) and features (N, d, H, W), None for others.

    Args:
        where: What errors start with.
        logits: As given.
        features: As given.
        x: Which dense ones are not for.
        confidence: Likewise.

    Raises:
        ValueError: One is dense and the other is not, or of other pixels; or there is ``x``.
        TypeError: One is not floating-point.
    """
    if not (is_dense(logits) or is_dense(features)):
        return None
    given = {"logits": logits, "features": features}
    tensors = {n: t for n, t in given.items() if isinstance(t, Tensor)}
    dense = [t for t in tensors.values() if t.dim() == 4]
    if not dense:
        return None
    n, _, h, w = dense[0].shape
    for name, t in tensors.items():
        if t.dim() != 4 or (t.shape[0], *t.shape[2:]) != (n, h, w):
            raise ValueError(
                f"{where}: {name} must be of the same pixels, ({n}, channels, {h}, {w}), got "
                f"{tuple(t.shape)}"
            )
        if not t.is_floating_point():
            raise TypeError(f"{where}: {name} must be floating-point, got {t.dtype}")
    if x is not None or confidence is not None:
        raise ValueError(f"{where}: x and confidence are not for logits and features of pixels")
    return n, h, w


def pixel_rows(
    where: str,
    logits: Any,
    features: Any,
    labels: Any = None,
) -> Iterator[tuple[Batch, Tensor | None]]:
    """Dense tensors as batches of rows, views of some pixels of an image, in order.

    Args:
        where: What errors start with.
        logits: (N, C, H, W), or None.
        features: (N, d, H, W), or None.
        labels: (N, H, W) integers, or None.

    Raises:
        ValueError: Labels are not of the same pixels.
        TypeError: Labels are not integers.
    """
    tensors = [t for t in (logits, features) if t is not None]
    n, _, h, w = tensors[0].shape
    if labels is not None:
        check_integers(where, "labels", labels)
        if labels.shape != (n, h, w):
            raise ValueError(
                f"{where}: labels must be ({n}, {h}, {w}), as there are pixels, got "
                f"{tuple(labels.shape)}"
            )
    rows = max(1, _BLOCK // max(t.shape[1] for t in tensors))
    for i in range(n):
        flat = [None if t is None else t[i].flatten(1).T for t in (logits, features)]
        own = None if labels is None else labels[i].flatten()
        for begin in range(0, h * w, rows):
            part = slice(begin, begin + rows)
            z, f = (None if t is None else t[part] for t in flat)
            yield Batch(logits=z, features=f), None if own is None else own[part]


def without_void(where: str, labels: Any, void: int | None) -> Tensor | None:
    """Labels with -1, which is left out, in place of the void label.

    Raises:
        ValueError: There is a void label and there are no labels.
    """
    if void is None:
        return labels
    void = check_int(where, "void", void)
    if labels is None:
        raise ValueError(f"{where}: labels must be given where there is a void label")
    return torch.where(labels == void, -1, labels)
