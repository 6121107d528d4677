"""Detectors compared on data sets, their tables and reports."""

from oodkernels.evaluation.evaluate import evaluate
from oodkernels.evaluation.methods import (
    Array,
    GroupOthers,
    Levels,
    MethodResult,
    StreamedMethodResult,
    Sweep,
)
from oodkernels.evaluation.results import Evaluation, combine, plain, software, write_texts
from oodkernels.evaluation.scoring import (
    DEFAULT_DETECTORS,
    ScoredBatch,
    as_detectors,
    score_sets,
    source_of,
)

__all__ = [
    "DEFAULT_DETECTORS",
    "Array",
    "Evaluation",
    "GroupOthers",
    "Levels",
    "MethodResult",
    "ScoredBatch",
    "StreamedMethodResult",
    "Sweep",
    "as_detectors",
    "combine",
    "evaluate",
    "plain",
    "score_sets",
    "software",
    "source_of",
    "write_texts",
]
