"""Scans of a bank against plain restatements of their authors' rules, one sample at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from head_world import Rule, world
from numpy.typing import NDArray

from oodkernels.detectors import MCM, NNGuide, NotFittedError, OODDetector, Relation
from oodkernels.detectors import bank as module

Array = NDArray[np.float64]
W = world(d=20)
TRAIN, LOGITS = W.features.numpy(), W.logits.numpy()
UNITS = TRAIN / np.linalg.norm(TRAIN, axis=1, keepdims=True)
TEXTS = torch.randn(7, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def energy(z: Array) -> float:
    return float(z.max() + np.log(np.exp(z - z.max()).sum()))


def softmax(z: Array) -> Array:
    e = np.exp(z - z.max())
    return np.asarray(e / e.sum())


def nnguide(f: Array, z: Array, k: int = 10) -> float:
    near = np.array([energy(row) for row in LOGITS]) * (UNITS @ (f / np.linalg.norm(f)))
    return energy(z) * float(np.sort(near)[::-1][:k].mean())


def relation(f: Array, z: Array, power: float = 1, cut: float = 0.03) -> float:
    total = 0.0
    for unit, row in zip(UNITS, LOGITS, strict=True):
        r = max(0.0, float(unit @ f) / float(np.linalg.norm(f))) * float(softmax(z) @ softmax(row))
        total += r**power if r > cut else 0
    return total


def mcm(f: Array, z: Array) -> float:
    texts = TEXTS.numpy() / np.linalg.norm(TEXTS.numpy(), axis=1, keepdims=True)
    return float(softmax(texts @ f / np.linalg.norm(f)).max())


RULES: dict[str, tuple[OODDetector, Rule]] = {
    "nnguide": (NNGuide(size=None), nnguide),
    "nnguide 3": (NNGuide(3), lambda f, z: nnguide(f, z, 3)),
    "relation": (Relation(), relation),
    "relation 4": (Relation(4, 0.1), lambda f, z: relation(f, z, 4, 0.1)),
    "mcm": (MCM(TEXTS), mcm),
}
rules = pytest.mark.parametrize(("detector", "rule"), RULES.values(), ids=RULES)


@rules
def test_rule(
    detector: OODDetector,
    rule: Rule,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_QUERIES", 7)
    monkeypatch.setattr(module, "_BLOCK", 60)
    expected = W.by(rule)
    W.fit(detector)
    torch.testing.assert_close(W.score(detector), expected, rtol=1e-9, atol=1e-9)
    found = W.score(detector, torch.float32)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-4)


@rules
def test_batches_and_files(detector: OODDetector, rule: Rule, tmp_path: Path) -> None:
    again = W.check_batches_and_files(detector, tmp_path)
    if detector.trained_on:
        with pytest.raises(ValueError, match="from a file has no sample of its training"):
            again.partial_fit(features=W.features, logits=W.logits)


@rules
def test_nan_and_no_rows(detector: OODDetector, rule: Rule) -> None:
    W.check_nan_and_no_rows(detector)


def test_sample_of_the_bank() -> None:
    one = W.fit(NNGuide(size=50))
    assert isinstance(one, NNGuide)
    assert one.bank.shape == (50, 20)
    assert torch.equal(one.bank, W.fit(NNGuide(size=50)).bank)  # type: ignore[attr-defined]
    assert not torch.equal(one.bank, W.fit(NNGuide(size=50, seed=1)).bank)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: NNGuide(size=5), ValueError, "NNGuide: size must be an int >= 10, got 5"),
        (lambda: Relation(0), ValueError, "power must be positive and cut in"),
        (
            lambda: NNGuide().fit(features=W.features[:9], logits=W.logits[:9]),
            ValueError,
            "there must be at least 10 ID samples, got 9",
        ),
        (lambda: MCM(torch.ones(3)), ValueError, r"texts must be floating-point \(C, d\), got \(3"),
        (lambda: W.score(MCM()), NotFittedError, "texts must be given"),
        (
            lambda: MCM(TEXTS).score(features=W.test[:, :4]),
            ValueError,
            "features must have width 20, got 4",
        ),
    ],
)
def test_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
