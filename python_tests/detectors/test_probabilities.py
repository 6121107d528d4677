"""GEN, temperature scaling, KL matching, weighted energy, OpenMax: each by its authors' rule."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_ood_package import pytorch_ood
from torch import Tensor

from oodkernels.detectors import (
    GEN,
    MSP,
    Energy,
    KLMatching,
    OODDetector,
    OpenMax,
    TemperatureScaling,
    WeightedEnergy,
    as_pytorch_ood,
    score_all,
)

C = 12
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def logits_of(
    n: int = 300, scale: float = 4.0, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Logits (n, C) in which the label leads, mostly."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(C, (n,), generator=generator)
    z = torch.randn(n, C, generator=generator, dtype=torch.float64)
    z[torch.arange(n), y] += 2
    return (scale * z).to(dtype), y


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


# --- the rules, restated in NumPy -----------------------------------------------------------------


def gen_rule(z: np.ndarray, gamma: float, m: int) -> np.ndarray:
    """In extended precision, where 1 - p is what it should be."""
    p = np.sort(softmax(z.astype(np.longdouble)), 1)[:, ::-1]
    rest = (p.sum(1, keepdims=True) - p)[:, :m]
    rest[:, 0] = p[:, 1:].sum(1)
    return -((p[:, :m] * rest) ** gamma).sum(1).astype(np.float64)


def kl_rule(z: np.ndarray, train: np.ndarray) -> np.ndarray:
    p, q = softmax(z), softmax(train)
    means = [q[q.argmax(1) == k].mean(0) for k in range(C) if (q.argmax(1) == k).any()]
    return np.array([-min((row * np.log(row / d)).sum() for d in means) for row in p])


def openmax_rule(
    z: np.ndarray, train: np.ndarray, y: np.ndarray, tail: int, alpha: int, eucos: bool
) -> tuple[np.ndarray, np.ndarray]:
    """A sample and a class at a time."""
    from scipy.optimize import brentq

    def likeliest(x: np.ndarray) -> tuple[float, float]:
        """Weibull's shape and scale: where the derivative of the likelihood is 0."""
        ratio = np.log(x / x.max())

        def slope(k: float) -> float:
            e = np.exp(k * ratio)
            return float((e * ratio).sum() / e.sum() - 1 / k - ratio.mean())

        shape = brentq(slope, 1.0, 1e9, xtol=1e-9, rtol=1e-14, maxiter=1000)
        return shape, x.max() * np.exp(shape * ratio).mean() ** (1 / shape)

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        far = float(np.linalg.norm(a - b))
        if not eucos:
            return far
        return far / 200 + 1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    models = []
    for c in range(C):
        mine = train[(train.argmax(1) == c) & (y == c)]
        mean = mine.mean(0)
        largest = np.sort([distance(row, mean) for row in mine])[-tail:]
        models.append((mean, largest.min(), *likeliest(largest - largest.min() + 10_000)))
    scores, labels = [], []
    for row in z:
        reduced = row.copy()
        for i, c in enumerate(np.argsort(-row)[:alpha], 1):
            mean, start, shape, scale = models[c]
            x = distance(row, mean) + 10_000 - start
            w = 1 - np.exp(-((x / scale) ** shape)) if x > 0 else 0
            reduced[c] = row[c] * (1 - w * (alpha + 1 - i) / alpha)
        unknown = (row - reduced).sum()
        every = np.exp(reduced - reduced.max()).sum() + np.exp(unknown - reduced.max())
        scores.append(-(unknown - reduced.max() - np.log(every)))
        labels.append(reduced.argmax())
    return np.array(scores), np.array(labels)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 10.0, 40.0])
@pytest.mark.parametrize(("gamma", "m"), [(0.1, 100), (0.1, 5), (0.5, 1), (2.0, C)])
def test_gen_is_the_rule(
    gamma: float, m: int, scale: float, dtype: torch.dtype, device: str
) -> None:
    z, _ = logits_of(scale=scale, dtype=dtype)
    score = GEN(gamma, m).score(logits=z.to(device))
    assert score.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-12 if dtype == torch.float64 else 5e-5
    expected = gen_rule(z.double().numpy(), gamma, m)
    np.testing.assert_allclose(score.cpu().numpy(), expected, rtol=tolerance, atol=1e-37)


def test_gen_of_float32_is_wrong_where_it_is_plain() -> None:
    z, _ = logits_of(scale=20.0, dtype=torch.float32)
    expected = gen_rule(z.double().numpy(), 0.1, C)
    plain = GEN(form="plain").score(logits=z).numpy()
    p = z.softmax(1)
    np.testing.assert_allclose(plain, -(p * (1 - p)).pow(0.1).sum(1).numpy(), rtol=1e-5)
    assert (abs(plain / expected - 1) > 0.05).mean() > 0.1
    theirs = pytorch_ood("detector.gen").GEN(None, gamma=0.1).predict_logits(z / 20)
    mine = as_pytorch_ood(GEN()).predict_logits(z / 20)
    torch.testing.assert_close(theirs * C, mine, rtol=1e-4, atol=1e-4)  # a mean, theirs


@pytest.mark.parametrize("true", [0.2, 0.9, 1.0, 2.0, 7.0])
def test_temperature_scaling_finds_the_temperature(true: float, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    z = 3 * torch.randn(40_000, C, generator=generator, dtype=torch.float64)
    y = torch.multinomial(z.softmax(1), 1, generator=generator)[:, 0]
    z = (true * z).to(device)
    detector = TemperatureScaling().fit(logits=z, labels=y)
    found = float(detector.temperature)
    assert found == pytest.approx(true, rel=0.03)

    def loss(t: float) -> float:
        return float(torch.nn.functional.cross_entropy(z / t, y.to(device)))

    assert loss(found) <= min(loss(found * (1 + 1e-4)), loss(found * (1 - 1e-4)))
    beta = torch.tensor(1 / found, dtype=torch.float64, requires_grad=True)
    torch.nn.functional.cross_entropy(z.cpu() * beta, y).backward()
    assert abs(float(beta.grad)) < 1e-8 * true
    assert torch.equal(detector.score(logits=z), MSP(found).score(logits=z))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 4.0, 20.0])
def test_kl_matching_is_the_rule(scale: float, dtype: torch.dtype, device: str) -> None:
    train, _ = logits_of(400, scale, seed=1, dtype=dtype)
    train[:, 3] -= 100  # a class that none is predicted as
    z, _ = logits_of(scale=scale, dtype=dtype)
    detector = KLMatching().fit(logits=train.to(device))
    assert detector.counts[3] == 0
    expected = kl_rule(z.double().numpy(), train.double().numpy())
    tolerance = 1e-11 if dtype == torch.float64 else 2e-5
    score = detector.score(logits=z.to(device)).cpu().numpy()
    np.testing.assert_allclose(score, expected, rtol=tolerance, atol=scale * tolerance)
    assert (score <= 0).all()


def test_kl_matching_is_pytorch_oods_where_all_classes_are_predicted() -> None:
    train, y = logits_of(2000, 1.0, seed=1, dtype=torch.float32)
    z, _ = logits_of(scale=1.0, dtype=torch.float32)
    theirs = pytorch_ood("detector.klmatching").KLMatching(None).fit_logits(train, y)
    mine = as_pytorch_ood(KLMatching().fit(logits=train))
    torch.testing.assert_close(
        mine.predict_logits(z), theirs.predict_logits(z), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weighted_energy_is_the_rule(dtype: torch.dtype, device: str) -> None:
    w = np.random.default_rng(0).normal(size=C)
    z, _ = logits_of(scale=30.0, dtype=dtype)  # exp(z) overflows float32
    detector = WeightedEnergy(torch.from_numpy(w))
    score = detector.score(logits=z.to(device)).cpu().numpy()
    e = np.exp(z.double().numpy().astype(np.longdouble))
    expected = np.log((np.maximum(w, 0) * e).sum(1)).astype(np.float64)
    np.testing.assert_allclose(score, expected, rtol=1e-12 if dtype == torch.float64 else 1e-5)
    ones = WeightedEnergy([1.0] * C).score(logits=z)
    torch.testing.assert_close(ones, Energy().score(logits=z))


@pytest.mark.parametrize(
    ("tail", "alpha", "eucos"), [(20, 10, True), (20, 3, False), (8, 1, True), (60, 50, False)]
)
def test_openmax_is_the_rule(tail: int, alpha: int, eucos: bool, device: str) -> None:
    pytest.importorskip("scipy")
    train, y = logits_of(600, seed=1)
    z, _ = logits_of(60)
    detector = OpenMax(tail, alpha, "eucos" if eucos else "euclidean")
    detector.fit(logits=train.to(device), labels=y)
    scores, labels = openmax_rule(z.numpy(), train.numpy(), y.numpy(), tail, min(alpha, C), eucos)
    score = detector.score(logits=z.to(device)).cpu().numpy()
    np.testing.assert_allclose(score, scores, rtol=1e-3, atol=1e-3)
    detector.calibrate(score)
    assert detector.predict(logits=z.to(device)).label.tolist() == labels.tolist()
    single = detector.score(logits=z.float().to(device)).cpu().numpy()
    np.testing.assert_allclose(single, score, rtol=1e-3, atol=1e-3)


def test_openmaxs_distribution_is_the_likeliest() -> None:
    from scipy.stats import weibull_min

    from oodkernels.detectors.probabilities import _weibull

    x = torch.rand(5, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = torch.cat([1 + 9 * x, x / 100 + 10_000, 50 * x + 10_000])
    x[1, 7:] = torch.nan  # a shorter tail
    shapes, scales = _weibull(x)
    for row, shape, scale in zip(x, shapes, scales, strict=True):
        row = row[row.isfinite()].numpy()

        def likelihood(a: float, b: float, row: np.ndarray = row) -> float:
            return float(weibull_min.logpdf(row, a, scale=b).sum())

        best = likelihood(float(shape), float(scale))
        for more in (1 - 1e-3, 1 + 1e-3):
            assert likelihood(float(shape) * more, float(scale)) < best
            assert likelihood(float(shape), float(scale) * (1 + (more - 1) / 100)) < best


# --- what all of them must do ---------------------------------------------------------------------

MAKE: dict[str, Callable[..., OODDetector]] = {
    "gen": GEN,
    "temperature-scaling": TemperatureScaling,
    "kl-matching": KLMatching,
    "weighted-energy": lambda **more: WeightedEnergy(torch.linspace(-0.2, 1, C), **more),
    "openmax": OpenMax,
}


def fitted(name: str, **more: Any) -> OODDetector:
    z, y = logits_of(600, seed=1)
    return MAKE[name](**more).fit(logits=z, labels=y)


@pytest.mark.parametrize("name", MAKE)
def test_batches_files_and_columns(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    z, y = logits_of(600, seed=1)
    x, _ = logits_of(100)
    detector = fitted(name)
    assert detector.name == name
    whole = detector.score(logits=x)
    parts = MAKE[name]()
    for i in range(0, 600, 70):
        parts.partial_fit(logits=z[i : i + 70], labels=y[i : i + 70])
    torch.testing.assert_close(parts.score(logits=x), whole, rtol=1e-10, atol=1e-10)
    more = {"a": detector, "b": MAKE[name](model=lambda x: x).fit([(z, y)])}
    for scores in (score_all(more, x=x, logits=x, chunk=7), score_all(more, logits=x)):
        torch.testing.assert_close(scores["a"], whole)
        torch.testing.assert_close(scores["b"], whole)
    monkeypatch.setattr("oodkernels.detectors.probabilities._CHUNK", 5 * C)
    torch.testing.assert_close(detector.score(logits=x), whole)
    wide = torch.cat([x, 90 + x[:, :1]], 1)  # an absent class
    absent = MAKE[name](absent=-1).fit(logits=torch.cat([z, 90 + z[:, :1]], 1), labels=y)
    torch.testing.assert_close(absent.score(logits=wide), whole)
    pytest.importorskip("safetensors")
    detector.calibrate(whole)
    detector.save(tmp_path / "file")
    loaded = OODDetector.load(tmp_path / "file", num_classes=None if name == "gen" else C)
    mine, found = detector.predict(logits=x), loaded.predict(logits=x)
    assert torch.equal(mine.score, found.score)
    assert torch.equal(mine.label, found.label)
    assert torch.equal(mine.is_ood, found.is_ood)


@pytest.mark.parametrize("name", MAKE)
def test_special_values_and_separation(name: str) -> None:
    detector = fitted(name)
    generator = torch.Generator().manual_seed(2)
    near, outside, inside = torch.randn(3, 600, C, generator=generator, dtype=torch.float64) / 2
    y = torch.arange(600) % C
    for z in (near, inside):
        z[torch.arange(600), y] += 6
    detector = MAKE[name]().fit(logits=near, labels=y.where(torch.arange(600) % 50 > 0, 0))
    assert detector.score(logits=inside).median() > detector.score(logits=outside).median()
    z = inside[:4].clone()
    z[1, 2] = math.nan
    z[2, z[2].argmin()] = -math.inf
    score = detector.score(logits=z)
    assert score.isnan().tolist() == [False, True, name == "openmax", False]
    assert detector.score(logits=z[:0]).shape == (0,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z, y: GEN(0), "GEN: gamma must be positive and finite, got 0"),
        (lambda z, y: GEN(m=0), "GEN: m must be an int >= 1, got 0"),
        (lambda z, y: GEN(form="exact"), "GEN: form must be log or plain, got 'exact'"),
        (lambda z, y: OpenMax(tail=1), "OpenMax: tail must be an int >= 2, got 1"),
        (lambda z, y: OpenMax(distance="cos"), "distance must be eucos or euclidean, got 'cos'"),
        (lambda z, y: OpenMax().score(logits=z), "OpenMax.score: fit must come first"),
        (lambda z, y: WeightedEnergy([-1.0, 0.0]), "finite and one of them positive"),
        (lambda z, y: WeightedEnergy([[1.0]]), r"weights must be floating-point \(C,\), got"),
        (
            lambda z, y: WeightedEnergy([1.0] * 5).score(logits=z),
            "WeightedEnergy.score: logits must have 5 classes, got 12",
        ),
        (
            lambda z, y: KLMatching().fit(logits=z).score(logits=z[:, 1:]),
            "KLMatching.score: logits must have 12 classes, got 11",
        ),
        (
            lambda z, y: KLMatching().fit(logits=z, labels=torch.full_like(y, -1)),
            "KLMatching.fit: there must be ID samples to fit to, got none",
        ),
        (
            lambda z, y: OpenMax().fit(logits=z, labels=y * 0),
            "OpenMax.fit: every class must have a sample that is .* got none of class 1",
        ),
        (
            lambda z, y: OpenMax().fit(logits=z, labels=y + 1),
            "OpenMax.fit: labels must be below 12, the number of classes, got 12",
        ),
        (
            lambda z, y: OpenMax().fit(logits=torch.eye(C), labels=torch.arange(C)),
            "distances of a class to its mean must differ .* got 1 equal ones of class 0",
        ),
        (
            lambda z, y: TemperatureScaling().fit(logits=9 * torch.eye(C), labels=torch.arange(C)),
            "one temperature, got none: all labels are certain",
        ),
        (
            lambda z, y: TemperatureScaling().fit(logits=-z, labels=y),
            "one temperature, got none: labels are no likelier than other classes",
        ),
        (
            lambda z, y: TemperatureScaling().fit(logits=z / 0, labels=y),
            "TemperatureScaling.fit: logits must be finite",
        ),
    ],
)
def test_refuses(call: Callable[[Tensor, Tensor], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(*logits_of())
