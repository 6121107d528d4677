"""Metrics of scores that arrive in batches, each a ``torchmetrics.Metric``: extra ``metrics``."""

from oodkernels._optional import require

require("torchmetrics", "metrics", "oodkernels.metrics.streaming")

# ruff: noqa: E402
from oodkernels.metrics.streaming.calibration import CalibrationError
from oodkernels.metrics.streaming.misclassification import MisclassificationMetrics
from oodkernels.metrics.streaming.ood import OODMetrics

__all__ = ["CalibrationError", "MisclassificationMetrics", "OODMetrics"]
