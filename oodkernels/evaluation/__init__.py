"""Detectors compared on data sets, their tables and reports."""

from oodkernels.evaluation._evaluate import (
    DEFAULT_DETECTORS,
    Array,
    Evaluation,
    GroupOthers,
    Method,
    StreamedMethod,
    Sweep,
    as_detectors,
    combine,
    evaluate,
    read_parts,
    score_part,
    software,
)

__all__ = [
    "DEFAULT_DETECTORS",
    "Array",
    "Evaluation",
    "GroupOthers",
    "Method",
    "StreamedMethod",
    "Sweep",
    "as_detectors",
    "combine",
    "evaluate",
    "read_parts",
    "score_part",
    "software",
]
