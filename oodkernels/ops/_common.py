"""What the ops' fake kernels, autograd and vmap rules share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


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
