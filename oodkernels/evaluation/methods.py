"""What an evaluation knows of each detector and each model: scores, figures, "others"."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from oodkernels.evaluation.tables import AVERAGE, printable
from oodkernels.metrics.ood import OODResults, ood_metrics

if TYPE_CHECKING:
    from oodkernels.metrics.streaming.ood import OODMetrics, ScoreLevels

Array: TypeAlias = NDArray[Any]

__all__ = [
    "Array",
    "GroupOthers",
    "Levels",
    "MethodResult",
    "StreamedMethodResult",
    "Sweep",
]

OWN, OTHER = "ID, own group", "ID, other groups"


class Levels(NamedTuple):
    """Distinct scores, ascending, and how many of either side have each."""

    values: Array
    n_id: Array
    n_ood: Array


@dataclass(frozen=True, eq=False)
class _Named:
    model: str
    score: str
    id_accuracy: float

    def __post_init__(self) -> None:
        for name in ("model", "score"):
            object.__setattr__(self, name, printable(getattr(self, name)))

    @property
    def name(self) -> str:
        """Model and score in one label."""
        return f"{self.model}: {self.score}"


@dataclass(frozen=True, eq=False)
class MethodResult(_Named):
    """Scores of one detector on every test set.

    Attributes:
        model: Name of the model that gave the scores.
        score: Name of the score.
        id_accuracy: Share of ID test samples that the model classifies right; NaN if not known.
        id_scores: (N,) higher = more ID.
        ood_scores: OOD set -> (M,) scores.
        convention: Of :func:`oodkernels.ood_metrics`.
    """

    id_scores: Array
    ood_scores: Mapping[str, Array]
    convention: str = "default"

    def __post_init__(self) -> None:
        super().__post_init__()
        sets = {printable(name): scores for name, scores in self.ood_scores.items()}
        object.__setattr__(self, "ood_scores", sets)

    @cached_property
    def results(self) -> OODResults:
        """OOD set -> metrics."""
        return ood_metrics(self.id_scores, self.ood_scores, convention=self.convention)

    @property
    def figures(self) -> dict[str, dict[str, float]]:
        """OOD set -> figure -> value, the average last."""
        per_set = {name: result.as_dict() for name, result in self.results.items()}
        return {**per_set, AVERAGE: self.results.average}

    @property
    def sizes(self) -> tuple[int, dict[str, int]]:
        """Number of ID scores, and of those of each OOD set."""
        return len(self.id_scores), {name: len(s) for name, s in self.ood_scores.items()}

    @property
    def threshold(self) -> float:
        """The largest score at or above which lie at least 95 % of the ID scores."""
        return next(iter(self.results.values())).threshold

    def levels(self, ood_set: str) -> Levels:
        """The scores as they are counted in histograms and ROC curves."""
        inside, outside = np.asarray(self.id_scores), np.asarray(self.ood_scores[ood_set])
        values, place = np.unique(np.concatenate((inside, outside)), return_inverse=True)
        n_id = np.bincount(place[: len(inside)], minlength=len(values))
        return Levels(values, n_id, np.bincount(place[len(inside) :], minlength=len(values)))


@dataclass(frozen=True, eq=False)
class StreamedMethodResult(_Named):
    """What a metric of fixed size knows of one detector's scores; reads like a `MethodResult`.

    ``figures`` have ``..._lower`` and ``..._upper`` beside each, between which the figure of the
    whole stream lies.
    """

    metric: OODMetrics
    convention: str = "default"

    @cached_property
    def figures(self) -> dict[str, dict[str, float]]:
        """OOD set -> figure -> value, the average last."""
        result: dict[str, dict[str, float]] = self.metric.compute()
        return result

    @property
    def sizes(self) -> tuple[int, dict[str, int]]:
        """Number of ID scores, and of those of each OOD set."""
        sets = {name: f for name, f in self.figures.items() if name != AVERAGE}
        n_id = int(next(iter(sets.values()))["n_id"])
        return n_id, {name: int(values["n_ood"]) for name, values in sets.items()}

    @property
    def threshold(self) -> float:
        """The largest score at or above which lie at least 95 % of the ID scores."""
        return next(iter(self.figures.values()))["threshold"]

    def levels(self, ood_set: str) -> Levels:
        """The bins of the scores, by their lower ends."""
        return Levels(*self._levels[ood_set])

    @cached_property
    def _levels(self) -> dict[str, ScoreLevels]:
        return self.metric.levels()


@dataclass(frozen=True)
class GroupOthers:
    """What a MOS model's "others" say about each test set.

    Attributes:
        name: Name of the model.
        groups: Per group, the classes in it.
        names: Of the groups.
        others: Kind of sample -> mean p_others per group. The kinds are the ID samples of the
            group's own classes, the other ID samples (all of them as one where labels are not
            known), and each OOD set.
        min_others: Test set -> mean over its samples of the least p_others, the negated MOS score.
    """

    name: str
    groups: list[list[int]]
    names: list[str]
    others: dict[str, list[float]]
    min_others: dict[str, float]


@dataclass(frozen=True)
class Sweep:
    """How a figure depends on something: the papers' curves of FPR95 over the number of classes.

    Attributes:
        series: Method -> points (x, fraction); several at one x are drawn as their mean, and the
            band of one standard deviation around it.
        x: What is varied.
        y: What is measured.
    """

    series: dict[str, list[tuple[float, float]]]
    x: str = "number of classes"
    y: str = "FPR95"


def ood_set_names(methods: Iterable[MethodResult | StreamedMethodResult]) -> list[str]:
    """Every OOD set that a method was tried on, in the order they come in."""
    return list(dict.fromkeys(name for method in methods for name in method.sizes[1]))
