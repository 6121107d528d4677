"""Detectors compared on data sets, their tables and reports."""

from oodkernels.evaluation._evaluate import (
    Evaluation,
    GroupOthers,
    Method,
    StreamedMethod,
    Sweep,
    evaluate,
)

__all__ = ["Evaluation", "GroupOthers", "Method", "StreamedMethod", "Sweep", "evaluate"]
