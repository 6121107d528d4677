"""Mahalanobis beside the authors' loop over the classes, pytorch-ood and careful torch.

    pytest benchmarks/test_mahalanobis.py --benchmark-only --benchmark-group-by=group

Group "score": all rows for us and for careful torch; the loops over the classes, which cost as
much at every row, take LOOP_ROWS of them, so compare "us a row". Every peer is first held against
our scores. Group "fit": means and covariance of all rows, ready to score.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from clustering import QUICK, measure, median
from peers import pytorch_ood
from torch import Tensor

from oodkernels.detectors import Mahalanobis
from oodkernels.detectors.statistics import ClassStatistics

SHAPE = (200, 16, 10) if QUICK else (50_000, 2048, 1000)  # rows, features, classes
LOOP_ROWS = 200
BATCH = 200  # of the authors' code

shapes = pytest.mark.parametrize("shape", [SHAPE], ids=lambda s: "x".join(map(str, s)))


class Problem(NamedTuple):
    features: Tensor
    labels: Tensor
    detector: Mahalanobis
    means: Tensor
    precision: Tensor


@cache
def problem(rows: int, d: int, classes: int) -> Problem:
    """Like penultimate features: not negative, about class means, correlated."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(rows) % classes
    noise = torch.randn(rows, d, generator=generator)
    x = noise @ (torch.eye(d) + 0.5 * torch.randn(d, d, generator=generator) / d**0.5)
    x = x.add_(torch.randn(classes, d, generator=generator)[y]).add_(0.5).relu_()
    detector = Mahalanobis().fit(features=x, labels=y)
    statistics = detector.statistics["features"]
    precision = statistics.covariance().inverse()
    return Problem(x, y, detector, statistics.means.float(), precision.float())


def authors(x: Tensor, means: Tensor, precision: Tensor) -> Tensor:
    """The loop of deep_Mahalanobis_detector, which takes the diagonal of a square product."""
    scores = []
    for rows in x.split(BATCH):
        gaussian = []
        for mean in means:
            centred = rows - mean
            gaussian.append(-0.5 * (centred @ precision @ centred.T).diag())
        scores.append(torch.stack(gaussian, 1).amax(1))
    return torch.cat(scores)


def careful(x: Tensor, matrix: Tensor, origin: Tensor, centroids: Tensor) -> Tensor:
    """Whitened once too; distances by the product that expands the square."""
    half_norms = centroids.square().sum(1) / 2
    scores = []
    for rows in x.split(4096):
        z = (rows - origin) @ matrix
        scores.append(torch.addmm(-half_norms, z, centroids.T).amax(1) - z.square().sum(1) / 2)
    return torch.cat(scores)


@pytest.mark.parametrize("peer", ["oodkernels", "torch, whitened", "pytorch-ood", "authors' loop"])
@shapes
def test_score(benchmark: Any, shape: tuple[int, int, int], peer: str) -> None:
    benchmark.group = f"score {shape}"
    p = problem(*shape)
    x = p.features[:LOOP_ROWS] if peer in ("pytorch-ood", "authors' loop") else p.features
    space = p.detector._whitening["features"].space(x)
    if peer == "pytorch-ood":
        theirs = pytorch_ood("detector.mahalanobis").Mahalanobis(None)
        theirs.mu, theirs.precision = p.means, p.precision
    calls = {
        "oodkernels": lambda: p.detector.score(features=x),
        "torch, whitened": lambda: careful(x, space.matrix, space.origin, space.centroids),
        "pytorch-ood": lambda: -theirs.predict_features(x),
        "authors' loop": lambda: authors(x, p.means, p.precision),
    }
    found, expected = calls[peer]()[:BATCH], p.detector.score(features=x[:BATCH])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)
    measure(benchmark, calls[peer], peer=peer, rows=len(x))
    benchmark.extra_info["us a row"] = 1e6 * median(benchmark) / len(x)


@pytest.mark.parametrize("peer", ["oodkernels", "statistics alone", "pytorch-ood", "authors"])
@shapes
def test_fit(benchmark: Any, shape: tuple[int, int, int], peer: str) -> None:
    """Ours in float64 and one pass, theirs in float32 and two."""
    from sklearn.covariance import EmpiricalCovariance

    benchmark.group = f"fit {shape}"
    p = problem(*shape)
    x, y = p.features, p.labels

    def two_passes() -> Any:
        means = torch.stack([x[y == c].mean(0) for c in range(shape[2])])
        return EmpiricalCovariance().fit((x - means[y]).numpy()).precision_

    calls = {
        "oodkernels": lambda: Mahalanobis().fit(features=x, labels=y),
        "statistics alone": lambda: ClassStatistics().update(x, y),
        "pytorch-ood": lambda: (
            pytorch_ood("detector.mahalanobis").Mahalanobis(None).fit_features(x, y)
        ),
        "authors": two_passes,
    }
    measure(benchmark, calls[peer], peer=peer, rows=len(x))
