"""What the row of feature_stats in op_db.py does not say."""

from __future__ import annotations

import pytest
import torch

from oodkernels import feature_stats, scaled_energy
from oodkernels.detectors import LTS, SCALE, activations, batch, score_all
from oodkernels.ops import indexed_distances, shape_features_

ROWS = {
    "rectified": lambda x: (x - 0.3).relu(),
    "long tail": lambda x: (3 * x).exp(),
    "one outlier": lambda x: x.index_fill(1, torch.tensor([5]), 1e30),
    "bfloat16": lambda x: x.bfloat16(),
}


@pytest.mark.parametrize("kind", ROWS)
def test_percentiles_do_not_depend_on_each_other(kind: str) -> None:
    x = ROWS[kind](torch.randn(40, 700, generator=torch.Generator().manual_seed(0)))
    percentiles = [50, 99, 3.5, 85, 84.9, 100, 0, 65]
    together = feature_stats(x, percentiles)
    for i, p in enumerate(percentiles):
        alone = feature_stats(x, [p])
        assert torch.equal(alone.threshold[:, 0], together.threshold[:, i])
        assert torch.equal(alone.top_sum[:, 0], together.top_sum[:, i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.1, 3.0, 50.0])
def test_scales_do_not_depend_on_each_other(spread: float, dtype: torch.dtype) -> None:
    """What is left out under one scale is not lost to another, whatever their order."""
    generator = torch.Generator().manual_seed(0)
    z = (spread * torch.randn(20, 300, generator=generator)).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    bias = torch.randn(300, generator=generator).to(wide)
    scales = torch.tensor([7.0, 0.3, torch.inf, 60.0, -1.0, 1.0, torch.nan, 900.0, 0.0], dtype=wide)
    together = scaled_energy(z, scales.expand(20, -1).contiguous(), bias)
    for i, scale in enumerate(scales):
        alone = scaled_energy(z, scale.expand(20, 1).contiguous(), bias)[:, 0]
        torch.testing.assert_close(alone, together[:, i], rtol=0, atol=0, equal_nan=True)


def test_half_a_feature_is_rounded_to_the_even_number() -> None:
    x = torch.arange(342.0)[None]
    assert feature_stats(x, [75]).threshold.item() == 342 - (342 - 256)


def test_sums_lose_nothing() -> None:
    """In float32 one at a time, 2^24 ones end at 2^24, and 1e30 squared is infinite."""
    x = torch.ones(1, 2**24 + 3)
    assert feature_stats(x, [0.0]).top_sum.item() == 2**24 + 4  # 2^24 + 3 in float32
    assert feature_stats(x * 1e30, []).l2.item() == pytest.approx(4096e30)


def test_detectors_of_one_pass_share_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*args: object) -> object:
        calls.append(args[1:])
        return feature_stats(*args)

    energies = []

    def energy(*args: torch.Tensor) -> torch.Tensor:
        energies.append(args[1].shape[1])
        return scaled_energy(*args)

    monkeypatch.setattr(batch, "feature_stats", counted)
    monkeypatch.setattr(activations, "scaled_energy", energy)
    head = torch.nn.Linear(50, 7)
    x = torch.rand(20, 50)
    settings = {f"scale {p}": SCALE(p, head=head) for p in (85, 50, 65.5)} | {"lts": LTS()}
    found = score_all(settings, features=x, logits=head(x).detach())
    assert calls == [((50.0, 65.5, 85.0, 95.0), False)]
    assert energies == [3, 1]  # the logits are read once for SCALE, once for LTS
    for name, detector in settings.items():
        alone = detector.score(features=x, logits=head(x).detach())
        assert torch.equal(found[name], alone)


@pytest.mark.parametrize("shape", ["ash-p", "ash-s", "scale"])
def test_views_are_shaped_where_they_are(shape: str) -> None:
    """Rows of a wider tensor, every other column, a transpose: the view changes, nothing else."""
    x = torch.rand(6, 40, generator=torch.Generator().manual_seed(0))
    expected = shape_features_(x.clone(), shape, percentile=80.0)
    around = torch.full((6, 43), 9.0)
    every_other, transposed = torch.full((6, 80), 9.0), torch.empty(40, 6)
    for view in (around[:, 2:-1], every_other[:, ::2], transposed.T):
        view.copy_(x)
        assert shape_features_(view, shape, percentile=80.0) is view
        assert torch.equal(view, expected)
    assert (around[:, :2] == 9).all()
    assert (around[:, -1:] == 9).all()
    assert (every_other[:, 1::2] == 9).all()


def test_shaping_refuses_what_needs_gradients() -> None:
    x = torch.rand(3, 4, requires_grad=True)
    with pytest.raises(ValueError, match="shape_features_: features must not require gradients"):
        shape_features_(x, "ash-p", percentile=50.0)
    with torch.no_grad():
        shape_features_(x, "ash-p", percentile=50.0)


@pytest.mark.parametrize(("table", "wrong"), [(1, -1), (0, 5)])
def test_no_row_of_another_table_is_named(table: int, wrong: int) -> None:
    x, tables = torch.randn(3, 4), torch.randn(2, 5, 4)
    index = torch.tensor([[[0], [4], [1]], [[2], [0], [3]]])
    each = torch.func.vmap(indexed_distances, in_dims=(None, 0, 0))
    assert each(x, tables, index).l2.shape == (2, 3, 1)
    index[table, 1] = wrong
    with pytest.raises(ValueError, match="index must name rows of table"):
        each(x, tables, index)
