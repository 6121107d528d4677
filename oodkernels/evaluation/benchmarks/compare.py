"""Runs of a benchmark side by side: what differs, paired tests, means over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from oodkernels._files import read_json
from oodkernels.data import open_samples
from oodkernels.data.arrays import PathLike
from oodkernels.evaluation.benchmarks.result import RESULT_FORMAT
from oodkernels.evaluation.benchmarks.run import differences
from oodkernels.metrics.comparison import ComparisonResult, compare_detectors

__all__ = ["FinishedRun", "RunComparison", "compare_runs", "read_finished"]


@dataclass(frozen=True, eq=False)
class FinishedRun:
    """A run of `oodk benchmark` that has its results.

    Attributes:
        folder: Where it is.
        name: What it is called beside others.
        record: Its ``results.json``.
    """

    folder: Path
    name: str
    record: Mapping[str, Any]

    @property
    def identity(self) -> Mapping[str, Any]:
        """What its figures are of."""
        found: Mapping[str, Any] = self.record["identity"]
        return found

    @property
    def data(self) -> dict[str, Any]:
        """The part of the identity that says which samples its figures are of."""
        tested = {
            key: {**one, "skipped": self.identity["skipped"].get(key, [])}
            for key, one in self.identity["data"].items()
            if key == "id/test" or key.partition("/")[0] in ("near", "far", "shifted")
        }
        return {"benchmark": self.identity["benchmark"], "data": tested}

    @property
    def detectors(self) -> list[str]:
        """Labels of its detectors."""
        return list(self.identity["detectors"])

    def figure(self, score: str, ood_set: str, figure: str, spectrum: str = "standard") -> float:
        """A figure of a detector on a set or average; NaN where it is not there."""
        for row in self.record["results"]:
            if (row["score"], row["ood_set"], row["spectrum"]) == (score, ood_set, spectrum):
                return math.nan if row[figure] is None else float(row[figure])
        return math.nan

    def scores(self, key: str, score: str) -> Tensor:
        """(N,) scores of a set by a detector.

        Raises:
            ValueError: They are not there.
        """
        path = self.folder / self.record["files"][score].format(set=key.replace("/", "-"))
        if not path.is_file():
            raise ValueError(f"{self.folder} has no scores of {key} by {score}: {path} is gone")
        return open_samples(path).read("scores")


def read_finished(folder: PathLike, name: str | None = None) -> FinishedRun:
    """The run in a folder.

    Args:
        folder: Of `oodk benchmark`.
        name: What it is called beside others; by default the folder's name.

    Raises:
        ValueError: There are no results of a benchmark.
        OSError: They cannot be read.
    """
    folder = Path(folder)
    path = folder / "results.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no results of oodk benchmark: there is no results.json")
    record = read_json(str(path), path.read_text(encoding="utf-8"), RESULT_FORMAT, 1)
    return FinishedRun(folder, name or folder.resolve().name, record)


@dataclass(frozen=True, eq=False)
class RunComparison:
    """Runs on the same data.

    Attributes:
        runs: In the order they were given.
        detectors: Labels that are compared, those of any run.
        differing: What else than the data differs between the first run and another, in words.
    """

    runs: Sequence[FinishedRun]
    detectors: Sequence[str]
    differing: Sequence[str]

    @cached_property
    def paired(self) -> ComparisonResult:
        """Paired tests of every detector of every run, "run: detector", on all OOD sets."""
        kinds = {
            key.partition("/")[2]: key
            for key in self.runs[0].identity["data"]
            if key.partition("/")[0] in ("near", "far")
        }
        each = [(run, d) for run in self.runs for d in self.detectors if d in run.detectors]
        return compare_detectors(
            {f"{run.name}: {d}": run.scores("id/test", d) for run, d in each},
            {
                name: {f"{run.name}: {d}": run.scores(key, d) for run, d in each}
                for name, key in kinds.items()
            },
        )

    def means(self, ood_set: str, figure: str) -> dict[str, tuple[float, float]]:
        """Detector -> mean and standard deviation of a figure over the runs, as replicates.

        Args:
            ood_set: A set, or "near", "far" or "all".
            figure: One of ``FIGURES``.

        Raises:
            ValueError: Preprocessing or detectors' settings differ: then they are no replicates.
        """
        if wrong := [text for text in self.differing if not text.startswith(_REPLICATES)]:
            raise ValueError(f"runs are no replicates of each other: {'; '.join(wrong[:5])}")
        found = {}
        for detector in self.detectors:
            values = [run.figure(detector, ood_set, figure) for run in self.runs]
            if not any(map(math.isnan, values)):
                found[detector] = statistics.fmean(values), statistics.stdev(values)
        return found

    def as_dict(self) -> dict[str, Any]:
        """What was found, as JSON has it."""
        paired = self.paired
        return {
            "runs": {run.name: str(run.folder) for run in self.runs},
            "differing": list(self.differing),
            "results": [
                {"run": run.name, **row}
                for run in self.runs
                for row in run.record["results"]
                if row["score"] in self.detectors
            ],
            "not_told_from_best": {
                name: {
                    "auroc": paired.as_good_as_best(name),
                    "fpr95": paired.as_good_as_best(name, "fpr"),
                }
                for name in paired.sets
            },
            "pairs": [
                {
                    "ood_set": name,
                    "a": a,
                    "b": b,
                    "auroc_difference": pair.auroc_difference,
                    "auroc_interval": list(pair.auroc_interval),
                    "auroc_p_holm": paired.p_auroc[name, a, b],
                    "fpr95_difference": pair.fpr_difference,
                    "fpr95_interval": list(pair.fpr_interval),
                    "fpr95_p_holm": paired.p_fpr[name, a, b],
                }
                for (name, a, b), pair in paired.pairs.items()
            ],
        }


_REPLICATES = ("model.weights", "model.name", "detectors.")
"""What may differ between runs of several seeds: settings too, where each chose its own."""


def compare_runs(
    runs: Sequence[FinishedRun], detectors: Sequence[str] | None = None
) -> RunComparison:
    """Runs side by side.

    Args:
        runs: At least two, with names of their own.
        detectors: Labels; by default those that all runs have.

    Raises:
        ValueError: The runs measured on different data (the message says which), a name is there
            twice, there are fewer than two runs, or no run has a detector.
    """
    if len(runs) < 2:
        raise ValueError(f"compare_runs: there must be two runs, got {len(runs)}")
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise ValueError(f"compare_runs: two runs are called {names[0]!r}: say NAME=FOLDER")
    first = runs[0]
    for run in runs[1:]:
        if wrong := differences(first.data, run.data):
            raise ValueError(
                f"{first.folder} and {run.folder} were measured on different data: "
                + "; ".join(wrong[:5])
            )
    shared = [d for d in first.detectors if all(d in run.detectors for run in runs)]
    chosen = shared if detectors is None else list(detectors)
    for detector in chosen:
        if not any(detector in run.detectors for run in runs):
            raise ValueError(f"compare_runs: no run has the detector {detector!r}")
    if not chosen:
        raise ValueError("compare_runs: the runs share no detector: name those of each")
    differing: list[str] = []
    for run in runs[1:]:
        one, other = ({**r.identity, "data": None} for r in (first, run))
        for each in (one, other):
            each["detectors"] = {d: w for d, w in each["detectors"].items() if d in shared}
        differing += [text for text in differences(one, other) if text not in differing]
    return RunComparison(runs, chosen, differing)
