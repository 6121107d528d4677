"""Detectors that shape the features and then apply the head: the energy of what comes out.

Rows are shaped and multiplied by the head a block at a time, so that the (N, C) logits of the
shaped features never exist as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from oodkernels import reference
from oodkernels._checks import check_count, check_flag, check_number
from oodkernels.detectors.activations import _Mean
from oodkernels.detectors.base import register
from oodkernels.detectors.batch import Batch, blocks, present
from oodkernels.detectors.head import (
    HEAD,
    Head,
    HeadDetector,
    Reservoir,
    Sampled,
    check_percentile,
    floats,
)
from oodkernels.detectors.model import Model
from oodkernels.ops import indexed_distances, logit_scores, shape_features_

__all__ = ["ASHB", "ASHP", "ASHS", "DICE", "VRA", "OptFS", "ReAct"]

_BLOCK = 1 << 22  # numbers of a block's features and logits: in smaller ones products are slower
_SMALL = 1 << 18  # of a block of features alone
_SAMPLE = 5000  # rows of which quantiles are taken


Shaping: TypeAlias = tuple[str, float | None, Tensor | None, Tensor | None]
"""Shape, percentile, low and high of :func:`oodkernels.ops.shape_features_`."""


class _Shaped(HeadDetector):
    """Energy of head(shape(features))."""

    needs = frozenset({"features"})
    _changes = True  # the features, and not the weights

    def _shape_(self, x: Tensor) -> Tensor:
        """Shape rows of float32 or float64, which may be overwritten."""
        shape, percentile, low, high = self._shaping(x)
        if torch.compiler.is_compiling():  # programs are made of what they can be taken apart to
            return reference.shape_features(x, shape, percentile, low, high)
        return shape_features_(x, shape, percentile=percentile, low=low, high=high)

    def _shaping(self, x: Tensor) -> Shaping:
        """Arguments of :func:`oodkernels.ops.shape_features_`."""
        raise NotImplementedError

    def _weights(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self._linear(batch)

    def _score(self, batch: Batch) -> Tensor:
        features = present(batch.features)
        weight, bias = self._weights(batch)
        if torch.compiler.is_compiling():
            x = self._shape_(floats(features))
            with torch.autocast(x.device.type, enabled=False):
                return logit_scores(torch.addmm(bias, x, weight.T)).energy
        rows = max(1, min(len(features), _BLOCK // max(weight.shape)))
        own, z = weight.new_empty(rows, features.shape[1]), weight.new_empty(rows, len(weight))
        energies = []
        for block in blocks(features, rows):
            x, out = own[: len(block)], z[: len(block)]  # one block's, and then the next one's
            x = self._shape_(x.copy_(block)) if self._changes else floats(block)
            with torch.autocast(x.device.type, enabled=False):
                torch.addmm(bias, x, weight.T, out=out)
            energies.append(logit_scores(out).energy)
        return torch.cat(energies)


class _Sampled(Sampled, _Shaped):
    """One whose shape follows from a sample of the training features."""

    trained_on = frozenset({"features"})

    def _reservoir(self) -> Reservoir:
        return Reservoir(_SAMPLE)

    def _columns(self, batch: Batch) -> tuple[Tensor, ...]:
        return (present(batch.features),)

    def _finish(self, where: str) -> None:
        self._learn_shape(*self._rows(where))

    def _learn_shape(self, features: Tensor, *beside: Tensor) -> None:
        raise NotImplementedError


@register(
    "react",
    "C",
    "Sun et al., NeurIPS 2021",
    grid={"percentile": (85, 90, 95, 99)},
)
class ReAct(_Sampled):
    """Energy of the logits of features clipped from above.

    Sun, Guo & Li, ReAct: Out-of-distribution Detection With Rectified Activations, NeurIPS 2021.
    The limit is a percentile, linearly interpolated, of all activations of up to 5,000 samples of
    those fitted to (a uniform sample of them where there are more).

    Args:
        percentile: In per cent; the authors have 90.
        limit: The limit itself, as the authors have 1 for ImageNet and ResNet-50; nothing is fitted
            then.
        head: As for :class:`HeadDetector`.
        absent: As for :class:`MSP`.
        model: As for :class:`OODDetector`.
    """

    _tensors: ClassVar[Mapping[str, str]] = {**HEAD, "clip": "one"}
    clip: Tensor

    def __init__(
        self,
        percentile: float = 90.0,
        limit: float | None = None,
        *,
        head: Head | None = None,
        absent: int | None = None,
        model: Model | None = None,
    ) -> None:
        super().__init__(head, model, absent)
        self.percentile = check_percentile("ReAct", percentile)
        self.limit = None if limit is None else check_number("ReAct", "limit", limit)
        if self.limit is not None:
            self.trained_on = frozenset()
            self.clip = torch.tensor([self.limit], dtype=torch.float64)

    def _learn_shape(self, features: Tensor, *beside: Tensor) -> None:
        self.clip = _quantiles(features, [self.percentile])

    def _shaping(self, x: Tensor) -> Shaping:
        return "clip", None, None, self.clip.to(x)


@register(
    "vra",
    "C",
    "Xu et al., NeurIPS 2023",
    grid={"low": (50, 60), "high": (80, 85, 95)},
)
class VRA(_Sampled):
    """Energy of the logits of features that are zeroed below a limit and clipped above another.

    Xu, Lian, Liu & Tao, VRA: Variational Rectified Activation for Out-of-distribution Detection,
    NeurIPS 2023: features below a become 0, those above b become b. The limits are percentiles
    of each feature (the authors' CIFAR setting), or of all, or given.

    Args:
        low: Percentile of a, in per cent; the authors have 60.
        high: Percentile of b, in per cent, above ``low``; the authors have 95.
        per_feature: Whether each feature has its own limits.
        limits: (a, b) themselves, as the authors have (0.5, 1) for ImageNet and ResNet-50; nothing
            is fitted then.
        head: As for :class:`HeadDetector`.
        absent: As for :class:`MSP`.
        model: As for :class:`OODDetector`.
    """

    _tensors: ClassVar[Mapping[str, str]] = {**HEAD, "range": "two m"}
    range: Tensor

    def __init__(
        self,
        low: float = 60.0,
        high: float = 95.0,
        per_feature: bool = True,
        limits: Sequence[float] | None = None,
        *,
        head: Head | None = None,
        absent: int | None = None,
        model: Model | None = None,
    ) -> None:
        super().__init__(head, model, absent)
        self.low, self.high = (check_percentile("VRA", p) for p in (low, high))
        self.per_feature = check_flag("VRA", "per_feature", per_feature)
        if not self.low < self.high:
            raise ValueError(f"VRA: low must be below high, got {low} and {high}")
        self.limits = None
        if limits is not None:
            self.limits = [check_number("VRA", "limits", x) for x in limits]
            if len(self.limits) != 2 or not self.limits[0] < self.limits[1]:
                raise ValueError(f"VRA: limits must be two, ascending, got {self.limits}")
            self.trained_on = frozenset()
            self.range = torch.tensor(self.limits, dtype=torch.float64)[:, None]

    def _learn_shape(self, features: Tensor, *beside: Tensor) -> None:
        both = [self.low, self.high]
        if self.per_feature:
            self.range = torch.stack([_quantiles(f, both) for f in features.unbind(1)], 1)
        else:
            self.range = _quantiles(features, both)[:, None]

    def _shaping(self, x: Tensor) -> Shaping:
        low, high = self.range.to(x)
        return "vra", None, low, high


class _ASH(_Shaped):
    """Features of which all but the largest are set to zero.

    Djurisic, Bozanic, Ashok & Liu, Extremely Simple Activation Shaping for Out-of-Distribution
    Detection, ICLR 2023. The largest are the d - round(d p / 100) largest of d, of equal ones those
    of lower index.

    Args:
        percentile: p, in per cent; None for the authors' for ImageNet.
        head: As for :class:`HeadDetector`.
        absent: As for :class:`MSP`.
        model: As for :class:`OODDetector`.
    """

    _positive = "activations behind a ReLU"
    _authors: ClassVar[float]

    def __init__(
        self,
        percentile: float | None = None,
        *,
        head: Head | None = None,
        absent: int | None = None,
        model: Model | None = None,
    ) -> None:
        super().__init__(head, model, absent)
        percentile = self._authors if percentile is None else percentile
        self.percentile = check_percentile(type(self).__name__, percentile)

    def _shaping(self, x: Tensor) -> Shaping:
        return self.name, self.percentile, None, None


@register(
    "ash-p",
    "C",
    "Djurisic et al., ICLR 2023",
    grid={"percentile": (65, 70, 75, 80, 85, 90, 95)},
)
class ASHP(_ASH):
    """Energy of the logits of the largest features, the others set to zero.

    Arguments as for :class:`ASHS`; the authors' percentile is 60 for ImageNet, 90 for CIFAR-10 and
    80 for CIFAR-100.
    """

    _authors = 60.0


@register(
    "ash-b",
    "C",
    "Djurisic et al., ICLR 2023",
    grid={"percentile": (65, 70, 75, 80, 85, 90, 95)},
)
class ASHB(_ASH):
    """Energy of the logits of the largest features, all set to one value that keeps the sum.

    Arguments as for :class:`ASHS`; the authors' percentile is 65 for ImageNet, 95 for CIFAR-10 and
    85 for CIFAR-100.
    """

    _authors = 65.0


@register(
    "ash-s",
    "C",
    "Djurisic et al., ICLR 2023",
    grid={"percentile": (65, 70, 75, 80, 85, 90, 95)},
)
class ASHS(_ASH):
    """Energy of the logits of the largest features times exp(sum / their sum).

    Djurisic, Bozanic, Ashok & Liu, Extremely Simple Activation Shaping for Out-of-Distribution
    Detection, ICLR 2023. The largest are the d - round(d p / 100) largest of d, of equal ones those
    of lower index.

    Args:
        percentile: p, in per cent; None for the authors' 90 for ImageNet. Theirs for CIFAR-10 is
            95, for CIFAR-100 90.
        head: As for :class:`HeadDetector`.
        absent: As for :class:`MSP`.
        model: As for :class:`OODDetector`.
    """

    _authors = 90.0


@register(
    "dice",
    "C",
    "Sun & Li, ECCV 2022",
    grid={"percentile": (10, 30, 50, 70, 90, 99)},
    at_score=("percentile",),
)
class DICE(_Mean, _Shaped):
    """Energy of the logits by the head's most contributing weights alone.

    Sun & Li, DICE: Leveraging Sparsification for Out-of-Distribution Detection, ECCV 2022. A
    weight's contribution is its product with the mean of its feature over the training data; those
    at or below a percentile of all contributions are set to zero.

    Args:
        percentile: In per cent; the authors have 90 for CIFAR and 70 for ImageNet.
        head: As for :class:`HeadDetector`.
        absent: As for :class:`MSP`.
        model: As for :class:`OODDetector`.
    """

    needs = frozenset({"features"})
    _changes = False

    def __init__(
        self,
        percentile: float = 90.0,
        *,
        head: Head | None = None,
        absent: int | None = None,
        model: Model | None = None,
    ) -> None:
        super().__init__(head, model, absent)
        self.percentile = check_percentile("DICE", percentile)

    def _shape_(self, x: Tensor) -> Tensor:
        return x

    def _weights(self, batch: Batch) -> tuple[Tensor, Tensor]:
        weight, bias = self._linear(batch)

        def sparse() -> Tensor:
            share = weight.double() * self.means[0].to(weight.device)
            least = _quantiles(share, [self.percentile])
            return torch.where(share > least, weight, 0)

        key = (self.percentile, self.absent_of(batch), weight.dtype, weight.device)
        return self._once(key, sparse), bias


@register(
    "optfs",
    "C",
    "Zhao et al., ICLR 2024",
    at_score=("kind",),
)
class OptFS(_Sampled):
    """Features weighted by how much features of their size speak for the class predicted.

    Zhao, Xu, Gavves & others, Towards Optimal Feature-Shaping Methods for Out-of-Distribution
    Detection, ICLR 2024: equal bins between the 0.1 and 99.9 per cent quantiles of the training
    activations, theta_k proportional to the mean over training samples of the sum of w_pj h_j over
    the features h_j in bin k, scaled to norm 1000; features outside the bins count as 0. Fitted to
    up to 5,000 samples.

    Args:
        kind: ``"logit"``, w_p . (theta h) for the class p that is predicted, as the authors have
            it, or ``"energy"`` of the shaped features' logits.
        bins: Number of bins; the authors have 100.
        head: As for :class:`HeadDetector`.
        absent: As for :class:`MSP`.
        model: As for :class:`OODDetector`.
    """

    needs = frozenset({"features", "logits"})
    trained_on = frozenset({"features", "logits"})
    _tensors: ClassVar[Mapping[str, str]] = {**HEAD, "ends": "two", "theta": "bins"}
    ends: Tensor
    theta: Tensor

    def __init__(
        self,
        kind: Literal["logit", "energy"] = "logit",
        bins: int = 100,
        *,
        head: Head | None = None,
        absent: int | None = None,
        model: Model | None = None,
    ) -> None:
        super().__init__(head, model, absent)
        if kind not in ("logit", "energy"):
            raise ValueError(f"OptFS: kind must be logit or energy, got {kind!r}")
        self.kind, self.bins = kind, check_count("OptFS", "bins", bins)

    def _columns(self, batch: Batch) -> tuple[Tensor, ...]:
        label = batch.class_logits(self.absent).argmax(1)
        absent = self.absent_of(batch)
        return present(batch.features), label if absent is None else label + (label >= absent)

    def _learn_shape(self, features: Tensor, *beside: Tensor) -> None:
        x = features.double()
        self.ends = _quantiles(x, [0.1, 99.9])
        share = x * self.weight.to(x)[beside[0].to(x.device)]
        place, inside = self._place(x)
        theta = x.new_zeros(self.bins)
        theta.index_add_(0, place[inside], share[inside])
        self.theta = theta * (1000 / theta.norm())

    def _edges(self, x: Tensor) -> Tensor:
        """Edges of the bins, (bins + 1,)."""
        low, high = self.ends.to(x)
        return low + (high - low) * torch.arange(self.bins + 1).to(x) / self.bins

    def _place(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Bin of each feature, and whether it is in one."""
        place = torch.searchsorted(self._edges(x), x.contiguous(), right=True) - 1
        inside = (place >= 0) & (place < self.bins)
        return place.clamp(0, self.bins - 1), inside

    def _shaping(self, x: Tensor) -> Shaping:
        return "optfs", None, self._edges(x), self.theta.to(x)

    def _score(self, batch: Batch) -> Tensor:
        if self.kind == "energy":
            return super()._score(batch)
        weight, _ = self._linear(batch)
        label = batch.logit_scores(absent=self.absent).label
        features = present(batch.features)
        rows = max(1, _SMALL // features.shape[1])
        found = []
        for part, own in zip(blocks(features, rows), blocks(label, rows), strict=True):
            shaped = self._shape_(floats(part) if part.dtype != weight.dtype else part.clone())
            found.append(indexed_distances(shaped, weight, own[:, None]).inner[:, 0])
        return torch.cat(found)


def _quantiles(values: Tensor, percentiles: Sequence[float]) -> Tensor:
    """Percentiles of all values, linearly interpolated as NumPy does it, float64."""
    ordered = values.flatten().double().sort().values
    place = torch.tensor(percentiles, dtype=torch.float64) / 100 * (len(ordered) - 1)
    below = place.floor().long()
    share = (place - below).to(ordered.device)
    low = ordered[below.to(ordered.device)]
    high = ordered[(below + 1).clamp(max=len(ordered) - 1).to(ordered.device)]
    return torch.where(share < 0.5, low + (high - low) * share, high - (high - low) * (1 - share))
