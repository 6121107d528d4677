"""Members' scores put together, against scipy and NumPy; files; what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from head_world import world
from torch import Tensor, nn

from oodkernels.detectors import (
    KNN,
    MSP,
    Composed,
    Energy,
    Ensemble,
    FeatureModel,
    LayerEnsemble,
    Mahalanobis,
    NotFittedError,
    OODDetector,
    ReAct,
    ViM,
    extract,
)

W = world()
TRAIN = {"features": W.features[:300], "logits": W.logits[:300], "labels": W.labels[:300]}
HELD = {"features": W.features[300:], "logits": W.logits[300:]}
TEST = {"features": W.test, "logits": W.test_logits}


def members() -> list[OODDetector]:
    shaped = Composed([ReAct(head=W.head), Energy()])
    return [KNN(3), ViM(8, head=W.head), MSP(), shaped, Composed([ReAct(head=W.head), KNN(5)])]


def rule_of(rule: str, test: np.ndarray, held: np.ndarray) -> np.ndarray:
    if rule == "mean":
        return test.mean(1)
    if rule == "standardised":
        return ((test - held.mean(0)) / held.std(0)).mean(1)
    p = [
        [(1 + (h <= s).sum()) / (len(h) + 1) for s, h in zip(r, held.T, strict=True)] for r in test
    ]
    return np.array([2 * np.log(row).sum() for row in p])


@pytest.mark.parametrize("rule", ["mean", "standardised", "fisher"])
def test_it_is_the_rule(rule: Any, tmp_path: Path) -> None:
    ensemble = Ensemble(members(), rule).fit(**TRAIN)
    alone = [member.fit(**TRAIN) for member in members()]
    assert torch.equal(
        Ensemble(alone, "mean").score(**TEST),
        Ensemble(members(), "mean").fit(**TRAIN).score(**TEST),
    )
    test, held = (torch.stack([m.score(**data) for m in alone], 1).numpy() for data in (TEST, HELD))
    if rule != "mean":
        with pytest.raises(NotFittedError, match="fit_reference must come first"):
            ensemble.score(**TEST)
        ensemble.fit_reference(**HELD)
    expected = torch.from_numpy(rule_of(rule, test, held))
    torch.testing.assert_close(ensemble.score(**TEST), expected, rtol=1e-6, atol=1e-6)
    ensemble.calibrate(ensemble.score(**HELD))
    ensemble.save(tmp_path / "e")
    again = OODDetector.load(tmp_path / "e")
    assert repr(again) == repr(ensemble)
    torch.testing.assert_close(again.score(**TEST), ensemble.score(**TEST), rtol=0, atol=1e-12)
    assert torch.equal(again.predict(**TEST).is_ood, ensemble.predict(**TEST).is_ood)
    broken = W.test.clone()
    broken[3, 2] = torch.nan
    found = ensemble.score(features=broken, logits=W.head(broken).detach())
    assert found.isnan().nonzero().tolist() == [[3]]


def test_fisher_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    ensemble = Ensemble([MSP(), Energy()], "fisher").fit_reference(logits=W.logits)
    held = [d.score(logits=W.logits) for d in ensemble.members]
    for z, score in zip(W.test_logits, ensemble.score(logits=W.test_logits), strict=True):
        own = [float(d.score(logits=z[None])) for d in ensemble.members]
        p = [(1 + int((h <= s).sum())) / (len(h) + 1) for s, h in zip(own, held, strict=True)]
        assert -float(score) == pytest.approx(stats.combine_pvalues(p, "fisher").statistic)


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body = nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU())
            self.fc = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.body(x).mean((2, 3)))
        return out


def test_one_detector_at_each_layer(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(90, 2, 6, 6, generator=g), torch.arange(90) % 3
    model = Net()
    detector = LayerEnsemble(Mahalanobis(shrinkage=0.1), ["body.0", "fc"], "fisher", model=model)
    detector.fit([(x[i : i + 30], y[i : i + 30]) for i in (0, 30)]).fit_reference(x[60:])
    outputs = extract(model, x, ["body.0", "fc"])
    pooled = {n: o.flatten(2).mean(2) if o.dim() > 2 else o for n, o in outputs.layers.items()}
    alone = {
        n: Mahalanobis(shrinkage=0.1).fit(features=f[:60], labels=y[:60]).score(features=f)
        for n, f in pooled.items()
    }
    scores = torch.stack(list(alone.values()), 1).double().numpy()
    expected = rule_of("fisher", scores[:60], scores[60:])
    np.testing.assert_allclose(detector.score(x[:60]), expected, rtol=1e-5)
    detector.save(tmp_path / "l")
    again = OODDetector.load(tmp_path / "l", model)
    assert repr(again) == repr(detector)
    torch.testing.assert_close(again.score(x), detector.score(x))


def test_a_deep_ensemble_runs_each_model_once() -> None:
    x = torch.randn(20, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    models = [Net(seed).eval() for seed in range(3)]
    found = Ensemble([MSP(model=model) for model in models], "mean").score(x)
    with torch.no_grad():
        expected = torch.stack([model(x).softmax(1).amax(1) for model in models]).mean(0)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Ensemble([]), ValueError, "there must be at least one member, got none"),
        (
            lambda: Ensemble([MSP()], "sum"),
            ValueError,
            "rule must be one of mean, standardised, fi",
        ),
        (lambda: Ensemble(["msp"]), TypeError, "members must be detectors, got str"),
        (
            lambda: LayerEnsemble(MSP(), ["a"]),
            ValueError,
            "detector must read features alone, got msp, which reads logits",
        ),
        (lambda: LayerEnsemble(KNN(), ["a", "a"]), ValueError, "must be named once each"),
        (
            lambda: Ensemble([MSP()]).fit_reference(logits=W.logits[:1]),
            ValueError,
            "at least two samples, of finite scores, got 1",
        ),
        (lambda: Ensemble([KNN()]).score(**TEST), NotFittedError, "fit must come first"),
        (
            lambda: Ensemble([KNN(model=FeatureModel(Net())), MSP(model=Net())]).fit(
                [(torch.randn(9, 2, 6, 6), torch.zeros(9, dtype=torch.int64))]
            ),
            ValueError,
            "members with models of their own must be fitted by themselves",
        ),
    ],
)
def test_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
