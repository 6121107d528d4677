"""Fast, exact out-of-distribution detection: C++/CUDA kernels for PyTorch.

Importing it registers ``torch.ops.oodk.*``. Every score is higher = more in-distribution.
"""

from oodkernels._extension import build_info
from oodkernels._version import __version__
from oodkernels.cluster import KMeans, kmeans
from oodkernels.groups import Groups
from oodkernels.nn import MOSHead, MOSLoss
from oodkernels.ops import (
    DOSSelection,
    KMeansResult,
    LogitScores,
    MOSPrediction,
    cluster_argmax,
    dos_select,
    kmeans_init,
    logit_scores,
    mos_log_others,
    mos_loss,
    mos_predict,
    mos_score,
    nearest_centroid,
)

__all__ = [
    "DOSSelection",
    "Groups",
    "KMeans",
    "KMeansResult",
    "LogitScores",
    "MOSHead",
    "MOSLoss",
    "MOSPrediction",
    "__version__",
    "build_info",
    "cluster_argmax",
    "dos_select",
    "kmeans",
    "kmeans_init",
    "logit_scores",
    "mos_log_others",
    "mos_loss",
    "mos_predict",
    "mos_score",
    "nearest_centroid",
]
