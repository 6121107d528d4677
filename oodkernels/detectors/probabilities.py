"""Detectors that read logits, and more of the row than its maximum, sum or entropy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from oodkernels._checks import accumulate_type, check_count, check_real
from oodkernels.detectors.base import OODDetector, register
from oodkernels.detectors.batch import Batch, blocks, present
from oodkernels.detectors.model import Model
from oodkernels.ops import gen_scores, indexed_distances, logit_scores

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["GEN", "KLMatching", "OpenMax", "TemperatureScaling", "WeightedEnergy"]

_CHUNK = 1 << 20  # numbers of a block that stays in cache
_FLOOR = -1e4  # of log d: what is never there costs much and not infinitely much
_SHIFT = 10_000.0  # libMR adds it to what it fits a Weibull distribution to


def _by_rows(z: Tensor, width: int, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """``compute`` of blocks of rows, read as float32 or float64, put together."""
    kind = accumulate_type(z.dtype)
    parts = blocks(z, max(1, _CHUNK // max(1, width)))
    return torch.cat([compute(part.to(kind)) for part in parts])


@register(
    "gen",
    "A",
    "Liu, Lochman & Zach, CVPR 2023",
    grid={"gamma": (0.01, 0.1, 0.5, 1, 2, 5, 10), "m": (10, 50, 100, 200, 500, 1000)},
)
class GEN(OODDetector):
    """Negative generalised entropy of the largest probabilities, -sum_j (p_j (1 - p_j))^gamma.

    Liu, Lochman & Zach, GEN: Pushing the Limits of Softmax-Based Out-of-Distribution Detection,
    CVPR 2023: j runs over the m largest of softmax(z). (1 - p)^gamma is steep at p = 1, where
    ``1 - softmax(z)`` in float32 is wrong by up to all of it; here both factors are kept as
    logarithms, from the sum of all other exponentials.

    Args:
        gamma: In (0, inf); the authors' 0.1.
        m: How many of the largest; of fewer classes, all. The authors have 100 for the 1000 classes
            of ImageNet and 10 for the 10 of CIFAR-10.
        form: ``"log"``, or ``"plain"`` for float32's ``1 - softmax(z)`` as published code has it.
        absent: As for :class:`MSP`.
        model: As for :class:`OODDetector`.

    Raises:
        ValueError: ``gamma``, ``m`` or ``form`` is none of these.
    """

    needs = frozenset({"logits"})

    def __init__(
        self,
        gamma: float = 0.1,
        m: int = 100,
        form: Literal["log", "plain"] = "log",
        *,
        absent: int | None = None,
        model: Model | None = None,
    ) -> None:
        super().__init__(model, absent)
        self.gamma = check_real("GEN", "gamma", gamma)
        if not (self.gamma > 0 and math.isfinite(self.gamma)):
            raise ValueError(f"GEN: gamma must be positive and finite, got {self.gamma:g}")
        if form not in ("log", "plain"):
            raise ValueError(f"GEN: form must be log or plain, got {form!r}")
        self.m, self.form = check_count("GEN", "m", m), form

    def _scorer(
        self, where: str, settings: Sequence[Mapping[str, Any]]
    ) -> Callable[[Batch], Tensor]:
        own = [self.varied(**one) for one in settings]
        if any(v.form != "log" or v.absent != self.absent for v in own):
            return super()._scorer(where, settings)
        gamma, m = [v.gamma for v in own], [v.m for v in own]
        return lambda batch: gen_scores(batch.class_logits(self.absent), gamma, m)

    def _score(self, batch: Batch) -> Tensor:
        z = batch.class_logits(self.absent)
        if self.form == "log":
            return gen_scores(z, [self.gamma], [self.m])[:, 0]
        return _by_rows(z, z.shape[1], self._plain)

    def _plain(self, z: Tensor) -> Tensor:
        p = z.softmax(1).topk(min(self.m, z.shape[1])).values
        return -(p * (1 - p)).pow(self.gamma).sum(1)


@register("temperature-scaling", "A", "Guo et al., ICML 2017")
class TemperatureScaling(OODDetector):
    """Maximum softmax probability at the temperature that fits labelled samples best.

    Guo, Pleiss, Sun & Weinberger, On Calibration of Modern Neural Networks, ICML 2017: T minimises
    the negative log-likelihood of samples that the model was not trained on. It is convex in 1 / T
    and minimised by Newton's method to the last digits; fifty steps of L-BFGS as published code
    takes them stop on the way (1.7 for a true temperature of 2).

    Logits of :meth:`partial_fit` are kept until the fit is finished.

    Args:
        absent: As for :class:`MSP`.
        model: As for :class:`OODDetector`.

    Attributes:
        temperature: T, a float64 scalar, after the fit.
    """

    needs = frozenset({"logits"})
    trained_on = frozenset({"logits", "labels"})
    _tensors: ClassVar[Mapping[str, str]] = {"temperature": ""}
    temperature: Tensor

    def __init__(self, *, absent: int | None = None, model: Model | None = None) -> None:
        super().__init__(model, absent)
        self._new: list[tuple[Tensor, Tensor]] = []

    def _reset(self) -> None:
        super()._reset()
        self._new = []

    def _update(self, where: str, batch: Batch, labels: Tensor | None) -> None:
        z, y = _class_logits_and_labels(where, self, batch, labels)
        self._new.append((z, y))

    def _finish(self, where: str) -> None:
        z, y = _joined(where, self._new)
        self.temperature = 1 / _best_scale(where, z, y)

    def _score(self, batch: Batch) -> Tensor:
        return batch.logit_scores(float(self.temperature), self.absent).msp


def _best_scale(where: str, z: Tensor, y: Tensor) -> Tensor:
    """Find the beta > 0 that minimises the mean of -log softmax(beta z)_y, a float64 scalar."""
    chunks = list(zip(z.split(4096), y.split(4096), strict=True))

    def moments(beta: float) -> tuple[float, float, float]:
        """The mean loss, its slope in beta and its curvature."""
        total = torch.zeros(3, dtype=torch.float64, device=z.device)
        for rows, labels in chunks:
            rows = rows.double()
            log_p = (beta * rows).log_softmax(1)
            p, own = log_p.exp(), rows.gather(1, labels[:, None])[:, 0]
            mean = (p * rows).sum(1)
            spread = (p * (rows - mean[:, None]).square()).sum(1)
            loss = -log_p.gather(1, labels[:, None])
            total += torch.stack([loss.sum(), (mean - own).sum(), spread.sum()])
        loss, slope, curvature = (total / len(z)).tolist()
        return loss, slope, curvature

    beta = 1.0
    loss, slope, curvature = moments(beta)
    for _ in range(100):
        if not curvature or loss < 1e-12:  # which no samples have that are ever wrong
            break
        step = max(min(slope / curvature, 0.9 * beta), -9 * beta)
        if abs(step) <= 1e-12 * beta:
            return torch.tensor(beta, dtype=torch.float64, device=z.device)
        while True:
            found = moments(beta - step)
            if found[0] <= loss + 1e-15 * abs(loss) or abs(step) <= 1e-12 * beta:
                break
            step /= 2
        beta -= step
        loss, slope, curvature = found
        if not 1e-6 < beta < 1e6:
            break
    much = "all labels are certain" if beta > 1 else "labels are no likelier than other classes"
    raise ValueError(f"{where}: labels must fit one temperature, got none: {much}")


@register("kl-matching", "A", "Hendrycks et al., ICML 2022")
class KLMatching(OODDetector):
    """Negative divergence of the probabilities from those of the class that they match best.

    Hendrycks et al., Scaling Out-of-Distribution Detection for Real-World Settings, ICML 2022,
    section 4: -min_k KL(p || d_k), p = softmax(z), d_k the mean of p over the training samples
    predicted as k. It is the negative entropy less the largest of p . log d_k: one product with the
    table of log d. A class that none was predicted as has no d_k.

    Args:
        absent: As for :class:`MSP`.
        model: As for :class:`OODDetector`.

    Attributes:
        sums: (C, C) float64, sums of p by predicted class.
        counts: (C,) float64, samples predicted as each class.
    """

    needs = frozenset({"logits"})
    trained_on = frozenset({"logits"})
    _tensors: ClassVar[Mapping[str, str]] = {"sums": "C C", "counts": "C"}
    sums: Tensor
    counts: Tensor

    def __init__(self, *, absent: int | None = None, model: Model | None = None) -> None:
        super().__init__(model, absent)

    def _update(self, where: str, batch: Batch, labels: Tensor | None) -> None:
        z = _checked_classes(where, self, batch)
        classes = z.shape[1]
        if "sums" not in vars(self):
            self.sums = torch.zeros(classes, classes, dtype=torch.float64, device=z.device)
            self.counts = self.sums.new_zeros(classes)
        for rows in z.split(max(1, _CHUNK // classes)) if len(z) else ():
            label = rows.argmax(1)
            order = label.argsort(stable=True)  # index_add_ is not deterministic on CUDA
            found, counts = label[order].unique_consecutive(return_counts=True)
            p = rows[order].double().softmax(1).to(self.sums)
            found, counts = found.to(p.device), counts.to(p.device)
            self.sums[found] += torch.segment_reduce(p, "sum", lengths=counts, axis=0)
            self.counts[found] += counts

    def _finish(self, where: str) -> None:
        if not self.counts.sum():
            raise ValueError(f"{where}: there must be ID samples to fit to, got none")

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> Self:
        """Merge what the processes of a group were given by :meth:`partial_fit`.

        All of them call this, once, after their last batch; each must have had one.
        """
        for tensor in (self.sums, self.counts):
            dist.all_reduce(tensor, group=group)
        self._status, self.threshold = "pending", None
        return self

    def _score(self, batch: Batch) -> Tensor:
        z = _checked_classes("KLMatching.score", self, batch)
        table = self._log_means(z)

        def best(rows: Tensor) -> Tensor:
            with torch.autocast(rows.device.type, enabled=False):
                return (rows.softmax(1) @ table).amax(1)

        entropy = batch.logit_scores(absent=self.absent).entropy
        # No divergence is negative but by rounding.
        return (_by_rows(z, max(z.shape[1], table.shape[1]), best) - entropy).clamp(max=0)

    def _log_means(self, z: Tensor) -> Tensor:
        """(C, predicted classes), log d."""
        kind = accumulate_type(z.dtype)

        def compute() -> Tensor:
            seen = self.counts > 0
            means = self.sums[seen] / self.counts[seen, None]
            return means.log().clamp(min=_FLOOR).T.to(z.device, kind).contiguous()

        return self._once(("log means", kind, z.device), compute)


@register("weighted-energy", "A", "Du et al., ICLR 2022")
class WeightedEnergy(OODDetector):
    """Weighted negative free energy, log sum_c max(w_c, 0) exp(z_c).

    Du, Wang, Cai & Li, VOS: Learning What You Don't Know by Virtual Outlier Synthesis, ICLR 2022,
    equation 5, with the weights w that were trained with the model.

    Args:
        weights: (C,), finite, one at least positive.
        absent: As for :class:`MSP`; the column has no weight.
        model: As for :class:`OODDetector`.

    Raises:
        ValueError: ``weights`` are none of these.
    """

    needs = frozenset({"logits"})
    _tensors: ClassVar[Mapping[str, str]] = {"weights": "C"}
    _carried = OODDetector._carried | {"weights"}

    def __init__(
        self,
        weights: Tensor | Sequence[float],
        *,
        absent: int | None = None,
        model: Model | None = None,
    ) -> None:
        super().__init__(model, absent)
        self.weights = torch.as_tensor(weights).detach().clone()
        if self.weights.dim() != 1 or not self.weights.is_floating_point():
            raise ValueError(
                f"WeightedEnergy: weights must be floating-point (C,), got {self.weights.dtype} "
                f"{tuple(self.weights.shape)}"
            )
        if not (self.weights.isfinite().all() and (self.weights > 0).any()):
            raise ValueError("WeightedEnergy: weights must be finite and one of them positive")
        self.num_classes = len(self.weights)

    def _score(self, batch: Batch) -> Tensor:
        z = _checked_classes("WeightedEnergy.score", self, batch)
        log_w = self.weights.clamp(min=0).to(z.device, accumulate_type(z.dtype)).log()
        return _by_rows(z, z.shape[1], lambda rows: (rows + log_w).logsumexp(1))

    def _arguments(self) -> dict[str, Any]:
        return {name: v for name, v in super()._arguments().items() if name != "weights"}

    @classmethod
    def _from_settings(cls, settings: Mapping[str, Any], model: Model | None) -> Self:
        detector = cls([1.0], **settings, model=model)  # until the file's are loaded
        detector.num_classes = None
        return detector

    def _load_state(self, tensors: Mapping[str, Tensor]) -> None:
        super()._load_state(tensors)
        if not (self.weights > 0).any():
            raise ValueError("one of the weights must be positive")


@register("openmax", "A", "Bendale & Boult, CVPR 2016")
class OpenMax(OODDetector):
    """Negative log-probability of the unknown class that OpenMax adds to the others.

    Bendale & Boult, Towards Open Set Deep Networks, CVPR 2016, algorithms 1 and 2: of each class,
    the mean logits mu_c of the training samples that are classified correctly, and a Weibull
    distribution fitted to the ``tail`` largest of their distances to it (by maximum likelihood, of
    distances moved to begin at 10,000, as the authors' libMR has it). A sample's ``alpha`` largest
    logits are reduced by the share omega_i = (alpha + 1 - i) / alpha, for the i-th largest, of the
    distribution's value at its distance; what they lose is the logit of the unknown class. The
    authors' score is 1 - P(unknown), which rounds to 1; the class predicted is the largest of the
    reduced logits. The authors average over ten crops, which this leaves to the caller.

    Logits of :meth:`partial_fit` are kept until the fit is finished, of samples that are classified
    correctly.

    Args:
        tail: How many distances of each class are fitted to.
        alpha: How many of the largest logits are reduced.
        distance: ``"eucos"``, the authors' |z - mu| / 200 + 1 - cos(z, mu), or ``"euclidean"``,
            |z - mu|, which OpenOOD has with ``alpha=3``.
        absent: As for :class:`MSP`.
        model: As for :class:`OODDetector`.

    Attributes:
        means: (C, C) float64, mean logits of each class.
        shapes: (C,) float64, of the Weibull distributions.
        scales: (C,) float64.
        starts: (C,) float64, the least distance of each tail.

    Raises:
        ValueError: ``tail``, ``alpha`` or ``distance`` is none of these.
    """

    needs = frozenset({"logits"})
    trained_on = frozenset({"logits", "labels"})
    _tensors: ClassVar[Mapping[str, str]] = {
        "means": "C C",
        "shapes": "C",
        "scales": "C",
        "starts": "C",
    }
    means: Tensor
    shapes: Tensor
    scales: Tensor
    starts: Tensor

    def __init__(
        self,
        tail: int = 20,
        alpha: int = 10,
        distance: Literal["eucos", "euclidean"] = "eucos",
        *,
        absent: int | None = None,
        model: Model | None = None,
    ) -> None:
        super().__init__(model, absent)
        if distance not in ("eucos", "euclidean"):
            raise ValueError(f"OpenMax: distance must be eucos or euclidean, got {distance!r}")
        self.tail = check_count("OpenMax", "tail", tail, 2)
        self.alpha = check_count("OpenMax", "alpha", alpha)
        self.distance = distance
        self._new: list[tuple[Tensor, Tensor]] = []

    def _reset(self) -> None:
        super()._reset()
        self._new = []

    def _update(self, where: str, batch: Batch, labels: Tensor | None) -> None:
        z, y = _class_logits_and_labels(where, self, batch, labels)
        right = z.argmax(1) == y
        self._new.append((z[right], y[right]))

    def _finish(self, where: str) -> None:
        z, y = _joined(where, self._new)
        classes = z.shape[1]
        tails = z.new_full((classes, self.tail), torch.nan, dtype=torch.float64)
        self.means = torch.zeros(classes, classes, dtype=torch.float64, device=z.device)
        order = y.argsort(stable=True)
        groups = z[order].split(torch.bincount(y, minlength=classes).tolist())
        for c, rows in enumerate(groups):
            if not len(rows):
                raise ValueError(
                    f"{where}: every class must have a sample that is classified correctly, got "
                    f"none of class {c}"
                )
            rows = rows.double()
            self.means[c] = rows.mean(0)
            largest = self._distance(rows, self.means[c]).topk(min(self.tail, len(rows))).values
            if largest[0] == largest[-1]:
                raise ValueError(
                    f"{where}: distances of a class to its mean must differ to be fitted to, got "
                    f"{len(largest)} equal ones of class {c}"
                )
            tails[c, : len(largest)] = largest
        self.starts = tails.nan_to_num(torch.inf).amin(1)
        self.shapes, self.scales = _weibull(tails - self.starts[:, None] + _SHIFT)

    def _distance(self, z: Tensor, means: Tensor) -> Tensor:
        """Distance of logits (..., C) to means of the same shape."""
        far = (z - means).norm(dim=-1)
        if self.distance == "euclidean":
            return far
        return far / 200 + 1 - torch.nn.functional.cosine_similarity(z, means, dim=-1)

    def _score(self, batch: Batch) -> Tensor:
        return self._reduced(batch)[:, 0].to(accumulate_type(present(batch.logits).dtype))

    def _label(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        return self._reduced(batch)[:, 1].long(), None

    def _reduced(self, batch: Batch) -> Tensor:
        """Scores and the columns of the largest reduced logits, (N, 2) float64."""
        return batch.once(self, lambda: self._compute(batch))

    def _compute(self, batch: Batch) -> Tensor:
        z = _checked_classes("OpenMax.score", self, batch)
        alpha = min(self.alpha, z.shape[1])
        self.to(z.device)
        share = torch.arange(alpha, 0, -1, dtype=torch.float64, device=z.device) / alpha
        means, sizes = self._table(z)

        def scored(rows: Tensor) -> Tensor:
            largest, near = rows.topk(alpha)
            found = indexed_distances(rows, means, near)
            distance = found.l2.double()
            if self.distance == "eucos":
                both = rows.norm(dim=1, keepdim=True).clamp(min=1e-8) * sizes[near]
                distance = distance / 200 + (1 - (found.inner / both).double())
            x = (distance - self.starts[near] + _SHIFT).clamp(min=0) / self.scales[near]
            top = largest.double()
            lost = top * share * -torch.expm1(-(x ** self.shapes[near]))
            left = logit_scores(rows.scatter(1, near, (top - lost).to(rows)))
            # Over the unknown class too, and less its logit: log(1 + exp(energy - unknown)).
            score = torch.nn.functional.softplus(left.energy.double() - lost.sum(1))
            return torch.stack([score, left.label.double()], 1)

        return _by_rows(z, z.shape[1], scored)

    def _table(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The means for logits of this type, and their norms, (C,)."""
        kind = accumulate_type(z.dtype)

        def compute() -> tuple[Tensor, Tensor]:
            means = self.means.to(z.device, kind).contiguous()
            return means, means.norm(dim=1).clamp(min=1e-8)

        return self._once(("means", kind, z.device), compute)


def _weibull(x: Tensor) -> tuple[Tensor, Tensor]:
    """Shape and scale of Weibull distributions by maximum likelihood, for rows of (k, n) > 0.

    The shape k solves mean(log x) + 1 / k = sum(x^k log x) / sum(x^k), whose right side grows and
    whose left side falls with k: by halving, in logarithms of x over its largest. NaN is left out.
    """
    there = x.isfinite()
    n = there.sum(1)
    largest = x.nan_to_num(0).amax(1)
    log_x = (x / largest[:, None]).log().nan_to_num(0)
    mean = log_x.sum(1) / n
    low = torch.full_like(mean, -10.0)  # of log k
    high = torch.full_like(mean, 60.0)
    for _ in range(100):
        middle = (low + high) / 2
        k = middle.exp()[:, None]
        weight = (k * log_x).masked_fill(~there, -math.inf).softmax(1)
        more = (weight * log_x).sum(1) < mean + 1 / k[:, 0]
        low, high = torch.where(more, middle, low), torch.where(more, high, middle)
    k = ((low + high) / 2).exp()
    power = (k[:, None] * log_x).masked_fill(~there, -math.inf).logsumexp(1)
    return k, ((power - n.double().log()) / k).exp() * largest


def _checked_classes(where: str, detector: OODDetector, batch: Batch) -> Tensor:
    """The classes' logits, as many as the detector knows of; it takes note of their number."""
    z = batch.class_logits(detector.absent)
    if detector.num_classes is None:
        detector.num_classes = z.shape[1]
    if z.shape[1] != detector.num_classes:
        raise ValueError(
            f"{where}: logits must have {detector.num_classes} classes, got {z.shape[1]}"
        )
    return z


def _class_logits_and_labels(
    where: str, detector: OODDetector, batch: Batch, labels: Tensor | None
) -> tuple[Tensor, Tensor]:
    z, y = _checked_classes(where, detector, batch).clone(), present(labels)
    if not z.isfinite().all():
        raise ValueError(f"{where}: logits must be finite")
    if len(y) and int(y.max()) >= z.shape[1]:
        raise ValueError(
            f"{where}: labels must be below {z.shape[1]}, the number of classes, got {int(y.max())}"
        )
    return z, y


def _joined(where: str, parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    z, y = (torch.cat(column) for column in zip(*parts, strict=True))
    if not len(z):
        raise ValueError(f"{where}: there must be ID samples to fit to, got none")
    return z, y
