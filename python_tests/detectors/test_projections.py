"""Gaussians and subspaces against plain restatements of their authors' rules, by NumPy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from head_world import Rule, world
from numpy.typing import NDArray

from oodkernels.detectors import (
    NECO,
    RMDS,
    CoP,
    CoRP,
    MahalanobisPlusPlus,
    OODDetector,
    Residual,
    RMDSPlusPlus,
    ViM,
)
from oodkernels.detectors import subspaces as module

Array = NDArray[np.float64]
W = world(d=20)
WEIGHT, BIAS = (t.detach().numpy() for t in (W.head.weight, W.head.bias))
TRAIN, LABELS = W.features.numpy(), W.labels.numpy()
UNIT = TRAIN / np.linalg.norm(TRAIN, axis=1, keepdims=True)


def quads(train: Array, f: Array) -> tuple[float, float]:
    """Least squared distance to a class mean, and that to the mean of all."""
    means = np.stack([train[c == LABELS].mean(0) for c in range(7)])
    within = (train - means[LABELS]).T @ (train - means[LABELS]) / len(train)
    total = np.cov(train.T, bias=True)
    inverse, inverse_total = np.linalg.inv(within), np.linalg.inv(total)
    own = min(float((f - m) @ inverse @ (f - m)) for m in means)
    away = f - train.mean(0)
    return own, float(away @ inverse_total @ away)


def rmds(f: Array, z: Array) -> float:
    own, every = quads(TRAIN, f)
    return every - own


def mahalanobis_pp(f: Array, z: Array) -> float:
    return -quads(UNIT, f / np.linalg.norm(f))[0]


def rmds_pp(f: Array, z: Array) -> float:
    own, every = quads(UNIT, f / np.linalg.norm(f))
    return every - own


ORIGIN = -np.linalg.pinv(WEIGHT) @ BIAS


def null(dim: int) -> Array:
    x = TRAIN - ORIGIN
    _, vectors = np.linalg.eigh(x.T @ x / len(x))
    return np.asarray(vectors[:, : 20 - dim])


def residual(f: Array, z: Array, dim: int = 10) -> float:
    return -float(np.linalg.norm((f - ORIGIN) @ null(dim)))


def vim(f: Array, z: Array, dim: int = 10) -> float:
    norms = np.linalg.norm((TRAIN - ORIGIN) @ null(dim), axis=1)
    alpha = W.logits.numpy().max(1).mean() / norms.mean()
    energy = z.max() + np.log(np.exp(z - z.max()).sum())
    return float(energy + alpha * residual(f, z, dim))


def neco(f: Array, z: Array, dim: int | None = None, logit: bool = True) -> float:
    mean, std = TRAIN.mean(0), TRAIN.std(0)
    x = (TRAIN - mean) / std
    _, s, vt = np.linalg.svd(x, full_matrices=False)
    if dim is None:
        share = np.cumsum(s**2) / (s**2).sum()
        dim = int(np.argmax(share > 0.9)) + 1
    y = (f - mean) / std
    ratio = np.linalg.norm(vt[:dim] @ y) / np.linalg.norm(y)
    return float(ratio * (z.max() if logit else 1))


def cop(f: Array, z: Array, variance: float = 0.99) -> float:
    mean = UNIT.mean(0)
    _, s, vt = np.linalg.svd(UNIT - mean, full_matrices=False)
    total = (s**2).sum()
    q = next(i for i in range(len(s) + 1) if (s[:i] ** 2).sum() / total > variance)
    x = f / np.linalg.norm(f) - mean
    return -float(np.linalg.norm(x - vt[:q].T @ (vt[:q] @ x)))


RULES: dict[str, tuple[OODDetector, Rule]] = {
    "rmds": (RMDS(), rmds),
    "mahalanobis++": (MahalanobisPlusPlus(), mahalanobis_pp),
    "rmds++": (RMDSPlusPlus(), rmds_pp),
    "residual": (Residual(head=W.head), residual),
    "vim": (ViM(head=W.head), vim),
    "vim 15": (ViM(15, head=W.head), lambda f, z: vim(f, z, 15)),
    "neco": (NECO(), neco),
    "neco 5": (NECO(5, max_logit=False), lambda f, z: neco(f, z, 5, False)),
    "cop": (CoP(), cop),
    "cop 50": (CoP(50), lambda f, z: cop(f, z, 0.5)),
}
rules = pytest.mark.parametrize(("detector", "rule"), RULES.values(), ids=RULES)


@rules
def test_rule(detector: OODDetector, rule: Rule) -> None:
    expected = W.by(rule)
    W.fit(detector)
    torch.testing.assert_close(W.score(detector), expected, rtol=1e-8, atol=1e-8)
    found = W.score(detector, torch.float32)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected.float(), rtol=2e-3, atol=2e-3)
    in_float32 = W.score(W.fit(detector, torch.float32), torch.float32)
    torch.testing.assert_close(in_float32, expected.float(), rtol=2e-3, atol=2e-3)


every = pytest.mark.parametrize(
    "detector", [*(d for d, _ in RULES.values()), CoRP(m=64, gamma=0.5)]
)


@every
def test_batches_and_files(detector: OODDetector, tmp_path: Path) -> None:
    W.check_batches_and_files(detector, tmp_path)


@every
def test_nan_and_no_rows(detector: OODDetector) -> None:
    W.check_nan_and_no_rows(detector)


def test_labels_are_the_nearest_classes() -> None:
    detector = W.fit(RMDS())
    detector.calibrate(W.score(detector))
    found = detector.predict(features=W.test).label
    means = torch.stack([W.features[W.labels == c].mean(0) for c in range(7)])
    within = (W.features - means[W.labels]).T @ (W.features - means[W.labels]) / 400
    away = W.test[:, None] - means
    quad = (away @ torch.linalg.inv(within) * away).sum(2)
    assert torch.equal(found, quad.argmin(1))


def test_zero_features_have_no_direction() -> None:
    for detector in (MahalanobisPlusPlus(), RMDSPlusPlus()):
        test = W.test.clone()
        test[2] = 0
        found = W.fit(detector).score(features=test)
        assert found.isnan().nonzero().tolist() == [[2]]


def test_random_features_are_of_a_gaussian_kernel() -> None:
    """exp(-gamma |x - y|^2), up to the error of 20,000 features."""
    detector = CoRP(m=20_000, gamma=2.0)
    z = detector._read(W.test[:10])
    x = W.test[:10] / W.test[:10].norm(dim=1, keepdim=True)
    kernel = torch.exp(-2 * torch.cdist(x, x).square())
    torch.testing.assert_close(z @ z.T, kernel, rtol=0, atol=0.05)
    assert torch.equal(z, CoRP(m=20_000, gamma=2.0)._read(W.test[:10]))
    assert not torch.equal(z, CoRP(m=20_000, gamma=2.0, seed=1)._read(W.test[:10]))


def test_vims_factor_from_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = float(W.fit(ViM(head=W.head)).alpha)
    monkeypatch.setattr(module, "_SAMPLE", 100)
    found = float(W.fit(ViM(head=W.head)).alpha)
    assert found != exact
    assert found == pytest.approx(exact, rel=0.2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: W.fit(ViM(20, head=W.head)), "dim must be less than the 20 features, got 20"),
        (lambda: W.fit(NECO(21)), "dim must be at most the 20 features, got 21"),
        (lambda: CoP(0.99), "variance must be in per cent, in .1, 100., got 0.99: 0.9 is"),
        (lambda: CoRP(gamma=0), "CoRP: gamma must be positive and finite, got 0"),
        (lambda: RMDS(shrinkage=2), r"RMDS: shrinkage must be in \[0, 1\] or None, got 2"),
        (lambda: RMDS(classes=8).fit(features=W.features, labels=W.labels), "got none of class 7"),
        (lambda: NECO().fit(features=W.features[:0], logits=W.logits[:0]), "must be ID samples"),
        (
            lambda: ViM(head=W.head).fit(
                features=torch.zeros(9, 20), logits=W.head.bias.detach().float().expand(9, 7)
            ),
            "a part outside of the subspace, got none",
        ),
    ],
)
def test_bad_input(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("detector", [NECO(), Residual(head=W.head), ViM(head=W.head), CoP()])
def test_loaded_from_a_file_it_cannot_learn_more(detector: OODDetector, tmp_path: Path) -> None:
    W.fit(detector).save(tmp_path / "d")
    again = OODDetector.load(tmp_path / "d")
    with pytest.raises(ValueError, match="from a file has no statistics of its training features"):
        again.partial_fit(features=W.features, logits=W.logits)
