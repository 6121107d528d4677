"""OOD detection metrics: positive = ID, scores higher = more ID."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import average_precision_score, roc_auc_score

Array = NDArray[Any]

AVERAGE = "average"
METRICS = ("fpr95", "auroc", "aupr_in", "aupr_out")
CONVENTION = {
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


def ood_metrics(id_scores: ArrayLike, ood_scores: ArrayLike) -> dict[str, float]:
    """How well scores tell ID from OOD; see :data:`CONVENTION` for each metric's definition.

    Args:
        id_scores: (N,) scores of ID samples, higher = more ID; infinities are allowed.
        ood_scores: (M,) scores of OOD samples.

    Returns:
        ``fpr95`` (lower is better), ``auroc``, ``aupr_in`` and ``aupr_out``, each in [0, 1].

    Raises:
        ValueError: Scores are not a vector, or empty, or hold a NaN.
    """
    inside, outside = _checked("id_scores", id_scores), _checked("ood_scores", ood_scores)
    is_id = np.arange(len(inside) + len(outside)) < len(inside)
    # Ranks order and tie as the scores do, and are finite.
    ranks = np.unique(np.concatenate([inside, outside]), return_inverse=True)[1]
    kept = ranks[~is_id] >= threshold(ranks[is_id])
    return {
        "fpr95": float(kept.mean()),
        "auroc": float(roc_auc_score(is_id, ranks)),
        "aupr_in": float(average_precision_score(is_id, ranks)),
        "aupr_out": float(average_precision_score(~is_id, -ranks)),
    }


def threshold(id_scores: Array, percent: int = 95) -> Any:
    """The largest score at or above which lie at least ``percent`` % of ``id_scores`` (N,)."""
    kept = -(-percent * len(id_scores) // 100)
    return np.sort(id_scores)[-kept]


def evaluate(methods: Iterable[Method]) -> list[Row]:
    """The table of results: per method one row for each OOD set, then their average."""
    rows = []
    for method in methods:
        per_set = {name: ood_metrics(method.id_scores, s) for name, s in method.ood_scores.items()}
        sizes = {name: len(scores) for name, scores in method.ood_scores.items()}
        per_set[AVERAGE] = {
            metric: float(np.mean([values[metric] for values in per_set.values()]))
            for metric in METRICS
        }
        sizes[AVERAGE] = sum(sizes.values())
        rows += [
            Row(
                ood_set=name,
                model=method.model,
                score=method.score,
                id_accuracy=method.id_accuracy,
                n_id=len(method.id_scores),
                n_ood=sizes[name],
                **values,
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


def _checked(name: str, scores: ArrayLike) -> Array:
    array = np.asarray(scores)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"ood_metrics: {name} must be a non-empty vector, got {array.shape}")
    nans = np.flatnonzero(np.isnan(array))
    if nans.size:
        raise ValueError(
            f"ood_metrics: {name} must not hold NaN, got {nans.size}, the first at index {nans[0]}"
        )
    return array
