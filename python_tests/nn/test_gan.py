"""The joint GAN's losses against the rule, and its networks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_losses import batch, mean, restated
from torch import Tensor, nn

from oodkernels.nn import gan


def test_gan_losses_are_the_rule() -> None:
    random = torch.Generator().manual_seed(0)
    real, fake = torch.randn(5, 1, generator=random).double(), torch.randn(7).double()
    logits, _ = batch(7, 0)
    d = [1 / (1 + math.exp(-x)) for x in real.flatten().tolist()]
    g = [1 / (1 + math.exp(-x)) for x in fake.tolist()]
    loss = gan.JointGANLoss(0.6)
    expected = mean([-math.log(x) for x in d]) + mean([-math.log(1 - x) for x in g])
    assert float(loss.discriminator(real, fake)) == pytest.approx(expected)
    divergence = mean([restated("joint GAN", z, -1) for z in logits.tolist()])
    expected = mean([-math.log(x) for x in g]) + divergence
    assert float(loss.generator(fake, logits)) == pytest.approx(expected)
    assert loss.generator(fake.half(), logits.half()).dtype == torch.float32
    assert gan.discriminator_loss(real[:0], fake[:0]) == 0
    with pytest.raises(TypeError, match="discriminator_loss: generated must be float64"):
        gan.discriminator_loss(real, fake.long())
    with pytest.raises(TypeError, match="generator_loss: generated must be float64"):
        gan.generator_loss(fake.long(), logits)


def test_uniform_classifier_has_no_divergence() -> None:
    target = torch.full((3,), -1)
    torch.testing.assert_close(gan.joint_gan_loss(torch.ones(3, 9), target), torch.tensor(0.0))


@pytest.mark.parametrize(("size", "channels"), [(8, 1), (32, 3), (28, 1), (6, 2), (7, 1), (64, 3)])
def test_generator_and_discriminator_fit(size: int, channels: int) -> None:
    generator = gan.Generator(size, channels, latent=10, width=4)
    images = generator.sample(3)
    assert images.shape == (3, channels, size, size)
    assert images.amin() >= 0
    assert images.amax() <= 1
    logits = gan.Discriminator(size, channels, width=4)(images)
    assert logits.shape == (3,)
    logits.sum().backward()
    assert all(p.grad is not None for p in generator.parameters())


@pytest.mark.parametrize("network", [gan.Generator, gan.Discriminator])
def test_network_refuses(network: Any) -> None:
    with pytest.raises(ValueError, match="size must be at least 1 pixel, got 0"):
        network(0)


def test_gan_steps_do_what_they_are_for() -> None:
    """Two blobs and a generator: the classifier learns them, and to be unsure of what is made."""
    torch.manual_seed(0)
    loss = gan.JointGANLoss(beta=1.0)
    classifier = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 2))
    generator = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
    discriminator = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 1))
    optimizers = {
        network: torch.optim.Adam(network.parameters(), lr, (0.5, 0.999))
        for network, lr in ((classifier, 1e-2), (generator, 2e-3), (discriminator, 2e-3))
    }

    def update(network: nn.Module, value: Tensor) -> None:
        optimizers[network].zero_grad()
        value.backward()
        optimizers[network].step()

    for _ in range(75):
        y = torch.randint(2, (64,))
        x = (2.0 * y - 1)[:, None] * 2 + 0.3 * torch.randn(64, 2)
        made = generator(torch.randn(64, 4))
        real, fake = discriminator(x), discriminator(made.detach())
        update(discriminator, loss.discriminator(real, fake))
        update(generator, loss.generator(discriminator(made), classifier(made)))
        target = torch.cat([y, torch.full((64,), -1)])
        update(classifier, loss(classifier(torch.cat([x, made.detach()])), target))
    with torch.no_grad():
        logits = classifier(x)
        confidence = logits.softmax(-1).amax(-1).mean()
        made_confidence = classifier(generator(torch.randn(64, 4))).softmax(-1).amax(-1).mean()
    assert (logits.argmax(-1) == y).float().mean() > 0.9
    assert made_confidence < confidence - 0.2
