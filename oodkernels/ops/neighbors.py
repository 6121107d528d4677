"""The k nearest rows of a bank: exact, without the matrix of distances."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from oodkernels._checks import (
    FLOATS,
    accumulate_type,
    check_count,
    check_device,
    check_dtype,
    check_floating,
)
from oodkernels.ops._common import register_batch_rule, register_not_differentiable


class Neighbors(NamedTuple):
    """What :func:`nearest_neighbors` returns."""

    distances: Tensor
    """(..., k): squared Euclidean distances, ascending; float64 for float64 queries, else float32.
    NaN for a query that holds NaN or infinity, or whose squared norm overflows."""
    indices: Tensor
    """(..., k) int64: rows of the bank; -1 where the distance is NaN."""


def nearest_neighbors(
    queries: Tensor,
    bank: Tensor | Iterable[Tensor],
    k: int,
    normalize: bool = False,
    *,
    group: dist.ProcessGroup | None = None,
) -> Neighbors:
    """Find the k nearest rows of a bank for every query, exactly.

    A distance is the sum of the squared differences of two rows, so nothing cancels; it is squared,
    as faiss has it. Products of matrices only leave out rows that are certainly farther than the
    k-th: the result is that of comparing all distances, equal ones by the lowest row, whatever the
    number of threads, the other queries, and the pieces that a bank comes in. A bank of float16 or
    bfloat16 is read as such and accumulated in float32.

    Args:
        queries: (..., d), float64, float32, bfloat16 or float16; any strides.
        bank: (N, d), of any of these types, but float64 if and only if the queries are. Or pieces
            of it in order, such as the chunks of a file: one at a time is in memory, and rows are
            numbered through.
        k: 1 to N.
        normalize: Divide rows of both by their Euclidean norms as they are read; zero rows stay.
        group: Processes that each hold a part of the bank, of this process in ``bank``, and call
            this together, each with queries of its own; rows are numbered through by rank.
            ``dist.group.WORLD`` for all; None for this process alone.

    Returns:
        :class:`Neighbors`. Not differentiable.

    Raises:
        ValueError: A wrong shape, ``k`` is not in 1 to N, or the bank holds a row that is not
            finite (on CUDA with ``OODK_VALIDATE=1`` only; else it is nobody's neighbour).
        TypeError: ``queries`` or ``bank`` is not of a type above.
    """
    if group is not None:
        return _of_all_processes(queries, bank, k, normalize, group)
    if isinstance(bank, Tensor):
        return Neighbors(*torch.ops.oodk.nearest_neighbors(queries, bank, k, normalize))
    found, rows = _of_pieces(queries, bank, check_count("nearest_neighbors", "k", k), normalize)
    _check_rows(k, rows)
    return found


def merge_neighbors(parts: Iterable[Neighbors], k: int) -> Neighbors:
    """The k nearest of what parts of a bank have: the bits that the whole bank has.

    Args:
        parts: Of the same queries, with rows of the whole bank; of any numbers of neighbours.
        k: How many; fewer where the parts have fewer together.

    Returns:
        :class:`Neighbors` with equal distances by the lowest row.

    Raises:
        ValueError: There are no parts.
    """
    parts = list(parts)
    if not parts:
        raise ValueError("merge_neighbors: parts must be at least one, got none")
    distances, indices = (torch.cat(columns, -1) for columns in zip(*parts, strict=True))
    by_row = indices.sort(dim=-1, stable=True)
    by_distance = distances.gather(-1, by_row.indices).sort(dim=-1, stable=True)
    return Neighbors(
        by_distance.values[..., :k].contiguous(),
        by_row.values.gather(-1, by_distance.indices[..., :k]),
    )


def _check_rows(k: int, rows: int) -> None:
    if not 1 <= k <= rows:
        raise ValueError(
            f"nearest_neighbors: k must be at least 1 and at most the rows of bank, {rows}, got {k}"
        )


def _of_pieces(
    queries: Tensor, pieces: Iterable[Tensor], k: int, normalize: bool
) -> tuple[Neighbors, int]:
    """At most k neighbours among the rows of the pieces, and the number of these rows."""
    empty = (*queries.shape[:-1], 0)
    found = Neighbors(
        queries.new_empty(empty, dtype=accumulate_type(queries.dtype)),
        queries.new_empty(empty, dtype=torch.int64),
    )
    rows = 0
    for piece in pieces:
        if not isinstance(piece, Tensor):
            raise TypeError(
                f"nearest_neighbors: bank must be a tensor or tensors in order, got pieces of type "
                f"{type(piece).__name__}"
            )
        piece = piece.to(queries.device)
        if piece.dim() != 2 or len(piece):  # the op tells what is wrong with a shape
            count = min(k, len(piece)) if piece.dim() else k
            near = Neighbors(*torch.ops.oodk.nearest_neighbors(queries, piece, count, normalize))
            indices = torch.where(near.indices < 0, -1, near.indices + rows)
            found = merge_neighbors([found, Neighbors(near.distances, indices)], k)
        rows += len(piece)
    return found, rows


def _of_all_processes(
    queries: Tensor,
    bank: Tensor | Iterable[Tensor],
    k: int,
    normalize: bool,
    group: dist.ProcessGroup,
) -> Neighbors:
    """Each process's queries meet all parts of the bank; k candidates of each part come back."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    flat = queries.reshape(-1, queries.shape[-1])
    everyone: list[Tensor] = _gathered(flat, group)
    pieces = [bank] if isinstance(bank, Tensor) else bank
    together, rows = _of_pieces(torch.cat(everyone), pieces, k, normalize)
    counts = [torch.zeros(1, dtype=torch.int64, device=queries.device) for _ in range(ranks)]
    dist.all_gather(counts, counts[0].new_tensor([rows]), group=group)
    _check_rows(k, int(sum(counts)))
    sizes = [len(part) for part in everyone]
    parts = []
    before = 0
    for count, *columns in zip(
        counts,
        *(_gathered(column.T.contiguous(), group) for column in together),
        strict=True,
    ):
        distances, indices = (column.T.split(sizes)[rank] for column in columns)
        parts.append(Neighbors(distances, torch.where(indices < 0, -1, indices + before)))
        before += int(count)
    found = merge_neighbors(parts, k)
    return Neighbors(*(column.reshape(*queries.shape[:-1], k) for column in found))


def _gathered(local: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """The rows of every process, which may hold different numbers of them."""
    ranks = dist.get_world_size(group)
    length = torch.tensor([len(local)], device=local.device)
    lengths = [torch.empty_like(length) for _ in range(ranks)]
    dist.all_gather(lengths, length, group=group)
    padded = local.new_zeros((int(max(lengths)), *local.shape[1:]))
    padded[: len(local)] = local
    parts = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(parts, padded, group=group)
    return [part[: int(n)] for part, n in zip(parts, lengths, strict=True)]


@torch.library.register_fake("oodk::nearest_neighbors")
def _(queries: Tensor, bank: Tensor, k: int, normalize: bool = False) -> tuple[Tensor, Tensor]:
    op = "nearest_neighbors"
    check_floating(op, "queries", queries)
    check_dtype(op, "bank", bank, *FLOATS)
    if (bank.dtype == torch.float64) != (queries.dtype == torch.float64):
        raise TypeError(
            f"{op}: bank must be float64 where queries are, and only there, got {bank.dtype} for "
            f"queries {queries.dtype}"
        )
    check_device(op, "bank", bank, "queries", queries)
    if queries.shape[-1] < 1:
        raise ValueError(
            f"{op}: queries must have at least one feature, got shape {tuple(queries.shape)}"
        )
    if bank.dim() != 2 or bank.shape[1] != queries.shape[-1]:
        raise ValueError(
            f"{op}: bank must have shape (N, d) with the d of queries, {queries.shape[-1]}, got "
            f"{tuple(bank.shape)}"
        )
    _check_rows(k, bank.shape[0])
    shape = (*queries.shape[:-1], k)
    return (
        queries.new_empty(shape, dtype=accumulate_type(queries.dtype)),
        queries.new_empty(shape, dtype=torch.int64),
    )


register_not_differentiable("nearest_neighbors")
register_batch_rule("nearest_neighbors", batched=(0,))
