"""Detectors that compare with a bank of training features."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from oodkernels._checks import accumulate_type, check_count, check_int, check_real
from oodkernels._optional import require
from oodkernels.detectors.base import NotFittedError, OODDetector, register
from oodkernels.detectors.batch import Batch, blocks, present
from oodkernels.detectors.head import Reservoir, Sampled, floats
from oodkernels.detectors.logits import check_temperature
from oodkernels.detectors.model import Model
from oodkernels.detectors.statistics import check_finite
from oodkernels.ops import LogitScores, logit_scores, nearest_neighbors

__all__ = ["KNN", "MCM", "NNGuide", "Relation"]

_QUERIES, _BLOCK = 1024, 1 << 14  # rows of a matrix of similarities, and columns
_NEIGHBORS = 1 << 22  # distances and rows of neighbours that are held at a time


@register(
    "knn",
    "E",
    "Sun et al., ICML 2022",
    grid={"k": (50, 100, 200, 500, 1000)},
    at_score=("k", "backend"),
)
class KNN(OODDetector):
    """Distance to the k-th nearest training sample among normalised features, negated.

    Sun, Ming, Zhu & Li, Out-of-Distribution Detection with Deep Nearest Neighbors, ICML 2022,
    section 3: with z = h / |h|, the score is -|z - z_(k)|, z_(k) the k-th nearest of the training
    samples' z. It lies in [-2, 0]. The authors' code reports the squared distance, which ranks
    alike. A sample that was trained on counts itself as its nearest.

    The neighbour is that of :func:`oodkernels.nearest_neighbors`, exactly. faiss, and torch's
    matrix products, may take another one that is as near but for their rounding; the distance is
    then computed from differences, too, so that nothing cancels.

    Args:
        k: Which neighbour; the paper has 50 for CIFAR-10, 200 for CIFAR-100, 1000 for ImageNet.
        backend: ``"native"`` for the op; ``"faiss"``, on the CPU; ``"torch"``, of which exported
            and compiled programs are made whatever the backend.
        model: As for :class:`OODDetector`.

    Attributes:
        bank: (N, d) normalised training features, float64 for float64 features, else float32.

    Raises:
        ValueError: ``k`` or ``backend`` is none of these.
    """

    needs = frozenset({"features"})
    trained_on = frozenset({"features"})
    _tensors: ClassVar[Mapping[str, str]] = {"bank": "n d"}
    _least = -2.0
    bank: Tensor

    def __init__(
        self,
        k: int = 50,
        backend: Literal["native", "faiss", "torch"] = "native",
        *,
        model: Model | None = None,
    ) -> None:
        super().__init__(model)
        if backend not in ("native", "faiss", "torch"):
            raise ValueError(f"KNN: backend must be native, faiss or torch, got {backend!r}")
        self.k = check_count("KNN", "k", k)
        self.backend = backend
        self._reset()

    def _reset(self) -> None:
        super()._reset()
        self._new: list[Tensor] = []
        self._index: Any = None

    def _update(self, where: str, batch: Batch, labels: Tensor | None) -> None:
        features = present(batch.features)
        check_finite(where, features)
        self.width = features.shape[1]
        self._new.append(_direction(features))

    def _finish(self, where: str) -> None:
        known = [self.bank] if hasattr(self, "bank") else []
        bank = torch.cat([rows.to(self._new[0]) for rows in [*known, *self._new]])
        if len(bank) < self.k:
            raise ValueError(
                f"{where}: there must be at least k = {self.k} samples to fit to, got {len(bank)}"
            )
        self.bank, self._new, self._index = bank, [], None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_index": None}  # which is made anew

    def _load_state(self, tensors: Mapping[str, Tensor]) -> None:
        super()._load_state(tensors)
        self._index = None
        check_bank("", self)

    def _settle(self, where: str, changed: Collection[str]) -> None:
        self._ready(where)
        check_bank(f"{where}: ", self)

    def _score(self, batch: Batch) -> Tensor:
        features = present(batch.features)
        if self.bank.device != features.device:
            self.to(features.device)
        return -self._distances(features, [self.k])[:, 0].to(accumulate_type(features.dtype))

    def _scorer(
        self, where: str, settings: Sequence[Mapping[str, Any]]
    ) -> Callable[[Batch], Tensor]:
        if any(one.keys() != {"k"} for one in settings):
            return super()._scorer(where, settings)
        own = [self.varied(**one) for one in settings]
        most = max(own, key=lambda variant: variant.k)

        def scores(batch: Batch) -> Tensor:
            features = present(batch.features)
            distances = most._distances(features, [v.k for v in own])
            return -distances.to(accumulate_type(features.dtype))

        return scores

    def _distances(self, features: Tensor, ks: Sequence[int]) -> Tensor:
        """Distances to several of the k nearest, from one scan, (N, len(ks))."""
        z = _direction(features).to(self.bank)
        program = torch.compiler.is_compiling()
        if self.backend == "native" and not program:
            columns = [k - 1 for k in ks]
            parts = z.split(max(_QUERIES, _NEIGHBORS // self.k))
            near = [nearest_neighbors(x, self.bank, self.k).distances[:, columns] for x in parts]
            return torch.cat(near).sqrt()
        find = self._by_faiss if self.backend == "faiss" and not program else self._nearest
        found = []
        for part in blocks(z, _QUERIES):
            rows = find(part)
            found.append(
                torch.stack([(part - self.bank[rows[:, k - 1]]).norm(dim=1) for k in ks], 1)
            )
        return torch.cat(found)

    def _nearest(self, z: Tensor) -> Tensor:
        """Rows of the k nearest in the bank, (N, k): those of the largest z.b - |b|^2 / 2."""
        best = torch.empty(z.shape[0], 0, dtype=z.dtype, device=z.device)
        rows = torch.empty(z.shape[0], 0, dtype=torch.int64, device=z.device)
        for begin in range(0, len(self.bank), max(_BLOCK, 2 * self.k)):
            block = self.bank[begin : begin + max(_BLOCK, 2 * self.k)]
            with torch.autocast(z.device.type, enabled=False):
                near = torch.addmm(block.square().sum(1) / -2, z, block.T)
            top = near.topk(min(self.k, len(block)))
            best = torch.cat([best, top.values], 1)
            rows = torch.cat([rows, top.indices + begin], 1)
            if best.shape[1] > self.k:
                top = best.topk(self.k)
                best, rows = top.values, rows.gather(1, top.indices)
        return rows

    def _by_faiss(self, z: Tensor) -> Tensor:
        faiss = require("faiss", "faiss", "KNN: backend='faiss'")
        if self._index is None:
            index = faiss.IndexFlatL2(self.bank.shape[1])
            index.add(self.bank.float().cpu().numpy())
            self._index = index  # whole, for other threads
        _, rows = self._index.search(z.float().cpu().numpy(), self.k)
        return torch.from_numpy(rows).to(z.device)


class _Bank(Sampled):
    """Normalised training features beside what the logits say of them."""

    needs = frozenset({"features", "logits"})
    trained_on = frozenset({"features", "logits"})
    size: int | None
    seed: int
    bank: Tensor

    def _reservoir(self) -> Reservoir:
        return Reservoir(self.size or sys.maxsize, self.seed)

    def _columns(self, batch: Batch) -> tuple[Tensor, ...]:
        return _direction(present(batch.features)), self._beside(batch)

    def _beside(self, batch: Batch) -> Tensor:
        raise NotImplementedError


@register(
    "nnguide",
    "E",
    "Park et al., ICCV 2023",
    grid={"k": (10, 100, 1000)},
    at_fit=("size", "seed"),
    at_score=("k",),
)
class NNGuide(_Bank):
    """Energy times the mean of the k largest similarities to training samples, each by its energy.

    Park, Jung & Teoh, Nearest Neighbor Guidance for Out-of-Distribution Detection, ICCV 2023: with
    u = h / |h| and E the energy, E(h) times the mean of the k largest E_i u . u_i over the bank.

    Args:
        k: How many; the authors have 10.
        size: Training samples to keep, a uniform sample of them; the authors keep 1 per cent,
            12,812 of ImageNet's. None for all.
        seed: Of the sample.
        absent: As for :class:`MSP`.
        model: As for :class:`OODDetector`.

    Attributes:
        bank: (n, d): E_i u_i.
    """

    _tensors: ClassVar[Mapping[str, str]] = {"bank": "n d"}

    def __init__(
        self,
        k: int = 10,
        size: int | None = 12_812,
        seed: int = 0,
        *,
        absent: int | None = None,
        model: Model | None = None,
    ) -> None:
        super().__init__(model, absent)
        self.k = check_count("NNGuide", "k", k)
        self.size = None if size is None else check_count("NNGuide", "size", size, self.k)
        self.seed = check_int("NNGuide", "seed", seed)

    def _settle(self, where: str, changed: Collection[str]) -> None:
        super()._settle(where, changed)
        self._ready(where)
        check_bank(f"{where}: ", self)

    def _beside(self, batch: Batch) -> Tensor:
        return batch.logit_scores(absent=self.absent).energy

    def _finish(self, where: str) -> None:
        units, energy = self._rows(where, self.k)
        self.bank = units * energy[:, None].to(units)

    def _scorer(
        self, where: str, settings: Sequence[Mapping[str, Any]]
    ) -> Callable[[Batch], Tensor]:
        if any(one.keys() != {"k"} for one in settings):
            return super()._scorer(where, settings)
        own = [self.varied(**one) for one in settings]
        most = max(own, key=lambda variant: variant.k)
        return lambda batch: most._guided(batch, [v.k for v in own])

    def _score(self, batch: Batch) -> Tensor:
        return self._guided(batch, [self.k])[:, 0]

    def _guided(self, batch: Batch, ks: Sequence[int]) -> Tensor:
        """Scores by several numbers of neighbours, from one scan, (N, len(ks))."""
        units = _direction(present(batch.features))
        best = _largest_products(units, self.bank.to(units), self.k)
        near = torch.stack([best[:, :k].mean(1) for k in ks], 1)
        scores = batch.logit_scores(absent=self.absent).energy.to(units)[:, None] * near
        return torch.where(units.isnan().any(1, keepdim=True), torch.nan, scores)


@register(
    "relation",
    "E",
    "Kim et al., NeurIPS 2023",
    grid={"power": (1, 2, 4, 6, 8)},
    at_fit=("size", "seed"),
    at_score=("power", "cut"),
)
class Relation(_Bank):
    """Sum of the relations to training samples: similar features times similar predictions.

    Kim, Yun & Song, Neural Relation Graph: A Unified Framework for Identifying Label Noise and
    Outlier Data, NeurIPS 2023: with u = h / |h| and p = softmax(z), the sum over training samples
    of r_i^t where r_i = max(0, u . u_i) (p . p_i) is above a threshold. It grows with their number.

    Args:
        power: t; the authors have 1.
        cut: The threshold; the authors have 0.03.
        size: Training samples to keep, a uniform sample of them; None for all, as the authors.
        seed: Of the sample.
        absent: As for :class:`MSP`.
        model: As for :class:`OODDetector`.

    Attributes:
        bank: (n, d): u_i.
        probabilities: (n, C): p_i.
    """

    _tensors: ClassVar[Mapping[str, str]] = {"bank": "n d", "probabilities": "n C"}
    probabilities: Tensor

    def __init__(
        self,
        power: float = 1.0,
        cut: float = 0.03,
        size: int | None = None,
        seed: int = 0,
        *,
        absent: int | None = None,
        model: Model | None = None,
    ) -> None:
        super().__init__(model, absent)
        self.power, self.cut = (
            check_real("Relation", name, value) for name, value in (("power", power), ("cut", cut))
        )
        if not self.power > 0 or not 0 <= self.cut < 1:
            raise ValueError(
                f"Relation: power must be positive and cut in [0, 1), got {power} and {cut}"
            )
        self.size = None if size is None else check_count("Relation", "size", size)
        self.seed = check_int("Relation", "seed", seed)

    def _beside(self, batch: Batch) -> Tensor:
        return floats(batch.class_logits(self.absent)).softmax(1)

    def _finish(self, where: str) -> None:
        self.bank, self.probabilities = self._rows(where)

    def _scorer(
        self, where: str, settings: Sequence[Mapping[str, Any]]
    ) -> Callable[[Batch], Tensor]:
        if any(one.keys() - self.spec.at_score for one in settings):
            return super()._scorer(where, settings)
        own = [self.varied(**one) for one in settings]
        return lambda batch: self._related(batch, own)

    def _score(self, batch: Batch) -> Tensor:
        return self._related(batch, [self])[:, 0]

    def _related(self, batch: Batch, variants: Sequence[Relation]) -> Tensor:
        """Scores by several powers and thresholds, from one scan, (N, variants)."""
        units = _direction(present(batch.features))
        p = self._beside(batch).to(units)
        bank, known = self.bank.to(units), self.probabilities.to(units)
        scores = units.new_zeros(units.shape[0], len(variants))
        for (i, near), (_, alike) in zip(_products(units, bank), _products(p, known), strict=True):
            relation = near.clamp(min=0) * alike
            for j, own in enumerate(variants):
                kept = torch.where(relation > own.cut, relation**own.power, 0)
                scores[i : i + near.shape[0], j] += kept.sum(1)
        nan = units.isnan().any(1, keepdim=True) | p.isnan().any(1, keepdim=True)
        return torch.where(nan, torch.nan, scores)


@register(
    "mcm",
    "E",
    "Ming et al., NeurIPS 2022",
    grid={"temperature": (0.01, 1, 10)},
)
class MCM(OODDetector):
    """Maximum softmax probability of the cosines to the classes' text embeddings.

    Ming, Cai, Gu et al., Delving into Out-of-Distribution Detection with Vision-Language
    Representations, NeurIPS 2022: max_c softmax(cos(h, t_c) / T)_c of image features h and the
    text features t_c of "a photo of a <class>".

    Args:
        texts: (C, d) text embeddings, one a class, in any length; None only for a detector that a
            file will fill.
        temperature: T; the authors' 1, of plain cosines.
        model: As for :class:`OODDetector`: it gives the image features.
    """

    needs = frozenset({"features"})
    _tensors: ClassVar[Mapping[str, str]] = {"embeddings": "C d"}
    embeddings: Tensor

    def __init__(
        self,
        texts: Tensor | None = None,
        temperature: float = 1.0,
        *,
        model: Model | None = None,
    ) -> None:
        super().__init__(model)
        self.temperature = check_temperature("MCM", temperature)
        if texts is not None:
            if not isinstance(texts, Tensor) or texts.dim() != 2 or not texts.is_floating_point():
                shape = tuple(texts.shape) if isinstance(texts, Tensor) else type(texts).__name__
                raise ValueError(f"MCM: texts must be floating-point (C, d), got {shape}")
            self.embeddings = _direction(texts.detach())
            self.num_classes, self.width = texts.shape

    def _arguments(self) -> dict[str, Any]:
        return {"temperature": self.temperature}

    def _ready(self, where: str) -> None:
        if "embeddings" not in vars(self):
            raise NotFittedError(f"{where}: texts must be given: MCM(texts=...)")
        super()._ready(where)

    def _cosines(self, batch: Batch) -> LogitScores:
        def compute() -> LogitScores:
            units = _direction(present(batch.features))
            return logit_scores(units @ self.embeddings.to(units).T, self.temperature)

        return batch.once(self, compute)

    def _score(self, batch: Batch) -> Tensor:
        return self._cosines(batch).msp

    def _label(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        return self._cosines(batch).label, None


def check_bank(where: str, detector: KNN | NNGuide) -> None:
    """Raise ValueError unless the bank has as many rows as neighbours are asked for."""
    if len(detector.bank) < detector.k:
        raise ValueError(
            f"{where}bank must have at least k = {detector.k} rows, got {len(detector.bank)}"
        )


def _products(rows: Tensor, bank: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Blocks of ``rows @ bank.T``, each with the number of its first row."""
    begin = 0
    for part in blocks(rows, _QUERIES):
        for block in bank.split(_BLOCK):
            with torch.autocast(rows.device.type, enabled=False):
                yield begin, part @ block.T
        begin += part.shape[0]


def _largest_products(units: Tensor, bank: Tensor, k: int) -> Tensor:
    """The k largest of each row of ``units @ bank.T``, descending."""
    if torch.compiler.is_compiling():
        best = units.new_full((units.shape[0], k), -torch.inf)
        for i, near in _products(units, bank):
            rows = slice(i, i + near.shape[0])
            best[rows] = torch.cat([best[rows], near], 1).topk(k).values
        return best
    # The nearest, where one more column makes all rows of the bank as long as the longest, 1:
    # |u - b|^2 = 2 - 2 u.b, for a zero row of units 1 - 2 u.b.
    longest = bank.norm(dim=1).amax().clamp(min=torch.finfo(bank.dtype).tiny)
    bank = bank / longest
    missing = (1 - bank.double().square().sum(1, keepdim=True)).clamp(min=0).sqrt().to(bank)
    found = nearest_neighbors(
        torch.cat([units, units.new_zeros(len(units), 1)], 1), torch.cat([bank, missing], 1), k
    )
    lengths = 1 + units.square().sum(1, keepdim=True)
    return (lengths - found.distances) / 2 * longest


def _direction(features: Tensor) -> Tensor:
    """Rows over their norms; zero rows stay zero."""
    return normalize(features.to(accumulate_type(features.dtype)), dim=1)
