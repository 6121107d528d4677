"""K-means on tensors, over processes, and as an estimator."""

from typing import TYPE_CHECKING, Any

from oodkernels.cluster.functional import kmeans

if TYPE_CHECKING:
    from oodkernels.cluster.estimator import KMeans

__all__ = ["KMeans", "kmeans"]


def __getattr__(name: str) -> Any:
    # Loaded when asked for: it brings scikit-learn.
    if name == "KMeans":
        from oodkernels.cluster.estimator import KMeans

        return KMeans
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
