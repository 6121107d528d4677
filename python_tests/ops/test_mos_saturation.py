"""mos_predict where probabilities round to 1: the class is that of float64, on all backends."""

from __future__ import annotations

import pytest
import torch
from op_db import CONFIDENT, confident_rows

from oodkernels import reference
from oodkernels.ops import mos_predict, mos_score


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


@pytest.mark.parametrize("others", [-150, -110, -100, -90, -80, -30, 0, 60, 80, 110])
@pytest.mark.parametrize("above", [-80, -30, 30, 60, 75])
def test_the_smallest_scores_are_right_in_all_their_digits(others: int, above: int) -> None:
    offsets = torch.tensor([0, 4, 45, 700])
    z = torch.full((33, 700), float(others + above))
    z[:, offsets[:-1]] = float(others)
    z[1::2] -= torch.linspace(0, 0.5, 700)
    expected = mos_score(z.double(), offsets).float()
    assert torch.all(expected < 0)
    torch.testing.assert_close(mos_score(z, offsets), expected, rtol=2e-5, atol=0)
    torch.testing.assert_close(mos_predict(z, offsets).score, expected, rtol=2e-5, atol=0)
