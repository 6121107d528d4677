"""Checks of arguments that more than one room makes; ``op`` begins the message."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""The types of scores, logits and features."""


def check_dtype(op: str, name: str, x: Tensor, *dtypes: torch.dtype) -> None:
    """Raise TypeError unless x is of one of ``dtypes``."""
    if x.dtype not in dtypes:
        *others, last = [str(dtype).removeprefix("torch.") for dtype in dtypes]
        expected = f"{', '.join(others)} or {last}" if others else last
        raise TypeError(f"{op}: {name} must be {expected}, got {x.dtype}")


def check_floating(op: str, name: str, x: Tensor) -> None:
    """Raise unless x is of one of the types :data:`FLOATS`, and not a scalar."""
    check_dtype(op, name, x, *FLOATS)
    if x.dim() < 1:
        raise ValueError(f"{op}: {name} must have at least one dimension, got a scalar")


def check_same_dtype(op: str, name: str, t: Tensor, other: str, x: Tensor) -> None:
    """Raise TypeError unless t is of the type of x."""
    if t.dtype != x.dtype:
        raise TypeError(f"{op}: {name} must have the type of {other}, {x.dtype}, got {t.dtype}")


def check_device(op: str, name: str, t: Tensor, other: str, x: Tensor) -> None:
    """Raise ValueError unless t is on the device of x."""
    if t.device != x.device:
        raise ValueError(
            f"{op}: {name} must be on the device of {other}, {x.device}, got {t.device}"
        )


def check_at_least(op: str, name: str, value: int, least: int) -> None:
    """Raise ValueError unless least <= value < 2^31 - 1."""
    if not least <= value < 2**31 - 1:
        raise ValueError(
            f"{op}: {name} must be at least {least} and less than 2^31 - 1, got {value}"
        )


def check_classes(op: str, logits: Tensor) -> None:
    """Raise unless logits are of a floating-point type and have at least one class."""
    check_floating(op, "logits", logits)
    if logits.shape[-1] < 1:
        raise ValueError(
            f"{op}: logits must have at least one class, got shape {tuple(logits.shape)}"
        )


def check_target(op: str, logits: Tensor, target: Tensor) -> None:
    """Raise unless target is int64, one class a row of logits, on their device."""
    check_dtype(op, "target", target, torch.int64)
    if target.shape != logits.shape[:-1]:
        raise ValueError(
            f"{op}: target must have shape logits.shape[:-1], one class a row, got "
            f"{tuple(target.shape)} for logits {tuple(logits.shape)}"
        )
    check_device(op, "target", target, "logits", logits)


def accumulate_type(dtype: torch.dtype) -> torch.dtype:
    """The type half precision is accumulated and returned in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
