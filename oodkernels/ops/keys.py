"""Scores as integers that order as they do."""

from __future__ import annotations

import torch
from torch import Tensor

KEY_TYPES = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}
"""The type of a score's key, of the same width, by the type of the score."""


def keys_of_scores(scores: Tensor) -> Tensor:
    """The key of each score: ascending with the score, equal exactly where the scores are.

    Args:
        scores: Any shape, float64, float32, bfloat16 or float16.

    Returns:
        Keys of the type that :data:`KEY_TYPES` has; -0.0 has the key of 0.0. NaN keys lie beyond
        those of the infinities.
    """
    bits = (scores + 0.0).view(KEY_TYPES[scores.dtype])
    return _flipped(bits)


def scores_of_keys(keys: Tensor, dtype: torch.dtype) -> Tensor:
    """The scores that have ``keys``, as ``dtype``; -0.0 has become +0.0."""
    return _flipped(keys).view(dtype)


def order_key(scores: Tensor) -> Tensor:
    """The int32 key of each score as float32, which keeps the order of float64 but for new ties.

    Args:
        scores: As for :func:`keys_of_scores`, which says what a key is.

    Returns:
        int32 keys.
    """
    return keys_of_scores(scores.float())


def _flipped(bits: Tensor) -> Tensor:
    # A negative score's key has all bits but the sign flipped, which undoes itself.
    return torch.where(bits < 0, bits ^ torch.iinfo(bits.dtype).max, bits)
