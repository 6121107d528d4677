"""Measures of detectors, and thresholds."""

from oodkernels.metrics.calibration import (
    CalibrationBins,
    calibration_bins,
    expected_calibration_error,
    reliability_diagram,
)
from oodkernels.metrics.intervals import auroc_interval, clopper_pearson, delong, quantile_ranks
from oodkernels.metrics.misclassification import (
    MisclassificationResult,
    misclassification_metrics,
)
from oodkernels.metrics.ood import (
    CONVENTIONS,
    FIGURES,
    Convention,
    OODResult,
    OODResults,
    compare_conventions,
    fpr_name,
    ood_metrics,
)
from oodkernels.metrics.threshold import Threshold, ThresholdSource

__all__ = [
    "CONVENTIONS",
    "FIGURES",
    "CalibrationBins",
    "Convention",
    "MisclassificationResult",
    "OODResult",
    "OODResults",
    "Threshold",
    "ThresholdSource",
    "auroc_interval",
    "calibration_bins",
    "clopper_pearson",
    "compare_conventions",
    "delong",
    "expected_calibration_error",
    "fpr_name",
    "misclassification_metrics",
    "ood_metrics",
    "quantile_ranks",
    "reliability_diagram",
]
