"""The CUDA kernels of nearest_neighbors, run on the CPU (cuda_emulator.py)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cuda_emulator import DTYPES, INDEX, Emulator, needs_compiler
from op_db import Sample, compare_neighbors, neighbor_samples
from torch import Tensor

from oodkernels import reference

pytestmark = needs_compiler

f64, f32, bf16, f16 = DTYPES


def search(
    emulator: Emulator,
    queries: Tensor,
    bank: Tensor,
    k: int,
    normalize: bool = False,
    chunk: int = 1024,
    piece: int = 1 << 15,
    **values: Any,
) -> list[Tensor]:
    rows = queries.reshape(-1, queries.shape[-1])
    found = emulator.run(
        "neighbors_search",
        {"queries": rows, "bank": bank},
        {"distances": f64 if queries.dtype == f64 else f32, "indices": INDEX},
        dtype=DTYPES.index(queries.dtype),
        bank_type=DTYPES.index(bank.dtype),
        count=len(rows),
        n=len(bank),
        query_stride=rows.shape[1],
        bank_stride=bank.shape[1],
        d=rows.shape[1],
        k=k,
        normalize=int(normalize),
        chunk=chunk,
        piece=piece,
        **{"orders": 2, **values},
    )
    return [x.view(*queries.shape[:-1], k) for x in found]


def samples() -> Iterator[Any]:
    """All in float32, two in the other types."""
    for dtype in DTYPES:
        found = [s for s in neighbor_samples("cpu", dtype) if s.args[0].numel()]
        for sample in found if dtype == f32 else [found[1], found[8]]:
            yield pytest.param(sample, id=f"{sample.name} {dtype}")


@pytest.mark.parametrize("sample", list(samples()))
def test_nearest_neighbors(emulator: Emulator, sample: Sample) -> None:
    queries, bank, k, *more = sample.args
    normalize = bool(more and more[0]) or sample.kwargs.get("normalize", False)
    found = search(emulator, queries, bank, k, normalize)
    expected = reference.nearest_neighbors(queries.double(), bank.double(), k, normalize)
    compare_neighbors(sample, found, expected)
    rtol, atol = (1e-12, 1e-12) if queries.dtype == f64 else (2e-5, 2e-6)
    torch.testing.assert_close(found[0].double(), expected[0], rtol=rtol, atol=atol, equal_nan=True)


@pytest.mark.parametrize("k", [1, 1100])
def test_chunks_and_pieces_change_no_bit(emulator: Emulator, k: int) -> None:
    """More are held than are merged at once, and more kept than held; ties across the pieces."""
    generator = torch.Generator().manual_seed(k)
    bank = torch.randn(1300, 3, generator=generator).mul(2).round()
    bank[50:] *= torch.linspace(3, 1, 1250)[:, None].round()  # nearer and nearer
    queries = torch.randn(3, 3, generator=generator).round()
    whole = search(emulator, queries, bank, k)
    for sizes in ({"chunk": 2, "piece": 500},):
        for x, y in zip(search(emulator, queries, bank, k, orders=1, **sizes), whole, strict=True):
            assert torch.equal(x, y)
    for x, y in zip(whole, reference.nearest_neighbors(queries, bank, k), strict=True):
        assert torch.equal(x, y)


def test_rows_left_out_are_nobodys_neighbours(emulator: Emulator) -> None:
    queries, bank = torch.randn(5, 6), torch.randn(90, 6).bfloat16()
    bank[3, 1], bank[80] = torch.inf, torch.nan
    distances, indices = search(emulator, queries, bank, 90)
    assert (indices[:, 88:] == -1).all()
    assert distances[:, 88:].isnan().all()
    assert not ((indices == 3) | (indices == 80)).any()
    assert distances[:, :88].isfinite().all()
