"""Fast, exact out-of-distribution detection: C++/CUDA kernels for PyTorch.

Importing it registers ``torch.ops.oodk.*``. Every score is higher = more in-distribution.
"""

from typing import TYPE_CHECKING, Any

from oodkernels._extension import build_info
from oodkernels._version import __version__
from oodkernels.cluster import KMeans, kmeans
from oodkernels.groups import Groups
from oodkernels.metrics import OODResult, OODResults, compare_conventions, ood_metrics
from oodkernels.nn import MOSHead, MOSLoss
from oodkernels.ops import (
    DOSSelection,
    KMeansResult,
    LogitScores,
    MOSPrediction,
    ROCMetrics,
    cluster_argmax,
    dos_select,
    kmeans_init,
    logit_scores,
    mos_log_others,
    mos_loss,
    mos_predict,
    mos_score,
    nearest_centroid,
    roc_metrics,
)

if TYPE_CHECKING:
    from oodkernels.streaming import OODMetrics

__all__ = [
    "DOSSelection",
    "Groups",
    "KMeans",
    "KMeansResult",
    "LogitScores",
    "MOSHead",
    "MOSLoss",
    "MOSPrediction",
    "OODMetrics",
    "OODResult",
    "OODResults",
    "ROCMetrics",
    "__version__",
    "build_info",
    "cluster_argmax",
    "compare_conventions",
    "dos_select",
    "kmeans",
    "kmeans_init",
    "logit_scores",
    "mos_log_others",
    "mos_loss",
    "mos_predict",
    "mos_score",
    "nearest_centroid",
    "ood_metrics",
    "roc_metrics",
]


def __getattr__(name: str) -> Any:
    if name == "OODMetrics":  # needs torchmetrics, which nothing else here does
        from oodkernels.streaming import OODMetrics

        return OODMetrics
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
