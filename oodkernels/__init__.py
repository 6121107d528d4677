"""Fast, exact out-of-distribution detection: C++/CUDA kernels for PyTorch.

Importing it registers ``torch.ops.oodk.*``. Every score is higher = more in-distribution.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from oodkernels._extension import build_info
from oodkernels._version import __version__
from oodkernels.cluster import kmeans
from oodkernels.detectors import (
    DETECTORS,
    OODDetector,
    Prediction,
    as_pytorch_ood,
    extract,
    score_all,
)
from oodkernels.detectors.statistics import ClassStatistics
from oodkernels.groups import Groups
from oodkernels.metrics import (
    OODResult,
    OODResults,
    Threshold,
    ThresholdSource,
    compare_conventions,
    expected_calibration_error,
    misclassification_metrics,
    ood_metrics,
    reliability_diagram,
)
from oodkernels.nn import (
    AbsentClassLoss,
    ConfidenceLoss,
    EnergyBoundedLoss,
    JointGANLoss,
    MOSHead,
    MOSLoss,
    OutlierExposureLoss,
    absent_class_loss,
    confidence_loss,
    energy_bounded_loss,
    joint_gan_loss,
    outlier_exposure_loss,
)
from oodkernels.ops import (
    DOSSelection,
    FeatureStats,
    IndexedDistances,
    KMeansResult,
    LogitScores,
    MOSPrediction,
    OutlierCrossEntropyResult,
    ROCMetricsResult,
    cluster_argmax,
    dos_select,
    feature_stats,
    gen_scores,
    indexed_distances,
    kmeans_init,
    logit_scores,
    mos_log_others,
    mos_loss,
    mos_predict,
    mos_score,
    nearest_centroid,
    nearest_neighbors,
    outlier_cross_entropy,
    roc_metrics,
    scaled_energy,
)
from oodkernels.training import (
    DOSMiner,
    MiningLog,
    NTOMMiner,
    OutlierMiner,
    POEMMiner,
    UniformMiner,
)

if TYPE_CHECKING:
    from oodkernels.cluster import KMeans
    from oodkernels.data import open_samples
    from oodkernels.evaluation import Evaluation
    from oodkernels.evaluation.evaluate import evaluate
    from oodkernels.metrics.streaming import CalibrationError, MisclassificationMetrics, OODMetrics
    from oodkernels.training import TrainConfig, Trainer

# Loaded when asked for: they bring torchmetrics and others that take longer than all the rest.
_LATER = {
    "CalibrationError": "metrics.streaming",
    "Evaluation": "evaluation",
    "KMeans": "cluster",
    "MisclassificationMetrics": "metrics.streaming",
    "OODMetrics": "metrics.streaming",
    "TrainConfig": "training",
    "Trainer": "training",
    "evaluate": "evaluation",
    "open_samples": "data",
}

__all__ = [
    "DETECTORS",
    "AbsentClassLoss",
    "CalibrationError",
    "ClassStatistics",
    "ConfidenceLoss",
    "DOSMiner",
    "DOSSelection",
    "EnergyBoundedLoss",
    "Evaluation",
    "FeatureStats",
    "Groups",
    "IndexedDistances",
    "JointGANLoss",
    "KMeans",
    "KMeansResult",
    "LogitScores",
    "MOSHead",
    "MOSLoss",
    "MOSPrediction",
    "MiningLog",
    "MisclassificationMetrics",
    "NTOMMiner",
    "OODDetector",
    "OODMetrics",
    "OODResult",
    "OODResults",
    "OutlierCrossEntropyResult",
    "OutlierExposureLoss",
    "OutlierMiner",
    "POEMMiner",
    "Prediction",
    "ROCMetricsResult",
    "Threshold",
    "ThresholdSource",
    "TrainConfig",
    "Trainer",
    "UniformMiner",
    "__version__",
    "absent_class_loss",
    "as_pytorch_ood",
    "build_info",
    "cluster_argmax",
    "compare_conventions",
    "confidence_loss",
    "dos_select",
    "energy_bounded_loss",
    "evaluate",
    "expected_calibration_error",
    "extract",
    "feature_stats",
    "gen_scores",
    "indexed_distances",
    "joint_gan_loss",
    "kmeans",
    "kmeans_init",
    "logit_scores",
    "misclassification_metrics",
    "mos_log_others",
    "mos_loss",
    "mos_predict",
    "mos_score",
    "nearest_centroid",
    "nearest_neighbors",
    "ood_metrics",
    "open_samples",
    "outlier_cross_entropy",
    "outlier_exposure_loss",
    "reliability_diagram",
    "roc_metrics",
    "scaled_energy",
    "score_all",
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
