"""Relative Mahalanobis distances, and Mahalanobis distances of normalised features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize

from oodkernels._checks import check_count
from oodkernels.detectors.base import OODDetector, register
from oodkernels.detectors.batch import Batch, present
from oodkernels.detectors.model import Model
from oodkernels.detectors.statistics import ClassStatistics
from oodkernels.detectors.whitening import Whitening, check_samples, check_shrinkage, whitening

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["RMDS", "MahalanobisPlusPlus", "RMDSPlusPlus"]


class _Gaussians(OODDetector):
    """Class means with one covariance, and one Gaussian of all; fitted in one pass, in float64."""

    needs = frozenset({"features"})
    trained_on = frozenset({"features", "labels"})
    _tensors: ClassVar[Mapping[str, str]] = {"counts": "C", "means": "C d", "scatter": "d d"}
    _carried = OODDetector._carried | {"_maps"}
    _unit: ClassVar[bool]
    _relative: ClassVar[bool]
    _maps: list[Whitening]  # of the covariance within the classes, and of the total where needed

    def __init__(
        self,
        shrinkage: float | None = None,
        classes: int | None = None,
        *,
        model: Model | None = None,
    ) -> None:
        super().__init__(model)
        where = type(self).__name__
        self.shrinkage = check_shrinkage(where, shrinkage)
        self.classes = None if classes is None else check_count(where, "classes", classes)
        self._reset()

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> Self:
        """Sum over processes, like :class:`Mahalanobis`'s."""
        self.statistics.all_reduce(group)
        self._status, self.threshold = "pending", None
        return self

    def to(self, device: torch.device | str | int) -> Self:
        """Move what was fitted; the model is left where it is."""
        self.statistics.to(device)
        self._maps = [m.to(device) for m in self._maps]
        return self

    def _reset(self) -> None:
        super()._reset()
        self.statistics = ClassStatistics(self.classes)
        self._maps = []

    def _update(self, where: str, batch: Batch, labels: Tensor | None) -> None:
        features = present(batch.features)
        if self._unit:
            features = normalize(features.double(), dim=1)
        self.statistics.update(features, present(labels), where=where)

    @torch.inference_mode(False)
    def _finish(self, where: str) -> None:
        own = self.statistics
        check_samples(where, own)
        self.num_classes, self.width = own.num_classes, own.width
        within = own.covariance()
        matrix, _ = whitening(where, within, own, self.shrinkage, stacklevel=6)
        self._maps = [Whitening(matrix, own.mean, own.means, self._unit)]
        if self._relative:
            away = own.means - own.mean
            total = within + (away.T * own.counts.double()) @ away / own.count
            matrix, _ = whitening(where, total, own, self.shrinkage, stacklevel=6)
            self._maps.append(Whitening(matrix, own.mean, own.means[:0], self._unit))

    def _score(self, batch: Batch) -> Tensor:
        _, distance = self._maps[0].nearest(batch)
        if self._relative:
            distance = distance - self._maps[1].square(batch)
        return -distance

    def _label(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        return self._maps[0].nearest(batch)[0], None

    def _state(self) -> dict[str, Tensor]:
        state = self.statistics.state_dict()
        return {**state, "counts": state["counts"].double()}

    def _load_state(self, tensors: Mapping[str, Tensor]) -> None:
        super()._load_state(tensors)
        parts = {name: vars(self).pop(name) for name in self._tensors}
        self.statistics = ClassStatistics(self.classes)
        self.statistics.load_state_dict({**parts, "counts": parts["counts"].long()})
        self._finish("load")


@register(
    "rmds",
    "D",
    "Ren et al., arXiv 2106.09022",
    at_fit=("classes",),
)
class RMDS(_Gaussians):
    """Squared Mahalanobis distance to the nearest class mean less that to the mean of all, negated.

    Ren, Fort, Liu et al., A Simple Fix to Mahalanobis Distance for Improving Near-OOD Detection,
    arXiv 2106.09022: the classes share the covariance within them, the Gaussian of all has the
    total covariance.

    Args:
        shrinkage: Of both covariances, as of :class:`Mahalanobis`.
        classes: As of :class:`Mahalanobis`.
        model: As for :class:`OODDetector`.
    """

    _unit, _relative = False, True


@register(
    "mahalanobis++",
    "D",
    "Mueller & Hein, ICML 2025",
    at_fit=("classes",),
)
class MahalanobisPlusPlus(_Gaussians):
    """Squared Mahalanobis distance to the nearest class mean of normalised features, negated.

    Mueller & Hein, Mahalanobis++: Improving OOD Detection via Feature Normalization, ICML 2025:
    features are divided by their Euclidean norm, in fitting and in scoring. Arguments as for
    :class:`RMDS`.
    """

    _unit, _relative = True, False


@register(
    "rmds++",
    "D",
    "Mueller & Hein, ICML 2025",
    at_fit=("classes",),
)
class RMDSPlusPlus(_Gaussians):
    """:class:`RMDS` of normalised features.

    Mueller & Hein, Mahalanobis++: Improving OOD Detection via Feature Normalization, ICML 2025.
    Arguments as for :class:`RMDS`.
    """

    _unit, _relative = True, True
