"""Nearest neighbours: exact to the last bit, in pieces, in parts, over processes; errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from op_db import FLOATS, points_of
from points import same
from processes import ranks
from torch import Tensor

from oodkernels.ops import Neighbors, merge_neighbors, nearest_neighbors

K = 9


def twins(n: int, d: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Rows of length about 100, of which many differ by less than products of them can tell."""
    generator = torch.Generator().manual_seed(n)
    of_all = torch.Generator().manual_seed(0)
    centres = torch.randn(5, d, generator=of_all, dtype=torch.float64)
    centres *= 100 / centres.norm(dim=1, keepdim=True)
    x = centres[torch.arange(n) % 5]
    apart = torch.rand(n, 1, generator=generator) * torch.randn(n, d, generator=generator)
    x = x + (1e-9 if dtype == torch.float64 else 1e-4) * apart
    return (x * scale).to(dtype)


def by_differences(queries: Tensor, bank: Tensor, k: int, normalize: bool = False) -> Neighbors:
    """All distances by the op itself, a row of the bank a time; then the k least."""
    rows = [nearest_neighbors(queries[:1], row[None], 1, normalize) for row in bank]
    alone = torch.cat([row.distances for row in rows], 1)
    near = alone.sort(dim=1, stable=True)
    return Neighbors(near.values[:, :k], near.indices[:, :k])


@pytest.mark.parametrize("scale", [1.0, 1e-17, 1e16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_what_products_cannot_tell_is_told_by_differences(dtype: torch.dtype, scale: float) -> None:
    x, bank = twins(40, 130, dtype, scale), twins(1200, 130, dtype, scale)  # several blocks
    for normalize in (False, True):
        found = nearest_neighbors(x, bank, K, normalize)
        for q in (0, 21):
            expected = by_differences(x[q : q + 1], bank, K, normalize)
            same(Neighbors(*(column[q : q + 1] for column in found)), expected)


def test_norms_may_be_near_the_largest_number() -> None:
    """Relative to the mean of the bank they overflow, where few rows lie opposite to many."""
    side = torch.ones(4000, 1)
    side[[*range(2500, 2530), *range(3900, 3910)]] = -1
    bank = side * (1 + 1e-3 * torch.rand(4000, 33)) * (1.5e19 / 33**0.5)
    x = torch.cat([bank[2500:2520], bank[:20]])
    found = nearest_neighbors(x, bank, 25)
    for q in (0, 7, 25):
        same(nearest_neighbors(x[q : q + 1], bank, 25), Neighbors(*(c[q : q + 1] for c in found)))
    assert (found.distances[:, 0] == 0).all()


@pytest.mark.parametrize("shift", [0.0, 1e3])
def test_a_query_has_its_bits_in_any_batch(shift: float) -> None:
    x, bank = twins(60, 33, torch.float32) + shift, twins(1500, 33, torch.float32) + shift
    found = nearest_neighbors(x, bank, K)
    for part in (slice(0, 1), slice(7, 9), slice(20, 60)):
        same(nearest_neighbors(x[part], bank, K), Neighbors(*(c[part] for c in found)))


def test_parts_of_the_bank_on_threads() -> None:
    bank = points_of(9000, 8, k=900, device="cpu", dtype=torch.float32)
    bank[5000:] = bank[:4000].clone()  # ties across the parts
    x = bank[3000:3020] + 0.5
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = nearest_neighbors(x, bank, K)
        for n in (2, 3, 8):
            torch.set_num_threads(n)
            same(nearest_neighbors(x, bank, K), expected)
    finally:
        torch.set_num_threads(threads)
    assert (expected.indices.diff(dim=1)[expected.distances.diff(dim=1) == 0] > 0).all()
    assert (expected.distances.diff(dim=1) == 0).any()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_pieces_give_the_bits_of_the_whole(dtype: torch.dtype) -> None:
    x, bank = twins(20, 24, dtype), twins(300, 24, dtype)
    bank[200:] = bank[:100].clone()
    x[3] = torch.nan
    whole = nearest_neighbors(x, bank, K, True)
    for size in (1, 7, 250, 300):
        same(nearest_neighbors(x, iter(bank.split(size)), K, True), whole)
    assert (whole.indices[3] == -1).all()
    assert whole.distances[3].isnan().all()
    parts = [
        Neighbors(found.distances, torch.where(found.indices < 0, -1, found.indices + begin))
        for begin, end in ((140, 300), (0, 140))
        for found in [nearest_neighbors(x, bank[begin:end], K, True)]
    ]
    same(merge_neighbors(parts, K), whole)
    same(merge_neighbors(parts, 4), Neighbors(*(c[:, :4] for c in whole)))


def test_half_precision_is_read_as_it_is() -> None:
    x, bank = twins(20, 24, torch.float32), twins(200, 24, torch.bfloat16)
    same(nearest_neighbors(x, bank, K), nearest_neighbors(x, bank.float(), K))
    same(nearest_neighbors(x.half(), bank, K), nearest_neighbors(x.half().float(), bank.float(), K))


def search(rank: int, world: int) -> None:
    x, bank = twins(12, 24, torch.float32), twins(60, 24, torch.float32)
    bank[40:] = bank[:20].clone()
    x[5] = torch.inf
    mine, rows = x[[0, 8][rank] : [8, 12][rank]], bank[[0, 55][rank] : [55, 60][rank]]
    group = torch.distributed.group.WORLD
    same(nearest_neighbors(mine, rows, K, group=group), nearest_neighbors(mine, bank, K))
    same(
        nearest_neighbors(mine.view(2, -1, 24), rows.split(7), 60, True, group=group),
        nearest_neighbors(mine.view(2, -1, 24), bank, 60, True),
    )
    with pytest.raises(ValueError, match="at most the rows of bank, 60, got 61"):
        nearest_neighbors(mine, rows, 61, group=group)


def test_processes_share_a_bank(tmp_path: Path) -> None:
    ranks(tmp_path, 2, search)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: nearest_neighbors(x, [x, x], 9), ValueError, "the rows of bank, 8, got 9"),
        (lambda x: nearest_neighbors(x, [x], 0), ValueError, "k must be an int >= 1, got 0"),
        (lambda x: nearest_neighbors(x, [], 1), ValueError, "the rows of bank, 0, got 1"),
        (lambda x: nearest_neighbors(x, [x[0]], 1), ValueError, r"bank must have shape \(N, d\)"),
        (lambda x: nearest_neighbors(x, x.numpy(), 1), TypeError, "pieces of type ndarray"),
        (lambda x: merge_neighbors([], 1), ValueError, "parts must be at least one, got none"),
    ],
)
def test_refuses(call: Callable[[Tensor], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.randn(4, 3))
