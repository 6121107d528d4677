"""Detectors of features and logits against plain restatements of their authors' rules."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from head_world import Rule, world
from numpy.typing import NDArray
from torch import nn

from oodkernels.detectors import (
    DETECTORS,
    FDBD,
    LTS,
    NCI,
    PNML,
    SCALE,
    SHE,
    CADRef,
    GradNorm,
    HeadDetector,
    NotFittedError,
    OODDetector,
    score_all,
)
from oodkernels.detectors import activations as module

Array = NDArray[np.float64]


W = world()
WEIGHT, BIAS = (t.detach().numpy() for t in (W.head.weight, W.head.bias))


def lse(z: Array) -> float:
    return float(z.max() + np.log(np.exp(z - z.max()).sum()))


def softmax(z: Array) -> Array:
    e = np.exp(z - z.max())
    return e / e.sum()


# --- the rules, one sample at a time --------------------------------------------------------------


def scale(f: Array, z: Array, percentile: float = 85) -> float:
    k = len(f) - round(len(f) * percentile / 100)
    top = np.sort(f)[::-1][:k].sum()
    return lse(WEIGHT @ (f * np.exp(f.sum() / top)) + BIAS)


def lts(f: Array, z: Array, percentile: float = 95) -> float:
    f = np.maximum(f, 0)
    k = max(1, len(f) - round(len(f) * percentile / 100))
    return lse(z * (f.sum() / np.sort(f)[::-1][:k].sum()) ** 2)


def gradnorm(f: Array, z: Array) -> float:
    """By autograd, of a batch of one against a target of ones."""
    head = nn.Linear(len(f), len(z)).double()
    head.weight.data, head.bias.data = W.head.weight.data, W.head.bias.data
    out = head(torch.from_numpy(f))
    loss = -(torch.ones(len(z)) * out.log_softmax(0)).sum()
    (gradient,) = torch.autograd.grad(loss, head.weight)
    return float(gradient.abs().sum())


MEAN = W.features.mean(0).numpy()


def fdbd(f: Array, z: Array) -> float:
    p = int(z.argmax())
    total = 0.0
    for c in range(len(z)):
        if c != p:
            total += (z[p] - z[c]) / np.linalg.norm(WEIGHT[p] - WEIGHT[c])
    return float(total / np.linalg.norm(f - MEAN))


def nci(f: Array, z: Array, alpha: float = 1e-4) -> float:
    away = f - MEAN
    return float(WEIGHT[z.argmax()] @ away / np.linalg.norm(away) + alpha * np.abs(f).sum())


def she(f: Array, z: Array) -> float:
    p = int(z.argmax())
    right = (W.labels == p) & (W.logits.argmax(1) == p)
    return float(f @ W.features[right].mean(0).numpy())


def class_mean(p: int) -> Array:
    return W.features[W.logits.argmax(1) == p].mean(0).numpy()


def cadref(f: Array, z: Array) -> float:
    p = int(z.argmax())
    e = (f - class_mean(p)) * np.sign(WEIGHT[p])
    size = np.abs(f).sum()
    mean = np.mean([lse(row) for row in W.logits.numpy()])
    return float(-(np.maximum(e, 0).sum() / size / lse(z) + np.maximum(-e, 0).sum() / size / mean))


def caref(f: Array, z: Array) -> float:
    return float(-np.abs(f - class_mean(int(z.argmax()))).sum() / np.abs(f).sum())


def pnml(f: Array, z: Array) -> float:
    units = (W.features / W.features.norm(dim=1, keepdim=True)).numpy()
    inverse = np.linalg.pinv(units.T @ units)
    u = f / np.linalg.norm(f)
    x = u @ inverse @ u
    g = x / (1 + x)
    p = softmax(WEIGHT @ u + BIAS)
    return float(-np.log((p / (p + (1 - p) * p**g)).sum()) / math.log(len(z)))


RULES: dict[str, tuple[OODDetector, Rule]] = {
    "scale": (SCALE(head=W.head), scale),
    "scale 60": (SCALE(60, head=W.head), lambda f, z: scale(f, z, 60)),
    "lts": (LTS(), lts),
    "gradnorm": (GradNorm(), gradnorm),
    "fdbd": (FDBD(head=W.head), fdbd),
    "nci": (NCI(head=W.head), nci),
    "nci 0.1": (NCI(0.1, head=W.head), lambda f, z: nci(f, z, 0.1)),
    "she": (SHE(head=W.head), she),
    "cadref": (CADRef(head=W.head), cadref),
    "caref": (CADRef(decoupled=False, head=W.head), caref),
    "pnml": (PNML(head=W.head), pnml),
}
rules = pytest.mark.parametrize(("detector", "rule"), RULES.values(), ids=RULES)


@rules
def test_rule(detector: OODDetector, rule: Rule) -> None:
    expected = W.by(rule)
    W.fit(detector)
    torch.testing.assert_close(W.score(detector), expected, rtol=1e-10, atol=1e-10)
    found = W.score(detector, torch.float32)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected.float(), rtol=2e-5, atol=2e-5)


@rules
def test_batches_and_files(detector: OODDetector, rule: Rule, tmp_path: Path) -> None:
    W.check_batches_and_files(detector, tmp_path)


@rules
def test_nan_and_no_rows(detector: OODDetector, rule: Rule) -> None:
    W.check_nan_and_no_rows(detector)


def test_absent_column() -> None:
    """A head with a column for no class scores as one without it."""
    wide = nn.Linear(24, 8).double()
    wide.weight.data = torch.cat(
        [W.head.weight.data[:3], torch.ones(1, 24), W.head.weight.data[3:]]
    )
    wide.bias.data = torch.cat([W.head.bias.data[:3], torch.ones(1), W.head.bias.data[3:]])
    with torch.no_grad():
        train, test = wide(W.features), wide(W.test)
    plain: dict[str, OODDetector] = {}
    absent: dict[str, OODDetector] = {}
    for cls in (SCALE, FDBD, NCI, SHE, CADRef, PNML, LTS, GradNorm):
        with_head = issubclass(cls, HeadDetector)
        plain[cls.name] = W.fit(cls(**({"head": W.head} if with_head else {})))
        absent[cls.name] = cls(absent=3, **({"head": wide} if with_head else {})).fit(
            features=W.features, logits=train, labels=W.labels
        )
    expected = score_all(plain, features=W.test, logits=W.test_logits)
    found = score_all(absent, features=W.test, logits=test)
    for name in plain:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-9)


def test_large_spaces_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = W.score(W.fit(FDBD(head=W.head)))
    monkeypatch.setattr(module, "_TABLE", 3)
    monkeypatch.setattr(module, "_CHUNK", 40)
    found = W.score(W.fit(FDBD(head=W.head)))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_rows_with_a_common_offset_keep_their_distances() -> None:
    weight = W.head.weight.detach().float() + 10 * torch.randn(24)
    every = torch.arange(7)
    exact = torch.cdist(weight.double(), weight.double())
    off = ~torch.eye(7, dtype=torch.bool)
    for table in (7, 3):
        found = module._inverse_distances(weight, every)
        torch.testing.assert_close(1 / found[off].double(), exact[off], rtol=1e-4, atol=0)
        assert (found.diagonal() == 0).all()
        assert table


def test_class_that_was_never_predicted() -> None:
    rows = W.logits.argmax(1) != 2
    for decoupled in (True, False):
        detector = CADRef(decoupled, head=W.head)
        detector.fit(features=W.features[rows], logits=W.logits[rows])
        found = W.score(detector)
        like_none = W.test_logits.argmax(1) == 2
        assert like_none.any()
        assert (found[like_none] == -torch.inf).all()
        assert found[~like_none].isfinite().all()


def test_weights_of_zero_have_no_sign() -> None:
    """Of a pruned head the errors of the features that it leaves out count for neither sign."""
    weight = torch.where(W.head.weight.detach().abs() < 0.1, 0, W.head.weight.detach())
    assert not weight.all()
    logits = W.features @ weight.T + W.head.bias.detach()
    detector = CADRef(head=(weight, W.head.bias)).fit(features=W.features, logits=logits)
    p = logits.argmax(1)
    means = torch.stack([W.features[p == c].mean(0) for c in range(len(weight))])
    e = (W.features - means[p]) * weight[p].sign()
    energy, size = logits.logsumexp(1), W.features.abs().sum(1)
    expected = -(e.relu().sum(1) / energy + (-e).relu().sum(1) / energy.mean()) / size
    torch.testing.assert_close(detector.score(features=W.features, logits=logits), expected)


@pytest.mark.parametrize("kind", [SHE, CADRef, NCI, FDBD])
def test_what_follows_from_a_fit_is_forgotten_with_it(kind: type[HeadDetector]) -> None:
    """Tables that are made of the means once are made anew after more samples."""
    given = {"features": W.features, "logits": W.logits, "labels": W.labels}
    most = {name: t[:-20] for name, t in given.items()}
    test = {"features": W.features[:9], "logits": W.logits[:9]}
    detector = kind(head=W.head).fit(**most)
    before = detector.score(**test)
    detector.partial_fit(**{name: t[-20:] for name, t in given.items()})
    after = detector.score(**test)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, kind(head=W.head).fit(**given).score(**test))


def test_equal_rows_are_no_boundary() -> None:
    head = nn.Linear(24, 3)
    head.weight.data[2] = head.weight.data[1]
    head.bias.data[2] = head.bias.data[1]
    with torch.no_grad():
        z = head(W.test.float())
    found = (
        FDBD(head=head).fit(features=W.features.float()).score(features=W.test.float(), logits=z)
    )
    assert found.isfinite().all()


def test_head_of_a_model() -> None:
    model = nn.Sequential(nn.Linear(5, 24), nn.ReLU(), W.head.float()).double()
    x = torch.randn(9, 5, dtype=torch.float64)
    found = SCALE(model=model).score(x)
    with torch.no_grad():
        features = model[:2](x)
        expected = SCALE(head=W.head).score(features=features, logits=W.head(features))
    torch.testing.assert_close(found, expected)


HEADED = [n for n, c in DETECTORS.items() if issubclass(c, HeadDetector) and c.spec.family != "F"]


@pytest.mark.parametrize("name", HEADED)
def test_another_head_is_refused(name: str) -> None:
    other = nn.Linear(24, 7).double()
    detector = DETECTORS[name](head=other)
    with pytest.raises(ValueError, match="head must give the logits from the features, got logits"):
        detector.fit(features=W.features, logits=W.logits, labels=W.labels).score(
            features=W.test, logits=W.test_logits
        )
    with pytest.raises(ValueError, match="head must have a row for each of 7 logits, got 5"):
        DETECTORS[name](head=nn.Linear(24, 5)).fit(
            features=W.features, logits=W.logits, labels=W.labels
        ).score(features=W.test, logits=W.test_logits)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: SCALE(0.85), ValueError, r"in \[1, 100\), got 0\.85: 0\.9 is written 90"),
        (lambda: LTS(100), ValueError, r"LTS: percentile must be in per cent"),
        (lambda: SCALE(head=3), TypeError, "head must be an nn.Linear, or its weight and bias"),
        (
            lambda: SCALE(head=(torch.ones(3, 4), torch.ones(2))),
            ValueError,
            r"head must have weight \(C, d\) and bias \(C,\), got \(3, 4\) and \(2,\)",
        ),
        (lambda: W.score(SCALE()), NotFittedError, r"head must be given: SCALE\(head=model.fc\)"),
        (lambda: W.score(NCI(head=W.head)), NotFittedError, "fit must come first"),
        (lambda: NCI(-1), ValueError, "alpha must be >= 0 and finite, got -1"),
        (lambda: SHE("dot"), ValueError, "metric must be inner, euclidean or cosine, got 'dot'"),
        (
            lambda: SHE(head=W.head).fit(
                features=W.features[:2], logits=W.logits[:2], labels=W.logits[:2].argmax(1)
            ),
            ValueError,
            "every class must have a sample that is classified correctly, got none of",
        ),
        (
            lambda: W.fit(NCI(head=W.head)).score(features=W.test[:, :5], logits=W.test_logits),
            ValueError,
            "features must have width 24, got 5",
        ),
        (
            lambda: CADRef(head=W.head).fit(
                features=W.features, logits=W.logits - 1000, labels=W.labels
            ),
            ValueError,
            "head must give the logits",
        ),
    ],
)
def test_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_negative_features_warn_once() -> None:
    detector = SCALE(head=W.head)
    f = W.test - 1
    with torch.no_grad():
        z = W.head(f)
    with pytest.warns(UserWarning, match="features must not be negative for scale"):
        detector.score(features=f, logits=z)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        detector.score(features=f, logits=z)
