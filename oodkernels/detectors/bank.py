"""Detectors that compare with a bank of training features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from oodkernels._checks import accumulate_type, check_count
from oodkernels._optional import require
from oodkernels.detectors.base import OODDetector, register
from oodkernels.detectors.batch import Batch, present
from oodkernels.detectors.model import Model
from oodkernels.detectors.statistics import check_finite

__all__ = ["KNN"]

_QUERIES, _BLOCK = 1024, 1 << 14  # rows of a matrix of similarities, and columns


@register("knn", "E", "Sun et al., ICML 2022")
class KNN(OODDetector):
    """Distance to the k-th nearest training sample among normalised features, negated.

    Sun, Ming, Zhu & Li, Out-of-Distribution Detection with Deep Nearest Neighbors, ICML 2022,
    section 3: with z = h / |h|, the score is -|z - z_(k)|, z_(k) the k-th nearest of the training
    samples' z. It lies in [-2, 0]. The authors' code reports the squared distance, which ranks
    alike. A sample that was trained on counts itself as its nearest.

    The neighbour is found by faiss on the CPU where it is installed, else by matrix products in
    torch, block by block; its distance is then computed from differences in either case, so that
    nothing cancels and both give the same scores.

    Args:
        k: Which neighbour; the paper has 50 for CIFAR-10, 200 for CIFAR-100, 1000 for ImageNet.
        backend: ``"faiss"``, ``"torch"``, or ``"auto"`` for faiss where it is installed and the
            features are on the CPU.
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
        backend: Literal["auto", "faiss", "torch"] = "auto",
        *,
        model: Model | None = None,
    ) -> None:
        super().__init__(model)
        if backend not in ("auto", "faiss", "torch"):
            raise ValueError(f"KNN: backend must be auto, faiss or torch, got {backend!r}")
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

    def _load_state(self, tensors: Mapping[str, Tensor]) -> None:
        super()._load_state(tensors)
        if len(self.bank) < self.k:
            raise ValueError(f"bank must have at least k = {self.k} rows, got {len(self.bank)}")

    def _score(self, batch: Batch) -> Tensor:
        features = present(batch.features)
        if self.bank.device != features.device:
            self.to(features.device)
        scores = [self._distance(rows) for rows in features.split(_QUERIES)]
        return -torch.cat(scores).to(accumulate_type(features.dtype))

    def _distance(self, features: Tensor) -> Tensor:
        z = _direction(features).to(self.bank)
        kth = self.bank[self._kth_by_faiss(z) if self._uses_faiss(z) else self._kth(z)]
        return (z - kth).norm(dim=1)

    def _kth(self, z: Tensor) -> Tensor:
        """Rows of the k-th nearest in the bank, (N,): those of the k-th largest z.b - |b|^2 / 2."""
        best = torch.empty(len(z), 0, dtype=z.dtype, device=z.device)
        rows = torch.empty(len(z), 0, dtype=torch.int64, device=z.device)
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
        return rows[:, -1]

    def _uses_faiss(self, z: Tensor) -> bool:
        if self.backend == "torch" or (self.backend == "auto" and z.device.type != "cpu"):
            return False
        try:
            faiss = require("faiss", "faiss", "KNN: backend='faiss'")
        except ModuleNotFoundError:
            if self.backend == "auto":
                return False
            raise
        if self._index is None:
            index = faiss.IndexFlatL2(self.bank.shape[1])
            index.add(self.bank.float().cpu().numpy())
            self._index = index  # whole, for other threads
        return True

    def _kth_by_faiss(self, z: Tensor) -> Tensor:
        _, rows = self._index.search(z.float().cpu().numpy(), self.k)
        return torch.from_numpy(rows[:, -1]).to(z.device)


def _direction(features: Tensor) -> Tensor:
    """Rows over their norms; zero rows stay zero."""
    return normalize(features.to(accumulate_type(features.dtype)), dim=1)
