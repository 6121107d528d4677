"""What the ops' fake kernels, autograd and vmap rules share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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


def register_batch_rule(op: str, batched: tuple[int, ...], shared: tuple[int, ...] = ()) -> None:
    """Let ``torch.func.vmap`` treat a mapped dimension as one more leading dimension.

    Args:
        op: Name of the op, without namespace.
        batched: Positions of the arguments that have the op's leading dimensions.
        shared: Positions of the tensors that all rows share and that cannot be mapped over.
    """
    call: Callable[..., Any] = getattr(torch.ops.oodk, op)

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        for i in shared:
            if in_dims[i] is not None:
                raise ValueError(
                    f"{op}: vmap over groups is not supported: all rows share one grouping"
                )
        moved = list(args)
        for i in batched:
            dim = in_dims[i]
            if dim is None:
                moved[i] = args[i].unsqueeze(0).expand(info.batch_size, *args[i].shape)
            else:
                moved[i] = args[i].movedim(dim, 0)
        out = call(*moved)
        return out, tuple(0 for _ in out) if isinstance(out, tuple) else 0

    torch.library.register_vmap(f"oodk::{op}", rule)


def register_not_differentiable(op: str, instead: str = "") -> None:
    """Make a backward through ``op`` an error, where torch would warn or leave out the gradient."""

    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(f"{op} is not differentiable{instead and f': use {instead}'}")

    torch.library.register_autograd(f"oodk::{op}", backward)
