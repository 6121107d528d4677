"""Bundles of a small network, untrained, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from training_runs import ConfidenceHead

from oodkernels import Groups
from oodkernels.data import ToTensor
from oodkernels.deploy import Bundle
from oodkernels.detectors import DETECTORS, KNN, MOS, ConfidenceBranch, Mahalanobis, OODDetector

SHAPE = (1, 8, 8)
GROUPS = Groups.from_labels(["b", "a", "b", "c", "a", "b", "c"])


class SmallConvNet(nn.Module):
    """Two convolutions and a hidden layer of 128 units, for 8 x 8 grey images."""

    def __init__(self, head: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64 * 4 * 4, 128), nn.ReLU()),
        )
        self.head = head(128)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.backbone(images))
        return logits


class Data(NamedTuple):
    train: Tensor
    labels: Tensor
    held_out: Tensor
    new: Tensor


def data(classes: int = 10, n: int = 120) -> Data:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, n, *SHAPE, generator=generator)
    return Data(images[0], torch.arange(n) % classes, images[1], images[2, :40])


def network(columns: int = 10, head: Any = nn.Linear) -> SmallConvNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SmallConvNet(lambda width: head(width, columns)).eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):  # as if it were trained
                module.running_mean.uniform_(-0.1, 0.1)
                module.running_var.uniform_(0.5, 2)
    return model


def named(name: str, **options: Any) -> Callable[[nn.Module], OODDetector]:
    return lambda model: DETECTORS[name].spec.make("test", options, model=model)


KINDS: dict[str, Callable[[nn.Module], OODDetector]] = {
    "energy": named("energy"),
    "knn": lambda model: KNN(5, "torch", model=model),
    "layers": lambda model: Mahalanobis(["backbone.3", "backbone.8"], shrinkage=0.1, model=model),
    "confidence": lambda model: ConfidenceBranch(model=model),
    "mos": lambda model: MOS(GROUPS, model=model),
    "react": named("react"),
    "rmds": named("rmds", shrinkage=0.1),
    "vim": named("vim", dim=8),
}


def make(kind: str = "energy", calibrated: bool = True, **options: Any) -> Bundle:
    """A bundle with a detector of ``KINDS``."""
    found = data()
    model = network()
    if kind == "confidence":
        model = network(head=ConfidenceHead)
    elif kind == "mos":
        model = network(GROUPS.width)
        found = data(GROUPS.num_classes)
    detector = KINDS[kind](model)
    detector.fit([(found.train, found.labels)])
    bundle = Bundle(model, detector, input_shape=SHAPE, **options)
    if calibrated:
        bundle.calibrate(found.held_out, 0.9)
    return bundle


with_names = partial(make, "mos", class_names=list("ABCDEFG"), transform=ToTensor(8))
