"""Pixels against the same pixels as rows; what is never copied; void labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oodkernels import ood_metrics
from oodkernels.detectors import (
    GEN,
    KNN,
    MSP,
    NCI,
    SCALE,
    AbnormalityModule,
    Energy,
    FeatureModel,
    Mahalanobis,
    OODDetector,
    ReAct,
    ViM,
    dense,
    score_all,
)
from oodkernels.metrics import id_and_ood

N, C, D, H, W = 3, 6, 10, 9, 8
g = torch.Generator().manual_seed(0)
HEAD = nn.Linear(D, C).double()
FEATURES = torch.rand(N, D, H, W, generator=g, dtype=torch.float64)
with torch.no_grad():
    LOGITS = HEAD(FEATURES.movedim(1, -1)).movedim(-1, 1).contiguous()
LABELS = torch.arange(N * H * W).reshape(N, H, W) % C
LABELS[:, :2] = 255
FEW = torch.arange(N * H * W).reshape(N, H, W) % 5 == 0


def rows(x: Tensor) -> Tensor:
    return x.movedim(1, -1).reshape(-1, x.shape[1])


DETECTORS: list[Callable[[], OODDetector]] = [
    MSP,
    GEN,
    lambda: Energy(2.0),
    lambda: SCALE(head=HEAD),
    lambda: ReAct(head=HEAD),
    lambda: NCI(head=HEAD),
    lambda: ViM(4, head=HEAD),
    lambda: KNN(3, "torch"),
    lambda: Mahalanobis(shrinkage=0.1),
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "_BLOCK", 200)  # 20 pixels


@pytest.mark.parametrize("make", DETECTORS, ids=lambda make: make().name)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pixels_are_rows(make: Callable[[], OODDetector], layout: torch.memory_format) -> None:
    features, logits = (t.contiguous(memory_format=layout) for t in (FEATURES, LOGITS))
    known = rows(LABELS[:, None])[:, 0] != 255
    plain = make().fit(
        features=rows(FEATURES)[known],
        logits=rows(LOGITS)[known],
        labels=rows(LABELS[:, None])[known, 0],
    )
    expected = plain.score(features=rows(FEATURES), logits=rows(LOGITS)).reshape(N, H, W)
    mine = make().fit(features=features, logits=logits, labels=LABELS, void=255)
    found = mine.score(features=features, logits=logits)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    both = score_all({"a": mine, "b": MSP()}, features=features, logits=logits)
    assert torch.equal(both["a"], found)
    assert both["b"].shape == (N, H, W)
    mine.calibrate(found.flatten())
    prediction = mine.predict(features=features, logits=logits)
    assert torch.equal(prediction.score, found)
    assert prediction.label is not None
    assert prediction.label.shape == prediction.is_ood.shape == (N, H, W)
    if mine.name != "mahalanobis":
        assert torch.equal(prediction.label, LOGITS.argmax(1))


def test_nothing_is_copied_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    class Watched(Energy):
        def _score(self, batch: Any) -> Tensor:
            seen.append(batch.logits)
            return super()._score(batch)

    Watched().score(logits=LOGITS)
    assert {z.untyped_storage().data_ptr() for z in seen} == {LOGITS.untyped_storage().data_ptr()}
    assert max(len(z) for z in seen) <= 200 // C
    assert sum(len(z) for z in seen) == N * H * W


def test_void_is_left_out_of_rows_too() -> None:
    labels = torch.tensor([0, 1, 0, 1, 255, 0])
    x = torch.randn(6, 2, generator=g)
    known = Mahalanobis(shrinkage=0.5).fit(features=x[labels < 255], labels=labels[labels < 255])
    found = Mahalanobis(shrinkage=0.5).fit(features=x, labels=labels, void=255)
    assert torch.equal(found.score(features=x), known.score(features=x))
    model = FeatureModel(nn.Sequential(nn.Identity(), nn.Linear(2, 2)))
    loader = Mahalanobis(shrinkage=0.5, model=model).fit([(x, labels)], void=255)
    assert torch.equal(loader.score(features=x), known.score(features=x))
    with pytest.raises(ValueError, match=r"AbnormalityModule.fit: void must be None, got 255"):
        AbnormalityModule().fit([(x, labels)], void=255)


def test_figures_are_of_the_pixels_that_count() -> None:
    scores = Energy().score(logits=LOGITS)
    labels = torch.where(FEW, torch.tensor(-1), LABELS)
    inside, outside = id_and_ood(scores, labels, ood=-1, void=255)
    assert torch.equal(inside, scores[(labels >= 0) & (labels < 255)])
    assert torch.equal(outside, scores[labels == -1])
    assert 0 < ood_metrics(inside, outside).auroc < 1
    two = id_and_ood(scores, labels, ood=[-1, 3])
    assert len(two[0]) + len(two[1]) == N * H * W
    assert torch.equal(two[1], scores[(labels == -1) | (labels == 3)])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: SCALE(head=HEAD).score(features=rows(FEATURES), logits=LOGITS),
            ValueError,
            r"features must be of the same pixels, \(3, channels, 9, 8\), got \(216, 10\)",
        ),
        (
            lambda: MSP().score(LOGITS, logits=LOGITS),
            ValueError,
            "x and confidence are not for logits and features of pixels",
        ),
        (lambda: MSP().score(logits=LOGITS.long()), TypeError, "logits must be floating-point"),
        (
            lambda: MSP(model=nn.Conv2d(D, C, 1).double()).score(FEATURES),
            ValueError,
            r"the model must give logits \(N, C\), got \(3, 6, 9, 8\); those of pixels are scored",
        ),
        (
            lambda: Mahalanobis().fit(features=FEATURES, labels=LABELS[:, :3], void=255),
            ValueError,
            r"labels must be \(3, 9, 8\), as there are pixels, got \(3, 3, 8\)",
        ),
        (
            lambda: KNN(1).fit(features=FEATURES, void=255),
            ValueError,
            "labels must be given where there is a void label",
        ),
        (lambda: MSP().score(logits=LOGITS[0]), ValueError, r"logits must be \(N, C\), got \(6, 9"),
        (
            lambda: id_and_ood(torch.zeros(3), torch.zeros(2, dtype=torch.int64), ood=1),
            ValueError,
            r"labels must have the shape of scores, \(3,\), got \(2,\)",
        ),
        (
            lambda: id_and_ood(torch.zeros(2), torch.tensor([0, 1]), ood=1, void=1),
            ValueError,
            "void must be none of the labels of OOD, got 1",
        ),
        (
            lambda: id_and_ood(torch.zeros(2), torch.zeros(2), ood=1),
            TypeError,
            "labels must be int",
        ),
    ],
)
def test_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
