"""MOS against the authors' rules, restated, and what the op database cannot say of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

import oodkernels as oodk
from oodkernels import reference


class Official:
    """The rules of deeplearning-wisc/large_scale_ood: slices, and labels a group, 0 = others."""

    def __init__(self, groups: oodk.Groups) -> None:
        self.slices = groups.slices().tolist()

    def score(self, logits: Tensor) -> Tensor:
        others = [F.softmax(logits[:, a:b], dim=-1)[:, 0] for a, b in self.slices]
        return -torch.stack(others).min(0).values

    def labels(self, column: Tensor) -> list[Tensor]:
        return [torch.where((column >= a) & (column < b), column - a, 0) for a, b in self.slices]

    def loss(self, logits: Tensor, column: Tensor) -> Tensor:
        labels = self.labels(column)
        parts = zip(self.slices, labels, strict=True)
        return sum((F.cross_entropy(logits[:, a:b], y) for (a, b), y in parts), torch.zeros(()))

    def predicted_column(self, logits: Tensor) -> Tensor:
        best_prob, best_column = [], []
        for a, b in self.slices:
            prob, index = F.softmax(logits[:, a:b], dim=-1)[:, 1:].max(-1)
            best_prob.append(prob)
            best_column.append(index + a + 1)
        group = torch.stack(best_prob).max(0).indices
        return torch.stack(best_column).gather(0, group[None])[0]


@pytest.fixture(params=[(1000, 8), (100, 10), (40, 17)], ids=str)
def case(request: pytest.FixtureRequest) -> tuple[oodk.Groups, Tensor, Tensor]:
    classes, k = request.param
    groups = oodk.Groups.random(classes, k, seed=1)
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(200, groups.width, generator=generator) * 3
    target = torch.randint(classes, (200,), generator=generator)
    return groups, logits, target


def test_official_score(case: Any) -> None:
    groups, logits, _ = case
    expected = Official(groups).score(logits)
    torch.testing.assert_close(oodk.mos_score(logits, groups), expected, rtol=0, atol=2e-6)


def test_official_prediction(case: Any) -> None:
    groups, logits, _ = case
    column = Official(groups).predicted_column(logits)
    found = oodk.mos_predict(logits, groups)
    assert torch.equal(groups.to_column(groups.to_class(found.label)), column)


def test_official_loss_and_gradient(case: Any) -> None:
    groups, logits, target = case
    a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    ours = oodk.MOSLoss(groups)(a, target)
    theirs = Official(groups).loss(b, groups.to_column(target))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-8)


def test_official_mixup(case: Any) -> None:
    groups, logits, target = case
    other = target.flip(0)
    official = Official(groups)
    expected = 0.3 * official.loss(logits, groups.to_column(target)) + 0.7 * official.loss(
        logits, groups.to_column(other)
    )
    actual = oodk.MOSLoss(groups)(logits, target, other, 0.3)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)


def test_log_odds_rank_where_the_score_saturates() -> None:
    groups = oodk.Groups.from_sizes([3, 3])
    logits = torch.zeros(2, 8)
    logits[0, [0, 4]], logits[1, [0, 4]] = 40.0, 60.0  # both are OOD, the second one more so
    found = oodk.mos_predict(logits, groups)
    assert found.score[0] == found.score[1] == -1
    assert found.log_odds[0] > found.log_odds[1]
    unsaturated = torch.randn(100, 8)
    found = oodk.mos_predict(unsaturated, groups)
    torch.testing.assert_close(found.score, -torch.sigmoid(-found.log_odds), rtol=0, atol=2e-6)
    assert torch.equal(found.score, oodk.mos_score(unsaturated, groups))


def test_ties_take_the_lowest_class() -> None:
    groups = oodk.Groups.from_sizes([200, 7, 200])
    found = oodk.mos_predict(torch.zeros(3, groups.width), groups)
    assert found.group.tolist() == [1] * 3  # 1/8 beats 1/201
    assert found.label.tolist() == [200] * 3
    groups = oodk.Groups.from_sizes([100, 100])
    logits = torch.zeros(1, groups.width)
    logits[0, [50, 70, 151, 171]] = 5.0  # the groups tie too
    assert oodk.mos_predict(logits, groups).label.tolist() == [49]


def test_the_loss_saves_no_more_than_two_numbers_a_group() -> None:
    groups = oodk.Groups.from_sizes([125] * 8)
    logits = torch.randn(64, groups.width, requires_grad=True)
    target = torch.randint(1000, (64,))
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        saved[x.data_ptr()] = x.numel() * x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        oodk.mos_loss(logits, target, groups, reduction="none")
    saved.pop(logits.data_ptr())
    assert sum(saved.values()) <= 64 * 8 * 2 * 4 + 64 * 8 + 1024


def test_groups_are_whatever_has_offsets() -> None:
    offsets = torch.tensor([0, 3, 6])
    logits = torch.randn(4, 6)
    for groups in (SimpleNamespace(offsets=offsets), oodk.Groups.from_sizes([2, 2])):
        assert torch.equal(oodk.mos_score(logits, groups), oodk.mos_score(logits, offsets))
    for wrong in ([0, 3, 6], SimpleNamespace(offsets=[0, 3, 6]), None):
        with pytest.raises(TypeError, match=r"^mos_score: groups must be a tensor of offsets, or"):
            oodk.mos_score(logits, wrong)


def test_reductions() -> None:
    groups = oodk.Groups.from_sizes([3, 4])
    logits = torch.randn(5, 9)
    target = torch.tensor([0, 6, -100, 3, -100])
    each = oodk.mos_loss(logits, target, groups, reduction="none")
    assert each[2] == each[4] == 0
    assert oodk.mos_loss(logits, target, groups, reduction="sum") == each.sum()
    assert oodk.mos_loss(logits, target, groups) == each.sum() / 3
    assert oodk.mos_loss(logits[2:3], target[2:3], groups).isnan()
    with pytest.raises(ValueError, match="mos_loss: reduction must be none, sum or mean, got 'm'"):
        oodk.mos_loss(logits, target, groups, reduction="m")


def test_imagenet_21k() -> None:
    groups = oodk.Groups.random(21841, 38)
    logits = torch.randn(3, groups.width) * 3
    exact = reference.mos_predict(logits.double(), groups.offsets)
    found = oodk.mos_predict(logits, groups)
    torch.testing.assert_close(found.score.double(), exact[0], rtol=0, atol=2e-6)
    assert torch.equal(found.label, exact[2])


def test_extremes_of_half_precision() -> None:
    groups = oodk.Groups.from_sizes([2, 2])
    z = torch.tensor([[65504.0, -65504.0, 0.0, 0.0, 65504.0, 65504.0]], dtype=torch.float16)
    found = oodk.mos_predict(z, groups)
    assert found.score.dtype == torch.float32
    assert found.score.item() == 0
    assert found.label.item() == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_rows_of_any_size_side_by_side(dtype: torch.dtype) -> None:
    """Sums of e^z as it is, and of e^(z - max) where that is beyond the type, in one vector."""
    groups = oodk.Groups.from_sizes([100, 7, 1, 64, 20, 15, 130])
    z = torch.randn(33, groups.width, generator=torch.Generator().manual_seed(0)) * 4
    shift = torch.tensor([0.0, 40, -40, 64, -64, 75, -60, 100, -100, 1e4, -1e4, 700, -700, 0.5, 8])
    z = (z + shift.repeat(3)[:33, None]).to(dtype)
    z[5, groups.offsets[:-1]] = -torch.inf
    z[13, 1:9] = -torch.inf
    target = torch.arange(33)
    exact = reference.mos_predict(z.double(), groups.offsets)
    found = oodk.mos_predict(z, groups)
    close = {"rtol": 0, "atol": 2e-6 if dtype != torch.float64 else 1e-13}
    torch.testing.assert_close(found.score.double(), exact[0], **close)
    torch.testing.assert_close(found.prob.double(), exact[4], **close)
    assert torch.equal(found.label, exact[2])
    assert found.prob.max() <= 1
    assert torch.equal(found.score, oodk.mos_score(z, groups))
    loss = oodk.mos_loss(z, target, groups, reduction="none")
    alone = [oodk.mos_predict(row, groups) for row in z]
    for field in ("score", "log_odds", "prob", "label"):
        one = torch.stack([getattr(a, field) for a in alone])
        assert torch.equal(one, getattr(found, field))
    one = [oodk.mos_loss(z[i], target[i], groups, reduction="none") for i in range(33)]
    assert torch.equal(torch.stack(one), loss)
