"""Features, logits and labels of a linear head, for tests of detectors that know it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from oodkernels.detectors import OODDetector


class World(NamedTuple):
    """A head, and training and test samples of it."""

    head: nn.Linear
    features: Tensor
    logits: Tensor
    labels: Tensor
    test: Tensor
    test_logits: Tensor

    def fit(self, detector: OODDetector, dtype: torch.dtype = torch.float64) -> OODDetector:
        return detector.fit(
            features=self.features.to(dtype), logits=self.logits.to(dtype), labels=self.labels
        )

    def score(self, detector: OODDetector, dtype: torch.dtype = torch.float64) -> Tensor:
        return detector.score(features=self.test.to(dtype), logits=self.test_logits.to(dtype))


def world(d: int = 24, classes: int = 7, seed: int = 0) -> World:
    g = torch.Generator().manual_seed(seed)
    head = nn.Linear(d, classes).double()
    with torch.no_grad():
        head.weight.copy_(torch.randn(classes, d, generator=g, dtype=torch.float64))
        head.bias.copy_(torch.randn(classes, generator=g, dtype=torch.float64))

    def draw(n: int) -> Tensor:
        return torch.randn(n, d, generator=g, dtype=torch.float64).add(0.3).relu() + 1e-3

    features, test = draw(400), draw(50)
    with torch.no_grad():
        logits, test_logits = head(features), head(test)
    labels = torch.where(
        torch.rand(400, generator=g) < 0.8,
        logits.argmax(1),
        torch.randint(classes, (400,), generator=g),
    )
    return World(head, features, logits, labels, test, test_logits)
