"""Features, logits and labels of a linear head, for tests of detectors that know it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from oodkernels.detectors import OODDetector

Rule = Callable[[NDArray[np.float64], NDArray[np.float64]], float]
"""The score of one sample by its features (d,) and logits (C,)."""


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

    def by(self, rule: Rule) -> Tensor:
        """The test samples' scores by a rule, one at a time."""
        pairs = zip(self.test.numpy(), self.test_logits.numpy(), strict=True)
        return torch.tensor([rule(f, z) for f, z in pairs], dtype=torch.float64)

    def check_batches_and_files(self, detector: OODDetector, folder: Path) -> OODDetector:
        """Fitting in parts is fitting, a file gives the detector back; returns that."""
        expected = self.score(self.fit(detector))
        if detector.trained_on:
            detector._reset()
            for rows in torch.arange(len(self.labels)).split(90):
                detector.partial_fit(
                    features=self.features[rows],
                    logits=self.logits[rows],
                    labels=self.labels[rows],
                )
        found = self.score(detector)
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
        detector.save(folder / "d")
        again = OODDetector.load(folder / "d")
        assert repr(again) == repr(detector)
        torch.testing.assert_close(self.score(again), found, rtol=1e-9, atol=1e-9)
        one = [
            again.score(features=f[None], logits=z[None])
            for f, z in zip(self.test, self.test_logits, strict=True)
        ]
        torch.testing.assert_close(torch.cat(one), found, rtol=1e-9, atol=1e-9)
        return again

    def check_nan_and_no_rows(self, detector: OODDetector) -> None:
        """A NaN feature gives NaN to its row alone; of no rows there are no scores."""
        self.fit(detector)
        test, logits = self.test.clone(), self.test_logits.clone()
        test[3, 5], logits[3] = math.nan, math.nan
        found = detector.score(features=test, logits=logits)
        assert found.isnan().nonzero().tolist() == [[3]]
        assert detector.score(features=test[:0], logits=logits[:0]).shape == (0,)


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
