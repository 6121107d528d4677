"""The ops as Python functions; as torch ops they are ``torch.ops.oodk.*``."""

from oodkernels.ops.distances import IndexedDistances, indexed_distances
from oodkernels.ops.dos import DOSSelection, cluster_argmax, dos_select
from oodkernels.ops.features import FeatureStats, feature_stats, shape_features_
from oodkernels.ops.histogram import roc_histogram_
from oodkernels.ops.kmeans import KMeansResult, kmeans_init, kmeans_lloyd, nearest_centroid
from oodkernels.ops.logits import LogitScores, gen_scores, logit_scores, scaled_energy
from oodkernels.ops.mos import MOSPrediction, mos_log_others, mos_loss, mos_predict, mos_score
from oodkernels.ops.neighbors import Neighbors, merge_neighbors, nearest_neighbors
from oodkernels.ops.outlier import OutlierCrossEntropyResult, outlier_cross_entropy
from oodkernels.ops.roc import ROCMetricsResult, roc_metrics

__all__ = [
    "DOSSelection",
    "FeatureStats",
    "IndexedDistances",
    "KMeansResult",
    "LogitScores",
    "MOSPrediction",
    "Neighbors",
    "OutlierCrossEntropyResult",
    "ROCMetricsResult",
    "cluster_argmax",
    "dos_select",
    "feature_stats",
    "gen_scores",
    "indexed_distances",
    "kmeans_init",
    "kmeans_lloyd",
    "logit_scores",
    "merge_neighbors",
    "mos_log_others",
    "mos_loss",
    "mos_predict",
    "mos_score",
    "nearest_centroid",
    "nearest_neighbors",
    "outlier_cross_entropy",
    "roc_histogram_",
    "roc_metrics",
    "scaled_energy",
    "shape_features_",
]
