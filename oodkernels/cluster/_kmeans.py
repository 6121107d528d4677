"""K-means on tensors, NumPy arrays, and rows that are spread over processes.

Deterministic: the same data and seed give the same bits on any number of threads. The ops behind
it, with leading batch dimensions and restarts of your own, are in :mod:`oodkernels.ops.kmeans`,
which also says what happens to ties, duplicates and points that are not finite.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from oodkernels import reference
from oodkernels._checks import accumulate_type, check_floating
from oodkernels.ops import KMeansResult, kmeans_init, kmeans_lloyd, nearest_centroid

Backend = Literal["native", "faiss"]

_SEEDING_LIMIT, _SEEDING_SAMPLE = 1 << 16, 1 << 15  # as in csrc/cpu/kmeans_core.h
_CHUNK = 1 << 16  # rows that are converted to float64 at once


def kmeans(
    x: Tensor,
    k: int,
    *,
    n_init: int = 1,
    max_iter: int = 300,
    tol: float = 1e-4,
    seed: int = 0,
    normalize: bool = False,
    renormalize: bool = False,
    group: dist.ProcessGroup | None = None,
    backend: Backend = "native",
) -> KMeansResult:
    """K-means: greedy k-means++, Lloyd's iteration, the best of some restarts.

    Args:
        x: (N, d), float64, float32, bfloat16 or float16; leading batch dimensions where neither
            ``group`` nor another backend is asked for.
        k: Number of clusters, >= 1.
        n_init: Restarts, >= 1.
        max_iter: Most iterations, >= 0.
        tol: Stops where the squared shifts of the centroids sum to at most this times the mean
            variance of a feature, as in scikit-learn; >= 0.
        seed: Of all random numbers.
        normalize: Cluster directions, x / |x|.
        renormalize: Divide centroids by their norms after every iteration.
        group: Processes that each hold some of the rows (in order of rank, any number of them) and
            all call this; ``dist.group.WORLD`` for all. Sums are taken in float64 and all-reduced:
            the result is that of one process with all rows, up to the order of summation.
        backend: ``"faiss"`` for faiss's K-means on the same terms (random seeding, always
            ``max_iter`` iterations, no ``tol``, float32; on the GPU where x and faiss are).

    Returns:
        Centroids, labels, inertia and n_iter; with ``group`` the labels are those of this process's
        rows, the rest is the same on all. Not differentiable.

    Raises:
        ValueError: A wrong shape, a number out of range, fewer finite points than ``k`` for faiss.
        TypeError: ``x`` is not of a floating-point type above.
        ImportError: faiss is missing.
    """
    if backend not in ("native", "faiss"):
        raise ValueError(f"kmeans: backend must be native or faiss, got {backend!r}")
    if backend == "native" and group is None:
        init = kmeans_init(x, k, n_init, seed=seed, normalize=normalize)
        return kmeans_lloyd(x, init, max_iter, tol, normalize, renormalize)
    check_floating("kmeans", "x", x)
    if x.dim() != 2:
        raise ValueError(
            f"kmeans: x must have shape (N, d) with a group or with faiss, got {tuple(x.shape)}"
        )
    if backend == "faiss":
        if group is not None:
            raise ValueError("kmeans: group needs backend='native'")
        return _faiss(x, k, n_init, max_iter, seed, normalize, renormalize)
    return _Distributed(x, group, normalize, renormalize).fit(k, n_init, max_iter, tol, seed)


# --- rows over processes --------------------------------------------------------------------------


class _Distributed:
    """K-means on this process's rows and those of the others.

    The steps are those of csrc/cpu/kmeans_core.cpp, with each sum over rows followed by one over
    processes.
    """

    def __init__(
        self, x: Tensor, group: dist.ProcessGroup | None, normalize: bool, renormalize: bool
    ) -> None:
        self.x, self.group = x, group
        self.normalize, self.renormalize = normalize, renormalize
        self.type = accumulate_type(x.dtype)
        self.valid = torch.cat([valid for _, valid in self._chunks()])
        self.ranks = dist.get_world_size(group)
        counts = self._gathered(self.valid.sum()[None])
        self.n = int(counts.sum())
        self.before = int(counts[: dist.get_rank(group)].sum())  # valid rows of lower ranks

    def fit(self, k: int, n_init: int, max_iter: int, tol: float, seed: int) -> KMeansResult:
        fits = [self._lloyd(c, max_iter, tol) for c in self._seeds(k, n_init, seed)]
        return min(fits, key=lambda fit: float(fit.inertia))

    def _chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows as they are clustered, and which are valid, piece by piece."""
        for chunk in self.x.split(_CHUNK):
            yield reference.kmeans_points(chunk, self.normalize)

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
        for (points, _), label in zip(self._chunks(), labels.split(_CHUNK), strict=True):
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
        for points, valid in self._chunks():
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


# --- faiss ----------------------------------------------------------------------------------------


def _faiss(
    x: Tensor, k: int, n_init: int, max_iter: int, seed: int, normalize: bool, renormalize: bool
) -> KMeansResult:
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            "kmeans: backend='faiss' needs faiss: pip install 'oodkernels[faiss]', or "
            "'oodkernels[faiss-gpu]' for CUDA"
        ) from error
    points, valid = reference.kmeans_points(x, normalize)
    points = points[valid].float().contiguous()
    if len(points) < k:
        raise ValueError(f"kmeans: faiss needs at least k = {k} finite points, got {len(points)}")
    fitted = faiss.Kmeans(
        x.shape[1],
        k,
        niter=max_iter,
        nredo=n_init,
        seed=seed & 0x7FFFFFFF,
        spherical=renormalize,
        gpu=x.is_cuda and hasattr(faiss, "StandardGpuResources"),
        min_points_per_centroid=1,
        max_points_per_centroid=max(256, -(-len(points) // k)),  # all points, no sample of them
    )
    fitted.train(points.cpu().numpy())
    centroids = torch.from_numpy(np.array(fitted.centroids)).to(x.device, accumulate_type(x.dtype))
    labels, distance = nearest_centroid(x, centroids, normalize)
    inertia = torch.where(labels >= 0, distance, 0).double().sum()
    return KMeansResult(centroids, labels, inertia, torch.tensor(max_iter, device=x.device))


# --- scikit-learn's interface ---------------------------------------------------------------------


class KMeans:
    """K-means with scikit-learn's names, on tensors (any device) or NumPy arrays.

    NumPy arrays in, NumPy arrays out. Rows that hold NaN or inf are left out: their label is -1.

    Args:
        n_clusters: Number of clusters.
        init: ``"k-means++"`` (greedy), or centroids (n_clusters, d), which make a single restart.
        n_init: Restarts; the least inertia wins.
        max_iter: Most iterations, >= 0.
        tol: As in :func:`kmeans`.
        random_state: Seed; an int, always the same results.
        normalize: Cluster directions, x / |x|, in ``fit`` and ``predict``.
        renormalize: Divide centroids by their norms after every iteration.
        backend: As in :func:`kmeans`.
        group: As in :func:`kmeans`; ``fit`` is then a collective call.

    Attributes:
        cluster_centers_: (n_clusters, d), float64 for float64 (and integer) data, else float32.
        labels_: (N,) int64.
        inertia_: float, sum of squared distances to the centres.
        n_iter_: int, iterations of the restart that won.
        n_features_in_: int, d.
    """

    cluster_centers_: Any
    labels_: Any
    inertia_: float
    n_iter_: int
    n_features_in_: int

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        init: str | Tensor | NDArray[Any] = "k-means++",
        n_init: int = 1,
        max_iter: int = 300,
        tol: float = 1e-4,
        random_state: int = 0,
        normalize: bool = False,
        renormalize: bool = False,
        backend: Backend = "native",
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.n_clusters = n_clusters
        self.init = init
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state
        self.normalize = normalize
        self.renormalize = renormalize
        self.backend = backend
        self.group = group

    def fit(self, X: Tensor | NDArray[Any], y: None = None) -> KMeans:  # noqa: N803
        """Cluster the rows of X, (N, d); y is ignored.

        Raises:
            ValueError: As :func:`kmeans`; X has fewer rows than ``n_clusters``; ``init`` is neither
                ``"k-means++"`` nor centroids.
            TypeError: As :func:`kmeans`.
        """
        x = self._points("fit", X)
        if self.group is None and len(x) < self.n_clusters:
            raise ValueError(
                f"KMeans.fit: X must have at least n_clusters = {self.n_clusters} rows, got "
                f"{len(x)}"
            )
        if isinstance(self.init, str):
            if self.init != "k-means++":
                raise ValueError(
                    f"KMeans.fit: init must be 'k-means++' or centroids, got {self.init!r}"
                )
            result = kmeans(
                x,
                self.n_clusters,
                n_init=self.n_init,
                max_iter=self.max_iter,
                tol=self.tol,
                seed=self.random_state,
                normalize=self.normalize,
                renormalize=self.renormalize,
                group=self.group,
                backend=self.backend,
            )
        else:
            init = torch.as_tensor(self.init, device=x.device)
            init = init if init.is_floating_point() else init.double()
            if init.shape != (self.n_clusters, x.shape[1]):
                raise ValueError(
                    f"KMeans.fit: init must have shape {(self.n_clusters, x.shape[1])}, got "
                    f"{tuple(init.shape)}"
                )
            result = kmeans_lloyd(
                x, init, self.max_iter, self.tol, self.normalize, self.renormalize
            )
        self.cluster_centers_ = _like(X, result.centroids)
        self.labels_ = _like(X, result.labels)
        self.inertia_ = float(result.inertia)
        self.n_iter_ = int(result.n_iter)
        self.n_features_in_ = x.shape[1]
        return self

    def fit_predict(self, X: Tensor | NDArray[Any], y: None = None) -> Any:  # noqa: N803
        """``fit(X).labels_``."""
        return self.fit(X).labels_

    def predict(self, X: Tensor | NDArray[Any]) -> Any:  # noqa: N803
        """Nearest centre of each row of X, (N,) int64; -1 for a row that is not finite."""
        return _like(X, self._nearest("predict", X)[0])

    def score(self, X: Tensor | NDArray[Any], y: None = None) -> float:  # noqa: N803
        """Minus the sum of squared distances of X's rows to their nearest centres."""
        labels, distance = self._nearest("score", X)
        return -float(torch.where(labels >= 0, distance, 0).double().sum())

    def transform(self, X: Tensor | NDArray[Any]) -> Any:  # noqa: N803
        """Euclidean distances of X's rows to all centres, (N, n_clusters)."""
        x, centres = self._fitted("transform", X)
        points, valid = reference.kmeans_points(x, self.normalize)
        distance = torch.cdist(
            points, centres.to(points), compute_mode="donot_use_mm_for_euclid_dist"
        )
        return _like(X, torch.where(valid[:, None], distance, torch.nan))

    def _nearest(self, method: str, X: Tensor | NDArray[Any]) -> tuple[Tensor, Tensor]:  # noqa: N803
        x, centres = self._fitted(method, X)
        return nearest_centroid(x, centres, self.normalize)

    def _fitted(self, method: str, X: Tensor | NDArray[Any]) -> tuple[Tensor, Tensor]:  # noqa: N803
        if not hasattr(self, "cluster_centers_"):
            raise ValueError(f"KMeans.{method}: fit must come first")
        x = self._points(method, X)
        if x.shape[1] != self.n_features_in_:
            raise ValueError(
                f"KMeans.{method}: X must have {self.n_features_in_} features, got {x.shape[1]}"
            )
        return x, torch.as_tensor(self.cluster_centers_, device=x.device)

    def _points(self, method: str, X: Tensor | NDArray[Any]) -> Tensor:  # noqa: N803
        x = X.detach() if isinstance(X, Tensor) else torch.as_tensor(np.asarray(X))
        if not x.is_floating_point():
            x = x.double()
        if x.dim() != 2:
            raise ValueError(f"KMeans.{method}: X must have shape (N, d), got {tuple(x.shape)}")
        return x


def _like(X: Tensor | NDArray[Any], result: Tensor) -> Any:  # noqa: N803
    """A tensor for a tensor, else a NumPy array."""
    return result if isinstance(X, Tensor) else result.cpu().numpy()
