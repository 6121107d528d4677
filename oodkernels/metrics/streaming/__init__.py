"""Metrics of scores that arrive in batches."""

from oodkernels.metrics.streaming.ood import OODMetrics

__all__ = ["OODMetrics"]
