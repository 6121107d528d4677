"""Detectors' scores on every test set, and the table of results made of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from numpy.typing import NDArray

from oodkernels.metrics import OODResults, ood_metrics

Array = NDArray[Any]

AVERAGE = "average"
METRICS = ("fpr95", "auroc", "aupr_in", "aupr_out")
CONVENTION = {
    "name": "default",
    "scores": "higher = more in-distribution (ID)",
    "positive": "ID",
    "fpr95": "share of OOD kept at the largest threshold t with TPR(score >= t) >= 0.95, "
    "from exact counts; OOD scores equal to t count as kept",
    "auroc": "probability that an ID score exceeds an OOD score, ties counted half",
    "aupr_in": "average precision with ID as positive, tied scores grouped",
    "aupr_out": "average precision with OOD as positive and the scores negated",
    "average": "unweighted mean over the OOD sets",
}


@dataclass(frozen=True)
class Method:
    """Scores of one detector on every test set.

    Attributes:
        model: Name of the model that gave the scores.
        score: Name of the score.
        id_accuracy: Share of ID test samples that the model classifies right.
        id_scores: (N,) higher = more ID.
        ood_scores: OOD set -> (M,) scores.
    """

    model: str
    score: str
    id_accuracy: float
    id_scores: Array
    ood_scores: Mapping[str, Array]

    @property
    def name(self) -> str:
        """Model and score in one label."""
        return f"{self.model}: {self.score}"

    @cached_property
    def results(self) -> OODResults:
        """OOD set -> metrics."""
        return ood_metrics(self.id_scores, self.ood_scores, convention=CONVENTION["name"])

    @property
    def threshold(self) -> float:
        """The largest score at or above which lie at least 95 % of the ID scores."""
        return next(iter(self.results.values())).threshold


class Row(NamedTuple):
    """One line of a results table: one method on one OOD set, or its average over them."""

    ood_set: str
    model: str
    score: str
    id_accuracy: float
    fpr95: float
    auroc: float
    aupr_in: float
    aupr_out: float
    n_id: int
    n_ood: int


def evaluate(methods: Iterable[Method]) -> list[Row]:
    """The table of results: per method one row for each OOD set, then their average."""
    rows = []
    for method in methods:
        results = method.results
        per_set = {name: result.as_dict() for name, result in results.items()}
        sizes = {name: result.n_ood for name, result in results.items()}
        per_set[AVERAGE], sizes[AVERAGE] = results.average, sum(sizes.values())
        rows += [
            Row(
                ood_set=name,
                model=method.model,
                score=method.score,
                id_accuracy=method.id_accuracy,
                n_id=len(method.id_scores),
                n_ood=sizes[name],
                **{metric: values[metric] for metric in METRICS},
            )
            for name, values in per_set.items()
        ]
    return rows


def best(rows: Iterable[Row]) -> dict[tuple[str, str], float]:
    """(OOD set, metric) -> best value over the methods; the smallest for FPR95, else the largest.

    For ``id_accuracy`` too.
    """
    values: dict[tuple[str, str], float] = {}
    for row in rows:
        for metric in ("id_accuracy", *METRICS):
            better = min if metric == "fpr95" else max
            value = getattr(row, metric)
            key = (row.ood_set, metric)
            values[key] = better(values.get(key, value), value)
    return values
