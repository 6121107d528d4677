"""Detectors by how neurons answer: the states they had in training, or what is left of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from oodkernels._checks import check_count, check_int, check_real
from oodkernels.detectors.base import register
from oodkernels.detectors.batch import Batch, present
from oodkernels.detectors.head import HEAD, Head, HeadDetector, floats
from oodkernels.detectors.model import Model
from oodkernels.detectors.statistics import check_finite

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["NAC", "MCDropout"]

_BLOCK = 1 << 20  # numbers of a block's states and logits: some megabytes


@register(
    "nac",
    "C",
    "Liu et al., ICLR 2024",
    at_fit=("alpha", "bins"),
    at_score=("least",),
)
class NAC(HeadDetector):
    """How well training samples cover the states of the features' neurons.

    Liu, Tian, Li, Ma & Wang, Neuron Activation Coverage: Rethinking Out-of-distribution Detection
    and Generalization, ICLR 2024 (NAC-UE), at the penultimate layer. The state of feature h_i is
    sigmoid(alpha h_i g_i), g the gradient of KL(u || p) with respect to h for uniform u: (p - u) W
    exactly, so that no gradient is computed. In each of the equal intervals of [0, 1) training
    samples are counted; a sample's score is the mean over its features of
    min(count in the interval of its state / ``least``, 1). The authors add lower layers to it.

    Args:
        alpha: Steepness; the authors have 3000 for ImageNet and ResNet-50, 100 for CIFAR-10.
        bins: Number M of the intervals' ends, as the authors count; 50.
        least: Samples that fill an interval; the authors' O* of 10 for ImageNet, 50 for CIFAR, of
            1,000 training samples.
        head: As for :class:`HeadDetector`.
        absent: As for :class:`MSP`.
        model: As for :class:`OODDetector`.

    Attributes:
        counts: (bins - 1, d) float64.
    """

    needs = frozenset({"features", "logits"})
    trained_on = frozenset({"features", "logits"})
    _tensors: ClassVar[Mapping[str, str]] = {**HEAD, "counts": "m d"}
    counts: Tensor

    def __init__(
        self,
        alpha: float = 3000.0,
        bins: int = 50,
        least: int = 10,
        *,
        head: Head | None = None,
        absent: int | None = None,
        model: Model | None = None,
    ) -> None:
        super().__init__(head, model, absent)
        self.alpha = check_real("NAC", "alpha", alpha)
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"NAC: alpha must be positive and finite, got {alpha}")
        self.bins, self.least = (
            check_count("NAC", "bins", bins, 2),
            check_count("NAC", "least", least),
        )

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> Self:
        """Sum over processes, like :class:`SHE`'s."""
        dist.all_reduce(self.counts, group=group)
        self._status, self.threshold = "pending", None
        return self

    def _blocks(self, batch: Batch) -> Tensor:
        """The interval of each state, (N, d); bins - 1 for a state that rounds to 1."""
        weight, _ = self._linear(batch)
        z = floats(batch.class_logits(self.absent)).to(weight)
        x = floats(present(batch.features))
        rows = max(1, _BLOCK // max(weight.shape))
        found = []
        for f, logits in zip(x.split(rows), z.split(rows), strict=True):
            with torch.autocast(x.device.type, enabled=False):
                gradient = (logits.softmax(1) - 1 / z.shape[1]) @ weight
            state = torch.sigmoid(self.alpha * f * gradient)
            edges = torch.linspace(0, 1, self.bins).to(state)
            found.append(torch.searchsorted(edges, state.contiguous(), right=True) - 1)
        return torch.cat(found).clamp(min=0)

    def _update(self, where: str, batch: Batch, labels: Tensor | None) -> None:
        features = present(batch.features)
        check_finite(where, features)
        self.width = features.shape[1]
        place = self._blocks(batch)
        if "counts" not in vars(self):
            self.counts = torch.zeros(
                self.bins - 1, self.width, dtype=torch.float64, device=features.device
            )
        for i in range(self.bins - 1):
            self.counts[i] += (place == i).sum(0)

    def _finish(self, where: str) -> None:
        if not self.counts.sum():
            raise ValueError(f"{where}: there must be ID samples to fit to, got none")

    def _score(self, batch: Batch) -> Tensor:
        place = self._blocks(batch)
        x = floats(present(batch.features))
        covered = (self.counts / self.least).clamp(max=1).to(x)
        covered = torch.cat([covered, covered.new_zeros(1, covered.shape[1])])
        score = covered.gather(0, place).mean(1)
        return torch.where(x.isnan().any(1), torch.nan, score)


@register(
    "mc-dropout", "C", "Gal & Ghahramani, ICML 2016", at_score=("samples", "p", "kind", "seed")
)
class MCDropout(HeadDetector):
    """Agreement of the head's answers under dropout of the features.

    Gal & Ghahramani, Dropout as a Bayesian Approximation, ICML 2016: several times features are
    kept with probability 1 - p and divided by it, and the head is applied. The same features are
    dropped of every sample, in each of the answers others, as in an ensemble of heads: a sample's
    score depends neither on the others nor on their order. Dropout within the network is not
    repeated.

    Args:
        samples: How many answers.
        p: Share that is dropped, in (0, 1).
        kind: ``"msp"``, the largest of the mean probabilities; ``"variance"``, the mean over the
            classes of the answers' variance, negated; ``"information"``, the mutual information of
            answer and class, entropy of the mean less the mean entropy, negated.
        seed: Of the choice.
        head: As for :class:`HeadDetector`.
        absent: As for :class:`MSP`.
        model: As for :class:`OODDetector`.
    """

    needs = frozenset({"features"})

    def __init__(
        self,
        samples: int = 30,
        p: float = 0.5,
        kind: Literal["msp", "variance", "information"] = "msp",
        seed: int = 0,
        *,
        head: Head | None = None,
        absent: int | None = None,
        model: Model | None = None,
    ) -> None:
        super().__init__(head, model, absent)
        self.samples = check_count("MCDropout", "samples", samples, 2)
        self.p, self.seed = check_real("MCDropout", "p", p), check_int("MCDropout", "seed", seed)
        if not 0 < self.p < 1:
            raise ValueError(f"MCDropout: p must be in (0, 1), got {p}")
        if kind not in ("msp", "variance", "information"):
            raise ValueError(f"MCDropout: kind must be msp, variance or information, got {kind!r}")
        self.kind = kind

    def _score(self, batch: Batch) -> Tensor:
        weight, bias = self._linear(batch)
        x = floats(present(batch.features))
        generator = torch.Generator().manual_seed(self.seed)
        kept = torch.rand(self.samples, x.shape[1], generator=generator) >= self.p
        masks = kept.to(x) / (1 - self.p)
        found = []
        for rows in x.split(max(1, _BLOCK // max(weight.shape))):
            total = square = entropy = torch.zeros((), dtype=x.dtype, device=x.device)
            for mask in masks:
                with torch.autocast(x.device.type, enabled=False):
                    log_p = torch.addmm(bias, rows * mask, weight.T).log_softmax(1)
                p = log_p.exp()
                total, square = total + p, square + p.square()
                entropy = entropy - (p * log_p).sum(1)
            mean = total / self.samples
            if self.kind == "msp":
                score = mean.amax(1)
            elif self.kind == "variance":
                spread = (square - self.samples * mean.square()) / (self.samples - 1)
                score = -spread.clamp(min=0).mean(1)
            else:
                score = torch.special.xlogy(mean, mean).sum(1) + entropy / self.samples
            found.append(score)
        return torch.cat(found)
