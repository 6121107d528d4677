"""Fast, exact out-of-distribution detection: C++/CUDA kernels for PyTorch.

Importing it registers ``torch.ops.oodk.*``. Every score is higher = more in-distribution.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from oodkernels._extension import build_info
from oodkernels._version import __version__
from oodkernels.cluster import KMeans, kmeans
from oodkernels.detectors import (
    DETECTORS,
    OODDetector,
    Prediction,
    as_pytorch_ood,
    extract,
    score_all,
)
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
from oodkernels.statistics import ClassStatistics

if TYPE_CHECKING:
    from oodkernels.calibration import (
        CalibrationError,
        expected_calibration_error,
        reliability_diagram,
    )
    from oodkernels.misclassification import MisclassificationMetrics, misclassification_metrics
    from oodkernels.streaming import OODMetrics
    from oodkernels.threshold import Threshold

# Loaded when asked for: they bring torchmetrics, which takes longer to import than all the rest.
_LATER = {
    "CalibrationError": "calibration",
    "MisclassificationMetrics": "misclassification",
    "OODMetrics": "streaming",
    "Threshold": "threshold",
    "expected_calibration_error": "calibration",
    "misclassification_metrics": "misclassification",
    "reliability_diagram": "calibration",
}

__all__ = [
    "DETECTORS",
    "CalibrationError",
    "ClassStatistics",
    "DOSSelection",
    "Groups",
    "KMeans",
    "KMeansResult",
    "LogitScores",
    "MOSHead",
    "MOSLoss",
    "MOSPrediction",
    "MisclassificationMetrics",
    "OODDetector",
    "OODMetrics",
    "OODResult",
    "OODResults",
    "Prediction",
    "ROCMetrics",
    "Threshold",
    "__version__",
    "as_pytorch_ood",
    "build_info",
    "cluster_argmax",
    "compare_conventions",
    "dos_select",
    "expected_calibration_error",
    "extract",
    "kmeans",
    "kmeans_init",
    "logit_scores",
    "misclassification_metrics",
    "mos_log_others",
    "mos_loss",
    "mos_predict",
    "mos_score",
    "nearest_centroid",
    "ood_metrics",
    "reliability_diagram",
    "roc_metrics",
    "score_all",
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
