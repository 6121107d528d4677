"""Checks of arguments that more than one room makes; ``op`` begins the message."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import numpy as np
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


def plain(value: Any) -> Any:
    """A NumPy scalar as the Python number, bool or text that prints like it; all else as it is.

    So float32's 0.95 becomes 0.95 and not 0.949999988079071.
    """
    if isinstance(value, np.floating):
        return float(str(value))
    return value.item() if isinstance(value, np.generic) else value


def check_tpr(op: str, tpr: Any, name: str = "tpr") -> float:
    """A true positive rate, or another share, as a float; raise unless it is in (0, 1]."""
    return _share(op, name, tpr, "(0, 1]", with_one=True)


def check_confidence(op: str, confidence: Any, name: str = "confidence") -> float:
    """The confidence of an interval as a float; raise unless it is a number in (0, 1)."""
    return _share(op, name, confidence, "(0, 1)", with_one=False)


def _share(op: str, name: str, value: Any, range_: str, *, with_one: bool) -> float:
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{op}: {name} must be a number in {range_}, got {value!r}")
    share = float(value)
    if not (0 < share < 1 or (with_one and share == 1)):
        raise ValueError(f"{op}: {name} must be in {range_}, got {value}")
    return share


def check_number(op: str, name: str, value: Any) -> float:
    """A number as a float; raise where it is none or NaN."""
    number = check_real(op, name, value)
    if math.isnan(number):
        raise ValueError(f"{op}: {name} must not be NaN")
    return number


def check_count(op: str, name: str, value: Any, least: int = 1) -> int:
    """A number of things as an int; raise unless it is an integer of at least ``least``."""
    count = plain(value)
    if isinstance(count, bool) or not isinstance(count, int) or count < least:
        raise ValueError(f"{op}: {name} must be an int >= {least}, got {count!r}")
    return count


def check_flag(op: str, name: str, value: Any) -> bool:
    """A bool; raise unless it is one, NumPy's included."""
    flag = plain(value)
    if not isinstance(flag, bool):
        raise TypeError(f"{op}: {name} must be True or False, got {flag!r}")
    return flag


def check_integers(op: str, name: str, x: Tensor, when: str = "") -> None:
    """Raise TypeError unless x holds integers, which bool is not; ``when`` says where it must."""
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{op}: {name} must be integers{when}, got {x.dtype}")


def check_no_nan(op: str, name: str, x: Tensor) -> None:
    """Raise ValueError where x holds NaN, with the number and the first index of x flattened."""
    nan = x.isnan()
    if bool(nan.any()):
        raise ValueError(
            f"{op}: {name} must not be NaN, got {int(nan.sum())} NaN, the first at index "
            f"{int(nan.reshape(-1).nonzero()[0])}"
        )


def check_int(op: str, name: str, value: Any) -> int:
    """An int of either sign, NumPy's included; raise unless it is one."""
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"{op}: {name} must be an int, got {number!r}")
    return number


def check_real(op: str, name: str, value: Any) -> float:
    """A number as a float; raise unless it is one, NumPy's included."""
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, Real):
        raise TypeError(f"{op}: {name} must be a number, got {number!r}")
    return float(number)


def check_class_ids(op: str, labels: Any, n: int) -> Tensor:
    """Labels of n samples as int64; raise unless they are class ids, or -1 for OOD."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"{op}: labels must be a tensor, got {type(labels).__name__}")
    check_integers(op, "labels", labels)
    if labels.shape != (n,):
        raise ValueError(f"{op}: labels must be ({n},), got {tuple(labels.shape)}")
    if n and (low := int(labels.min())) < -1:
        raise ValueError(f"{op}: labels must be class ids or -1 for OOD, got {low}")
    return labels.long()
