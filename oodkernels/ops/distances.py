"""Rows beside those rows of a table that they name."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from oodkernels._checks import accumulate_type, check_device, check_dtype, check_floating
from oodkernels.ops._common import mapped_first, register_not_differentiable


class IndexedDistances(NamedTuple):
    """What :func:`indexed_distances` returns, (..., m) each, in the type of the table."""

    inner: Tensor
    """Inner product."""
    l1: Tensor
    """L1 norm of the difference."""
    l2: Tensor
    """Euclidean norm of the difference."""


def indexed_distances(x: Tensor, table: Tensor, index: Tensor) -> IndexedDistances:
    """Inner product and distances of each row and the rows of a table that it names.

    Such as features and the mean of the class that is predicted: no rows of the table are gathered
    in memory. All is added up in float64.

    Args:
        x: (..., d), d >= 1; float64, float32, bfloat16 or float16; any strides.
        table: (K, d), float64 for float64 x, else float32.
        index: (..., m) rows of the table, int64.

    Returns:
        An :class:`IndexedDistances`. No gradient flows through it.

    Raises:
        ValueError: Shapes do not fit, or, on the CPU, an index is outside 0..K - 1 (on CUDA it
            gives NaN).
        TypeError: A tensor is not of a type above.
    """
    return IndexedDistances(*torch.ops.oodk.indexed_distances(x, table, index))


@torch.library.register_fake("oodk::indexed_distances")
def _(x: Tensor, table: Tensor, index: Tensor) -> tuple[Tensor, ...]:
    op = "indexed_distances"
    check_floating(op, "x", x)
    d = x.shape[-1]
    if d < 1:
        raise ValueError(f"{op}: x must have at least one column, got shape {tuple(x.shape)}")
    check_dtype(op, "table", table, accumulate_type(x.dtype))
    if table.dim() != 2 or table.shape[1] != d:
        raise ValueError(
            f"{op}: table must have shape (K, d) with the d of x, {d}, got {tuple(table.shape)}"
        )
    check_dtype(op, "index", index, torch.int64)
    if index.dim() != x.dim() or index.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"{op}: index must have shape (..., m) for x (..., d), got {tuple(index.shape)} for x "
            f"{tuple(x.shape)}"
        )
    check_device(op, "table", table, "x", x)
    check_device(op, "index", index, "x", x)
    kind = accumulate_type(x.dtype)
    return tuple(index.new_empty(index.shape, dtype=kind) for _ in range(3))


def _vmap(
    info: Any, in_dims: tuple[int | None, ...], x: Tensor, table: Tensor, index: Tensor
) -> tuple[Any, Any]:
    """Rows more than there are; of tables that are mapped over one below the other."""
    n, (at, tables, named) = info.batch_size, in_dims
    x, index = mapped_first(x, at, n), mapped_first(index, named, n)
    if tables is not None:
        table = table.movedim(tables, 0)
        first = torch.arange(n, device=index.device) * table.shape[1]
        inside = (index >= 0) & (index < table.shape[1])  # of its own table, and not of another
        index = torch.where(inside, index + first.view(-1, *[1] * (index.dim() - 1)), -1)
        table = table.flatten(0, 1)
    out = torch.ops.oodk.indexed_distances(x, table, index)
    return out, tuple(0 for _ in out)


register_not_differentiable("indexed_distances")
torch.library.register_vmap("oodk::indexed_distances", _vmap)
