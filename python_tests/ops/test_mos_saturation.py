"""mos_predict where probabilities round to 1: the class is that of float64, on all backends."""

from __future__ import annotations

import pytest
import torch
from op_db import CONFIDENT, confident_rows

from oodkernels import reference
from oodkernels.ops import mos_predict


@pytest.mark.parametrize("case", CONFIDENT, ids=str)
def test_labels_are_those_of_float64(case: tuple[int, int, float, float]) -> None:
    z, offsets, group, decided = confident_rows(*case)
    for found in (mos_predict(z, offsets), mos_predict(z.double(), offsets)):
        assert torch.equal(found.group[decided], group[decided])
    exact = reference.mos_predict(z.double(), offsets)
    for index in (2, 3):
        assert torch.equal(exact[index][decided], mos_predict(z, offsets)[index][decided])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda d: str(d)[6:])
def test_equal_odds_go_to_the_first_group(dtype: torch.dtype) -> None:
    offsets = torch.tensor([0, 3, 6, 10])
    row = torch.tensor([0, 90, 1, 0, 1, 90, -9, 90, 1, 0], dtype=dtype)
    assert mos_predict(row, offsets).group == 0
    assert mos_predict(row, offsets).label == 0
    row[1] -= 1e-3  # as far as float32 goes
    assert mos_predict(row, offsets).label == 3
    row[4] = 2  # nearer to the best class of its group
    assert mos_predict(row, offsets).label == 4
