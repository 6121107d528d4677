"""Detectors by the part of the features that lies outside a principal subspace."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from oodkernels._checks import check_count, check_flag, check_int, check_real
from oodkernels.detectors.base import OODDetector, register
from oodkernels.detectors.batch import Batch, blocks, present
from oodkernels.detectors.head import HEAD, Head, HeadDetector, Reservoir, floats
from oodkernels.detectors.model import Model
from oodkernels.detectors.statistics import ClassStatistics

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["NECO", "CoP", "CoRP", "Residual", "ViM"]

_CHUNK = 1 << 24  # numbers that are projected at once
_SAMPLE = 10_000  # samples of which ViM's factor is taken


class _Subspace(OODDetector):
    """One covariance of features, fitted in one pass in float64, and its eigenvectors."""

    needs = frozenset({"features"})
    trained_on = frozenset({"features"})
    _statistics: ClassStatistics | None = None

    def _reset(self) -> None:
        super()._reset()
        self._statistics = None

    def _update(self, where: str, batch: Batch, labels: Tensor | None) -> None:
        if self._statistics is None:
            if self._status == "fitted":
                raise ValueError(
                    f"{where}: {self.name} from a file has no statistics of its training features "
                    f"to add to: fit it again to all of them"
                )
            self._statistics = ClassStatistics(1)
        features = present(batch.features)
        self.width = features.shape[1]
        zeros = torch.zeros(len(features), dtype=torch.int64, device=features.device)
        self._statistics.update(self._read(features), zeros, where=where)

    def _read(self, features: Tensor) -> Tensor:
        return features

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> Self:
        """Merge what the processes of a group were given by :meth:`partial_fit`.

        All of them call this, once, after their last batch; a process may have had none.
        """
        self._statistics = (self._statistics or ClassStatistics(1)).all_reduce(group)
        self.width = self._statistics.width
        self._status, self.threshold = "pending", None
        return self

    def _moments(self, where: str) -> tuple[Tensor, Tensor]:
        """Mean (d,) and covariance (d, d) about it, divided by N."""
        own = self._statistics
        if own is None or not own.count:
            raise ValueError(f"{where}: there must be ID samples to fit to, got none")
        return own.means[0], own.covariance()


def principal(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, the largest first and none negative, and eigenvectors in columns."""
    values, vectors = torch.linalg.eigh(covariance)
    return values.flip(0).clamp(min=0), vectors.flip(1)


def length(features: Tensor, origin: Tensor, vectors: Tensor) -> Tensor:
    """Norm of (features - origin) @ vectors, (N,), a block of rows at a time."""
    origin, vectors = origin.to(features), vectors.to(features)
    with torch.autocast(features.device.type, enabled=False):
        parts = [
            ((rows - origin) @ vectors).norm(dim=1)
            for rows in blocks(features, max(1, _CHUNK // features.shape[1]))
        ]
    return torch.cat(parts)


@register("residual", "D", "Wang et al., CVPR 2022")
class Residual(_Subspace, HeadDetector):
    """Norm of the features outside the principal subspace, negated.

    Wang, Li, Feng & Zhang, ViM: Out-Of-Distribution with Virtual-logit Matching, CVPR 2022: with
    the head's W and b the origin is u = -W^+ b, the subspace that of the ``dim`` largest
    eigenvalues of the mean of (h - u) (h - u)^T.

    Args:
        dim: Of the subspace, below the number d of features; None for the authors' 1000 if
            d >= 2048, 512 if d >= 768, else d / 2.
        head: As for :class:`HeadDetector`.
        absent: As for :class:`MSP`.
        model: As for :class:`OODDetector`.

    Attributes:
        origin: u, (d,).
        null: (d, d - dim) orthonormal columns outside of the subspace, of descending eigenvalue.
    """

    _tensors: ClassVar[Mapping[str, str]] = {**HEAD, "origin": "d", "null": "d m"}
    origin: Tensor
    null: Tensor

    def __init__(
        self,
        dim: int | None = None,
        *,
        head: Head | None = None,
        absent: int | None = None,
        model: Model | None = None,
    ) -> None:
        super().__init__(head, model, absent)
        self.dim = None if dim is None else check_count(type(self).__name__, "dim", dim)

    def _finish(self, where: str) -> None:
        mean, covariance = self._moments(where)
        d = len(mean)
        dim = (1000 if d >= 2048 else 512 if d >= 768 else d // 2) if self.dim is None else self.dim
        if not dim < d:
            raise ValueError(f"{where}: dim must be less than the {d} features, got {dim}")
        weight, bias = self.weight.to(mean), self.bias.to(mean)
        if self.absent is not None:
            rows = torch.arange(len(bias), device=bias.device) != self.absent % len(bias)
            weight, bias = weight[rows], bias[rows]
        self.origin = -torch.linalg.pinv(weight) @ bias
        away = mean - self.origin
        self.null = principal(covariance + torch.outer(away, away))[1][:, dim:].contiguous()

    def _outside(self, features: Tensor) -> Tensor:
        return length(floats(features), self.origin, self.null)

    def _score(self, batch: Batch) -> Tensor:
        return -self._outside(present(batch.features))


@register("vim", "D", "Wang et al., CVPR 2022")
class ViM(Residual):
    """Energy less alpha times the norm of the features outside the principal subspace.

    Wang, Li, Feng & Zhang, ViM: Out-Of-Distribution with Virtual-logit Matching, CVPR 2022. alpha
    is the mean of the largest logit over the mean of that norm, over up to 10,000 training samples
    (a uniform sample of them where there are more; the authors take 200,000). The softmax of the
    logits with -score as one more ranks alike.

    Args:
        dim: As for :class:`Residual`.
        head: As for :class:`HeadDetector`.
        absent: As for :class:`MSP`.
        model: As for :class:`OODDetector`.
    """

    needs = frozenset({"features", "logits"})
    trained_on = frozenset({"features", "logits"})
    _tensors: ClassVar[Mapping[str, str]] = {**Residual._tensors, "alpha": "one"}
    alpha: Tensor
    _sample: Reservoir | None = None

    def _reset(self) -> None:
        super()._reset()
        self._sample = None

    def _update(self, where: str, batch: Batch, labels: Tensor | None) -> None:
        super()._update(where, batch, labels)
        self._sample = self._sample or Reservoir(_SAMPLE)
        largest = batch.logit_scores(absent=self.absent).max_logit
        self._sample.add(present(batch.features), largest)

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> Self:
        """Sum over processes, like :class:`Residual`'s; each process must have had a batch."""
        super().all_reduce(group)
        self._ready("ViM.all_reduce")
        sums = self._sums()
        dist.all_reduce(sums, group=group)
        self.alpha = (sums[0] / sums[1]).reshape(1)
        return self

    def _finish(self, where: str) -> None:
        super()._finish(where)
        largest, outside = self._sums()
        features = present(self._sample).rows()[0].double()
        if not outside > 1e-10 * (features - self.origin).norm(dim=1).sum():
            raise ValueError(
                f"{where}: training features must have a part outside of the subspace, got none: "
                f"choose a smaller dim"
            )
        self.alpha = (largest / outside).reshape(1)

    def _sums(self) -> Tensor:
        """Sums of the sample: the largest logits, and the norms outside the subspace."""
        features, largest = present(self._sample).rows()
        return torch.stack([largest.double().sum(), self._outside(features.double()).sum()])

    def _score(self, batch: Batch) -> Tensor:
        outside = self._outside(present(batch.features))
        energy = batch.logit_scores(absent=self.absent).energy.to(outside)
        return energy - self.alpha.to(outside) * outside


@register("neco", "D", "Ben Ammar et al., ICLR 2024")
class NECO(_Subspace):
    """Share of the standardised features' norm within their principal subspace.

    Ben Ammar, Belkhir, Popescu, Manzanera & Franchi, NECO: Neural Collapse Based
    Out-of-distribution Detection, ICLR 2024. Features are standardised over the training data and
    projected on the principal components of these; the share is multiplied by the largest logit.

    Args:
        dim: Of the subspace; None for as few components as hold ``variance``.
        variance: Share of the variance, in per cent.
        max_logit: Whether to multiply by the largest logit; the authors do not for ResNets.
        absent: As for :class:`MSP`.
        model: As for :class:`OODDetector`.

    Attributes:
        mean, std: (d,) of the training features.
        components: (d, dim).
    """

    _tensors: ClassVar[Mapping[str, str]] = {"mean": "d", "std": "d", "components": "d m"}
    mean: Tensor
    std: Tensor
    components: Tensor

    def __init__(
        self,
        dim: int | None = None,
        variance: float = 90.0,
        max_logit: bool = True,
        *,
        absent: int | None = None,
        model: Model | None = None,
    ) -> None:
        super().__init__(model, absent)
        self.dim = None if dim is None else check_count("NECO", "dim", dim)
        self.variance = check_variance("NECO", variance)
        self.max_logit = check_flag("NECO", "max_logit", max_logit)
        if self.max_logit:
            self.needs = frozenset({"features", "logits"})

    def _finish(self, where: str) -> None:
        mean, covariance = self._moments(where)
        std = covariance.diagonal().sqrt()
        std = torch.where(std > 0, std, 1)  # a constant feature stays 0
        values, vectors = principal(covariance / std / std[:, None])
        dim = components(values, self.variance) if self.dim is None else self.dim
        if dim > len(mean):
            raise ValueError(f"{where}: dim must be at most the {len(mean)} features, got {dim}")
        self.mean, self.std, self.components = mean, std, vectors[:, :dim].contiguous()

    def _score(self, batch: Batch) -> Tensor:
        x = floats(present(batch.features))
        z = (x - self.mean.to(x)) / self.std.to(x)
        share = length(z, z.new_zeros(z.shape[1]), self.components) / z.norm(dim=1)
        if not self.max_logit:
            return share
        return share * batch.logit_scores(absent=self.absent).max_logit.to(share)


@register("cop", "D", "Fang et al., NeurIPS 2024")
class CoP(_Subspace):
    """Error of reconstructing the normalised features from their principal components, negated.

    Fang, Tao, Lv, He, Huang & Yang, Kernel PCA for Out-of-Distribution Detection, NeurIPS 2024,
    with the cosine kernel. Components are the fewest that hold more than ``variance``.

    Args:
        variance: Share of the variance, in per cent; the authors have 99 for ImageNet and
            ResNet-50, 85 for CIFAR-10 and ResNet-18.
        model: As for :class:`OODDetector`.

    Attributes:
        mean: (m,) of the mapped training features.
        null: (m, m - components) orthonormal columns.
    """

    _tensors: ClassVar[Mapping[str, str]] = {"mean": "m", "null": "m n"}
    mean: Tensor
    null: Tensor

    def __init__(self, variance: float = 99.0, *, model: Model | None = None) -> None:
        super().__init__(model)
        self.variance = check_variance(type(self).__name__, variance)

    def _read(self, features: Tensor) -> Tensor:
        x = floats(features)
        return x / (x.norm(dim=1, keepdim=True) + 1e-10)

    def _finish(self, where: str) -> None:
        self.mean, covariance = self._moments(where)
        values, vectors = principal(covariance)
        self.null = vectors[:, components(values, self.variance) :].contiguous()

    def _score(self, batch: Batch) -> Tensor:
        features = present(batch.features)
        rows = max(1, _CHUNK // max(len(self.mean), features.shape[1]))
        parts = [length(self._read(f), self.mean, self.null) for f in blocks(features, rows)]
        return -torch.cat(parts)


@register("corp", "D", "Fang et al., NeurIPS 2024")
class CoRP(CoP):
    """:class:`CoP` of random Fourier features of the normalised features.

    Fang, Tao, Lv, He, Huang & Yang, Kernel PCA for Out-of-Distribution Detection, NeurIPS 2024:
    sqrt(2 / M) cos(x Omega + phi), for a Gaussian kernel of coefficient gamma.

    Args:
        variance: As for :class:`CoP`; the authors have 50 for ImageNet and ResNet-50, 80 for
            CIFAR-10 and ResNet-18.
        gamma: > 0; the authors have 3 and 2.
        m: Number M of Fourier features; the authors have 4096 and 2048.
        seed: Of Omega and phi.
        model: As for :class:`OODDetector`.
    """

    def __init__(
        self,
        variance: float = 50.0,
        gamma: float = 3.0,
        m: int = 4096,
        seed: int = 0,
        *,
        model: Model | None = None,
    ) -> None:
        super().__init__(variance, model=model)
        self.gamma = check_real("CoRP", "gamma", gamma)
        if not 0 < self.gamma < math.inf:
            raise ValueError(f"CoRP: gamma must be positive and finite, got {gamma}")
        self.m, self.seed = check_count("CoRP", "m", m), check_int("CoRP", "seed", seed)
        self._map: tuple[Tensor, Tensor] | None = None

    def _read(self, features: Tensor) -> Tensor:
        x = super()._read(features)
        if self._map is None or len(self._map[0]) != x.shape[1]:
            g = torch.Generator().manual_seed(self.seed)
            omega = torch.randn(x.shape[1], self.m, generator=g, dtype=torch.float64)
            phase = torch.rand(self.m, generator=g, dtype=torch.float64) * (2 * math.pi)
            self._map = omega * math.sqrt(2 * self.gamma), phase
        omega, phase = (t.to(x) for t in self._map)
        with torch.autocast(x.device.type, enabled=False):
            return math.sqrt(2 / self.m) * torch.addmm(phase, x, omega).cos()


def check_variance(where: str, variance: float) -> float:
    """A share in per cent; raise unless it is one."""
    share = check_real(where, "variance", variance)
    if not 1 <= share <= 100:
        raise ValueError(
            f"{where}: variance must be in per cent, in [1, 100], got {variance}"
            + (": 0.9 is written 90" if 0 < share < 1 else "")
        )
    return share


def components(values: Tensor, variance: float) -> int:
    """The fewest of the largest eigenvalues that hold more than a share, in per cent, of all."""
    share = values.cumsum(0) / values.sum()
    return min(len(values), int((share <= variance / 100).sum()) + 1)
