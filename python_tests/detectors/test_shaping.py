"""Shaped features against plain restatements of their authors' rules, one sample at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from head_world import Rule, world
from numpy.typing import NDArray

from oodkernels.detectors import (
    ASHB,
    ASHP,
    ASHS,
    DICE,
    VRA,
    OODDetector,
    OptFS,
    ReAct,
)
from oodkernels.detectors import shaping as module
from oodkernels.detectors.head import Reservoir

Array = NDArray[np.float64]
W = world(d=30)
WEIGHT, BIAS = (t.detach().numpy() for t in (W.head.weight, W.head.bias))
TRAIN = W.features.numpy()


def energy(f: Array, weight: Array = WEIGHT) -> float:
    z = weight @ f + BIAS
    return float(z.max() + np.log(np.exp(z - z.max()).sum()))


def react(f: Array, z: Array) -> float:
    return energy(np.minimum(f, np.percentile(TRAIN, 90)))


def vra(f: Array, z: Array) -> float:
    low, high = np.percentile(TRAIN, [60, 95], axis=0)
    return energy(np.where(f < low, 0, np.where(f > high, high, f)))


def vra_all(f: Array, z: Array) -> float:
    low, high = np.percentile(TRAIN, [60, 95])
    return energy(np.where(f < low, 0, np.where(f > high, high, f)))


def vra_given(f: Array, z: Array) -> float:
    return energy(np.where(f < 0.5, 0, np.minimum(f, 1)))


def largest(f: Array, percentile: float) -> tuple[Array, int]:
    k = len(f) - round(len(f) * percentile / 100)
    order = sorted(range(len(f)), key=lambda i: (-f[i], i))[:k]
    mask = np.zeros(len(f))
    mask[order] = 1
    return mask, k


def ash_p(f: Array, z: Array, percentile: float = 60) -> float:
    return energy(f * largest(f, percentile)[0])


def ash_b(f: Array, z: Array, percentile: float = 65) -> float:
    mask, k = largest(f, percentile)
    return energy(mask * f.sum() / k)


def ash_s(f: Array, z: Array, percentile: float = 90) -> float:
    mask, _ = largest(f, percentile)
    return energy(mask * f * np.exp(f.sum() / (mask * f).sum()))


def dice(f: Array, z: Array, percentile: float = 90) -> float:
    share = WEIGHT * TRAIN.mean(0)
    return energy(f, WEIGHT * (share > np.percentile(share, percentile)))


def optfs_theta() -> tuple[Array, Array]:
    low, high = np.quantile(TRAIN, [0.001, 0.999])
    edges = low + (high - low) * np.arange(101) / 100
    theta = np.zeros(100)
    for x, z in zip(TRAIN, W.logits.numpy(), strict=True):
        w = WEIGHT[z.argmax()]
        for k in range(100):
            inside = (x >= edges[k]) & (x < edges[k + 1])
            theta[k] += (w[inside] * x[inside]).sum() / len(TRAIN)
    return edges, theta / np.linalg.norm(theta) * 1000


EDGES, THETA = optfs_theta()


def shaped_by_bins(f: Array) -> Array:
    out = np.zeros_like(f)
    for k in range(100):
        inside = (f >= EDGES[k]) & (f < EDGES[k + 1])
        out[inside] = THETA[k] * f[inside]
    return out


def optfs(f: Array, z: Array) -> float:
    return float(WEIGHT[z.argmax()] @ shaped_by_bins(f))


def optfs_energy(f: Array, z: Array) -> float:
    return energy(shaped_by_bins(f))


RULES: dict[str, tuple[OODDetector, Rule]] = {
    "react": (ReAct(head=W.head), react),
    "react 1": (ReAct(limit=1, head=W.head), lambda f, z: energy(np.minimum(f, 1))),
    "vra": (VRA(head=W.head), vra),
    "vra all": (VRA(per_feature=False, head=W.head), vra_all),
    "vra given": (VRA(limits=(0.5, 1), head=W.head), vra_given),
    "ash-p": (ASHP(head=W.head), ash_p),
    "ash-p 90": (ASHP(90, head=W.head), lambda f, z: ash_p(f, z, 90)),
    "ash-b": (ASHB(head=W.head), ash_b),
    "ash-s": (ASHS(head=W.head), ash_s),
    "ash-s 75": (ASHS(75, head=W.head), lambda f, z: ash_s(f, z, 75)),
    "dice": (DICE(head=W.head), dice),
    "dice 70": (DICE(70, head=W.head), lambda f, z: dice(f, z, 70)),
    "optfs": (OptFS(head=W.head), optfs),
    "optfs energy": (OptFS("energy", head=W.head), optfs_energy),
}
rules = pytest.mark.parametrize(("detector", "rule"), RULES.values(), ids=RULES)


@rules
def test_rule(
    detector: OODDetector,
    rule: Rule,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_BLOCK", 30 * 7)  # seven rows
    expected = W.by(rule)
    W.fit(detector)
    torch.testing.assert_close(W.score(detector), expected, rtol=1e-9, atol=1e-9)
    found = W.score(detector, torch.float32)
    assert found.dtype == torch.float32
    # A feature at a bin's edge may round into the next.
    close = torch.isclose(found, expected.float(), rtol=1e-4, atol=1e-4)
    assert close.float().mean() >= (0.9 if isinstance(detector, OptFS) else 1)


@rules
def test_batches_and_files(detector: OODDetector, rule: Rule, tmp_path: Path) -> None:
    W.check_batches_and_files(detector, tmp_path)


@rules
def test_nan_and_no_rows(detector: OODDetector, rule: Rule) -> None:
    W.check_nan_and_no_rows(detector)


def test_equal_features_are_taken_in_their_order() -> None:
    f = torch.zeros(1, 30, dtype=torch.float64)
    f[0, [3, 7, 11]] = 2.0
    found = ASHB(90, head=W.head).score(features=f)
    one = np.zeros(30)
    one[[3, 7, 11]] = 6 / 3
    assert float(found) == pytest.approx(energy(one))
    f[0, :] = 1.0
    first = np.zeros(30)
    first[:3] = 1.0
    assert float(ASHP(90, head=W.head).score(features=f)) == pytest.approx(energy(first))


def test_sample_does_not_depend_on_batches() -> None:
    rows = torch.arange(3000.0)[:, None]
    whole = Reservoir(100)
    whole.add(rows)
    parts = Reservoir(100)
    for part in rows.split(7):
        parts.add(part)
    assert torch.equal(whole.rows()[0], parts.rows()[0])
    assert len(whole.rows()[0]) == 100
    assert parts.count == 3000
    means = []
    for seed in range(200):
        one = Reservoir(50, seed)
        one.add(rows)
        means.append(one.rows()[0].mean())
    # Uniform: mean 1499.5, standard deviation 866 / sqrt(50) of each.
    assert abs(float(torch.stack(means).mean()) - 1499.5) < 4 * 866 / math.sqrt(50 * 200)


def test_large_training_sets_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SAMPLE", 200)
    detector = ReAct(head=W.head).fit(features=W.features)
    exact = np.percentile(TRAIN, 90)
    assert float(detector.clip) != exact
    assert abs(float(detector.clip) - exact) < 0.1


def test_loaded_from_a_file_it_cannot_learn_more(tmp_path: Path) -> None:
    ReAct(head=W.head).fit(features=W.features).save(tmp_path / "d")
    again = ReAct.load(tmp_path / "d")
    with pytest.raises(ValueError, match="react from a file has no sample of its training"):
        again.partial_fit(features=W.features)
    again.fit(features=W.features)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: VRA(95, 60), "VRA: low must be below high, got 95 and 60"),
        (lambda: VRA(limits=(1, 0)), "VRA: limits must be two, ascending"),
        (lambda: OptFS("both"), "OptFS: kind must be logit or energy, got 'both'"),
        (lambda: ASHS(0.9), "ASHS: percentile must be in per cent"),
        (
            lambda: ReAct(head=W.head).fit(features=W.features[:0]),
            "there must be at least 1 ID samples, got 0",
        ),
        (lambda: ReAct(head=W.head).fit(features=W.features / 0), "features must be finite"),
    ],
)
def test_bad_input(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
