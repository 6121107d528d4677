"""Counting scores into a table of bins, what the streaming metrics are made of."""

from __future__ import annotations

import torch
from torch import Tensor

from oodkernels._checks import check_device, check_dtype, check_floating

N_PREFIXES = 1 << 16
N_FACTS = 4
"""Columns of ``counts`` after the counters: scores counted, scores refused, rounded, low bits."""


def roc_histogram_(
    counts: Tensor,
    table: Tensor,
    scores: Tensor,
    side: int,
    rows: Tensor | None = None,
    atoms: Tensor | None = None,
) -> None:
    """Count scores into the bins of a table, in place.

    A score's key (:func:`~oodkernels.ops.keys.order_key`) has a 16-bit prefix,
    ``(key >> 16) + 32768``. The prefix's entry in ``table`` says where its bins start and how many
    of the 16 low bits they drop; a key listed in ``atoms`` has a counter of its own instead.
    Integers throughout: the result does not depend on threads or order.

    Args:
        counts: (R, B + A + 4) int64, contiguous. A row holds B bins, A atoms and four facts about
            its scores: how many were counted, how many refused, how many float64 values float32
            cannot hold, and the bitwise OR of the low 16 bits of all values as float32 (the last
            two in row ``side``, whatever ``rows``).
        table: (65536,) int64, one entry a prefix: ``shift | start << 5 | first_atom << 32 |
            n_atoms << 56``, with shift in 0..16 and at most 127 atoms.
        scores: Any shape and strides, float64, float32, bfloat16 or float16.
        side: Row of ``counts``.
        rows: None, or of the shape of ``scores``, uint8 or bool: added to ``side`` for each score.
        atoms: None, or (A,) int32 keys, ascending.

    Raises:
        ValueError: Shapes or devices do not match, ``counts`` is not contiguous, ``side`` is no
            row; on CPU also: a score is NaN (with number and first index), ``rows`` leads outside
            of ``counts``, or ``table`` does. ``counts`` is then as it was but for the low bits. On
            CUDA such scores are counted as refused instead.
        TypeError: A tensor is not of a type above.
    """
    torch.ops.oodk.roc_histogram_(counts, table, scores, side, rows, atoms)


@torch.library.register_fake("oodk::roc_histogram_")
def _(
    counts: Tensor,
    table: Tensor,
    scores: Tensor,
    side: int,
    rows: Tensor | None = None,
    atoms: Tensor | None = None,
) -> None:
    _check_histogram("roc_histogram_", counts, table, scores, side, rows, atoms)


def _check_histogram(
    op: str,
    counts: Tensor,
    table: Tensor,
    scores: Tensor,
    side: int,
    rows: Tensor | None,
    atoms: Tensor | None,
) -> None:
    check_floating(op, "scores", scores.reshape(-1))
    check_dtype(op, "counts", counts, torch.int64)
    check_device(op, "counts", counts, "scores", scores)
    check_dtype(op, "table", table, torch.int64)
    check_device(op, "table", table, "scores", scores)
    if tuple(table.shape) != (N_PREFIXES,):
        raise ValueError(f"{op}: table must have shape (65536,), got {tuple(table.shape)}")
    n_atoms = 0
    if atoms is not None:
        check_dtype(op, "atoms", atoms, torch.int32)
        check_device(op, "atoms", atoms, "scores", scores)
        if atoms.dim() != 1:
            raise ValueError(f"{op}: atoms must have shape (A,), got {tuple(atoms.shape)}")
        n_atoms = atoms.shape[0]
    if counts.dim() != 2 or counts.shape[1] <= n_atoms + N_FACTS:
        raise ValueError(
            f"{op}: counts must have shape (rows, bins + atoms + {N_FACTS}), at least one bin, got "
            f"{tuple(counts.shape)} for {n_atoms} atoms"
        )
    if not counts.is_contiguous():
        raise ValueError(f"{op}: counts must be contiguous")
    if not 0 <= side < counts.shape[0]:
        raise ValueError(f"{op}: side must be in 0..{counts.shape[0] - 1}, got {side}")
    if rows is not None:
        check_dtype(op, "rows", rows, torch.uint8, torch.bool)
        check_device(op, "rows", rows, "scores", scores)
        if rows.shape != scores.shape:
            raise ValueError(
                f"{op}: rows must have the shape of scores, {tuple(scores.shape)}, got "
                f"{tuple(rows.shape)}"
            )


def steer_histogram_(
    counts: Tensor,
    blocks: Tensor,
    table: Tensor,
    atoms: Tensor,
    used: Tensor,
    scale: Tensor,
    adapted: Tensor,
    scores: Tensor,
    side: int,
    rows: Tensor | None,
    first: bool,
    half: bool,
    share: float,
) -> None:
    """Put the bins of a histogram where scores that are about to be counted would crowd, in place.

    On CPU. The first seven are the fields of the sketch in ``oodkernels.metrics.streaming``, which
    says what becomes of them; ``scores`` to ``rows`` are those of :func:`roc_histogram_`. Nothing
    is done where little is new and a sample crowds no bin.

    Args:
        counts: (R, B + A + 4) int64.
        blocks: (9, 65536) int32.
        table: (65536,) int64.
        atoms: (A,) int32.
        used: () int64.
        scale: () float64.
        adapted: () int64.
        scores: Any shape, float64, float32, bfloat16 or float16.
        side: Row of ``counts``.
        rows: None, or of the shape of ``scores``, uint8 or bool.
        first: These are the first scores: look closer at them.
        half: Whether the first blocks resolve float16.
        share: The share of a side's scores that a bin may hold, > 0.

    Raises:
        ValueError: Shapes or devices do not match, something is not contiguous, ``share`` is not
            positive, or ``table`` or ``blocks`` lead outside of ``counts``.
        TypeError: A tensor is not of a type above.
    """
    torch.ops.oodk._steer_histogram_(
        counts, blocks, table, atoms, used, scale, adapted, scores, side, rows, first, half, share
    )


@torch.library.register_fake("oodk::_steer_histogram_")
def _(
    counts: Tensor,
    blocks: Tensor,
    table: Tensor,
    atoms: Tensor,
    used: Tensor,
    scale: Tensor,
    adapted: Tensor,
    scores: Tensor,
    side: int,
    rows: Tensor | None,
    first: bool,
    half: bool,
    share: float,
) -> None:
    op = "_steer_histogram_"
    _check_histogram(op, counts, table, scores, side, rows, atoms)
    n_atoms = atoms.numel()
    for name, t, dtype, shape in (
        ("blocks", blocks, torch.int32, (9, N_PREFIXES)),
        ("table", table, torch.int64, (N_PREFIXES,)),
        ("atoms", atoms, torch.int32, (n_atoms,)),
        ("used", used, torch.int64, ()),
        ("scale", scale, torch.float64, ()),
        ("adapted", adapted, torch.int64, ()),
    ):
        check_dtype(op, name, t, dtype)
        check_device(op, name, t, "scores", scores)
        if tuple(t.shape) != shape or not t.is_contiguous():
            text = "(A,)" if name == "atoms" else str(shape)
            raise ValueError(
                f"{op}: {name} must be contiguous, of shape {text}, got {tuple(t.shape)}"
            )
    if not share > 0:
        raise ValueError(f"{op}: share must be positive, got {share}")
