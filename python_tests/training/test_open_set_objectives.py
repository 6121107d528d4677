"""LogitNorm, entropic open-set, objectosphere and VOS against their formulas, and trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

pytest.importorskip("lightning_fabric")

from training_runs import CLASSES, blobs, config, loader, make_model, outlier_loader

from oodkernels.detectors import Objectosphere
from oodkernels.nn import (
    LogitNormLoss,
    ObjectosphereLoss,
    OutlierExposureLoss,
    logit_norm_loss,
    objectosphere_loss,
)
from oodkernels.training import (
    EntropicOpenSetObjective,
    ObjectosphereObjective,
    Trainer,
    VOSObjective,
)

g = torch.Generator().manual_seed(0)
LOGITS = 4 * torch.randn(12, 5, generator=g, dtype=torch.float64)
FEATURES = 9 * torch.randn(12, 7, generator=g, dtype=torch.float64)
TARGET = torch.tensor([0, 1, 2, 3, 4, -1, -1, 0, -1, 2, 2, -1])
KNOWN = TARGET >= 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_logitnorm_is_the_formula(dtype: torch.dtype) -> None:
    z = LOGITS.clone().to(dtype).requires_grad_()
    loss = logit_norm_loss(z, TARGET, 0.3)
    exact = z.detach().double().requires_grad_()
    scale = 0.3 * (exact[KNOWN].norm(dim=1, keepdim=True) + 1e-7)
    expected = F.cross_entropy(exact[KNOWN] / scale, TARGET[KNOWN])
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    loss.backward()
    expected.backward()
    assert z.grad is not None
    rough = (
        {"rtol": 0.01, "atol": 1e-3} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-6}
    )
    torch.testing.assert_close(z.grad.double(), exact.grad, **rough)
    each = logit_norm_loss(LOGITS, TARGET, 0.3, "none")
    assert (each[~KNOWN] == 0).all()
    torch.testing.assert_close(each.sum(), logit_norm_loss(LOGITS, TARGET, 0.3, "sum"))
    zero = torch.zeros(3, 5, requires_grad=True)
    logit_norm_loss(zero, torch.tensor([0, 1, 2])).backward()
    assert zero.grad is not None
    assert zero.grad.isfinite().all()


def test_objectosphere_is_the_formula() -> None:
    log_p, norm = LOGITS.log_softmax(1), FEATURES.norm(dim=1)
    known = -log_p[KNOWN].gather(1, TARGET[KNOWN][:, None])[:, 0]
    ring = (20 - norm[KNOWN]).clamp(min=0).square()
    unknown = -log_p[~KNOWN].mean(1)
    expected = (known + 0.01 * ring).mean() + (unknown + 0.01 * norm[~KNOWN].square()).mean()
    found = objectosphere_loss(LOGITS, FEATURES, TARGET, 0.01, 20)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        objectosphere_loss(LOGITS, FEATURES, TARGET, 0), OutlierExposureLoss(1.0)(LOGITS, TARGET)
    )
    features = FEATURES.clone()
    features[[0, 5]] = 0  # which has no direction
    features.requires_grad_()
    objectosphere_loss(LOGITS, features, TARGET).backward()
    assert features.grad is not None
    assert features.grad.isfinite().all()
    assert torch.autograd.gradcheck(
        lambda z, h: objectosphere_loss(z, h, TARGET, 0.01, 20),
        (LOGITS.clone().requires_grad_(), FEATURES.clone().requires_grad_()),
    )


def test_the_score_is_the_papers() -> None:
    found = Objectosphere().score(features=FEATURES, logits=LOGITS)
    expected = LOGITS.softmax(1).amax(1) * FEATURES.square().sum(1).sqrt()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["logitnorm", "entropic-open-set", "objectosphere", "vos"])
def test_the_trainer_learns_by_it(name: str) -> None:
    options: dict[str, Any] = {
        "logitnorm": {"temperature": 0.5},
        "vos": {"queue": 5, "draws": 50, "start": 0.2},
        "objectosphere": {"xi": 5.0, "weight": 0.01},
    }.get(name, {})
    model = make_model(name)
    trainer = Trainer(model, config=config(objective=name, options=options, epochs=8, lr=0.1))
    trainer.fit(loader(200), outlier_loader() if trainer.objective.outliers else None, loader(100))
    x, y = blobs(100)
    with torch.no_grad():
        assert (model.eval()(x).argmax(1) == y).float().mean() > 0.9
    assert trainer.objective.num_classes == CLASSES


def test_outliers_have_smaller_features() -> None:
    model = make_model("objectosphere")
    objective = ObjectosphereObjective(weight=0.01, xi=5.0)
    Trainer(model, objective, config(epochs=8, lr=0.1)).fit(loader(200), outlier_loader())
    with torch.no_grad():
        inside = model[0].eval()(blobs(100)[0]).norm(dim=1)
        outside = model[0](2 * torch.rand(100, 16, generator=g)).norm(dim=1)
    assert inside.mean() > 1.5 * outside.mean()


def test_vos_draws_from_the_tails() -> None:
    objective = VOSObjective(queue=40, draws=2000, take=2)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 4))
    objective.prepare(model, lambda: torch.zeros(1, 3))
    centres = 10 * torch.randn(4, 3, generator=g)
    scale = torch.tensor([0.5, 1.0, 2.0])
    y = torch.arange(200) % 4
    x = centres[y] + scale * torch.randn(200, 3, generator=g)
    objective._keep(x, y)
    assert objective.filled.tolist() == [40] * 4
    for c in range(4):
        assert torch.equal(objective.queue[c], x[y == c][-40:])
    torch.manual_seed(0)
    drawn = objective._outliers()
    assert drawn.shape == (8, 3)
    means = objective.queue.mean(1)
    within = torch.cat([x[y == c][-40:] - means[c] for c in range(4)])
    inverse = (within.T @ within / 160 + 1e-4 * torch.eye(3)).inverse()
    apart = drawn - means.repeat_interleave(2, 0)
    distance = ((apart @ inverse) * apart).sum(1).sqrt()
    assert (distance > 3).all()  # of 2,000 draws the farthest two
    assert (distance < 6.5).all()
    z = torch.randn(5, 4, generator=g)
    weights = objective.energy_weights
    assert weights is not None
    with torch.no_grad():
        weights[2] = -1
        expected = (weights.clamp(min=0) * z.exp()).sum(1).log()
        torch.testing.assert_close(objective._energy(z), expected)


def test_vos_says_that_it_has_not_begun() -> None:
    objective = VOSObjective(queue=500, start=0.0)
    with pytest.warns(UserWarning, match="a class has .* of 500 features, and nothing is drawn"):
        Trainer(make_model("vos"), objective, config(epochs=1)).fit(loader())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LogitNormLoss(0), "LogitNormLoss: temperature must be positive and finite, got 0"),
        (lambda: logit_norm_loss(LOGITS, TARGET, -1), "logit_norm_loss: temperature must be pos"),
        (lambda: ObjectosphereLoss(reduction="max"), "reduction must be 'mean', 'sum' or 'none'"),
        (
            lambda: objectosphere_loss(LOGITS, FEATURES[:5], TARGET),
            r"features must have shape \(..., d\) for target \(12,\), got \(5, 7\)",
        ),
        (lambda: VOSObjective(start=1), r"start must be in \[0, 1\), got 1"),
        (lambda: VOSObjective(take=20, draws=10), "take must be at most draws = 10, got 20"),
        (
            lambda: VOSObjective().prepare(nn.Conv2d(1, 1, 1), lambda: torch.zeros(1)),
            "the model's logits must come from an nn.Linear, got none",
        ),
    ],
)
def test_bad_input(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_entropic_open_set_is_outlier_exposure_at_weight_one() -> None:
    x, y = blobs(30)
    model = make_model("entropic-open-set").eval()
    loss, _ = EntropicOpenSetObjective().step(model, x, y, x + 1, None)  # type: ignore[arg-type]
    both = model(torch.cat([x, x + 1]))
    target = torch.cat([y, torch.full_like(y, -1)])
    torch.testing.assert_close(loss, OutlierExposureLoss(1.0)(both, target))
