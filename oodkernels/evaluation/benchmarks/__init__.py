"""The field's benchmarks, and one's own, run from images or extracted files to tables."""

from oodkernels.evaluation.benchmarks.compare import (
    FinishedRun,
    RunComparison,
    compare_runs,
    read_finished,
)
from oodkernels.evaluation.benchmarks.definition import (
    BENCHMARKS,
    Benchmark,
    SetDefinition,
    read_benchmark,
)
from oodkernels.evaluation.benchmarks.failures import (
    FailingSample,
    FailingSamples,
    failing_samples,
    thumbnail,
)
from oodkernels.evaluation.benchmarks.result import FIGURES, BenchmarkResult, BenchmarkRow
from oodkernels.evaluation.benchmarks.run import BenchmarkModel, BenchmarkRun
from oodkernels.evaluation.benchmarks.sources import MissingDataError, OpenSet, open_sets

__all__ = [
    "BENCHMARKS",
    "FIGURES",
    "Benchmark",
    "BenchmarkModel",
    "BenchmarkResult",
    "BenchmarkRow",
    "BenchmarkRun",
    "FailingSample",
    "FailingSamples",
    "FinishedRun",
    "MissingDataError",
    "OpenSet",
    "RunComparison",
    "SetDefinition",
    "compare_runs",
    "failing_samples",
    "open_sets",
    "read_benchmark",
    "read_finished",
    "thumbnail",
]
