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

from oodkernels._checks import accumulate_type, check_classes, check_floating, check_number
from oodkernels.ops.outlier import OOD, outlier_cross_entropy, outlier_loss

__all__ = [
    "AbsentClassLoss",
    "ConfidenceLoss",
    "EnergyBoundedLoss",
    "LogitNormLoss",
    "ObjectosphereLoss",
    "OutlierExposureLoss",
    "absent_class_loss",
    "confidence_loss",
    "energy_bounded_loss",
    "logit_norm_loss",
    "objectosphere_loss",
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
    m_in: float | None = None,
    m_out: float | None = None,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Energy-bounded learning (Liu et al., NeurIPS 2020), section 3.2.

    Cross entropy on ID samples, plus ``weight`` times max(0, E - m_in)^2 on ID and
    max(0, m_out - E)^2 on OOD samples, with E = -T logsumexp(z / T): the energy is minus the score.

    The authors choose the margins by data set: their script has -23 and -5 for CIFAR-10, -27 and -5
    for CIFAR-100. Logits that say nothing have the energy -T log C, so a margin that is not given
    here stands where it stands for CIFAR-10 seen from there: -23 - (T log C - log 10) and
    -5 - (T log C - log 10).

    Args:
        logits: (..., C), as for :func:`outlier_exposure_loss`.
        target: (...,) int64, classes 0..C-1 or -1 for OOD.
        weight: Of both squared terms.
        m_in: Energy above which ID samples are pulled down; None: -23, moved with C as above.
        m_out: Energy below which OOD samples are pushed up; None: -5, moved with C as above.
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
    moved = math.log(10) - temperature * math.log(logits.shape[-1])
    m_in = -23 + moved if m_in is None else m_in
    m_out = -5 + moved if m_out is None else m_out
    outside = torch.where(is_ood, m_out + lse, -lse - m_in).relu()
    return reduce_terms(torch.where(is_ood, 0, each) + weight * outside.square(), is_ood, reduction)


def absent_class_loss(
    logits: Tensor, target: Tensor, beta: float = 1.0, reduction: Reduction = "mean"
) -> Tensor:
    """Cross entropy with an absent class for outliers: DOS (Jiang et al., ICLR 2024), NTOM.

    The last of the C + 1 logits is the absent class's, the target of every OOD sample: cross
    entropy on ID samples, plus ``beta`` times the cross entropy on OOD samples.

    Args:
        logits: (..., C + 1), as for :func:`outlier_exposure_loss`.
        target: (...,) int64, classes 0..C-1 or -1 for OOD. C, the last column, is no target: labels
            that reach it are those of a model without a column for the absent class.
        beta: Weight of the OOD samples.
        reduction: "mean", "sum" or "none", see the module.

    Returns:
        A scalar, or (...,) with reduction "none".

    Raises:
        ValueError: As :func:`outlier_exposure_loss`.
        TypeError: As :func:`outlier_exposure_loss`.
    """
    _check_reduction("absent_class_loss", reduction)
    check_classes("absent_class_loss", logits)
    last = logits.shape[-1] - 1
    is_last = target == last
    if _readable(is_last) and bool(is_last.any()):
        raise ValueError(
            f"absent_class_loss: target must be a class in 0..{last - 1}, or -1 for OOD, the last "
            f"of {last + 1} logits being the absent class's, got {last} in row "
            f"{int(is_last.flatten().nonzero()[0])}"
        )
    # Where contents are not looked at, the op makes the row NaN, as for every other wrong target.
    return _outlier_loss(logits, torch.where(is_last, last + 1, target), beta, True, reduction)


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
    return reduce_terms(nll + weight * cost, target == OOD, reduction)


def logit_norm_loss(
    logits: Tensor, target: Tensor, temperature: float = 0.04, reduction: Reduction = "mean"
) -> Tensor:
    """LogitNorm (Wei et al., ICML 2022), equation 4.

    Cross entropy of the logits over their norm, z / (T (|z| + 1e-7)), by the fused cross entropy of
    this package. OOD samples are left out, as the method is trained without; their term is 0. The
    trained model is scored by its logits as they are.

    Args:
        logits: (..., C), as for :func:`outlier_exposure_loss`.
        target: (...,) int64, classes 0..C-1 or -1 for OOD.
        temperature: T > 0; the authors' 0.04 for CIFAR-10.
        reduction: "mean", "sum" or "none", see the module.

    Returns:
        A scalar, or (...,) with reduction "none".

    Raises:
        ValueError: As :func:`outlier_exposure_loss`; ``temperature`` is not positive.
        TypeError: As :func:`outlier_exposure_loss`.
    """
    _check_reduction("logit_norm_loss", reduction)
    _check_temperature("logit_norm_loss", temperature)
    check_classes("logit_norm_loss", logits)
    z = logits.to(accumulate_type(logits.dtype))
    norm = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    return _outlier_loss(z / (temperature * (norm + 1e-7)), target, 0.0, False, reduction)


def objectosphere_loss(
    logits: Tensor,
    features: Tensor,
    target: Tensor,
    weight: float = 1e-4,
    xi: float = 50.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Objectosphere (Dhamija, Guenther & Boult, NeurIPS 2018), equation 3.

    The entropic open-set loss, cross entropy on ID samples and the cross entropy to the uniform
    distribution on OOD samples, plus ``weight`` times max(0, xi - |h|)^2 on ID and |h|^2 on OOD
    samples. The authors average over all samples together, here as everywhere in this package ID
    and OOD samples have means of their own.

    Args:
        logits: (..., C), as for :func:`outlier_exposure_loss`.
        features: (..., d), what the logits are computed from.
        target: (...,) int64, classes 0..C-1 or -1 for OOD.
        weight: The paper's lambda; 0 for the entropic open-set loss alone.
        xi: The least norm that ID features are to have.
        reduction: "mean", "sum" or "none", see the module.

    Returns:
        A scalar, or (...,) with reduction "none".

    Raises:
        ValueError: As :func:`outlier_exposure_loss`; ``features`` have another shape.
        TypeError: As :func:`outlier_exposure_loss`, for features too.
    """
    _check_reduction("objectosphere_loss", reduction)
    each = outlier_cross_entropy(logits, target).loss
    check_floating("objectosphere_loss", "features", features)
    if features.shape[:-1] != target.shape:
        raise ValueError(
            f"objectosphere_loss: features must have shape (..., d) for target "
            f"{tuple(target.shape)}, got {tuple(features.shape)}"
        )
    is_ood = target == OOD
    square = features.to(each.dtype).square().sum(-1)
    # The norm of zeros has no gradient, and none is wanted where it does not count.
    norm = torch.where(is_ood | (square == 0), torch.ones_like(square), square).sqrt()
    norm = torch.where(square == 0, torch.zeros_like(norm), norm)
    ring = torch.where(is_ood, square, (xi - norm).relu().square())
    return reduce_terms(each + weight * ring, is_ood, reduction)


def _confidence_terms(
    logits: Tensor, confidence_logits: Tensor, target: Tensor, hints: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Terms -log p'_y and -log c of every sample, 0 for OOD."""
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


class SettingsLoss(nn.Module):
    """What the losses of this package share as modules: settings, which ``repr`` shows.

    Args:
        reduction: "mean", "sum" or "none", see the module.
        **settings: Kept as attributes of these names.

    Raises:
        ValueError: ``reduction`` is unknown, or a setting NaN.
        TypeError: A setting is no number.
    """

    reduction: Reduction

    def __init__(self, reduction: Reduction, **settings: float | None) -> None:
        super().__init__()
        _check_reduction(type(self).__name__, reduction)
        self._names = [*settings, "reduction"]
        where = type(self).__name__
        for name, value in settings.items():
            setattr(self, name, None if value is None else check_number(where, name, value))
        self.reduction = reduction

    def extra_repr(self) -> str:
        """What ``repr`` shows of the loss."""
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self._names)


class OutlierExposureLoss(SettingsLoss):
    """:func:`outlier_exposure_loss` as a module.

    pytorch-ood's loss of this name (0.4.0) divides both sums, over ID and over OOD samples, by the
    number of all samples: against its ID term, its OOD term weighs n_ood / n_id times as much as
    the authors' and this one's.

    Args:
        weight: Of the OOD samples' mean.
        reduction: "mean", "sum" or "none".
    """

    weight: float

    def __init__(self, weight: float = 0.5, reduction: Reduction = "mean") -> None:
        super().__init__(reduction, weight=weight)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of logits (..., C) and target (...,)."""
        return outlier_exposure_loss(logits, target, self.weight, self.reduction)


class EnergyBoundedLoss(SettingsLoss):
    """:func:`energy_bounded_loss` as a module.

    Args:
        weight: Of the squared terms.
        m_in: Energy above which ID samples are pulled down; None: as the function has it.
        m_out: Energy below which OOD samples are pushed up; None: as the function has it.
        temperature: T > 0 of the energy.
        reduction: "mean", "sum" or "none".
    """

    weight: float
    m_in: float | None
    m_out: float | None
    temperature: float

    def __init__(
        self,
        weight: float = 0.1,
        m_in: float | None = None,
        m_out: float | None = None,
        temperature: float = 1.0,
        reduction: Reduction = "mean",
    ) -> None:
        _check_temperature("EnergyBoundedLoss", temperature)
        super().__init__(reduction, weight=weight, m_in=m_in, m_out=m_out, temperature=temperature)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of logits (..., C) and target (...,)."""
        return energy_bounded_loss(
            logits, target, self.weight, self.m_in, self.m_out, self.temperature, self.reduction
        )


class LogitNormLoss(SettingsLoss):
    """:func:`logit_norm_loss` as a module.

    Args:
        temperature: T > 0.
        reduction: "mean", "sum" or "none".
    """

    temperature: float

    def __init__(self, temperature: float = 0.04, reduction: Reduction = "mean") -> None:
        _check_temperature("LogitNormLoss", temperature)
        super().__init__(reduction, temperature=temperature)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of logits (..., C) and target (...,)."""
        return logit_norm_loss(logits, target, self.temperature, self.reduction)


class ObjectosphereLoss(SettingsLoss):
    """:func:`objectosphere_loss` as a module.

    Args:
        weight: Of the features' norms.
        xi: The least norm that ID features are to have.
        reduction: "mean", "sum" or "none".
    """

    weight: float
    xi: float

    def __init__(
        self, weight: float = 1e-4, xi: float = 50.0, reduction: Reduction = "mean"
    ) -> None:
        super().__init__(reduction, weight=weight, xi=xi)

    def forward(self, logits: Tensor, features: Tensor, target: Tensor) -> Tensor:
        """The loss of logits (..., C), features (..., d) and target (...,)."""
        return objectosphere_loss(logits, features, target, self.weight, self.xi, self.reduction)


class AbsentClassLoss(SettingsLoss):
    """:func:`absent_class_loss` as a module: the objective of DOS and of NTOM.

    Args:
        beta: Weight of the OOD samples' mean.
        reduction: "mean", "sum" or "none".
    """

    beta: float

    def __init__(self, beta: float = 1.0, reduction: Reduction = "mean") -> None:
        super().__init__(reduction, beta=beta)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of logits (..., C + 1) and target (...,)."""
        return absent_class_loss(logits, target, self.beta, self.reduction)


class ConfidenceLoss(SettingsLoss):
    """:func:`confidence_loss` with the authors' budget, which adapts the price of hints.

    In training mode, each call with ID samples divides ``weight`` by 1.01 where their mean -log c
    is under the budget, and by 0.99 otherwise, for the next call. It is a buffer, in the state
    dict, and its update does not wait for the device.

    Args:
        budget: The mean -log c to aim for.
        weight: The paper's lambda, to begin with.
        reduction: "mean", "sum" or "none"; the budget always goes by the mean.
    """

    budget: float
    weight: Tensor

    def __init__(
        self, budget: float = 0.3, weight: float = 0.1, reduction: Reduction = "mean"
    ) -> None:
        super().__init__(reduction, budget=budget)
        self.register_buffer(
            "weight", torch.tensor(check_number("ConfidenceLoss", "weight", weight))
        )

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
        loss = reduce_terms(nll + self.weight * cost, is_ood, self.reduction)
        if self.training:
            with torch.no_grad():
                under = reduce_terms(cost, is_ood, "mean") < self.budget
                factor = torch.where(under, 1 / 1.01, 1 / 0.99)
                # Not in place: the backward needs the weight that was used.
                self.weight = self.weight * torch.where(is_ood.all(), 1, factor)
        return loss


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
        target = torch.where(is_ood, logits.shape[-1] - 1, target)
    each = outlier_cross_entropy(logits, target).loss
    return reduce_terms(torch.where(is_ood, weight * each, each), is_ood, reduction)


def reduce_terms(each: Tensor, is_ood: Tensor, reduction: str) -> Tensor:
    """``each``, its sum, or the sum of its means over ID and over OOD samples."""
    if reduction == "none":
        return each
    if reduction == "mean":
        n_ood = is_ood.sum()
        each = each / torch.where(is_ood, n_ood, is_ood.numel() - n_ood)
    return each.sum()


def _readable(x: Tensor) -> bool:
    """Whether the contents can be looked at: without waiting for a device, outside transforms."""
    transformed = torch._C._functorch.is_functorch_wrapped_tensor
    return x.is_cpu and not torch.compiler.is_compiling() and not transformed(x)


def _check_reduction(where: str, reduction: str) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{where}: reduction must be 'mean', 'sum' or 'none', got {reduction!r}")


def _check_temperature(where: str, temperature: float) -> None:
    if not 0 < temperature < math.inf:
        raise ValueError(f"{where}: temperature must be positive and finite, got {temperature}")
