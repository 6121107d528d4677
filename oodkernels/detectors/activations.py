"""Detectors that read features beside logits, and no second product with the head."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize

from oodkernels._checks import accumulate_type, check_flag, check_real
from oodkernels.detectors.base import OODDetector, register
from oodkernels.detectors.batch import Batch, blocks, in_blocks, present
from oodkernels.detectors.head import HEAD, Head, HeadDetector, check_percentile, floats
from oodkernels.detectors.logits import check_temperature
from oodkernels.detectors.model import Model
from oodkernels.detectors.statistics import check_finite
from oodkernels.detectors.whitening import inverse_root, times_triangle
from oodkernels.ops import indexed_distances, scaled_energy

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["FDBD", "LTS", "NCI", "PNML", "SCALE", "SHE", "CADRef", "GradNorm"]

_TABLE = 4096  # classes up to which all distances between head rows are kept
_CHUNK = 1 << 24  # numbers of an intermediate matrix
_SMALL = 1 << 18  # of one that stays in cache
_PRODUCT = 1 << 21  # numbers of a block that is multiplied by a matrix


def top_share(batch: Batch, percentile: float, *, rectified: bool = False) -> Tensor:
    """Sum of each row over the sum of what of it lies above a percentile, (N,)."""
    found = batch.feature_stats(percentile, rectified)
    return found.sum / found.top_sum


class _Scaled(OODDetector):
    """Energies of logits times a factor that follows from the sum above a percentile."""

    needs = frozenset({"features", "logits"})
    percentile: float

    def _announce(self, batch: Batch) -> None:
        batch.percentiles.add(self.percentile)
        batch.asked.setdefault(self._shared(batch), set()).add(self.percentile)

    def _scorer(
        self, where: str, settings: Sequence[Mapping[str, Any]]
    ) -> Callable[[Batch], Tensor]:
        variants = [self.varied(**one) for one in settings]
        for variant in variants:
            variant._ready(where)

        def scores(batch: Batch) -> Tensor:
            for variant in variants:
                variant._announce(batch)
            return torch.stack([variant._score(batch) for variant in variants], 1)

        return scores

    def _shared(self, batch: Batch) -> Hashable:
        """What detectors have in common whose energies differ in the percentile alone."""
        return self.name, batch.absent_column(self.name, self.absent)

    def _scale(self, batch: Batch, percentile: float) -> Tensor:
        """The factor, (N,)."""
        raise NotImplementedError

    def _fixed(self, batch: Batch) -> Tensor | None:
        """What of the logits is not scaled, (C,)."""
        return None

    def _score(self, batch: Batch) -> Tensor:
        key = self._shared(batch)
        asked = tuple(sorted({*batch.asked.get(key, ()), self.percentile}))
        energies = batch.once((key, asked), lambda: self._energies(batch, asked))
        return energies[:, asked.index(self.percentile)]

    def _energies(self, batch: Batch, percentiles: Sequence[float]) -> Tensor:
        z = batch.class_logits(self.absent)
        scale = torch.stack([self._scale(batch, p) for p in percentiles], 1)
        if accumulate_type(z.dtype) != scale.dtype:
            z = z.to(scale)
        return scaled_energy(z, scale, self._fixed(batch))


@register(
    "scale",
    "B",
    "Xu et al., ICLR 2024",
    grid={"percentile": (50, 55, 60, 65, 70, 75, 80, 85, 90, 95)},
)
class SCALE(_Scaled, HeadDetector):
    """Energy of the logits of features scaled by exp(r), r = sum / sum of the largest.

    Xu, Chen, Franchi & Yao, Scaling for Training Time and Post-hoc Out-of-distribution Detection
    Enhancement, ICLR 2024. With logits z of features h and the head's bias b, those of h exp(r) are
    exp(r) (z - b) + b, so that no second product with the head is needed. The largest are the
    d - round(d p / 100) largest of d features.

    Args:
        percentile: p, in per cent; the authors have 85.
        head: As for :class:`HeadDetector`.
        absent: As for :class:`MSP`.
        model: As for :class:`OODDetector`.
    """

    _positive = "activations behind a ReLU"
    _bias: tuple[Tensor, bytes] | None = None

    def __init__(
        self,
        percentile: float = 85.0,
        *,
        head: Head | None = None,
        absent: int | None = None,
        model: Model | None = None,
    ) -> None:
        super().__init__(head, model, absent)
        self.percentile = check_percentile("SCALE", percentile)

    def _shared(self, batch: Batch) -> Hashable:
        if torch.compiler.is_compiling():
            return super()._shared(batch), id(self)
        if self._bias is None or self._bias[0] is not self.bias:  # heads are copied: by its numbers
            self._bias = self.bias, self.bias.double().cpu().numpy().tobytes()
        return super()._shared(batch), self._bias[1]

    def _scale(self, batch: Batch, percentile: float) -> Tensor:
        return top_share(batch, percentile).exp()

    def _fixed(self, batch: Batch) -> Tensor | None:
        return self._linear(batch)[1]


@register("lts", "B", "Djurisic et al., MVA 2025")
class LTS(_Scaled):
    """Energy of the logits times (sum / sum of the largest) squared.

    Djurisic, Liu & Nikolic, Logit Scaling for Out-of-Distribution Detection, MVA 2025. Sums are of
    the features' positive parts; a row without any keeps its logits.

    Args:
        percentile: In per cent; the authors have 95, the top 5 per cent, for every network.
        absent: As for :class:`MSP`.
        model: As for :class:`OODDetector`.
    """

    def __init__(
        self, percentile: float = 95.0, *, absent: int | None = None, model: Model | None = None
    ) -> None:
        super().__init__(model, absent)
        self.percentile = check_percentile("LTS", percentile)

    def _scale(self, batch: Batch, percentile: float) -> Tensor:
        found = batch.feature_stats(percentile, rectified=True)
        return torch.where(found.sum == 0, 1, found.sum / found.top_sum).square()


@register("gradnorm", "B", "Huang et al., NeurIPS 2021")
class GradNorm(OODDetector):
    """L1 norm of the gradient of the head's weights, of the cross entropy against all classes.

    Huang, Geng & Li, On the Importance of Gradients for Detecting Distributional Shifts in the
    Wild, NeurIPS 2021, as their code has it: the target is 1 for every class, the bias is left out.
    In closed form |h|_1 sum_c |C p_c - 1| / T with p = softmax(z / T): no gradient is computed.

    Args:
        temperature: T > 0.
        absent: As for :class:`MSP`.
        model: As for :class:`OODDetector`.
    """

    needs = frozenset({"features", "logits"})

    def __init__(
        self, temperature: float = 1.0, *, absent: int | None = None, model: Model | None = None
    ) -> None:
        super().__init__(model, absent)
        self.temperature = check_temperature("GradNorm", temperature)

    def _score(self, batch: Batch) -> Tensor:
        z = batch.class_logits(self.absent)
        classes = z.shape[1]
        uniform = floats(z[:0]).new_full((1, classes), 1 / classes)

        def slope(rows: Tensor) -> Tensor:
            rows = floats(rows)
            p = (rows if self.temperature == 1 else rows / self.temperature).softmax(1)
            first = torch.zeros(len(rows), 1, dtype=torch.int64, device=rows.device)
            return indexed_distances(p, uniform, first).l1[:, 0]

        slopes = in_blocks(slope, z) * (classes / self.temperature)
        return batch.feature_stats().l1.to(slopes) * slopes


class _Sums(HeadDetector):
    """A detector that is fitted to sums of features by class, in float64."""

    needs = frozenset({"features", "logits"})
    trained_on = frozenset({"features", "logits"})
    _summed: ClassVar[tuple[str, ...]] = ("sums", "counts")
    _tensors: ClassVar[Mapping[str, str]] = {**HEAD, "sums": "k d", "counts": "k"}
    sums: Tensor
    counts: Tensor

    @property
    def means(self) -> Tensor:
        """(k, d) float64: of every class, or of all samples, k = 1."""
        return self.sums / self.counts[:, None]

    def _means(self, features: Tensor) -> Tensor:
        """The means for features of this type, 0 where a class has none."""
        like = floats(features[:0])
        key = ("means", like.dtype, like.device)
        return self._once(key, lambda: self.means.nan_to_num().to(like))

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> Self:
        """Merge what the processes of a group were given by :meth:`partial_fit`.

        All of them call this, once, after their last batch; each must have had one.
        """
        for name in self._summed:
            dist.all_reduce(getattr(self, name), group=group)
        self._status, self.threshold = "pending", None
        return self

    def _add(self, where: str, features: Tensor, classes: Tensor, k: int) -> None:
        """Sum features (N, d) by classes (N,) in 0..k - 1."""
        check_finite(where, features)
        if "sums" not in vars(self):
            self.width = features.shape[1]
            self.sums = features.new_zeros(k, self.width, dtype=torch.float64)
            self.counts = self.sums.new_zeros(k)
        classes = classes.to(self.sums.device)
        self.sums.index_add_(0, classes, features.to(self.sums))
        self.counts += torch.bincount(classes, minlength=k)

    def _finish(self, where: str) -> None:
        if not self.counts.sum():
            raise ValueError(f"{where}: there must be ID samples to fit to, got none")

    def _distance(self, batch: Batch) -> Tensor:
        """Distance of the features to the mean of all that were fitted to, (N,)."""
        features = present(batch.features)
        mean = (self.sums.sum(0) / self.counts.sum()).to(floats(features[:0]))

        def compute() -> Tensor:
            first = torch.zeros(len(features), 1, dtype=torch.int64, device=features.device)
            return indexed_distances(features, mean[None], first).l2[:, 0]

        if mean.is_cpu and not torch.compiler.is_compiling():  # others with that mean share it
            return batch.once(("distance", mean.numpy().tobytes()), compute)
        return compute()


class _Mean(_Sums):
    """A detector that is fitted to the mean of the features."""

    trained_on = frozenset({"features"})

    def _update(self, where: str, batch: Batch, labels: Tensor | None) -> None:
        features = present(batch.features)
        self._add(where, features, torch.zeros(len(features), dtype=torch.int64), 1)


@register(
    "fdbd",
    "B",
    "Liu & Qin, ICML 2024",
    grid={"normalize": ("mean", "norm")},
    at_score=("normalize",),
)
class FDBD(_Mean):
    """Distances of the features to the decision boundaries, over their distance to the mean.

    Liu & Qin, Fast Decision Boundary based Out-of-Distribution Detector, ICML 2024: with w_c the
    head's rows and p the class of the largest logit, sum over c of (z_p - z_c) / |w_p - w_c|, over
    |h - mean|. Rows that are equal are no boundary.

    Up to 4096 classes all distances of rows are kept, beyond that those of the classes predicted
    are computed for some samples at a time: there is never more than a block of them in memory.

    Args:
        normalize: ``"mean"`` for |h - mean|, ``"norm"`` for |h| in its place.
        head: As for :class:`HeadDetector`.
        absent: As for :class:`MSP`.
        model: As for :class:`OODDetector`.
    """

    def __init__(
        self,
        normalize: Literal["mean", "norm"] = "mean",
        *,
        head: Head | None = None,
        absent: int | None = None,
        model: Model | None = None,
    ) -> None:
        super().__init__(head, model, absent)
        if normalize not in ("mean", "norm"):
            raise ValueError(f"FDBD: normalize must be mean or norm, got {normalize!r}")
        self.normalize = normalize

    def _score(self, batch: Batch) -> Tensor:
        z = batch.class_logits(self.absent)
        size = batch.feature_stats().l2 if self.normalize == "norm" else self._distance(batch)
        scores = batch.logit_scores(absent=self.absent)
        best, label = scores.max_logit, scores.label
        weight, _ = self._linear(batch)
        if len(weight) <= _TABLE:
            apart = self._distances_kept(batch, weight)
            return self._sums_over(z, best, apart, label) / size.to(best)
        out = torch.empty_like(best)
        order = label.argsort(stable=True)  # so that a block has few classes
        for rows in blocks(order, max(1, _CHUNK // z.shape[1])):
            classes, place = label[rows].unique(return_inverse=True)
            apart = _inverse_distances(weight, classes)
            out[rows] = self._sums_over(z[rows], best[rows], apart, place)
        return out / size.to(out)

    @staticmethod
    def _sums_over(z: Tensor, best: Tensor, apart: Tensor, row: Tensor) -> Tensor:
        """Sums of (best - z) times a row of ``apart``, (N,)."""
        apart = apart.to(best)
        # Of logits less their largest, whose products with 1 / distance do not cancel.
        return torch.cat(
            [
                -indexed_distances(floats(part) - top[:, None], apart, at[:, None]).inner[:, 0]
                for part, top, at in zip(
                    *(blocks(t, max(1, _SMALL // z.shape[1])) for t in (z, best, row)),
                    strict=True,
                )
            ]
        )

    def _distances_kept(self, batch: Batch, weight: Tensor) -> Tensor:
        """1 / |w_p - w_c| of the head's rows, (C, C); 0 where they are equal."""
        every = torch.arange(len(weight), device=weight.device)
        key = ("distances", self.absent_of(batch), weight.dtype, weight.device)
        return self._once(key, lambda: _inverse_distances(weight, every))


def _inverse_distances(weight: Tensor, classes: Tensor) -> Tensor:
    # Less their mean, which changes no difference, rows are as small as they can be: without it
    # float32 loses three digits where they share an offset.
    w = weight.double() if len(weight) <= _TABLE else weight
    w = w - w.mean(0)
    size = w.square().sum(1)
    square = size[classes, None] + size - 2 * (w[classes] @ w.T)
    # Equal rows differ by rounding alone.
    tiny = 16 * torch.finfo(w.dtype).eps * (size[classes, None] + size)
    return torch.where(square > tiny, square.rsqrt(), 0).to(weight)


@register(
    "nci",
    "B",
    "Liu & Qin, CVPR 2025",
    grid={"alpha": (1e-4, 1e-3, 1e-2, 1e-1)},
    at_score=("alpha",),
)
class NCI(_Mean):
    """Projection of the centred features on the predicted class's row, plus alpha times |h|_1.

    Liu & Qin, Detecting Out-of-Distribution Through the Lens of Neural Collapse, CVPR 2025:
    w_p . (h - mean) / |h - mean| + alpha |h|_1, from the logits: w_p . h = z_p - b_p.

    Args:
        alpha: >= 0; the authors have 1e-4 for ImageNet and choose it on validation data.
        head: As for :class:`HeadDetector`.
        absent: As for :class:`MSP`.
        model: As for :class:`OODDetector`.
    """

    def __init__(
        self,
        alpha: float = 1e-4,
        *,
        head: Head | None = None,
        absent: int | None = None,
        model: Model | None = None,
    ) -> None:
        super().__init__(head, model, absent)
        self.alpha = check_real("NCI", "alpha", alpha)
        if not 0 <= self.alpha < float("inf"):
            raise ValueError(f"NCI: alpha must be >= 0 and finite, got {alpha}")

    def _score(self, batch: Batch) -> Tensor:
        distance = self._distance(batch)
        weight, bias = self._linear(batch)
        scores = batch.logit_scores(absent=self.absent)
        key = ("shift", self.absent_of(batch), weight.dtype, weight.device)
        shift = self._once(key, lambda: bias + weight @ self.means[0].to(weight))[scores.label]
        projected = (scores.max_logit.to(distance) - shift) / distance
        return projected + self.alpha * batch.feature_stats().l1


@register(
    "she",
    "B",
    "Zhang et al., ICLR 2023",
    at_score=("metric",),
)
class SHE(_Sums):
    """Inner product with the predicted class's mean of correctly classified training features.

    Zhang, Fu, Chen et al., Out-of-Distribution Detection based on In-Distribution Data Patterns
    Memorization with Modern Hopfield Energy, ICLR 2023.

    Args:
        metric: ``"inner"``, ``"euclidean"`` (the distance, negated) or ``"cosine"``.
        head: As for :class:`HeadDetector`.
        absent: As for :class:`MSP`.
        model: As for :class:`OODDetector`.
    """

    trained_on = frozenset({"features", "logits", "labels"})

    def __init__(
        self,
        metric: Literal["inner", "euclidean", "cosine"] = "inner",
        *,
        head: Head | None = None,
        absent: int | None = None,
        model: Model | None = None,
    ) -> None:
        super().__init__(head, model, absent)
        if metric not in ("inner", "euclidean", "cosine"):
            raise ValueError(f"SHE: metric must be inner, euclidean or cosine, got {metric!r}")
        self.metric = metric

    def _update(self, where: str, batch: Batch, labels: Tensor | None) -> None:
        z = batch.class_logits(self.absent)
        right = z.argmax(1) == present(labels)
        self._add(where, present(batch.features)[right], present(labels)[right], z.shape[1])

    def _finish(self, where: str) -> None:
        super()._finish(where)
        if missing := (self.counts == 0).nonzero()[:, 0].tolist():
            raise ValueError(
                f"{where}: every class must have a sample that is classified correctly, got none "
                f"of {len(missing)} classes, the first {missing[0]}"
            )

    def _score(self, batch: Batch) -> Tensor:
        features, label = present(batch.features), batch.logit_scores(absent=self.absent).label
        patterns = self._means(features)
        found = indexed_distances(features, patterns, label[:, None])
        if self.metric == "euclidean":
            return -found.l2[:, 0]
        inner = found.inner[:, 0]
        if self.metric == "cosine":
            sizes = patterns.norm(dim=1)[label] * batch.feature_stats().l2
            return inner / sizes.clamp(min=1e-8)
        return inner


@register("cadref", "B", "Ling et al., CVPR 2025")
class CADRef(_Sums):
    """Relative error of the features to the predicted class's mean, by the sign of the head's row.

    Ling, Chang, Zhao et al., CADRef: Robust Out-of-Distribution Detection via Class-Aware
    Decoupled Relative Feature Leveraging, CVPR 2025. With m_p the mean of the training features
    predicted as p, e = (h - m_p) sign(w_p), E+ and E- the sums of e's positive and negative parts
    over |h|_1, and S the energy: -(E+ / S + E- / mean of S over the training data). Where the
    energies of a network can be negative the rule has no meaning, which is refused in ``fit``.

    Args:
        decoupled: False for the authors' CARef, -|h - m_p|_1 / |h|_1.
        head: As for :class:`HeadDetector`.
        absent: As for :class:`MSP`.
        model: As for :class:`OODDetector`.
    """

    _summed = ("sums", "counts", "energy")
    _tensors: ClassVar[Mapping[str, str]] = {**_Sums._tensors, "energy": "one"}
    energy: Tensor
    _pruned = False  # some weights are 0, and have no sign

    def __init__(
        self,
        decoupled: bool = True,
        *,
        head: Head | None = None,
        absent: int | None = None,
        model: Model | None = None,
    ) -> None:
        super().__init__(head, model, absent)
        self.decoupled = check_flag("CADRef", "decoupled", decoupled)

    def _update(self, where: str, batch: Batch, labels: Tensor | None) -> None:
        z = batch.class_logits(self.absent)
        self._add(where, present(batch.features), z.argmax(1), z.shape[1])
        energy = batch.logit_scores(absent=self.absent).energy.double().sum().reshape(1)
        self.energy = energy + vars(self).get("energy", 0)

    def _load_state(self, tensors: Mapping[str, Tensor]) -> None:
        super()._load_state(tensors)
        self._pruned = not bool(self.weight.all())

    def _finish(self, where: str) -> None:
        super()._finish(where)
        self._pruned = not bool(self.weight.all())
        if self.decoupled and not self.energy > 0:
            raise ValueError(
                f"{where}: energies must be positive on average for CADRef's division by them, got "
                f"{float(self.energy / self.counts.sum()):.3g}: use decoupled=False"
            )

    def _score(self, batch: Batch) -> Tensor:
        features, scores = present(batch.features), batch.logit_scores(absent=self.absent)
        means, label = self._means(features), scores.label[:, None]
        size = batch.feature_stats().l1
        if self.decoupled:
            above, below = (part / size for part in self._errors(batch, features, means, label))
            mean = (self.energy / self.counts.sum()).to(means)
            score = -(above / scores.energy.to(means) + below / mean)
        else:
            score = -indexed_distances(features, means, label).l1[:, 0] / size
        # A class that was never predicted has no mean: no sample is like it.
        known = (self.counts > 0).to(score.device)[scores.label]
        return torch.where(known | score.isnan(), score, -torch.inf)

    def _errors(
        self, batch: Batch, features: Tensor, means: Tensor, label: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sums of the positive and of the negative parts of (h - m_p) sign(w_p), (N,) each."""
        weight, _ = self._linear(batch)
        key = (self.absent_of(batch), means.dtype, means.device)
        signs = self._once(("signs", *key), weight.sign)
        if self._pruned:

            def errors(rows: Tensor, at: Tensor) -> Tensor:
                apart = (floats(rows) - means[at]).mul_(signs[at])
                return torch.stack([apart.relu().sum(1), (-apart).relu_().sum(1)], 1)

            above, below = in_blocks(errors, features, label[:, 0]).unbind(1)
            return above, below
        own = self._once(("own", *key), lambda: (means.double() * signs).sum(1).to(means))
        both = indexed_distances(features, means, label).l1[:, 0]
        more = indexed_distances(features, signs, label).inner[:, 0] - own[label[:, 0]]
        return (both + more) / 2, (both - more) / 2


@register("pnml", "B", "Bibas et al., NeurIPS 2021")
class PNML(HeadDetector):
    """Regret of the predictive normalised maximum likelihood learner, negated, in [-1, 0].

    Bibas, Feder & Hassner, Single Layer Predictive Normalized Maximum Likelihood for
    Out-of-Distribution Detection, NeurIPS 2021: with u = h / |h|, x = u^T (U^T U)^+ u over the
    training data's U, g = x / (1 + x) and p = softmax(W u + b), the regret is
    log sum_c p_c / (p_c + (1 - p_c) p_c^g) / log C. W u + b comes from the logits.

    Args:
        head: As for :class:`HeadDetector`.
        absent: As for :class:`MSP`.
        model: As for :class:`OODDetector`.
    """

    needs = frozenset({"features", "logits"})
    trained_on = frozenset({"features"})
    _tensors: ClassVar[Mapping[str, str]] = {**HEAD, "gram": "d d"}
    gram: Tensor

    def __init__(
        self,
        *,
        head: Head | None = None,
        absent: int | None = None,
        model: Model | None = None,
    ) -> None:
        super().__init__(head, model, absent)

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> Self:
        """Sum over processes, like :class:`SHE`'s."""
        dist.all_reduce(self.gram, group=group)
        self._status, self.threshold = "pending", None
        return self

    def _update(self, where: str, batch: Batch, labels: Tensor | None) -> None:
        features = present(batch.features)
        check_finite(where, features)
        self.width = features.shape[1]
        for rows in blocks(features, max(1, _CHUNK // self.width)):
            u = normalize(rows.double(), dim=1)
            self.gram = u.T @ u + vars(self).get("gram", 0)

    def _inverse_root(self, like: Tensor) -> tuple[Tensor, bool]:
        """R with R R^T the pseudo-inverse of the Gram matrix, and whether it is triangular."""

        def compute() -> tuple[Tensor, bool]:
            values, vectors = torch.linalg.eigh(self.gram)
            least = values[-1] * len(values) * torch.finfo(torch.float64).eps
            root = inverse_root(self.gram) if values[0] > least else None
            if root is not None:
                return root.to(like), True
            root = vectors[:, values > least] * values[values > least].rsqrt()
            return root.to(like), False

        return self._once(("root", like.dtype, like.device), compute)

    def _score(self, batch: Batch) -> Tensor:
        x = floats(present(batch.features))
        length = batch.feature_stats().l2
        root, triangular = self._inverse_root(x)

        def square(rows: Tensor, size: Tensor) -> Tensor:
            u = rows / size[:, None]
            z = times_triangle(u, root) if triangular else u @ root
            return z.square_().sum(1)

        with torch.autocast(x.device.type, enabled=False):
            q = in_blocks(square, x, length, size=_PRODUCT)
        _, bias = self._linear(batch)

        def score(rows: Tensor, size: Tensor, share: Tensor) -> Tensor:
            z = (floats(rows).to(x) - bias) / size[:, None] + bias
            log_p = z.log_softmax(1)
            # log(1 - p), of the largest from the others: 1 - p would cancel.
            rest = torch.log(-torch.expm1(log_p.clamp(max=-1e-30)))
            regret = torch.sigmoid(-(rest + (share[:, None] - 1) * log_p)).sum(1).log()
            return -regret / math.log(z.shape[1])

        return in_blocks(score, batch.class_logits(self.absent), length, q / (1 + q))
