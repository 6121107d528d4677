"""K-means as an estimator of scikit-learn, which it needs."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from oodkernels import reference
from oodkernels._checks import check_count, check_flag, plain
from oodkernels._optional import require
from oodkernels.cluster.functional import Backend, kmeans
from oodkernels.ops import kmeans_lloyd, nearest_centroid

try:
    from sklearn.base import (
        BaseEstimator,
        ClassNamePrefixFeaturesOutMixin,
        ClusterMixin,
        TransformerMixin,
    )
    from sklearn.utils.validation import check_is_fitted, check_random_state, validate_data
except ImportError:
    require("sklearn.utils.validation", "sklearn", "KMeans")
    raise

__all__ = ["KMeans"]


_FLAGS = ("normalize", "renormalize")


class KMeans(ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClusterMixin, BaseEstimator):  # type: ignore[misc]
    """K-means with scikit-learn's names, on tensors (any device) or NumPy arrays.

    NumPy arrays in, NumPy arrays out. Rows that hold NaN or inf are left out: their label is -1.

    Args:
        n_clusters: Number of clusters.
        init: ``"k-means++"`` (greedy), or centroids (n_clusters, d), which make a single restart.
        n_init: Restarts; the least inertia wins. ``"auto"`` is one, as in scikit-learn.
        max_iter: Most iterations, >= 0.
        tol: As in :func:`kmeans`.
        random_state: Seed; an int, always the same results. A ``numpy.random.RandomState`` or None
            (NumPy's global one) gives others each time.
        normalize: Cluster directions, x / |x|, in ``fit`` and ``predict``.
        renormalize: Divide centroids by their norms after every iteration.
        backend: As in :func:`kmeans`.
        group: As in :func:`kmeans`; ``fit`` is then a collective call.

    Attributes:
        cluster_centers_: (n_clusters, d), float64 for float64 (and integer) data, else float32.
        labels_: (N,) int64.
        inertia_: Float, sum of squared distances to the centres.
        n_iter_: Int, iterations of the restart that won.
        n_features_in_: Int, d.
        feature_names_in_: (d,) names of the columns, where X was a data frame.
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
        n_init: int | str = 1,
        max_iter: int = 300,
        tol: float = 1e-4,
        random_state: int | np.random.RandomState | None = 0,
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

    def __sklearn_clone__(self) -> KMeans:
        """An estimator with the same parameters that is not fitted; the group is shared."""
        parameters = self.get_params(deep=False)
        group = parameters.pop("group")
        return type(self)(**copy.deepcopy(parameters), group=group)

    def __sklearn_tags__(self) -> Any:
        """What scikit-learn should know of it: rows that hold NaN are taken, and left out."""
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    def fit(self, X: Tensor | NDArray[Any], y: None = None) -> KMeans:  # noqa: N803
        """Cluster the rows of X, (N, d); y is ignored.

        Raises:
            ValueError: As :func:`kmeans`; X has fewer rows than ``n_clusters``; ``init`` is neither
                ``"k-means++"`` nor centroids.
            TypeError: As :func:`kmeans`.
        """
        k = check_count("KMeans.fit", "n_clusters", self.n_clusters)
        n_init = self.n_init
        if isinstance(n_init, str):
            if n_init != "auto":
                raise ValueError(f"KMeans.fit: n_init must be an int or 'auto', got {n_init!r}")
            n_init = 1  # greedy k-means++ needs no more
        x = self._points("fit", X)
        if self.group is None and len(x) < k:
            raise ValueError(
                f"KMeans.fit: X must have at least n_clusters = {k} rows, got {len(x)} "
                f"(n_samples={len(x)})"
            )
        max_iter = check_count("KMeans.fit", "max_iter", self.max_iter, 0)
        flags = {name: check_flag("KMeans.fit", name, getattr(self, name)) for name in _FLAGS}
        if isinstance(self.init, str):
            if self.init != "k-means++":
                raise ValueError(
                    f"KMeans.fit: init must be 'k-means++' or centroids, got {self.init!r}"
                )
            result = kmeans(
                x,
                k,
                n_init=check_count("KMeans.fit", "n_init", n_init),
                max_iter=max_iter,
                tol=self.tol,
                seed=_seed(self.random_state),
                **flags,
                group=self.group,
                backend=self.backend,
            )
        else:
            if self.group is not None or self.backend != "native":
                raise ValueError("KMeans.fit: init must be 'k-means++' with group or faiss")
            init = torch.as_tensor(self.init, device=x.device)
            init = init if init.is_floating_point() else init.double()
            if init.shape != (k, x.shape[1]):
                raise ValueError(
                    f"KMeans.fit: init must have shape {(k, x.shape[1])}, got {tuple(init.shape)}"
                )
            result = kmeans_lloyd(x, init, max_iter, plain(self.tol), **flags)
        self.cluster_centers_ = _like(X, result.centroids)
        self.labels_ = _like(X, result.labels)
        self.inertia_ = float(result.inertia)
        self.n_iter_ = int(result.n_iter)
        return self

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
        points, valid = reference.kmeans_points(x, bool(self.normalize))
        distance = torch.cdist(
            points, centres.to(points), compute_mode="donot_use_mm_for_euclid_dist"
        )
        return _like(X, torch.where(valid[:, None], distance, torch.nan))

    @property
    def _n_features_out(self) -> int:
        return len(self.cluster_centers_)

    def _nearest(self, method: str, X: Tensor | NDArray[Any]) -> tuple[Tensor, Tensor]:  # noqa: N803
        x, centres = self._fitted(method, X)
        return nearest_centroid(x, centres, bool(self.normalize))

    def _fitted(self, method: str, X: Tensor | NDArray[Any]) -> tuple[Tensor, Tensor]:  # noqa: N803
        check_is_fitted(self, msg=f"KMeans.{method}: fit must come first")
        x = self._points(method, X)
        return x, torch.as_tensor(self.cluster_centers_, device=x.device)

    def _points(self, method: str, X: Tensor | NDArray[Any]) -> Tensor:  # noqa: N803
        """The rows of X; ``fit`` sets how many features they have, the others compare."""
        if not isinstance(X, Tensor):
            array = validate_data(
                self,
                X,
                reset=method == "fit",
                dtype=[np.float64, np.float32, np.float16],
                order="C",
                ensure_all_finite=False,
            )
            return torch.as_tensor(array)
        x = X.detach()
        if not x.is_floating_point():
            x = x.double()
        if x.dim() != 2:
            raise ValueError(f"KMeans.{method}: X must have shape (N, d), got {tuple(x.shape)}")
        if method == "fit":
            self.n_features_in_ = x.shape[1]
        elif x.shape[1] != self.n_features_in_:
            raise ValueError(
                f"KMeans.{method}: X must have {self.n_features_in_} features, got {x.shape[1]}"
            )
        return x


def _seed(random_state: Any) -> int:
    seed = plain(random_state)
    if isinstance(seed, int):
        return seed
    return int(check_random_state(random_state).randint(2**31 - 1))


def _like(X: Tensor | NDArray[Any], result: Tensor) -> Any:  # noqa: N803
    """A tensor for a tensor, else a NumPy array."""
    return result if isinstance(X, Tensor) else result.cpu().numpy()
