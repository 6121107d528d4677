"""Detectors by the maps that layers within a network give."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from oodkernels._checks import check_count, check_int
from oodkernels.detectors.base import OODDetector, register
from oodkernels.detectors.batch import Batch, present
from oodkernels.detectors.head import Head, HeadDetector, floats
from oodkernels.detectors.logits import check_temperature
from oodkernels.detectors.model import Model
from oodkernels.ops import logit_scores

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Gram", "RankFeat"]

_SAMPLE = 1000  # samples that the layers' deviations are normalised by
_EVERY = 10  # of the training samples one is held out for that


def channels_first(where: str, layer: str, maps: Tensor, axis: int | None) -> Tensor:
    """The maps of a layer as (N, channels, positions).

    Args:
        where: What errors start with.
        layer: Its name.
        maps: (N, ...).
        axis: Of the channels, not the first; None where it is not known.

    Raises:
        ValueError: There are more than two axes, and ``axis`` is not known or none of them.
    """
    if maps.dim() == 2:
        return floats(maps)[:, :, None]
    shape = tuple(maps.shape)
    if maps.dim() < 2 or axis is None or not -maps.dim() < axis < maps.dim() or not axis:
        raise ValueError(
            f"{where}: layer {layer!r} gives {shape}, of which axis must be the channels': say "
            f"axis=1 if it is the second, axis=-1 if the last, got {axis}"
        )
    return floats(maps.movedim(axis, 1).flatten(2))


class _Maps(OODDetector):
    """A detector that reads layers."""

    axis: int | None

    def _read(self, batch: Batch, layer: str) -> Tensor:
        axis = batch.axes.get(layer) if self.axis is None else self.axis
        return channels_first(type(self).__name__, layer, batch.layers[layer], axis)


@register("rankfeat", "F", "Song, Sebe & Wang, NeurIPS 2022", at_score=("temperature",))
class RankFeat(_Maps, HeadDetector):
    """Energy of the logits of the last maps without their largest singular component.

    Song, Sebe & Wang, RankFeat: Rank-1 Feature Removal for Out-of-distribution Detection, NeurIPS
    2022, at the last block: of each sample's maps, channels x positions, s_1 u_1 v_1^T is taken
    away, before they are averaged over the positions and given to the head. The component comes
    from the smaller of the two Gram matrices, in float64. The authors average the logits with those
    of the same at the block before.

    Args:
        layer: Name of the layer whose output is averaged and given to the head.
        temperature: T > 0; the authors' 1.
        axis: Axis of the channels, where the model's modules do not tell; of tensors by keyword
            nothing else does.
        head: As for :class:`HeadDetector`.
        absent: As for :class:`MSP`.
        model: As for :class:`OODDetector`.
    """

    needs = frozenset({"features"})

    def __init__(
        self,
        layer: str,
        temperature: float = 1.0,
        axis: int | None = None,
        *,
        head: Head | None = None,
        absent: int | None = None,
        model: Model | None = None,
    ) -> None:
        HeadDetector.__init__(self, head, model, absent)
        self.layer, self.layers = layer, (layer,)
        self.temperature = check_temperature("RankFeat", temperature)
        self.axis = None if axis is None else check_int("RankFeat", "axis", axis)

    def _score(self, batch: Batch) -> Tensor:
        maps = self._read(batch, self.layer)
        if maps.shape[1] != present(self.width):
            raise ValueError(
                f"RankFeat.score: layer {self.layer!r} must have {self.width} channels, as the "
                f"head has, got {maps.shape[1]}"
            )
        a = maps.double()
        with torch.autocast(maps.device.type, enabled=False):
            if a.shape[2] <= a.shape[1]:
                v = torch.linalg.eigh(a.mT @ a)[1][:, :, -1]
                component = (a @ v[:, :, None])[:, :, 0] * v.mean(1, keepdim=True)
            else:
                u = torch.linalg.eigh(a @ a.mT)[1][:, :, -1]
                component = u * (u[:, None] @ a)[:, 0].mean(1, keepdim=True)
            pooled = (a.mean(2) - component).to(maps)
            weight, bias = self._linear(Batch(features=pooled, absent=batch.absent))
            logits = torch.addmm(bias, pooled, weight.T)
        return logit_scores(logits, self.temperature).energy


@register("gram", "F", "Sastry & Oore, ICML 2020", at_fit=("layers", "powers", "axis"))
class Gram(_Maps):
    """How far Gram matrices of the layers lie outside of the range they had in training, negated.

    Sastry & Oore, Detecting Out-of-Distribution Examples with Gram Matrices, ICML 2020: for each
    layer and power q the row sums of M^q (M^q)^T, M the maps as channels x positions, to the power
    1/q. Of the training samples predicted as a class, the least and the largest of each are kept. A
    sample's deviation of a layer is the sum of how far it lies below or above, each over the bound;
    over its largest probability; the score is minus the sum over layers of the deviation over its
    mean on ID samples. The authors take that mean of a tenth of the test samples; here it is of
    every tenth training sample, up to 1,000, which the ranges do not know. Row sums are computed
    without the matrix, M^q ((M^q)^T 1), in float64.

    Args:
        layers: Names of the model's layers, one at least.
        powers: Largest power; the authors have 10.
        axis: Axis of the channels, where the model's modules do not tell; of tensors by keyword
            nothing else does.
        absent: As for :class:`MSP`.
        model: As for :class:`OODDetector`.

    Attributes:
        least, most: (C, m) float64; infinities, as +-1e300, of a class that none was predicted as.
        sizes: (layers,) float64, how many of the m are of each layer.
        scale: (layers,) float64, mean deviations.
    """

    needs = frozenset({"features", "logits"})
    trained_on = frozenset({"features", "logits"})
    _tensors: ClassVar[Mapping[str, str]] = {
        "least": "C m",
        "most": "C m",
        "sizes": "l",
        "scale": "l",
    }
    least: Tensor
    most: Tensor
    sizes: Tensor
    scale: Tensor

    def __init__(
        self,
        layers: Sequence[str],
        powers: int = 10,
        axis: int | None = None,
        *,
        absent: int | None = None,
        model: Model | None = None,
    ) -> None:
        super().__init__(model, absent)
        self.layers = (layers,) if isinstance(layers, str) else tuple(layers)
        if not self.layers:
            raise ValueError("Gram: layers must name at least one, got none")
        self.powers = check_count("Gram", "powers", powers)
        self.axis = None if axis is None else check_int("Gram", "axis", axis)
        self._held: list[tuple[Tensor, Tensor, Tensor]] = []
        self._count = 0

    def _reset(self) -> None:
        super()._reset()
        self._held, self._count = [], 0

    def _sums(self, batch: Batch) -> list[Tensor]:
        """The roots of the row sums of each layer, (N, powers x channels)."""
        found = []
        for layer in self.layers:
            maps = self._read(batch, layer).double()
            powers, own = maps, []
            for q in range(1, self.powers + 1):
                sums = (powers @ powers.sum(1)[:, :, None])[:, :, 0]
                own.append(sums.sign() * sums.abs() ** (1 / q))
                powers = powers * maps
            found.append(torch.cat(own, 1))
        return found

    def _update(self, where: str, batch: Batch, labels: Tensor | None) -> None:
        if self._loaded:
            raise ValueError(
                f"{where}: gram from a file has no samples to add to: fit it again to all"
            )
        each = self._sums(batch)
        sums = torch.cat(each, 1)
        if not sums.isfinite().all():
            raise ValueError(
                f"{where}: features must be finite, and below overflow in {self.powers} powers"
            )
        scores = batch.logit_scores(absent=self.absent)
        classes = batch.class_logits(self.absent).shape[1]
        if "least" not in vars(self):
            self.num_classes = classes
            self.least = sums.new_full((classes, sums.shape[1]), 1e300)
            self.most = -self.least
            self.sizes = sums.new_tensor([float(own.shape[1]) for own in each])
        place = torch.arange(self._count, self._count + len(sums), device=sums.device)
        held = place % _EVERY == _EVERY - 1
        for c in scores.label[~held].unique().tolist():
            own = sums[~held & (scores.label == c)]
            self.least[c] = self.least[c].minimum(own.amin(0))
            self.most[c] = self.most[c].maximum(own.amax(0))
        if self._count // _EVERY < _SAMPLE:
            self._held.append((sums[held], scores.label[held], scores.msp[held].double()))
        self._count += len(sums)

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> Self:
        """Merge what the processes of a group were given by :meth:`partial_fit`.

        All of them call this, once, after their last batch; each must have had one.
        """
        dist.all_reduce(self.least, dist.ReduceOp.MIN, group)
        dist.all_reduce(self.most, dist.ReduceOp.MAX, group)
        total = self._held_sum()
        dist.all_reduce(total, group=group)
        self._set_scale("Gram.all_reduce", total)
        self._status, self.threshold = "fitted", None
        return self

    def _finish(self, where: str) -> None:
        self._set_scale(where, self._held_sum())

    def _held_sum(self) -> Tensor:
        """Sums of the deviations of the samples held out, by layer, and their number."""
        sums, label, p = (torch.cat(parts) for parts in zip(*self._held, strict=True))
        deviations = self._deviations(sums, label, p)
        known = deviations[deviations.isfinite().all(1)]
        return torch.cat([known.sum(0), known.new_tensor([float(len(known))])])

    def _set_scale(self, where: str, total: Tensor) -> None:
        if not total[-1]:
            raise ValueError(
                f"{where}: there must be {_EVERY} ID samples at least, of classes predicted more "
                f"than once, got {self._count}"
            )
        self.scale = total[:-1] / total[-1]

    def _deviations(self, sums: Tensor, label: Tensor, p: Tensor) -> Tensor:
        """Deviations of the layers, (N, layers)."""
        least, most = self.least.to(sums.device)[label], self.most.to(sums.device)[label]
        away = (least - sums).relu() / (least.abs() + 1e-6)
        away = away + (sums - most).relu() / (most.abs() + 1e-6)
        parts = away.split([int(size) for size in self.sizes], 1)
        found = torch.stack([part.sum(1) for part in parts], 1) / p[:, None]
        unknown = (least[:, 0] > most[:, 0]) & ~sums.isnan().any(1)
        return torch.where(unknown[:, None], math.inf, found)

    def _score(self, batch: Batch) -> Tensor:
        scores = batch.logit_scores(absent=self.absent)
        sums = torch.cat(self._sums(batch), 1)
        if sums.shape[1] != self.least.shape[1]:
            raise ValueError(
                f"Gram.score: layers must have {self.least.shape[1] // self.powers} channels in "
                f"all, got {sums.shape[1] // self.powers}"
            )
        deviations = self._deviations(sums, scores.label, scores.msp.double())
        found = -(deviations / (self.scale.to(sums.device) + 1e-7)).sum(1)
        return found.to(scores.msp)

    def _label(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        return batch.logit_scores(absent=self.absent).label, None
