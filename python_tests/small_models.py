"""A small classifier of the embedded digits, for the tests of detectors that read features."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import pytest
from torch import Tensor, nn

from oodkernels.training import TrainConfig, Trainer, reproducible, tensor_loader


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
    """Skips the test where the packages of data or training are missing."""
    for package in ("lightning_fabric", "skimage", "sklearn"):
        pytest.importorskip(package)
    from oodkernels.demo import digits as data

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
        loader = tensor_loader(
            found.train_images, found.train_labels, batch_size=64, shuffle=True, drop_last=True
        )
        Trainer(model, config=TrainConfig(epochs=10, accelerator="cpu")).fit(loader)
    return Trained(model, *found, data.ood_sets())


def batches(images: Tensor, labels: Tensor, size: int = 128) -> list[tuple[Tensor, Tensor]]:
    """In memory, in order."""
    return list(zip(images.split(size), labels.split(size), strict=True))
