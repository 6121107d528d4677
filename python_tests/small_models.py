"""A small classifier of the embedded digits, for the tests of detectors that read features."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import pytest
from torch import Tensor, nn

from oodkernels.training import Recipe, reproducible, train


class Trained(NamedTuple):
    """Layers "1", "3" and "5" are linear, "4" has the features."""

    model: nn.Sequential
    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    ood: dict[str, Tensor]


@cache
def digits() -> Trained:
    """Skips the test where the data's packages are missing."""
    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")
    from oodkernels import data

    found = data.digits()
    with reproducible(0):
        model = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, 64),
            nn.ReLU(),
            nn.Linear(64, 32),
            nn.ReLU(),
            nn.Linear(32, 10),
        )
        loss = nn.CrossEntropyLoss()
        train(model, loss, found.train_images, found.train_labels, Recipe(epochs=10))
    return Trained(model, *found, data.ood_sets())


def batches(images: Tensor, labels: Tensor, size: int = 128) -> list[tuple[Tensor, Tensor]]:
    """In memory, in order."""
    return list(zip(images.split(size), labels.split(size), strict=True))
