"""AdaSCALE: SCALE and LTS with a percentile after how a perturbed input moves the features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from oodkernels._checks import check_real
from oodkernels.detectors.base import OODDetector, register
from oodkernels.detectors.batch import Batch, present
from oodkernels.detectors.gradients import input_gradient
from oodkernels.detectors.head import HEAD, Head, HeadDetector, Reservoir, check_percentile, floats
from oodkernels.detectors.model import Model, run, to_model
from oodkernels.detectors.statistics import check_finite
from oodkernels.ops import logit_scores

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["AdaSCALEA", "AdaSCALEL"]

_SAMPLE = 5000  # ID samples that the shifts are ranked among
_GRID = {
    "low": (60, 65, 70, 75, 80, 85, 90, 95),
    "high": (65, 70, 75, 80, 85, 90, 95, 99),
}
_AT_FIT = ("eps", "pixels", "shift", "correction", "factor")


class _AdaSCALE(OODDetector):
    """Energies scaled by a percentile of each sample's own."""

    needs = frozenset({"x"})
    trained_on = frozenset({"x"})
    values: Tensor
    _sample: Reservoir | None = None

    def _set(self, low: float, high: float, **more: float) -> None:
        where = type(self).__name__
        self.low, self.high = (check_percentile(where, p) for p in (low, high))
        if not self.low < self.high:
            raise ValueError(f"{where}: low must be below high, got {low} and {high}")
        for name, value in more.items():
            number = check_real(where, name, value)
            most = float("inf") if name in ("eps", "factor") else 100
            if not 0 < number <= most:
                raise ValueError(f"{where}: {name} must be in (0, {most:g}], got {value}")
            setattr(self, name, number)

    def _reset(self) -> None:
        super()._reset()
        self._sample = None

    def _update(self, where: str, batch: Batch, labels: Tensor | None) -> None:
        if self._sample is None:
            if self._status == "fitted":
                raise ValueError(
                    f"{where}: {self.name} from a file has no sample to add to: fit it again to all"
                )
            self._sample = Reservoir(_SAMPLE)
        shift = self._moved(batch)[2]
        check_finite(where, shift[:, None])
        self._sample.add(shift)

    def _finish(self, where: str) -> None:
        rows = self._sample.rows() if self._sample else ()
        if not rows or not len(rows[0]):
            raise ValueError(f"{where}: there must be ID samples to fit to, got none")
        self.values = rows[0].double().sort().values

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> Self:
        """Merge what the processes of a group were given by :meth:`fit_batch`.

        All of them call this, once, after their last batch; each must have had one.
        """
        where = f"{type(self).__name__}.all_reduce"
        self._finish(where)
        every: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(every, self.values.cpu(), group)
        self.values = torch.cat(every).sort().values.to(self.values.device)
        self._status, self.threshold = "fitted", None
        return self

    def _moved(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Features, logits of the classes, and by how much the perturbed input moves them."""
        key = ("adascale", self.absent, *(getattr(self, name) for name in _AT_FIT))
        return batch.once(key, lambda: self._compute(batch))

    def _compute(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        where, model = f"{type(self).__name__}.score", present(self.model)

        def outputs(x: Tensor) -> tuple[Tensor, Tensor]:
            found = Batch.of(x, run(model, x))
            if found.features is None:
                raise ValueError(f"{where}: the model must give features; see FeatureModel")
            return floats(found.features), floats(found.class_logits(self.absent))

        x = to_model(model, present(batch.x))
        gradient = input_gradient(where, lambda x: outputs(x)[1].amax(1).sum(), x).flatten(1)
        few = int(gradient.shape[1] * self._share("pixels"))
        place = gradient.abs().topk(few, largest=False).indices
        step = torch.zeros_like(gradient).scatter(1, place, gradient.gather(1, place).sign())
        eps: float = vars(self)["eps"]
        before, logits = outputs(x)
        after, _ = outputs(x.detach() + eps * step.reshape(x.shape))
        order = before.argsort(dim=1, descending=True, stable=True)
        d = before.shape[1]
        apart, moved = (before - after).abs().gather(1, order), after.relu().gather(1, order)
        shift = apart[:, : max(1, int(d * self._share("shift")))].sum(1)
        correction = moved[:, : max(1, int(d * self._share("correction")))].sum(1)
        factor: float = vars(self)["factor"]
        return before, logits, correction + factor * shift

    def _share(self, name: str) -> float:
        return float(vars(self)[name]) / 100

    def _ratio(self, features: Tensor, shift: Tensor) -> Tensor:
        """Sum of the positive parts over that of those above the sample's percentile, (N,)."""
        known = self.values.to(shift.device)
        rank = torch.searchsorted(known, shift.double().contiguous(), right=True) / len(known)
        percentile = self.low + (1 - rank.double()) * (self.high - self.low)
        d = features.shape[1]
        k = (d - (d * percentile / 100).round()).clamp(min=1).long()
        x = features.relu()
        sums = x.sort(1, descending=True).values.double().cumsum(1)
        top = sums.gather(1, k[:, None] - 1)[:, 0].to(x)
        return torch.where(top > 0, x.sum(1) / top, torch.ones_like(top))

    def _check(self, where: str, batch: Batch) -> None:
        if self.model is None:
            raise ValueError(f"{where}: x needs a model: {type(self).__name__}(..., model=model)")
        super()._check(where, batch)


@register(
    "adascale-a",
    "F",
    "Regmi, arXiv 2503.08023 2025",
    grid=_GRID,
    at_fit=_AT_FIT,
    at_score=("low", "high"),
)
class AdaSCALEA(_AdaSCALE, HeadDetector):
    """:class:`SCALE` with a percentile of each sample's own, after how far a perturbation moves it.

    Regmi, AdaSCALE: Adaptive Scaling for OOD Detection, arXiv 2503.08023. The input's ``pixels``
    per cent of values with the least gradients of the largest logit move by ``eps``
    sign(gradient). Q is ``factor`` times the sum of |h - h'| over the ``shift`` per cent largest
    features h, plus the sum of h' > 0 over the ``correction`` per cent largest: OOD samples move
    more. With F the share
    of up to 5,000 ID samples that have no larger Q, the percentile is
    low + (1 - F(Q)) (high - low), and features are scaled by exp(r) as SCALE does.

    Args:
        low: Least percentile, in per cent; the authors choose among 60 to 95.
        high: Largest percentile, in per cent.
        eps: Size of the step, in the units of x.
        pixels: Share of the inputs' values that move, in per cent.
        shift: Share of the features whose shift counts, in per cent.
        correction: Share of the features in the correction, in per cent.
        factor: Of the shift.
        head: As for :class:`HeadDetector`.
        absent: As for :class:`MSP`.
        model: As for :class:`OODDetector`; differentiable in x.
    """

    _tensors: ClassVar[Mapping[str, str]] = {**HEAD, "values": "n"}

    def __init__(
        self,
        low: float = 75.0,
        high: float = 85.0,
        eps: float = 0.5,
        pixels: float = 5.0,
        shift: float = 1.0,
        correction: float = 5.0,
        factor: float = 10.0,
        *,
        head: Head | None = None,
        absent: int | None = None,
        model: Model | None = None,
    ) -> None:
        HeadDetector.__init__(self, head, model, absent)
        more: dict[str, Any] = {"shift": shift, "correction": correction, "factor": factor}
        self._set(low, high, eps=eps, pixels=pixels, **more)

    def _score(self, batch: Batch) -> Tensor:
        features, logits, shift = self._moved(batch)
        scale = self._ratio(features, shift).exp()[:, None]
        _, bias = self._linear(Batch(batch.x, features=features, absent=batch.absent))
        return logit_scores((logits.to(scale) - bias) * scale + bias).energy


@register(
    "adascale-l",
    "F",
    "Regmi, arXiv 2503.08023 2025",
    grid=_GRID,
    at_fit=_AT_FIT,
    at_score=("low", "high"),
)
class AdaSCALEL(_AdaSCALE):
    """:class:`LTS` with a percentile of each sample's own, as :class:`AdaSCALEA` finds it.

    Regmi, AdaSCALE: Adaptive Scaling for OOD Detection, arXiv 2503.08023: the logits are multiplied
    by r squared. Arguments as for :class:`AdaSCALEA`.
    """

    _tensors: ClassVar[Mapping[str, str]] = {"values": "n"}

    def __init__(
        self,
        low: float = 75.0,
        high: float = 85.0,
        eps: float = 0.5,
        pixels: float = 5.0,
        shift: float = 1.0,
        correction: float = 5.0,
        factor: float = 10.0,
        *,
        absent: int | None = None,
        model: Model | None = None,
    ) -> None:
        super().__init__(model, absent)
        more: dict[str, Any] = {"shift": shift, "correction": correction, "factor": factor}
        self._set(low, high, eps=eps, pixels=pixels, **more)

    def _score(self, batch: Batch) -> Tensor:
        features, logits, shift = self._moved(batch)
        ratio = self._ratio(features, shift).square()[:, None]
        return logit_scores(logits.to(ratio) * ratio).energy
