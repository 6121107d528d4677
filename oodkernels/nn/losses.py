"""Training objectives: cross entropy on ID samples, and what each method adds for outliers.

Every loss takes the logits of ID and OOD samples from one forward and one target a sample: a class
index 0..C-1, or -1 for an OOD sample. With reduction "mean" each term is averaged over the samples
it speaks of, ID terms over the ID samples and OOD terms over the OOD samples; without any it is 0,
and so is its gradient. "none" gives each sample's term, weighted, "sum" their sum. Half-precision
logits are accumulated in float32, and the loss is float32 (float64 for float64 logits).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from oodkernels._checks import accumulate_type, check_floating
from oodkernels.nn.mos import MOSLoss
from oodkernels.ops.outlier import OOD, outlier_cross_entropy, outlier_loss

__all__ = [
    "AbsentClassLoss",
    "ConfidenceLoss",
    "Discriminator",
    "EnergyBoundedLoss",
    "Generator",
    "JointGANLoss",
    "MOSLoss",
    "OutlierExposureLoss",
    "absent_class_loss",
    "confidence_loss",
    "discriminator_loss",
    "energy_bounded_loss",
    "generator_loss",
    "joint_gan_loss",
    "outlier_exposure_loss",
]

Reduction = Literal["mean", "sum", "none"]


def outlier_exposure_loss(
    logits: Tensor, target: Tensor, weight: float = 0.5, reduction: Reduction = "mean"
) -> Tensor:
    """Outlier Exposure (Hendrycks et al., ICLR 2019).

    Cross entropy on ID samples, plus ``weight`` times the cross entropy to the uniform
    distribution, logsumexp(z) - mean(z), on OOD samples, averaged over the OOD samples alone.

    Args:
        logits: (..., C), float64, float32, bfloat16 or float16; any strides.
        target: (...,) int64, classes 0..C-1 or -1 for OOD.
        weight: The paper's lambda.
        reduction: "mean", "sum" or "none", see the module.

    Returns:
        A scalar, or (...,) with reduction "none".

    Raises:
        ValueError: Shapes disagree, a target is out of range (on CUDA its row is NaN instead), or
            ``reduction`` is unknown.
        TypeError: ``logits`` is not of a type above, or ``target`` not int64.
    """
    _check_reduction("outlier_exposure_loss", reduction)
    return _outlier_loss(logits, target, weight, False, reduction)


def energy_bounded_loss(
    logits: Tensor,
    target: Tensor,
    weight: float = 0.1,
    m_in: float = -25.0,
    m_out: float = -7.0,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Energy-bounded learning (Liu et al., NeurIPS 2020), section 3.2.

    Cross entropy on ID samples, plus ``weight`` times max(0, E - m_in)^2 on ID and
    max(0, m_out - E)^2 on OOD samples, with E = -T logsumexp(z / T): the energy is minus the score.

    Args:
        logits: (..., C), as for :func:`outlier_exposure_loss`.
        target: (...,) int64, classes 0..C-1 or -1 for OOD.
        weight: Of both squared terms.
        m_in: Energy above which ID samples are pulled down; the default is the paper's for CIFAR.
        m_out: Energy below which OOD samples are pushed up.
        temperature: T > 0, of the energy alone.
        reduction: "mean", "sum" or "none", see the module.

    Returns:
        A scalar, or (...,) with reduction "none".

    Raises:
        ValueError: As :func:`outlier_exposure_loss`; ``temperature`` is not positive.
        TypeError: As :func:`outlier_exposure_loss`.
    """
    _check_reduction("energy_bounded_loss", reduction)
    _check_temperature("energy_bounded_loss", temperature)
    each, lse = outlier_cross_entropy(logits, target)
    if temperature != 1:
        lse = temperature * (logits.to(each.dtype) / temperature).logsumexp(-1)
    is_ood = target == OOD
    outside = torch.where(is_ood, m_out + lse, -lse - m_in).relu()
    return _reduce(torch.where(is_ood, 0, each) + weight * outside.square(), is_ood, reduction)


def absent_class_loss(
    logits: Tensor, target: Tensor, beta: float = 1.0, reduction: Reduction = "mean"
) -> Tensor:
    """Cross entropy with an absent class for outliers: DOS (Jiang et al., ICLR 2024), NTOM.

    The last of the C + 1 logits is the absent class's, the target of every OOD sample: cross
    entropy on ID samples, plus ``beta`` times the cross entropy on OOD samples.

    Args:
        logits: (..., C + 1), as for :func:`outlier_exposure_loss`.
        target: (...,) int64, classes 0..C-1; -1 or C for OOD.
        beta: Weight of the OOD samples.
        reduction: "mean", "sum" or "none", see the module.

    Returns:
        A scalar, or (...,) with reduction "none".

    Raises:
        ValueError: As :func:`outlier_exposure_loss`.
        TypeError: As :func:`outlier_exposure_loss`.
    """
    _check_reduction("absent_class_loss", reduction)
    check_floating("absent_class_loss", "logits", logits)
    return _outlier_loss(logits, target, beta, True, reduction)


def confidence_loss(
    logits: Tensor,
    confidence_logits: Tensor,
    target: Tensor,
    weight: float | Tensor = 0.1,
    hints: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Confidence branch (DeVries & Taylor, 2018), section 3.

    With confidence c = sigmoid(confidence_logits) a sample may ask for a hint, the probability
    p' = c p + (1 - c) y, at the cost of -log c: the loss is -log p'_y - weight log c on ID samples.
    OOD samples are left out, as the method is trained without; their term is 0.

    Args:
        logits: (..., C), as for :func:`outlier_exposure_loss`.
        confidence_logits: (...,) or (..., 1), before the sigmoid.
        target: (...,) int64, classes 0..C-1 or -1 for OOD.
        weight: The paper's lambda; :class:`ConfidenceLoss` adapts it.
        hints: (...,) bool, which samples get the hint, the others having p' = p. None: each with
            probability 1/2, from torch's global generator.
        reduction: "mean", "sum" or "none", see the module.

    Returns:
        A scalar, or (...,) with reduction "none".

    Raises:
        ValueError: As :func:`outlier_exposure_loss`; ``confidence_logits`` or ``hints`` have
            another shape.
        TypeError: As :func:`outlier_exposure_loss`, for both logits; ``hints`` are not bool.
    """
    _check_reduction("confidence_loss", reduction)
    nll, cost = _confidence_terms(logits, confidence_logits, target, hints)
    return _reduce(nll + weight * cost, target == OOD, reduction)


def _confidence_terms(
    logits: Tensor, confidence_logits: Tensor, target: Tensor, hints: Tensor | None
) -> tuple[Tensor, Tensor]:
    """-log p'_y and -log c of every sample, 0 for OOD."""
    each = outlier_cross_entropy(logits, target).loss
    check_floating("confidence_loss", "confidence_logits", confidence_logits)
    if confidence_logits.shape not in (target.shape, (*target.shape, 1)):
        raise ValueError(
            "confidence_loss: confidence_logits must have shape (...,) or (..., 1) for target "
            f"{tuple(target.shape)}, got {tuple(confidence_logits.shape)}"
        )
    if hints is None:
        hints = torch.rand_like(each) < 0.5
    elif hints.dtype != torch.bool:
        raise TypeError(f"confidence_loss: hints must be bool, got {hints.dtype}")
    elif hints.shape != target.shape:
        raise ValueError(
            f"confidence_loss: hints must have the shape of target, {tuple(target.shape)}, got "
            f"{tuple(hints.shape)}"
        )
    k = confidence_logits.to(accumulate_type(confidence_logits.dtype)).reshape(target.shape)
    log_c, log_doubt = F.logsigmoid(k), F.logsigmoid(-k)
    nll = torch.where(hints, -torch.logaddexp(log_c - each, log_doubt), each)
    is_ood = target == OOD
    return torch.where(is_ood, 0, nll), torch.where(is_ood, 0, -log_c)


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
    return _reduce(torch.where(is_ood, beta * divergence, each), is_ood, reduction)


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


class OutlierExposureLoss(nn.Module):
    """:func:`outlier_exposure_loss` as a module.

    pytorch-ood's loss of this name averages over ID and OOD samples together and so weakens
    ``weight`` by the share of OOD samples; this one is the authors'.

    Args:
        weight: Of the OOD samples' mean.
        reduction: "mean", "sum" or "none".
    """

    def __init__(self, weight: float = 0.5, reduction: Reduction = "mean") -> None:
        super().__init__()
        _check_reduction("OutlierExposureLoss", reduction)
        self.weight = weight
        self.reduction = reduction

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of logits (..., C) and target (...,)."""
        return outlier_exposure_loss(logits, target, self.weight, self.reduction)

    def extra_repr(self) -> str:
        """What ``repr`` shows of the loss."""
        return f"weight={self.weight}, reduction={self.reduction!r}"


class EnergyBoundedLoss(nn.Module):
    """:func:`energy_bounded_loss` as a module.

    Args:
        weight: Of the squared terms.
        m_in: Energy above which ID samples are pulled down.
        m_out: Energy below which OOD samples are pushed up.
        temperature: T > 0 of the energy.
        reduction: "mean", "sum" or "none".
    """

    def __init__(
        self,
        weight: float = 0.1,
        m_in: float = -25.0,
        m_out: float = -7.0,
        temperature: float = 1.0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        _check_reduction("EnergyBoundedLoss", reduction)
        _check_temperature("EnergyBoundedLoss", temperature)
        self.weight = weight
        self.m_in = m_in
        self.m_out = m_out
        self.temperature = temperature
        self.reduction = reduction

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of logits (..., C) and target (...,)."""
        return energy_bounded_loss(
            logits, target, self.weight, self.m_in, self.m_out, self.temperature, self.reduction
        )

    def extra_repr(self) -> str:
        """What ``repr`` shows of the loss."""
        return (
            f"weight={self.weight}, m_in={self.m_in}, m_out={self.m_out}, "
            f"temperature={self.temperature}, reduction={self.reduction!r}"
        )


class AbsentClassLoss(nn.Module):
    """:func:`absent_class_loss` as a module: the objective of DOS and of NTOM.

    Args:
        beta: Weight of the OOD samples' mean.
        reduction: "mean", "sum" or "none".
    """

    def __init__(self, beta: float = 1.0, reduction: Reduction = "mean") -> None:
        super().__init__()
        _check_reduction("AbsentClassLoss", reduction)
        self.beta = beta
        self.reduction = reduction

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of logits (..., C + 1) and target (...,)."""
        return absent_class_loss(logits, target, self.beta, self.reduction)

    def extra_repr(self) -> str:
        """What ``repr`` shows of the loss."""
        return f"beta={self.beta}, reduction={self.reduction!r}"


class ConfidenceLoss(nn.Module):
    """:func:`confidence_loss` with the authors' budget, which adapts the price of hints.

    In training mode, each call with ID samples divides ``weight`` by 1.01 where their mean -log c
    is under the budget, and by 0.99 otherwise, for the next call. It is a buffer, in the state
    dict, and its update does not wait for the device.

    Args:
        budget: The mean -log c to aim for.
        weight: The paper's lambda, to begin with.
        reduction: "mean", "sum" or "none"; the budget always goes by the mean.
    """

    weight: Tensor

    def __init__(
        self, budget: float = 0.3, weight: float = 0.1, reduction: Reduction = "mean"
    ) -> None:
        super().__init__()
        _check_reduction("ConfidenceLoss", reduction)
        self.budget = budget
        self.reduction = reduction
        self.register_buffer("weight", torch.tensor(weight))

    def forward(
        self,
        logits: Tensor,
        confidence_logits: Tensor,
        target: Tensor,
        hints: Tensor | None = None,
    ) -> Tensor:
        """The loss; arguments as for :func:`confidence_loss`."""
        nll, cost = _confidence_terms(logits, confidence_logits, target, hints)
        is_ood = target == OOD
        loss = _reduce(nll + self.weight * cost, is_ood, self.reduction)
        if self.training:
            with torch.no_grad():
                factor = torch.where(
                    _reduce(cost, is_ood, "mean") < self.budget, 1 / 1.01, 1 / 0.99
                )
                # Not in place: the backward needs the weight that was used.
                self.weight = self.weight * torch.where(is_ood.all(), 1, factor)
        return loss

    def extra_repr(self) -> str:
        """What ``repr`` shows of the loss."""
        return f"budget={self.budget}, reduction={self.reduction!r}"


class JointGANLoss(nn.Module):
    """The three losses of a joint GAN (Lee et al., ICLR 2018), which makes its own outliers.

    Each step: update the discriminator by :meth:`discriminator`, the generator by
    :meth:`generator`, and the classifier by calling the module on the logits of
    ``cat(ID, generated)`` with target -1 for the generated.

    Args:
        beta: Weight of KL(U || p), the same for classifier and generator.
        reduction: Of the classifier's loss: "mean", "sum" or "none".
    """

    def __init__(self, beta: float = 0.1, reduction: Reduction = "mean") -> None:
        super().__init__()
        _check_reduction("JointGANLoss", reduction)
        self.beta = beta
        self.reduction = reduction

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The classifier's loss, :func:`joint_gan_loss`."""
        return joint_gan_loss(logits, target, self.beta, self.reduction)

    def discriminator(self, real: Tensor, generated: Tensor) -> Tensor:
        """:func:`discriminator_loss`."""
        return discriminator_loss(real, generated)

    def generator(self, generated: Tensor, logits: Tensor) -> Tensor:
        """:func:`generator_loss`."""
        return generator_loss(generated, logits, self.beta)

    def extra_repr(self) -> str:
        """What ``repr`` shows of the loss."""
        return f"beta={self.beta}, reduction={self.reduction!r}"


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


def _outlier_loss(
    logits: Tensor, target: Tensor, weight: float, absent: bool, reduction: str
) -> Tensor:
    """Cross entropy, ``weight`` times it on OOD samples: to the absent class or to uniform."""
    if reduction != "none":
        loss = outlier_loss(logits, target, weight, absent, reduction == "mean")
        if loss is not None:
            return loss
    is_ood = target == OOD
    if absent:
        last = logits.shape[-1] - 1
        is_ood = is_ood | (target == last)
        target = torch.where(is_ood, last, target)
    each = outlier_cross_entropy(logits, target).loss
    return _reduce(torch.where(is_ood, weight * each, each), is_ood, reduction)


def _reduce(each: Tensor, is_ood: Tensor, reduction: str) -> Tensor:
    """``each``, its sum, or the sum of its means over ID and over OOD samples."""
    if reduction == "none":
        return each
    if reduction == "mean":
        n_ood = is_ood.sum()
        each = each / torch.where(is_ood, n_ood, is_ood.numel() - n_ood)
    return each.sum()


def _mean_softplus(x: Tensor) -> Tensor:
    """The mean, 0 of nothing."""
    return F.softplus(x.to(accumulate_type(x.dtype))).sum() / max(x.numel(), 1)


def _check_reduction(where: str, reduction: str) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{where}: reduction must be 'mean', 'sum' or 'none', got {reduction!r}")


def _check_temperature(where: str, temperature: float) -> None:
    if not 0 < temperature < math.inf:
        raise ValueError(f"{where}: temperature must be positive and finite, got {temperature}")


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
