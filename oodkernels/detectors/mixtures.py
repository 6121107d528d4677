"""A Gaussian for each class, and the likelihood under all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from oodkernels._checks import check_count, check_real
from oodkernels.detectors.base import OODDetector, register
from oodkernels.detectors.batch import Batch, present
from oodkernels.detectors.head import floats
from oodkernels.detectors.model import Model
from oodkernels.detectors.statistics import ClassStatistics
from oodkernels.detectors.whitening import times_triangle

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["GMM"]

_CHUNK = 1 << 24  # numbers that are whitened at once


@register(
    "gmm",
    "D",
    "Kirchheim, Filax & Ortmeier, CVPRW 2022",
    at_fit=("classes",),
)
class GMM(OODDetector):
    """Log-likelihood of the features under a Gaussian for each class, weighted by its frequency.

    log sum_c pi_c N(h; mu_c, S_c) with the mean and the covariance (divided by the number of
    samples) of each class's training features, S_c + ``ridge`` I, as pytorch-ood has it: a
    classical baseline of which no paper is the first. Determinants are in it, and nothing
    underflows. Statistics are fitted in one pass in float64 and merge over processes; with a
    covariance for each class they take C d^2 numbers.

    Args:
        covariance: ``"full"`` for one for each class, ``"tied"`` for one within all of them.
        ridge: Added to the variances, > 0.
        classes: Number C of classes, so that a class without samples is noticed even if it is the
            last; None for the largest label + 1.
        model: As for :class:`OODDetector`.

    Attributes:
        counts: (C,) float64.
        means: (C, d) float64.
        covariances: (C, d, d) float64, or (1, d, d) where tied, with the ridge.
    """

    needs = frozenset({"features"})
    trained_on = frozenset({"features", "labels"})
    _tensors: ClassVar[Mapping[str, str]] = {
        "counts": "C",
        "means": "C d",
        "covariances": "m d d",
    }
    counts: Tensor
    means: Tensor
    covariances: Tensor

    def __init__(
        self,
        covariance: Literal["full", "tied"] = "full",
        ridge: float = 1e-6,
        classes: int | None = None,
        *,
        model: Model | None = None,
    ) -> None:
        super().__init__(model)
        if covariance not in ("full", "tied"):
            raise ValueError(f"GMM: covariance must be full or tied, got {covariance!r}")
        self.covariance, self.ridge = covariance, check_real("GMM", "ridge", ridge)
        if not 0 < self.ridge < math.inf:
            raise ValueError(f"GMM: ridge must be positive and finite, got {ridge}")
        self.classes = None if classes is None else check_count("GMM", "classes", classes)
        self._reset()

    def _reset(self) -> None:
        super()._reset()
        self.statistics: dict[int, ClassStatistics] = {}
        self._maps: tuple[Tensor, Tensor] | None = None

    def _update(self, where: str, batch: Batch, labels: Tensor | None) -> None:
        if self._loaded:
            raise ValueError(
                f"{where}: gmm from a file has no statistics to add to: fit it again to all"
            )
        features, y = present(batch.features), present(labels)
        highest = int(y.max()) if len(y) else -1
        if self.classes is not None and highest >= self.classes:
            raise ValueError(f"{where}: labels must be in 0..{self.classes - 1}, got {highest}")
        self.width = features.shape[1]
        for c in y.unique().tolist():
            rows = features[y == c]
            zeros = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
            self.statistics.setdefault(c, ClassStatistics(1)).update(rows, zeros, where=where)

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> Self:
        """Merge what the processes of a group were given by :meth:`partial_fit`.

        All of them call this, once, after their last batch; a process may have had none.
        """
        first = next(iter(self.statistics.values()), None)
        device = None if first is None else first.counts.device
        highest = torch.tensor([max(self.statistics, default=-1)], device=device)
        dist.all_reduce(highest, dist.ReduceOp.MAX, group)
        for c in range(int(highest) + 1):
            self.statistics.setdefault(c, ClassStatistics(1, device)).all_reduce(group)
        self._status, self.threshold = "pending", None
        return self

    def _finish(self, where: str) -> None:
        known = {c: s for c, s in self.statistics.items() if s.count}
        number = max(known, default=-1) + 1 if self.classes is None else self.classes
        if missing := [c for c in range(number) if c not in known] or ([0] if not number else []):
            raise ValueError(
                f"{where}: every class must have samples to fit to, got none of class {missing[0]}"
            )
        every = [known[c] for c in range(number)]
        self.num_classes, self.width = number, every[0].width
        self.counts = torch.tensor([s.count for s in every]).to(every[0].means)
        self.means = torch.cat([s.means for s in every])
        if self.covariance == "tied":
            scatter = torch.stack([s.scatter for s in every]).sum(0, keepdim=True)
            found = scatter / self.counts.sum()
        else:
            found = torch.stack([s.covariance() for s in every])
        self.covariances = found + self.ridge * torch.eye(found.shape[1]).to(found)
        self._maps = None

    def _whitening(self) -> tuple[Tensor, Tensor]:
        """Matrices (m, d, d) that make the covariances the identity, and log-determinants (m,)."""
        if self._maps is None:
            factor, failed = torch.linalg.cholesky_ex(self.covariances)
            if bool(failed.any()):
                which = int(failed.nonzero()[0])
                raise ValueError(
                    f"GMM: covariance {which} must be positive definite: choose a larger ridge"
                )
            eye = torch.eye(factor.shape[1]).to(factor).expand_as(factor)
            maps = torch.linalg.solve_triangular(factor, eye, upper=False).mT
            log_determinants = 2 * factor.diagonal(dim1=1, dim2=2).log().sum(1)
            self._maps = maps.contiguous(), log_determinants
        return self._maps

    def _load_state(self, tensors: Mapping[str, Tensor]) -> None:
        super()._load_state(tensors)
        if not (self.counts > 0).all() or len(self.covariances) not in (1, len(self.counts)):
            raise ValueError("counts must be positive, and covariances one or as many as classes")
        self._maps = None
        self._whitening()

    def to(self, device: torch.device | str | int) -> Self:
        """Move what was fitted; the model is left where it is."""
        self._maps = None
        return super().to(device)

    def _parts_of(self, batch: Batch) -> Tensor:
        """(N, C): the logarithm of each class's share of the likelihood."""
        x = floats(present(batch.features))
        maps, log_determinants = (t.to(x) for t in self._whitening())
        origin = self.means.mean(0).to(x)
        means = (self.means.to(x.device) - origin.double()).to(x)
        prior = (self.counts / self.counts.sum()).log().to(x)
        constant = prior - (log_determinants + x.shape[1] * math.log(2 * math.pi)) / 2
        blocks = []
        for rows in x.split(max(1, _CHUNK // (x.shape[1] + len(means)))):
            rows = rows - origin
            with torch.autocast(x.device.type, enabled=False):
                if len(maps) == 1:
                    z, centres = times_triangle(rows, maps[0]), means @ maps[0]
                    square = torch.stack([(z - c).square().sum(1) for c in centres], 1)
                else:
                    pairs = zip(means, maps, strict=True)
                    square = torch.stack(
                        [times_triangle(rows - c, w).square().sum(1) for c, w in pairs], 1
                    )
            blocks.append(constant - square / 2)
        return torch.cat(blocks)

    def _shares(self, batch: Batch) -> Tensor:
        return batch.once(self, lambda: self._parts_of(batch))

    def _score(self, batch: Batch) -> Tensor:
        return self._shares(batch).logsumexp(1)

    def _label(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        return self._shares(batch).argmax(1), None
