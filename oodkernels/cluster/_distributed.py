"""K-means on rows that are spread over processes."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from oodkernels import reference
from oodkernels._checks import accumulate_type
from oodkernels.cluster._points import CHUNK, centred, chunks
from oodkernels.ops import KMeansResult, kmeans_init, nearest_centroid

_SEEDING_LIMIT, _SEEDING_SAMPLE = 1 << 16, 1 << 15  # as in csrc/common/seeding.h


class DistributedKMeans:
    """K-means on this process's rows and those of the others.

    The steps are those of csrc/cpu/kmeans/solver.cpp, with each sum over rows followed by one over
    processes.
    """

    def __init__(
        self, x: Tensor, group: dist.ProcessGroup | None, normalize: bool, renormalize: bool
    ) -> None:
        self.x, self.group = x, group
        self.normalize, self.renormalize = normalize, renormalize
        self.type = accumulate_type(x.dtype)
        self.mean: Tensor | float = 0.0
        if not (normalize or renormalize):
            self.x, self.mean = centred(x, self._sum)
        self.valid = torch.cat([valid for _, valid in chunks(self.x, self.normalize)])
        self.ranks = dist.get_world_size(group)
        counts = self._gathered(self.valid.sum()[None])
        self.n = int(counts.sum())
        self.before = int(counts[: dist.get_rank(group)].sum())  # valid rows of lower ranks

    def fit(self, k: int, n_init: int, max_iter: int, tol: float, seed: int) -> KMeansResult:
        """Cluster from each restart's seeds; the least inertia wins."""
        fits = [self._lloyd(c, max_iter, tol) for c in self._seeds(k, n_init, seed)]
        best = min(fits, key=lambda fit: float(fit.inertia))
        return best._replace(centroids=(best.centroids.double() + self.mean).to(self.type))

    def _sum(self, local: Tensor) -> Tensor:
        dist.all_reduce(local, group=self.group)
        return local

    def _gathered(self, local: Tensor) -> Tensor:
        """The rows of all processes, which may hold different numbers of them."""
        length = torch.tensor([len(local)], device=local.device)
        lengths = [torch.empty_like(length) for _ in range(self.ranks)]
        dist.all_gather(lengths, length, group=self.group)
        most = int(max(lengths))
        padded = local.new_zeros((most, *local.shape[1:]))
        padded[: len(local)] = local
        parts = [torch.empty_like(padded) for _ in range(self.ranks)]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[: int(n)] for part, n in zip(parts, lengths, strict=True)])

    def _seeds(self, k: int, n_init: int, seed: int) -> list[Tensor]:
        """Centroids of every restart: those that one process would start from."""
        rows = self.valid.nonzero()[:, 0]
        if self.n > _SEEDING_LIMIT:
            m = max(_SEEDING_SAMPLE, min(self.n, 2 * k))
            stratum = self.n / m
            sample = torch.from_numpy(
                (stratum * (np.arange(m) + _uniforms(seed, reference.SAMPLE, m))).astype(np.int64)
            ).to(rows.device)
            mine = (sample >= self.before) & (sample < self.before + len(rows))
            rows = rows[sample[mine] - self.before]
        points = self._gathered(self.x[rows])
        init = kmeans_init(points, k, n_init, seed=seed, normalize=self.normalize)
        points = reference.kmeans_points(points, self.normalize)[0]
        nan = points.new_full((1, points.shape[1]), torch.nan)
        return list(torch.cat([points, nan])[init])

    def _cluster_sums(self, labels: Tensor, k: int) -> Tensor:
        """Sum of the rows of each cluster and, in the last column, their number: (k, d + 1)."""
        sums = self.x.new_zeros((k + 1, self.x.shape[1] + 1), dtype=torch.float64)
        for (points, _), label in zip(
            chunks(self.x, self.normalize), labels.split(CHUNK), strict=True
        ):
            label = torch.where(label < 0, k, label)
            order = label.argsort(stable=True)
            counts = label.bincount(minlength=k + 1)
            rows = torch.cat([points, torch.ones_like(points[:, :1])], 1).double()[order]
            rows = torch.where(label[order, None] < k, rows, 0.0)  # NaN
            sums += torch.segment_reduce(rows, "sum", lengths=counts, axis=0, unsafe=True)
        return self._sum(sums[:k].contiguous())

    def _refill(self, sums: Tensor, labels: Tensor, distance: Tensor) -> None:
        """Lets empty clusters take the farthest points of all, from clusters that keep one."""
        counts = sums[:, -1]
        empty = (counts == 0).nonzero()[:, 0].tolist()
        if not empty:
            return
        # Of each process as many as could be refused, one a cluster, and taken.
        far = torch.where(labels >= 0, distance, -1.0)
        far = far.argsort(descending=True, stable=True)[: len(empty) + len(sums)]
        far = far[labels[far] >= 0]
        points = reference.kmeans_points(self.x[far], self.normalize)[0].double()
        about = torch.stack([distance[far].double(), labels[far].double()], 1)
        offers = self._gathered(torch.cat([about, points], 1))
        for i in offers[:, 0].argsort(descending=True, stable=True).tolist():
            donor = int(offers[i, 1])
            if not empty:
                break
            if counts[donor] > 1:
                taker = empty.pop(0)
                moved = torch.cat([offers[i, 2:], offers.new_ones(1)])
                sums[donor] -= moved
                sums[taker] += moved

    def _variance(self) -> float:
        """Variance of a feature, averaged over the features."""
        label = torch.where(self.valid, 0, -1)
        total = self._cluster_sums(label, 1)[0]
        mean = (total[:-1] / total[-1]).to(self.type)
        squares = self.x.new_zeros((), dtype=torch.float64)
        for points, valid in chunks(self.x, self.normalize):
            squares += torch.where(valid[:, None], points - mean, 0).double().square().sum()
        return float(self._sum(squares)) / max(1, self.n * self.x.shape[1])

    def _lloyd(self, centroids: Tensor, max_iter: int, tol: float) -> KMeansResult:
        k = len(centroids)
        limit = tol * self._variance() if tol > 0 else 0.0
        before: Tensor | None = None
        n_iter = 0
        settled = False
        labels, distance = nearest_centroid(self.x, centroids, self.normalize)
        while n_iter < max_iter and self.n and not settled:
            n_iter += 1
            if before is not None:
                changed = self._sum((labels != before).sum())
                settled = not changed
                if settled:
                    break
            before = labels
            sums = self._cluster_sums(labels, k)
            self._refill(sums, labels, distance)
            new = sums[:, :-1] / sums[:, -1:]
            if self.renormalize:
                norm = new.norm(dim=1, keepdim=True)
                new = new / torch.where(norm == 0, 1, norm)
            moved = new.to(self.type)
            unused = moved.isnan() & centroids.isnan()
            shift = float(torch.where(unused, 0, moved.double() - centroids).square().sum())
            centroids = moved
            labels, distance = nearest_centroid(self.x, centroids, self.normalize)
            if shift <= limit:
                break
        inertia = torch.where(labels >= 0, distance, 0).double().sum()
        count = torch.tensor(n_iter, device=self.x.device)
        return KMeansResult(centroids, labels, self._sum(inertia), count)


def _uniforms(seed: int, stream: int, n: int) -> NDArray[np.float64]:
    """``reference.uniform(reference.random_bits(seed, stream, 0, 0, i))`` for i = 0..n-1."""
    low = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    c = [np.arange((n + 1) // 2, dtype=np.uint64)] + [
        np.full((n + 1) // 2, word, dtype=np.uint64) for word in (0, 0, stream)
    ]
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [
            p1 >> shift ^ c[1] ^ np.uint64(k0),
            p1 & low,
            p0 >> shift ^ c[3] ^ np.uint64(k1),
            p0 & low,
        ]
        k0, k1 = k0 + 0x9E3779B9 & 0xFFFFFFFF, k1 + 0xBB67AE85 & 0xFFFFFFFF
    bits = np.stack([c[1] << shift | c[0], c[3] << shift | c[2]], 1).reshape(-1)[:n]
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
