"""Measures of detectors, and thresholds."""

from oodkernels.metrics.calibration import (
    CalibrationBins,
    calibration_bins,
    expected_calibration_error,
    reliability_diagram,
)
from oodkernels.metrics.comparison import (
    ComparisonResult,
    PairedResult,
    compare_detectors,
    holm,
    paired_test,
)
from oodkernels.metrics.dense import id_and_ood
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
    higher_is_better,
    ood_metrics,
    precision_recall_areas,
)
from oodkernels.metrics.open_set import (
    OpenSetResult,
    RiskCoverageResult,
    open_set_metrics,
    risk_coverage,
)
from oodkernels.metrics.threshold import Threshold, ThresholdSource

__all__ = [
    "CONVENTIONS",
    "FIGURES",
    "CalibrationBins",
    "ComparisonResult",
    "Convention",
    "MisclassificationResult",
    "OODResult",
    "OODResults",
    "OpenSetResult",
    "PairedResult",
    "RiskCoverageResult",
    "Threshold",
    "ThresholdSource",
    "auroc_interval",
    "calibration_bins",
    "clopper_pearson",
    "compare_conventions",
    "compare_detectors",
    "delong",
    "expected_calibration_error",
    "fpr_name",
    "higher_is_better",
    "holm",
    "id_and_ood",
    "misclassification_metrics",
    "ood_metrics",
    "open_set_metrics",
    "paired_test",
    "precision_recall_areas",
    "quantile_ranks",
    "reliability_diagram",
    "risk_coverage",
]
