"""K-means."""

from oodkernels.cluster._kmeans import KMeans, kmeans

__all__ = ["KMeans", "kmeans"]
