"""Detectors of maps, gradients and dropout against restatements, one sample at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from head_world import world
from processes import ranks
from torch import Tensor, nn

from oodkernels.detectors import (
    GMM,
    NAC,
    AdaSCALEA,
    AdaSCALEL,
    Gram,
    MCDropout,
    OODDetector,
    RankFeat,
    sweep,
)

W = world()
Z = W.test_logits
g = torch.Generator().manual_seed(0)


class Net(nn.Module):
    """Two convolutions, whose maps are averaged."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.low = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU())
            self.high = nn.Sequential(nn.Conv2d(4, 9, 2), nn.ReLU())
            self.fc = nn.Linear(9, 3)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.high(self.low(x)).mean((2, 3)))
        return out


MODEL = Net()
X = torch.randn(80, 2, 6, 6, generator=g, dtype=torch.float64)
FAR = 2 * torch.randn(20, 2, 6, 6, generator=g, dtype=torch.float64)
with torch.no_grad():
    LOW, LOGITS = MODEL.low(X), MODEL(X)
    HIGH = MODEL.high(LOW)
    FEATURES = HIGH.mean((2, 3))
WEIGHT, BIAS = (t.detach().numpy() for t in (MODEL.fc.weight, MODEL.fc.bias))
LOADER = [(X[i : i + 16], LOGITS[i : i + 16].argmax(1)) for i in range(0, 80, 16)]


def energy(z: Any) -> float:
    return float(np.logaddexp.reduce(np.asarray(z, dtype=np.float64)))


# --- RankFeat -------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("transposed", [False, True])
def test_rankfeat_is_the_svd(temperature: float, transposed: bool) -> None:
    """More channels than positions, and fewer."""
    maps = HIGH[:, :, :, :1] if transposed else HIGH
    expected = []
    for a in maps.numpy():
        u, s, v = np.linalg.svd(a.reshape(9, -1), full_matrices=False)
        pooled = (a.reshape(9, -1) - s[0] * np.outer(u[:, 0], v[0])).mean(1)
        expected.append(temperature * energy((WEIGHT @ pooled + BIAS) / temperature))
    detector = RankFeat("high", temperature, axis=1, head=MODEL.fc)
    found = detector.score(features={"high": maps})
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    if not transposed:
        model = RankFeat("high", temperature, model=MODEL).score(X)
        np.testing.assert_allclose(model, expected, rtol=1e-9)


# --- Gram -----------------------------------------------------------------------------------------


def gram_rows(maps: Any, powers: int) -> Any:
    m = maps.reshape(len(maps), -1)
    rows = []
    for q in range(1, powers + 1):
        row = (m**q @ (m**q).T).sum(1)
        rows.append(np.sign(row) * np.abs(row) ** (1 / q))
    return np.concatenate(rows)


def test_gram_is_the_rule(tmp_path: Path) -> None:
    layers = [LOW.numpy(), HIGH.numpy()]
    sums = [np.stack([gram_rows(m, 4) for m in layer]) for layer in layers]
    label, p = LOGITS.argmax(1).numpy(), LOGITS.softmax(1).amax(1).numpy()
    held = np.arange(80) % 10 == 9

    def deviations(i: int) -> list[float]:
        found = []
        for own in sums:
            known = own[~held & (label == label[i])]
            low, high = known.min(0), known.max(0)
            below = np.maximum(low - own[i], 0) / (np.abs(low) + 1e-6)
            above = np.maximum(own[i] - high, 0) / (np.abs(high) + 1e-6)
            found.append((below + above).sum() / p[i])
        return found

    scale = np.mean([deviations(i) for i in np.flatnonzero(held)], axis=0)
    expected = [
        -sum(d / (s + 1e-7) for d, s in zip(deviations(i), scale, strict=True)) for i in range(80)
    ]
    detector = Gram(["low", "high"], 4, model=MODEL).fit(LOADER)
    np.testing.assert_allclose(detector.score(X), expected, rtol=1e-6, atol=1e-9)
    assert float(detector.score(X).min()) < -0.1
    maps = {"low": LOW, "high": HIGH}
    whole = Gram(["low", "high"], 4, axis=1).fit(features=maps, logits=LOGITS)
    torch.testing.assert_close(whole.score(features=maps, logits=LOGITS), detector.score(X))
    whole.save(tmp_path / "gram")
    again = OODDetector.load(tmp_path / "gram")
    assert torch.equal(
        again.score(features=maps, logits=LOGITS), whole.score(features=maps, logits=LOGITS)
    )
    only = LOGITS.argmax(1) == LOGITS.argmax(1).mode().values  # classes that none was predicted as
    few = Gram(["low"], 2, axis=1).fit(features={"low": LOW[only]}, logits=LOGITS[only])
    found = few.score(features={"low": LOW}, logits=LOGITS)
    assert torch.equal(found == -math.inf, ~only)


# --- AdaSCALE -------------------------------------------------------------------------------------


def q_of(x: Tensor, **given: float) -> tuple[float, Any]:
    options = {"eps": 0.5, "pixels": 5.0, "shift": 1.0, "correction": 5.0, "factor": 10.0, **given}
    x = x[None].clone().requires_grad_()
    MODEL(x).max().backward()
    assert x.grad is not None
    gradient = x.grad.flatten()
    few = int(len(gradient) * options["pixels"] / 100)
    step = torch.zeros_like(gradient)
    place = gradient.abs().argsort()[:few]
    step[place] = options["eps"] * gradient[place].sign()
    with torch.no_grad():
        f, moved = (
            MODEL.high(MODEL.low(v)).mean((2, 3))[0].numpy() for v in (x, x + step.reshape(x.shape))
        )
    order = np.argsort(-f, kind="stable")
    one, two = (max(1, int(len(f) * options[k] / 100)) for k in ("shift", "correction"))
    shift = np.abs(f - moved)[order[:one]].sum()
    return np.maximum(moved, 0)[order[:two]].sum() + options["factor"] * shift, f


@pytest.mark.parametrize("kind", [AdaSCALEA, AdaSCALEL])
def test_adascale_is_the_rule(kind: Any, tmp_path: Path) -> None:
    options = {"eps": 0.3, "pixels": 20.0, "shift": 30.0, "correction": 60.0, "factor": 7.0}
    known = np.array([q_of(x, **options)[0] for x in X[:60]])
    test = torch.cat([X[60:], FAR])
    expected = []
    for x in test:
        q, f = q_of(x, **options)
        p = 30 + (1 - (known <= q).mean()) * (90 - 30)
        k = max(1, len(f) - round(len(f) * p / 100))
        top = np.maximum(f, 0)
        r = top.sum() / np.sort(top)[::-1][:k].sum()
        f, z = (f * np.exp(r), 1.0) if kind is AdaSCALEA else (f, r**2)
        expected.append(energy(z * (WEIGHT @ f + BIAS)))
    detector = kind(30, 90, **options, model=MODEL).fit(
        [(X[i : i + 20], torch.zeros(20, dtype=torch.int64)) for i in (0, 20, 40)]
    )
    np.testing.assert_allclose(detector.score(test), expected, rtol=1e-9)
    detector.save(tmp_path / "a")
    again = OODDetector.load(tmp_path / "a", MODEL)
    assert torch.equal(again.score(test), detector.score(test))
    assert repr(again) == repr(detector)
    torch.testing.assert_close(
        detector.varied(low=50).score(test), again.varied(low=50).score(test)
    )


def test_adascales_percentiles_are_swept_from_one_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    from oodkernels.detectors import adascale

    taken = []
    real = adascale.input_gradient
    monkeypatch.setattr(adascale, "input_gradient", lambda *a: taken.append(1) or real(*a))
    found = sweep(
        ["adascale-a"],
        id=[X[60:]],
        ood_val={"far": [FAR]},
        train=[(X[:60], LOGITS[:60].argmax(1))],
        model=MODEL,
    )
    assert len(taken) == 3  # training, ID and OOD
    assert len(found.detectors["adascale-a"].settings) == 36


# --- Gaussians, coverage, dropout -----------------------------------------------------------------


@pytest.mark.parametrize("covariance", ["full", "tied"])
def test_gmm_is_scipys(covariance: Any, tmp_path: Path) -> None:
    stats = pytest.importorskip("scipy.stats")
    x, y = W.features.numpy(), W.labels.numpy()
    parts = []
    within = sum(np.cov(x[y == c].T, bias=True) * (y == c).sum() for c in range(7)) / len(x)
    for c in range(7):
        own = x[y == c]
        s = np.cov(own.T, bias=True) if covariance == "full" else within
        normal = stats.multivariate_normal(own.mean(0), s + 0.01 * np.eye(24))
        parts.append(normal.logpdf(W.test.numpy()) + np.log(len(own) / len(x)))
    expected = np.logaddexp.reduce(parts)
    detector = GMM(covariance, 0.01)
    W.fit(detector)
    np.testing.assert_allclose(W.score(detector), expected, rtol=1e-9)
    W.check_batches_and_files(detector, tmp_path)
    W.check_nan_and_no_rows(detector)
    detector = GMM(covariance, 0.01)
    W.fit(detector)
    detector.calibrate(W.score(detector))
    assert detector.predict(features=W.test).label.tolist() == np.argmax(parts, 0).tolist()
    with pytest.raises(ValueError, match="every class must have samples to fit to, got none of cl"):
        GMM(classes=9).fit(features=W.features, labels=W.labels)


def test_nac_is_the_rule(tmp_path: Path) -> None:
    weight = W.head.weight.detach().numpy()

    def states(f: Any, z: Any) -> Any:
        p = np.exp(z - np.logaddexp.reduce(z))
        f = torch.from_numpy(f).requires_grad_()
        logits = f @ torch.from_numpy(weight).T + W.head.bias.detach()
        (-logits.log_softmax(0).mean()).backward()  # KL(u || p) but for a constant
        assert f.grad is not None
        np.testing.assert_allclose(f.grad, (p - 1 / 7) @ weight, atol=1e-9)
        return 1 / (1 + np.exp(-2 * f.detach().numpy() * f.grad.numpy()))

    train = np.stack(
        [states(f, z) for f, z in zip(W.features.numpy(), W.logits.numpy(), strict=True)]
    )
    edges = np.linspace(0, 1, 20)

    def rule(f: Any, z: Any) -> float:
        found = []
        for i, s in enumerate(states(f, z)):
            k = int(np.searchsorted(edges, s, side="right")) - 1
            inside = (
                (train[:, i] >= edges[k]) & (train[:, i] < edges[k + 1]) if k < 19 else np.zeros(1)
            )
            found.append(min(inside.sum() / 30, 1))
        return float(np.mean(found))

    detector = NAC(2.0, 20, 30, head=W.head)
    W.fit(detector)
    torch.testing.assert_close(W.score(detector), W.by(rule), rtol=1e-9, atol=1e-9)
    W.check_batches_and_files(detector, tmp_path)
    W.check_nan_and_no_rows(detector)


@pytest.mark.parametrize("kind", ["msp", "variance", "information"])
def test_dropout_is_an_ensemble_of_heads(kind: Any, tmp_path: Path) -> None:
    masks = torch.rand(6, 24, generator=torch.Generator().manual_seed(3)) >= 0.3

    def rule(f: Any, z: Any) -> float:
        head = W.head.weight.detach().numpy(), W.head.bias.detach().numpy()
        logits = [head[0] @ (f * m / 0.7) + head[1] for m in masks.double().numpy()]
        p = np.exp([row - np.logaddexp.reduce(row) for row in logits])
        if kind == "msp":
            return float(p.mean(0).max())
        if kind == "variance":
            return float(-p.var(0, ddof=1).mean())
        return float((p.mean(0) * np.log(p.mean(0))).sum() - (p * np.log(p)).sum(1).mean())

    detector = MCDropout(6, 0.3, kind, 3, head=W.head)
    torch.testing.assert_close(W.score(detector), W.by(rule), rtol=1e-8, atol=1e-10)
    W.check_batches_and_files(detector, tmp_path)
    W.check_nan_and_no_rows(detector)


def merged(rank: int, world: int) -> dict[str, Tensor]:
    """Scores of detectors that each process fitted to a half."""
    half = slice(40 * rank, 40 * rank + 40)
    maps = {"low": LOW[half]}
    gram = Gram(["low"], 3, axis=1).partial_fit(features=maps, logits=LOGITS[half])
    half_x = [(X[half], LOGITS[half].argmax(1))]
    scale = AdaSCALEL(model=MODEL)
    for batch, y in scale._training_batches("test", half_x):
        scale.fit_batch(batch, y)
    rows = slice(200 * rank, 200 * rank + 200)
    given = {"features": W.features[rows], "logits": W.logits[rows], "labels": W.labels[rows]}
    gmm, nac = GMM(ridge=0.1).partial_fit(**given), NAC(2.0, head=W.head).partial_fit(**given)
    return {
        "gram": gram.all_reduce().score(features={"low": LOW}, logits=LOGITS),
        "adascale": scale.all_reduce().score(X),
        "gmm": gmm.all_reduce().score(features=W.test),
        "nac": nac.all_reduce().score(features=W.test, logits=Z),
    }


def test_processes_merge_to_a_fit_of_all(tmp_path: Path) -> None:
    first, second = ranks(tmp_path, 2, merged)
    whole = {
        "gram": Gram(["low"], 3, axis=1)
        .fit(features={"low": LOW}, logits=LOGITS)
        .score(features={"low": LOW}, logits=LOGITS),
        "adascale": AdaSCALEL(model=MODEL).fit(LOADER).score(X),
        "gmm": W.fit(GMM(ridge=0.1)).score(features=W.test),
        "nac": W.fit(NAC(2.0, head=W.head)).score(features=W.test, logits=Z),
    }
    for name, expected in whole.items():
        torch.testing.assert_close(first[name], expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(second[name], first[name], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Gram([]), "layers must name at least one, got none"),
        (lambda: Gram(["a"], 0), "powers must be an int >= 1, got 0"),
        (
            lambda: Gram(["a"]).fit(features={"a": LOW}, logits=LOGITS),
            "layer 'a' gives .*say axis=1 if it is the second",
        ),
        (
            lambda: Gram(["a"], axis=1).fit(features={"a": LOW[:5]}, logits=LOGITS[:5]),
            "there must be 10 ID samples at least",
        ),
        (
            lambda: RankFeat("a", axis=1, head=W.head).score(features={"a": HIGH}),
            "layer 'a' must have 24 channels, as the head has, got 9",
        ),
        (lambda: AdaSCALEA(90, 80), "low must be below high, got 90 and 80"),
        (lambda: AdaSCALEL(pixels=0), r"pixels must be in \(0, 100\], got 0"),
        (lambda: AdaSCALEL().fit([(X, LOGITS.argmax(1))]), "needs a model"),
        (lambda: GMM("diagonal"), "covariance must be full or tied, got 'diagonal'"),
        (lambda: GMM(ridge=0), "ridge must be positive and finite, got 0"),
        (lambda: NAC(alpha=-1), "alpha must be positive and finite, got -1"),
        (lambda: MCDropout(p=1), r"p must be in \(0, 1\), got 1"),
        (lambda: MCDropout(1), "samples must be an int >= 2, got 1"),
        (lambda: MCDropout(kind="mean"), "kind must be msp, variance or information"),
    ],
)
def test_bad_input(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
