"""What the ops' fake kernels, autograd and vmap rules share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from oodkernels._checks import check_device, check_dtype

library = torch.library.Library("oodk", "FRAGMENT")


def check_like(op: str, name: str, t: Tensor, expected: Tensor) -> None:
    """Raise unless t, saved by a forward or its gradient, has the type and shape it came with."""
    check_dtype(op, name, t, expected.dtype)
    if t.shape != expected.shape:
        raise ValueError(f"{op}: {name} has the wrong shape, {tuple(t.shape)}")
    check_device(op, name, t, "logits", expected)


def mapped_first(t: Tensor, dim: int | None, n: int) -> Tensor:
    """A tensor with the dimension that is mapped over first; None: n times the same."""
    return t.expand(n, *t.shape) if dim is None else t.movedim(dim, 0)


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
            moved[i] = mapped_first(args[i], in_dims[i], info.batch_size)
        out = call(*moved)
        return out, tuple(0 for _ in out) if isinstance(out, tuple) else 0

    torch.library.register_vmap(f"oodk::{op}", rule)


def register_not_differentiable(op: str) -> None:
    """Give the outputs of ``op`` no gradient, whatever its inputs require."""
    library.impl(op, torch.library.fallthrough_kernel, "Autograd")


def register_composite(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make ``op`` of other ops and of autograd functions, under ``torch.func``'s transforms too."""

    def register(kernel: Callable[..., Any]) -> Callable[..., Any]:
        library.impl(op, kernel, "CompositeImplicitAutograd")
        # An autograd function meets the transforms itself: the op must come apart before.
        library.impl(op, kernel, "FuncTorchDynamicLayerFrontMode")
        return kernel

    return register
