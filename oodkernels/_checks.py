"""Checks of arguments that more than one room makes; ``op`` begins the message."""

from __future__ import annotations

import torch
from torch import Tensor

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_floating(op: str, name: str, x: Tensor) -> None:
    """Raise TypeError unless x holds one of the four floating-point types of scores and logits."""
    if x.dtype not in _FLOATS:
        raise TypeError(
            f"{op}: {name} must be float64, float32, bfloat16 or float16, got {x.dtype}"
        )
    if x.dim() < 1:
        raise ValueError(f"{op}: {name} must have at least one dimension, got a scalar")


def check_classes(op: str, logits: Tensor) -> None:
    """Raise unless logits are of a floating-point type and have at least one class."""
    check_floating(op, "logits", logits)
    if logits.shape[-1] < 1:
        raise ValueError(
            f"{op}: logits must have at least one class, got shape {tuple(logits.shape)}"
        )


def check_target(op: str, logits: Tensor, target: Tensor) -> None:
    """Raise unless target is int64, one class a row of logits, on their device."""
    if target.dtype != torch.int64:
        raise TypeError(f"{op}: target must be int64, got {target.dtype}")
    if target.shape != logits.shape[:-1]:
        raise ValueError(
            f"{op}: target must have shape logits.shape[:-1], one class a row, got "
            f"{tuple(target.shape)} for logits {tuple(logits.shape)}"
        )
    if target.device != logits.device:
        raise ValueError(
            f"{op}: target must be on the device of logits, {logits.device}, got {target.device}"
        )


def accumulate_type(dtype: torch.dtype) -> torch.dtype:
    """The type half precision is accumulated and returned in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
