"""Training of small classifiers on data that fit in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Recipe:
    """How to train: SGD with Nesterov momentum, learning rate decayed to 0 along a cosine.

    Attributes:
        epochs: Passes over the training data.
        batch_size: Images per step; what is left over at the end of an epoch is skipped.
        lr: Learning rate of the first step.
        momentum: Nesterov momentum.
        weight_decay: L2 penalty on every parameter.
    """

    epochs: int = 20
    batch_size: int = 64
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4


class SmallConvNet(nn.Module):
    """Two convolutions and a hidden layer of 128 units, for 8 x 8 grey images.

    Args:
        head: Number of features -> last layer, (N, 128) -> (N, columns). A callable and not a
            module, so that the backbone is initialised first: under one seed it is the same below
            any head.
    """

    def __init__(self, head: Callable[[int], nn.Module]) -> None:
        super().__init__()
        num_features = 128
        self.backbone = nn.Sequential(
            *_conv_block(1, 32),
            *_conv_block(32, 64),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, num_features),
            nn.ReLU(),
        )
        self.head = head(num_features)

    def features(self, images: Tensor) -> Tensor:
        """Penultimate features: (N, 1, 8, 8) -> (N, 128)."""
        features: Tensor = self.backbone(images)
        return features

    def forward(self, images: Tensor) -> Tensor:
        """Logits: (N, 1, 8, 8) -> (N, columns)."""
        logits: Tensor = self.head(self.features(images))
        return logits


def _conv_block(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return conv, nn.BatchNorm2d(outputs), nn.ReLU()


def zero_linear(in_features: int, columns: int) -> nn.Linear:
    """A linear head that starts at zero, as a MOS head does."""
    head = nn.Linear(in_features, columns)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


@contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """Seed torch on the CPU and use one thread; on leaving, put both back as they were.

    One thread, because the reductions of some CPU layers depend on how many there are.
    """
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def train(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    recipe: Recipe,
    seed: int = 0,
    on_epoch: Callable[[int], None] = lambda epoch: None,
) -> None:
    """Train in place, and leave the model in evaluation mode.

    Args:
        model: images -> logits.
        loss: (logits, labels) -> scalar.
        images: (N, ...), N >= ``recipe.batch_size``.
        labels: (N,) class ids.
        recipe: How.
        seed: Of the order of the images, drawn apart from torch's global generator.
        on_epoch: Called after each epoch with the number of epochs done.

    Raises:
        ValueError: Fewer images than one batch.
    """
    steps = len(images) // recipe.batch_size
    if steps == 0:
        raise ValueError(
            f"train: images must fill a batch of {recipe.batch_size}, got {len(images)}"
        )
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=True,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs * steps)
    model.train()
    for epoch in range(recipe.epochs):
        order = torch.randperm(len(images), generator=generator)
        for batch in order.split(recipe.batch_size)[:steps]:
            optimizer.zero_grad()
            loss(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
        on_epoch(epoch + 1)
    model.eval()
