"""The ops as Python functions; as torch ops they are ``torch.ops.oodk.*``."""

from oodkernels.ops.logits import LogitScores, logit_scores
from oodkernels.ops.mos import MOSPrediction, mos_log_others, mos_loss, mos_predict, mos_score
from oodkernels.ops.roc import ROCMetrics, roc_metrics

__all__ = [
    "LogitScores",
    "MOSPrediction",
    "ROCMetrics",
    "logit_scores",
    "mos_log_others",
    "mos_loss",
    "mos_predict",
    "mos_score",
    "roc_metrics",
]
