"""A small classifier of scikit-learn's digits, for the tests of detectors on real images."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from oodkernels.data.glyphs import photographs
from oodkernels.training import TrainConfig, Trainer, reproducible, tensor_loader


class Trained(NamedTuple):
    """Layers "1", "3" and "5" are linear, "4" has the features. Images are (N, 1, 8, 8)."""

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
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.from_numpy(found.images / 16).float()[:, None]
    labels = torch.from_numpy(found.target).long()
    held = torch.arange(len(images)) % 3 == 0
    train, test = images[~held], images[held]
    sources = {"textures": ("brick", "grass", "gravel"), "photos": ("astronaut", "coins", "rocket")}
    ood = {name: photographs(names, 600, 8).float() / 255 for name, names in sources.items()}
    with reproducible(0):
        model = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, 64),
            nn.ReLU(),
            nn.Linear(64, 32),
            nn.ReLU(),
            nn.Linear(32, 10),
        )
        loader = tensor_loader(train, labels[~held], batch_size=64, shuffle=True, drop_last=True)
        Trainer(model, config=TrainConfig(epochs=25, lr=0.2, accelerator="cpu")).fit(loader)
    return Trained(model, train, labels[~held], test, labels[held], ood)


def batches(images: Tensor, labels: Tensor, size: int = 128) -> list[tuple[Tensor, Tensor]]:
    """In memory, in order."""
    return list(zip(images.split(size), labels.split(size), strict=True))
