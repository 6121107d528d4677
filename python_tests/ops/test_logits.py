"""Scores of logits: what one row leaves behind changes nothing of the next."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from op_db import special_rows
from torch import Tensor

from oodkernels import reference
from oodkernels.ops import gen_scores, logit_scores


def rows_of_all_kinds(width: int, dtype: torch.dtype) -> Tensor:
    """Neighbours unlike each other: large and small, shifted, tied, with NaN and infinities."""
    generator = torch.Generator().manual_seed(width)
    z = torch.randn(64, width, generator=generator)
    z = z * torch.tensor([4.0, 0.1, 30.0, 1.0]).repeat(16)[:, None]
    z = z + torch.tensor([0.0, 200.0, -50.0]).repeat(22)[:64, None]
    z[::5] = z[::5].round()
    z[1::16, width // 3 :] = z[1::16, :1]  # the k-th largest is one of many equal ones
    z = torch.cat([z.to(dtype), special_rows(width, "cpu", dtype)])
    return z[torch.randperm(len(z), generator=generator)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("width", [50, 130, 1000])
def test_a_row_has_its_bits_in_any_batch(width: int, dtype: torch.dtype) -> None:
    z = rows_of_all_kinds(width, dtype)
    scores = partial(gen_scores, gamma=[0.1, 0.5, 0.1], m=[10, 45, 100])
    found = scores(z)
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(1))
    alone = torch.stack([scores(row) for row in z])
    for other in (alone, scores(z[order])[order.argsort()]):
        torch.testing.assert_close(found, other, rtol=0, atol=0, equal_nan=True)
    together = logit_scores(z)
    for i, row in enumerate(z):
        for a, b in zip(together, logit_scores(row), strict=True):
            torch.testing.assert_close(a[i], b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("m", [1, 10, 47, 48, 49, 100, 999])
def test_gen_of_ties_is_the_references(m: int) -> None:
    z = rows_of_all_kinds(1000, torch.bfloat16)
    expected = reference.gen_scores(z.double(), [0.1], [m])
    found = gen_scores(z, [0.1], [m])
    torch.testing.assert_close(found.double(), expected, rtol=4e-6, atol=1e-6, equal_nan=True)
