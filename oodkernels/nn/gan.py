"""Joint GAN (Lee et al., ICLR 2018): networks that make a classifier's outliers, their losses."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from oodkernels._checks import accumulate_type, check_floating
from oodkernels.nn.losses import Reduction, SettingsLoss, _check_reduction, reduce_terms
from oodkernels.ops.outlier import OOD, outlier_cross_entropy

__all__ = [
    "Discriminator",
    "Generator",
    "JointGANLoss",
    "discriminator_loss",
    "generator_loss",
    "joint_gan_loss",
]


def joint_gan_loss(
    logits: Tensor, target: Tensor, beta: float = 0.1, reduction: Reduction = "mean"
) -> Tensor:
    """The classifier's loss of a joint GAN (Lee et al., ICLR 2018), equation 4.

    Cross entropy on ID samples, plus ``beta`` times KL(U || p), U uniform, on OOD samples: those
    that the :class:`Generator` made.

    Args:
        logits: (..., C), as for :func:`outlier_exposure_loss`.
        target: (...,) int64, classes 0..C-1 or -1 for OOD, that is, generated.
        beta: Weight of the divergence; the authors' for CIFAR is 0.1.
        reduction: "mean", "sum" or "none", see the module.

    Returns:
        A scalar, or (...,) with reduction "none".

    Raises:
        ValueError: As :func:`outlier_exposure_loss`.
        TypeError: As :func:`outlier_exposure_loss`.
    """
    _check_reduction("joint_gan_loss", reduction)
    each = outlier_cross_entropy(logits, target).loss
    is_ood = target == OOD
    divergence = each - math.log(logits.shape[-1])
    return reduce_terms(torch.where(is_ood, beta * divergence, each), is_ood, reduction)


def discriminator_loss(real: Tensor, generated: Tensor) -> Tensor:
    """The discriminator's loss of a joint GAN (Lee et al., ICLR 2018): binary cross entropy.

    Args:
        real: The discriminator's logits of ID samples, any shape; larger = more real.
        generated: Those of generated samples, any shape. Detach the samples from the generator.

    Returns:
        A scalar, the sum of two means: -log D of real, -log(1 - D) of generated samples.

    Raises:
        TypeError: An argument is not of a floating-point type.
    """
    check_floating("discriminator_loss", "real", real)
    check_floating("discriminator_loss", "generated", generated)
    return _mean_softplus(-real) + _mean_softplus(generated)


def generator_loss(generated: Tensor, logits: Tensor, beta: float = 0.1) -> Tensor:
    """The generator's loss of a joint GAN (Lee et al., ICLR 2018): to seem real, near the boundary.

    Args:
        generated: The discriminator's logits of generated samples, any shape.
        logits: (..., C), the classifier's logits of the same samples.
        beta: Weight of KL(U || p).

    Returns:
        A scalar, the mean of -log D plus ``beta`` times the mean of KL(U || p).

    Raises:
        ValueError: ``logits`` hold no class.
        TypeError: An argument is not of a floating-point type.
    """
    check_floating("generator_loss", "generated", generated)
    target = torch.full(logits.shape[:-1], OOD, device=logits.device)
    return _mean_softplus(-generated) + joint_gan_loss(logits, target, beta)


class JointGANLoss(SettingsLoss):
    """The three losses of a joint GAN (Lee et al., ICLR 2018), which makes its own outliers.

    Each step: update the discriminator by :meth:`discriminator`, the generator by
    :meth:`generator`, and the classifier by calling the module on the logits of
    ``cat(ID, generated)`` with target -1 for the generated.

    Args:
        beta: Weight of KL(U || p), the same for classifier and generator.
        reduction: Of the classifier's loss: "mean", "sum" or "none".
    """

    beta: float

    def __init__(self, beta: float = 0.1, reduction: Reduction = "mean") -> None:
        super().__init__(reduction, beta=beta)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The classifier's loss, :func:`joint_gan_loss`."""
        return joint_gan_loss(logits, target, self.beta, self.reduction)

    def discriminator(self, real: Tensor, generated: Tensor) -> Tensor:
        """The discriminator's loss, :func:`discriminator_loss`."""
        return discriminator_loss(real, generated)

    def generator(self, generated: Tensor, logits: Tensor) -> Tensor:
        """The generator's loss, :func:`generator_loss`."""
        return generator_loss(generated, logits, self.beta)


class Generator(nn.Module):
    """A small DCGAN generator (Radford et al., ICLR 2016): noise to square images in [0, 1].

    Transposed convolutions double the side, from 4 to 7 where ``size`` is a power of two times
    that, any ``size`` being possible. Normalise the images after it as your data are.

    Args:
        size: Side of the images, in pixels.
        channels: Of the images.
        latent: Width of the noise.
        width: Channels before the last layer; they double with every layer towards the noise.
    """

    def __init__(
        self, size: int = 32, channels: int = 3, latent: int = 100, width: int = 64
    ) -> None:
        super().__init__()
        side, doublings = _pyramid("Generator", size)
        self.latent = latent
        inner = width << max(doublings - 1, 0)
        layers: list[nn.Module] = [
            nn.ConvTranspose2d(latent, inner, side, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
        ]
        for _ in range(doublings - 1):
            layers += [
                nn.ConvTranspose2d(inner, inner // 2, 4, 2, 1, bias=False),
                nn.BatchNorm2d(inner // 2),
                nn.ReLU(),
            ]
            inner //= 2
        if doublings:
            layers.append(nn.ConvTranspose2d(inner, channels, 4, 2, 1))
        else:
            layers.append(nn.Conv2d(inner, channels, 3, padding=1))
        self.layers = nn.Sequential(*layers, nn.Sigmoid())
        self.apply(_initialise)

    def forward(self, noise: Tensor) -> Tensor:
        """Images (N, channels, size, size) of standard normal noise (N, latent)."""
        images: Tensor = self.layers(noise[..., None, None])
        return images

    def sample(self, n: int) -> Tensor:
        """Images of ``n`` noise vectors drawn on the parameters' device."""
        weight = next(self.parameters())
        return self(torch.randn(n, self.latent, device=weight.device, dtype=weight.dtype))


class Discriminator(nn.Module):
    """A small DCGAN discriminator: square images to one logit each, larger = more real.

    Args:
        size: Side of the images, in pixels.
        channels: Of the images.
        width: Channels after the first layer; they double with every layer.
    """

    def __init__(self, size: int = 32, channels: int = 3, width: int = 64) -> None:
        super().__init__()
        side, halvings = _pyramid("Discriminator", size)
        first = nn.Conv2d(channels, width, 4, 2, 1) if halvings else nn.Conv2d(channels, width, 1)
        layers: list[nn.Module] = [first, nn.LeakyReLU(0.2)]
        for _ in range(halvings - 1):
            layers += [
                nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False),
                nn.BatchNorm2d(2 * width),
                nn.LeakyReLU(0.2),
            ]
            width *= 2
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 1, side))
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N,) of images (N, channels, size, size)."""
        logits: Tensor = self.layers(images)
        return logits.flatten()


def _mean_softplus(x: Tensor) -> Tensor:
    """The mean, 0 of nothing."""
    return F.softplus(x.to(accumulate_type(x.dtype))).sum() / max(x.numel(), 1)


def _pyramid(where: str, size: int) -> tuple[int, int]:
    """The least side that ``size`` is 2^n times, 4 or more if n > 0, and n."""
    if size < 1:
        raise ValueError(f"{where}: size must be at least 1 pixel, got {size}")
    n = 0
    while size % 2 == 0 and size >= 8:
        size //= 2
        n += 1
    return size, n


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0, 0.02)  # DCGAN, section 3
