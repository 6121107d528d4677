"""Measures of detectors, and thresholds."""

from oodkernels.metrics.intervals import auroc_interval, clopper_pearson, delong, quantile_ranks
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
    "Convention",
    "OODResult",
    "OODResults",
    "Threshold",
    "ThresholdSource",
    "auroc_interval",
    "clopper_pearson",
    "compare_conventions",
    "delong",
    "fpr_name",
    "ood_metrics",
    "quantile_ranks",
]
