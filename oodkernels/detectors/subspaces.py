"""Detectors by the part of the features that lies outside a principal subspace."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from oodkernels._checks import check_count, check_flag, check_int, check_real
from oodkernels._digest import digest
from oodkernels.detectors.base import OODDetector, register
from oodkernels.detectors.batch import Batch, blocks, present
from oodkernels.detectors.head import HEAD, Head, HeadDetector, Reservoir, floats
from oodkernels.detectors.model import Model
from oodkernels.detectors.statistics import ClassStatistics

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["NECO", "CoP", "CoRP", "Residual", "ViM"]

_CHUNK = 1 << 21  # numbers that are projected at once, which stay in cache
_ALL = 1 << 20  # numbers that are projected on all directions at once
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


class Projection:
    """An origin and orthonormal columns, on which features less the origin are projected.

    What is projected of a batch is projected once for all detectors with equal ones.

    Args:
        origin: (d,) float64.
        vectors: (d, m) float64.
    """

    def __init__(self, origin: Tensor, vectors: Tensor) -> None:
        self.origin, self.vectors = origin, vectors
        self._digest = digest(origin, vectors)
        self._known: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    def to(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Origin and columns in the type and on the device of a tensor."""
        key = (like.dtype, like.device)
        found = self._known.get(key)
        if found is None:
            found = self.origin.to(like), self.vectors.to(like)
            if not torch.compiler.is_compiling():
                self._known[key] = found
        return found

    def norm(self, batch: Batch) -> Tensor:
        """Norm of the projection of a batch's features, (N,), kept there."""
        key = ("norm", self._digest, str(self.vectors.device))
        return batch.once(key, lambda: self.norm_of(present(batch.features)))

    def norm_of(self, features: Tensor) -> Tensor:
        """Norm of the projection of features (N, d), (N,), a block of rows at a time."""
        return length(features, *self.to(floats(features[:0])))


def length(features: Tensor, origin: Tensor, vectors: Tensor) -> Tensor:
    """Norm of (features - origin) @ vectors, (N,), a block of rows at a time."""
    like = floats(features[:0])
    origin, vectors = origin.to(like), vectors.to(like)
    with torch.autocast(features.device.type, enabled=False):
        parts = [
            ((rows - origin) @ vectors).norm(dim=1)
            for rows in blocks(features, max(1, _CHUNK // features.shape[1]))
        ]
    return torch.cat(parts)


@register(
    "residual",
    "D",
    "Wang et al., CVPR 2022",
    grid={"dim": (16, 32, 64, 128, 256, 512, 1000)},
)
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
    _vectors: Tensor | None = None  # (d, d), all of them
    _outside: Projection  # on the null columns

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
        dim = self._dim(where, self.dim, len(mean))
        weight, bias = self.weight.to(mean), self.bias.to(mean)
        if self.absent is not None:
            rows = torch.arange(len(bias), device=bias.device) != self.absent % len(bias)
            weight, bias = weight[rows], bias[rows]
        self.origin = -torch.linalg.pinv(weight) @ bias
        away = mean - self.origin
        self._vectors = principal(covariance + torch.outer(away, away))[1]
        self.null = self._vectors[:, dim:].contiguous()
        self._outside = Projection(self.origin, self.null)

    def _load_state(self, tensors: Mapping[str, Tensor]) -> None:
        super()._load_state(tensors)
        self._outside = Projection(self.origin, self.null)

    def to(self, device: torch.device | str | int) -> Self:
        """Move what was fitted; the model is left where it is."""
        super().to(device)
        if "null" in vars(self):
            self._outside = Projection(self.origin, self.null)
        return self

    def _settle(self, where: str, changed: Collection[str]) -> None:
        if changed == {"dim"} and self._vectors is not None:
            self.null = self._vectors[:, self._dim(where, self.dim, len(self._vectors)) :]
            self._outside = Projection(self.origin, self.null)
            return
        super()._settle(where, changed)

    @staticmethod
    def _dim(where: str, dim: int | None, d: int) -> int:
        if dim is None:
            dim = 1000 if d >= 2048 else 512 if d >= 768 else d // 2
        if not dim < d:
            raise ValueError(f"{where}: dim must be less than the {d} features, got {dim}")
        return dim

    def _every(self, option: str) -> Sequence[Any] | None:
        return range(1, present(self.width)) if option == "dim" else super()._every(option)

    def _scorer(
        self, where: str, settings: Sequence[Mapping[str, Any]]
    ) -> Callable[[Batch], Tensor]:
        if self._vectors is None or any(one.keys() != {"dim"} for one in settings):
            return super()._scorer(where, settings)
        own = [type(self)(one["dim"]).dim for one in settings]
        return self._at_dims([self._dim(where, dim, len(self._vectors)) for dim in own])

    def _at_dims(self, dims: Sequence[int]) -> Callable[[Batch], Tensor]:
        return lambda batch: self._all_outside(present(batch.features), dims).neg_()

    def _all_outside(self, features: Tensor, dims: Sequence[int]) -> Tensor:
        """Norms outside of subspaces of several dimensions, from one projection, (N, dims)."""
        like = floats(features[:0])
        n, d = features.shape
        origin, vectors = self.origin.to(like), present(self._vectors).to(like).flip(1)
        places = torch.tensor([d - 1 - dim for dim in dims], device=like.device)
        found = like.new_empty(n, len(dims))
        rows = max(1, _ALL // d)
        with torch.autocast(like.device.type, enabled=False):
            for some, out in zip(features.split(rows), found.split(rows), strict=True):
                squares = ((some - origin) @ vectors).square_()
                # Summed from the smallest, so that nothing cancels.
                torch.index_select(squares.cumsum_(1), 1, places, out=out)
                out.sqrt_()
        return found

    def _score(self, batch: Batch) -> Tensor:
        return -self._outside.norm(batch)


@register(
    "vim",
    "D",
    "Wang et al., CVPR 2022",
    grid={"dim": (16, 32, 64, 128, 256, 512, 1000)},
)
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
        self._scale(where)

    def _settle(self, where: str, changed: Collection[str]) -> None:
        super()._settle(where, changed)
        if changed == {"dim"}:
            self._scale(where)

    def _scale(self, where: str) -> None:
        largest, outside = self._sums()
        self._check_outside(where, outside)
        self.alpha = (largest / outside).reshape(1)

    def _check_outside(self, where: str, outside: Tensor) -> None:
        features = present(self._sample).rows()[0].double()
        if not (outside > 1e-10 * (features - self.origin).norm(dim=1).sum()).all():
            raise ValueError(
                f"{where}: training features must have a part outside of the subspace, got none: "
                f"choose a smaller dim"
            )

    def _at_dims(self, dims: Sequence[int]) -> Callable[[Batch], Tensor]:
        features, largest = present(self._sample).rows()
        outside = self._all_outside(features.double(), dims).sum(0)
        self._check_outside("ViM", outside)
        alphas = largest.double().sum() / outside

        def scores(batch: Batch) -> Tensor:
            apart = self._all_outside(present(batch.features), dims)
            energy = batch.logit_scores(absent=self.absent).energy.to(apart)
            return apart.mul_(-alphas.to(apart)).add_(energy[:, None])

        return scores

    def _sums(self) -> Tensor:
        """Sums of the sample: the largest logits, and the norms outside the subspace."""
        features, largest = present(self._sample).rows()
        return torch.stack([largest.double().sum(), self._outside.norm_of(features.double()).sum()])

    def _score(self, batch: Batch) -> Tensor:
        outside = self._outside.norm(batch)
        energy = batch.logit_scores(absent=self.absent).energy.to(outside)
        return energy - self.alpha.to(outside) * outside


@register(
    "neco",
    "D",
    "Ben Ammar et al., ICLR 2024",
    grid={"dim": (10, 50, 100, 150, 200, 250, 300)},
    at_score=("max_logit",),
)
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
    _spectrum: tuple[Tensor, Tensor] | None = None  # all eigenvalues and vectors

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
        self._spectrum = principal(covariance / std / std[:, None])
        self.mean, self.std = mean, std
        self.components = self._spectrum[1][:, : self._dim(where)].contiguous()

    def _dim(self, where: str) -> int:
        values, _ = present(self._spectrum)
        dim = components(values, self.variance) if self.dim is None else self.dim
        if dim > len(values):
            raise ValueError(f"{where}: dim must be at most the {len(values)} features, got {dim}")
        return dim

    def _settle(self, where: str, changed: Collection[str]) -> None:
        if changed and self._spectrum is not None:
            self.components = self._spectrum[1][:, : self._dim(where)]
            return
        super()._settle(where, changed)

    def _every(self, option: str) -> Sequence[Any] | None:
        return range(1, present(self.width) + 1) if option == "dim" else super()._every(option)

    def _scorer(
        self, where: str, settings: Sequence[Mapping[str, Any]]
    ) -> Callable[[Batch], Tensor]:
        if self._spectrum is None or any(one.keys() - {"dim", "variance"} for one in settings):
            return super()._scorer(where, settings)
        places = [self.varied(**one)._dim(where) - 1 for one in settings]
        _, vectors = self._spectrum

        def scores(batch: Batch) -> Tensor:
            z = self._standardized(batch)
            with torch.autocast(z.device.type, enabled=False):
                squares = (z @ vectors.to(z)).square()
            share = squares.cumsum(1)[:, places].sqrt() / z.norm(dim=1, keepdim=True)
            return self._weighted(batch, share)

        return scores

    def _standardized(self, batch: Batch) -> Tensor:
        x = floats(present(batch.features))
        return (x - self.mean.to(x)) / self.std.to(x)

    def _score(self, batch: Batch) -> Tensor:
        features = present(batch.features)
        like = floats(features[:0])
        mean, std, vectors = (t.to(like) for t in (self.mean, self.std, self.components))
        shares = []
        for rows in blocks(features, max(1, _CHUNK // features.shape[1])):
            with torch.autocast(like.device.type, enabled=False):
                z = (rows.to(like) - mean) / std
                shares.append((z @ vectors).norm(dim=1) / z.norm(dim=1))
        return self._weighted(batch, torch.cat(shares)[:, None])[:, 0]

    def _weighted(self, batch: Batch, share: Tensor) -> Tensor:
        if not self.max_logit:
            return share
        return share * batch.logit_scores(absent=self.absent).max_logit.to(share)[:, None]


@register(
    "cop",
    "D",
    "Fang et al., NeurIPS 2024",
    grid={"variance": (60, 70, 80, 85, 90, 99)},
)
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
    _spectrum: tuple[Tensor, Tensor] | None = None  # all eigenvalues and vectors

    def __init__(self, variance: float = 99.0, *, model: Model | None = None) -> None:
        super().__init__(model)
        self.variance = check_variance(type(self).__name__, variance)

    def _read(self, features: Tensor) -> Tensor:
        x = floats(features)
        return x / (x.norm(dim=1, keepdim=True) + 1e-10)

    def _finish(self, where: str) -> None:
        self.mean, covariance = self._moments(where)
        self._spectrum = principal(covariance)
        self._cut()

    def _cut(self) -> None:
        values, vectors = present(self._spectrum)
        self.null = vectors[:, components(values, self.variance) :].contiguous()

    def _settle(self, where: str, changed: Collection[str]) -> None:
        if changed == {"variance"} and self._spectrum is not None:
            self._cut()
            return
        super()._settle(where, changed)

    def _scorer(
        self, where: str, settings: Sequence[Mapping[str, Any]]
    ) -> Callable[[Batch], Tensor]:
        if self._spectrum is None or any(one.keys() != {"variance"} for one in settings):
            return super()._scorer(where, settings)
        values, vectors = self._spectrum
        own = [type(self)(one["variance"]).variance for one in settings]
        places = [components(values, variance) for variance in own]

        def of_rows(features: Tensor) -> Tensor:
            z = self._read(features)
            with torch.autocast(z.device.type, enabled=False):
                squares = ((z - self.mean.to(z)) @ vectors.to(z)).square()
            # Summed from the smallest, so that nothing cancels; of no component, 0.
            sums = torch.nn.functional.pad(squares.flip(1).cumsum(1).flip(1), (0, 1))
            return sums[:, places].sqrt()

        return lambda batch: (
            -torch.cat([of_rows(rows) for rows in present(batch.features).split(self._rows(batch))])
        )

    def _rows(self, batch: Batch) -> int:
        return max(1, _CHUNK // max(len(self.mean), present(batch.features).shape[1]))

    def _score(self, batch: Batch) -> Tensor:
        parts = blocks(present(batch.features), self._rows(batch))
        return -torch.cat([length(self._read(rows), self.mean, self.null) for rows in parts])


@register(
    "corp",
    "D",
    "Fang et al., NeurIPS 2024",
    grid={"variance": (50, 80)},
    at_fit=("gamma", "m", "seed"),
)
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
