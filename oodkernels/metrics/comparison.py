"""Paired tests between detectors that have scored the same samples.

Two detectors' figures on the same samples err together, so that their difference is known better
than either. Scores are higher = more in-distribution (ID).

- *AUROC*: DeLong, DeLong & Clarke-Pearson, Comparing the areas under two or more correlated
  receiver operating characteristic curves, Biometrics 1988; variances from exact integer sums.
- *FPR at a TPR*, positive = ID, by the rule of :func:`oodkernels.metrics.ood_metrics`: a normal
  interval from the influence of every sample. An OOD sample counts by whether each detector keeps
  it; an ID sample moves each threshold, and with it the FPR by the slope of the ROC curve there,
  which is measured between the ends of the confidence interval of the TPR (a difference quotient,
  as in Woodruff, Confidence intervals for medians and other position measures, JASA 1952).
- *Many comparisons*: Holm, A simple sequentially rejective multiple test procedure, Scandinavian
  Journal of Statistics 1979, over all pairs of detectors on all sets, so that a best detector that
  was found on the same data may be compared with the others.

- *Samples that are not independent*, such as those of one class, one scene or one patient: given
  their classes, variances come from sums over classes (Obuchowski, Nonparametric analysis of
  clustered ROC curve data, Biometrics 1997), and speak of classes drawn anew.

All are asymptotic: near their nominal coverage from some tens of samples, or classes, a side on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import NormalDist
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from oodkernels._checks import (
    check_confidence,
    check_integers,
    check_no_nan,
    check_number,
    check_tpr,
)
from oodkernels.metrics.intervals import Interval, delong
from oodkernels.metrics.ood import Scores, as_tensor, fpr_name, from_array, in_one_line, text_table
from oodkernels.ops.roc import exact_ceil

__all__ = [
    "ComparisonResult",
    "PairedResult",
    "compare_detectors",
    "holm",
    "paired_test",
]

Ints: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]
Figure: TypeAlias = Literal["auroc", "fpr"]

_FEWEST_REJECTED = 5
"""ID scores below a threshold for its FPR to be near normal."""


@dataclass(frozen=True)
class PairedResult:
    """Detector a against detector b on the same samples; differences are a's figure less b's.

    Attributes:
        auroc: AUROC of a and of b.
        auroc_difference: Theirs.
        auroc_standard_error: Of the difference, see this module's head; NaN where a side has one
            sample, or one class.
        auroc_interval: Of the population's difference.
        auroc_p: Two-sided p-value of no difference.
        fpr: FPR at the TPR of a and of b.
        fpr_difference: Theirs.
        fpr_standard_error: Of the difference, see this module's head; NaN where fewer than five ID
            scores lie below a threshold, or a side has one sample or class.
        fpr_interval: Of the population's difference; (-1, 1) where the standard error is NaN.
        fpr_p: Two-sided p-value of no difference; 1 where the standard error is NaN.
        tpr: The TPR asked for.
        confidence: Of the intervals.
        n_id: Number of ID samples.
        n_ood: Number of OOD samples.
        id_units: Number of ID samples, or of their classes where these are given.
        ood_units: Number of OOD samples, or of their classes where these are given.
    """

    auroc: tuple[float, float]
    auroc_difference: float
    auroc_standard_error: float
    auroc_interval: Interval
    auroc_p: float
    fpr: tuple[float, float]
    fpr_difference: float
    fpr_standard_error: float
    fpr_interval: Interval
    fpr_p: float
    tpr: float
    confidence: float
    n_id: int
    n_ood: int
    id_units: int
    ood_units: int


@dataclass(frozen=True)
class ComparisonResult:
    """All pairs of detectors on all sets; returned by :func:`compare_detectors`, prints a table.

    Attributes:
        detectors: Their names.
        sets: Names of the OOD sets.
        pairs: (OOD set, detector a, detector b) -> :class:`PairedResult`, each pair once, in the
            order of ``detectors``.
        p_auroc: The same keys -> p-value of the AUROCs' difference, corrected by Holm over all.
        p_fpr: Likewise of the FPRs'.
        level: Corrected p-values at or above it are no evidence of a difference: 1 - confidence.
    """

    detectors: tuple[str, ...]
    sets: tuple[str, ...]
    pairs: dict[tuple[str, str, str], PairedResult]
    p_auroc: dict[tuple[str, str, str], float]
    p_fpr: dict[tuple[str, str, str], float]
    level: float

    def figures(self, ood_set: str, figure: Figure = "auroc") -> dict[str, float]:
        """A figure of every detector on a set."""
        found: dict[str, float] = {}
        for (of, *names), pair in self.pairs.items():
            if of == ood_set:
                found.update(zip(names, getattr(pair, figure), strict=True))
        return {name: found[name] for name in self.detectors}

    def best(self, ood_set: str, figure: Figure = "auroc") -> str:
        """The detector with the highest AUROC, or the lowest FPR, on a set; of equals the first."""
        found = self.figures(ood_set, figure)
        return min(found, key=lambda name: found[name] * (-1 if figure == "auroc" else 1))

    def as_good_as_best(self, ood_set: str, figure: Figure = "auroc") -> list[str]:
        """The best detector on a set, and all that the data do not tell from it."""
        best = self.best(ood_set, figure)
        p = self.p_auroc if figure == "auroc" else self.p_fpr
        return [
            name
            for name in self.detectors
            if name == best
            or p.get((ood_set, name, best), p.get((ood_set, best, name), 1.0)) >= self.level
        ]

    def __str__(self) -> str:
        """Figures in percent, a row a detector; ``=`` marks what is not told from the best."""
        fpr = fpr_name(next(iter(self.pairs.values())).tpr)
        header, columns = ["detector"], []
        for name in self.sets:
            figures: dict[Figure, str] = {"auroc": "auroc", "fpr": fpr}
            for figure, called in figures.items():
                header.append(f"{in_one_line(name)} {called}")
                found = self.figures(name, figure)
                marked = self.as_good_as_best(name, figure)
                columns.append(
                    [f"{100 * found[d]:.2f}{'=' if d in marked else ' '}" for d in self.detectors]
                )
        rows = [
            [in_one_line(name), *cells]
            for name, cells in zip(self.detectors, zip(*columns, strict=True), strict=True)
        ]
        return text_table([header, *rows]) + (
            f"\n= not told from the best of its column at level {self.level:g}, Holm over all pairs"
        )


def paired_test(
    id_scores: tuple[Scores, Scores],
    ood_scores: tuple[Scores, Scores],
    *,
    tpr: float = 0.95,
    confidence: float = 0.95,
    id_classes: ArrayLike | Tensor | None = None,
    ood_classes: ArrayLike | Tensor | None = None,
) -> PairedResult:
    """Whether one detector is better than another, from their scores of the same samples.

    Args:
        id_scores: Of detectors a and b: scores of the same ID samples in the same order, as for
            :func:`oodkernels.metrics.ood_metrics`. The detectors' scales need not be the same.
        ood_scores: Of detectors a and b: scores of the same OOD samples in the same order.
        tpr: 0 < tpr <= 1 of the FPR, read as the decimal it prints as.
        confidence: Of the intervals, in (0, 1).
        id_classes: Integers, one for each ID sample: samples of one class are not independent, as
            this module's head has it. None if all samples are.
        ood_classes: Likewise of the OOD samples.

    Returns:
        A :class:`PairedResult`. Exact up to the normal approximation, in O(n log n).

    Raises:
        ValueError: Scores are empty or hold NaN, scores or classes are not one for each sample, or
            ``tpr`` or ``confidence`` is out of range.
        TypeError: Scores are not numbers, or classes not integers.
    """
    where = "paired_test"
    tpr, confidence = check_tpr(where, tpr), check_confidence(where, confidence)
    if len(id_scores) != 2 or len(ood_scores) != 2:
        raise ValueError(
            f"{where}: id_scores and ood_scores must be pairs, one for each detector, got "
            f"{len(id_scores)} and {len(ood_scores)}"
        )
    inside = [_checked(where, f"id_scores[{i}]", id_scores[i]) for i in (0, 1)]
    outside = [_checked(where, f"ood_scores[{i}]", ood_scores[i]) for i in (0, 1)]
    _same_samples(where, ("id_scores[1]", inside[1]), ("id_scores[0]", inside[0]))
    _same_samples(where, ("ood_scores[1]", outside[1]), ("ood_scores[0]", outside[0]))
    a, b = (_Ranked(x, y, tpr) for x, y in zip(inside, outside, strict=True))
    classes = (
        _units(where, "id_classes", id_classes, a.n),
        _units(where, "ood_classes", ood_classes, a.m),
    )
    return _paired(a, b, classes, tpr, confidence)


def compare_detectors(
    id_scores: Mapping[str, Scores],
    ood_scores: Mapping[str, Mapping[str, Scores]],
    *,
    tpr: float = 0.95,
    confidence: float = 0.95,
    id_classes: ArrayLike | Tensor | None = None,
    ood_classes: Mapping[str, ArrayLike | Tensor] | None = None,
) -> ComparisonResult:
    """All pairs of detectors on all OOD sets, with p-values corrected for their number.

    Args:
        id_scores: Detector -> scores of the same ID samples in the same order.
        ood_scores: OOD set -> detector -> scores of the set's samples in the same order.
        tpr: As for :func:`paired_test`.
        confidence: Of the intervals; its rest is the level of the corrected tests.
        id_classes: As for :func:`paired_test`.
        ood_classes: OOD set -> classes of its samples; sets that are not there have none.

    Returns:
        A :class:`ComparisonResult`.

    Raises:
        ValueError: There are fewer than two detectors or no set, a set has other detectors, classes
            are of a set that is not there, or as :func:`paired_test`.
        TypeError: As :func:`paired_test`.

    Example:
        >>> print(compare_detectors({"msp": a, "energy": b}, {"near": {"msp": c, "energy": d}}))
    """
    where = "compare_detectors"
    tpr, confidence = check_tpr(where, tpr), check_confidence(where, confidence)
    names = tuple(id_scores)
    if len(names) < 2 or not ood_scores:
        raise ValueError(
            f"{where}: there must be two detectors and one OOD set, got {len(names)} and "
            f"{len(ood_scores)}"
        )
    inside = {d: _checked(where, f"id_scores[{d!r}]", id_scores[d]) for d in names}
    for d in names:
        _same_samples(
            where, (f"id_scores[{d!r}]", inside[d]), (f"id_scores[{names[0]!r}]", inside[names[0]])
        )
    ood_classes = ood_classes or {}
    if unknown := ood_classes.keys() - ood_scores.keys():
        raise ValueError(
            f"{where}: ood_classes must be of sets in ood_scores, {list(ood_scores)}, got "
            f"{sorted(unknown)}"
        )
    id_units = _units(where, "id_classes", id_classes, len(inside[names[0]]))
    pairs = {}
    for set_name, scores in ood_scores.items():
        if scores.keys() != id_scores.keys():
            raise ValueError(
                f"{where}: ood_scores[{set_name!r}] must have the detectors {list(names)}, got "
                f"{list(scores)}"
            )
        prefix = f"ood_scores[{set_name!r}]"
        outside = {d: _checked(where, f"{prefix}[{d!r}]", scores[d]) for d in names}
        first = f"{prefix}[{names[0]!r}]", outside[names[0]]
        for d in names:
            _same_samples(where, (f"{prefix}[{d!r}]", outside[d]), first)
        given, n_ood = ood_classes.get(set_name), len(first[1])
        classes = id_units, _units(where, f"ood_classes[{set_name!r}]", given, n_ood)
        ranked = {d: _Ranked(inside[d], outside[d], tpr) for d in names}
        for a, b in combinations(names, 2):
            pairs[set_name, a, b] = _paired(ranked[a], ranked[b], classes, tpr, confidence)
    return ComparisonResult(
        names,
        tuple(ood_scores),
        pairs,
        dict(zip(pairs, holm([pair.auroc_p for pair in pairs.values()]), strict=True)),
        dict(zip(pairs, holm([pair.fpr_p for pair in pairs.values()]), strict=True)),
        1 - confidence,
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number: any below a level errs at most that often in all.

    The i-th smallest of m is multiplied by m - i + 1, and is at least the one before it; valid
    however the tests depend on each other.

    Args:
        p_values: Each in [0, 1].

    Returns:
        The corrected ones in the same order, at most 1.

    Raises:
        ValueError: One is NaN or outside [0, 1].
        TypeError: One is not a number.
    """
    p = [check_number("holm", f"p_values[{i}]", value) for i, value in enumerate(p_values)]
    for i, value in enumerate(p):
        if not 0 <= value <= 1:
            raise ValueError(f"holm: p_values[{i}] must be in [0, 1], got {value}")
    corrected, least = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        least = max(least, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = least
    return corrected


class _Ranked:
    """What of a detector's scores its comparisons need, by sample."""

    def __init__(self, inside: Tensor, outside: Tensor, tpr: float) -> None:
        ids, oods = inside.sort().values, outside.sort().values
        n, m = len(ids), len(oods)

        def below_twice(scores: Tensor, among: Tensor) -> Ints:
            """2 #{lower} + #{equal} of each score."""
            lower = torch.searchsorted(among, scores)
            found: Ints = (lower + torch.searchsorted(among, scores, right=True)).cpu().numpy()
            return found

        self.by_id = below_twice(inside, oods)
        self.by_ood = 2 * n - below_twice(outside, ids)
        self.n, self.m, self.wins = n, m, int(self.by_id.sum())

        def kept_from(rank: int) -> tuple[int, int]:
            """ID and OOD scores at or above the rank-th highest of the ID scores."""
            t = ids[n - rank]
            return n - int(torch.searchsorted(ids, t)), m - int(torch.searchsorted(oods, t))

        rank = exact_ceil(tpr, n)
        self.rejected = n - kept_from(rank)[0]
        self.id_kept = (inside >= ids[n - rank]).cpu().numpy()
        self.ood_kept = (outside >= ids[n - rank]).cpu().numpy()
        reach = 2 * math.sqrt(tpr * (1 - tpr) * n)
        ends = [kept_from(min(max(round(rank + step), 1), n)) for step in (-reach, reach)]
        gained = ends[1][0] - ends[0][0]
        self.slope = (ends[1][1] - ends[0][1]) / m * n / gained if gained else 0.0


def _paired(
    a: _Ranked, b: _Ranked, classes: tuple[Ints | None, Ints | None], tpr: float, confidence: float
) -> PairedResult:
    n, m = a.n, a.m
    id_units, ood_units = (
        size if of is None else int(of.max()) + 1 for of, size in zip(classes, (n, m), strict=True)
    )
    placed = a.by_id - b.by_id, a.by_ood - b.by_ood
    auroc, auroc_error = delong(a.wins - b.wins, n, m, *map(_sum_of_squares, placed))
    if any(of is not None for of in classes):
        auroc_error = _error((placed[0] / (2 * m), placed[1] / (2 * n)), classes)
    discordant = a.ood_kept.astype(np.int8) - b.ood_kept
    fpr = int(discordant.sum(dtype=np.int64)) / m
    fpr_error = math.nan
    if min(a.rejected, b.rejected) >= _FEWEST_REJECTED:
        moved = a.slope * a.id_kept - b.slope * b.id_kept
        fpr_error = _error((moved, discordant.astype(np.float64)), classes)
    auroc_interval, auroc_p = _verdict(auroc, auroc_error, min(id_units, ood_units), confidence)
    fpr_interval, fpr_p = _verdict(fpr, fpr_error, min(id_units, ood_units), confidence)
    return PairedResult(
        auroc=(a.wins / (2 * n * m), b.wins / (2 * n * m)),
        auroc_difference=auroc,
        auroc_standard_error=auroc_error,
        auroc_interval=auroc_interval,
        auroc_p=auroc_p,
        fpr=(int(a.ood_kept.sum()) / m, int(b.ood_kept.sum()) / m),
        fpr_difference=fpr,
        fpr_standard_error=fpr_error,
        fpr_interval=fpr_interval,
        fpr_p=fpr_p,
        tpr=tpr,
        confidence=confidence,
        n_id=n,
        n_ood=m,
        id_units=id_units,
        ood_units=ood_units,
    )


def _error(sides: tuple[Floats, Floats], classes: tuple[Ints | None, Ints | None]) -> float:
    """Standard error of a sum of means, one a side, of what each sample adds to it."""
    variance = 0.0
    for values, of in zip(sides, classes, strict=True):
        centred = values - values.mean()
        if of is not None:
            centred = np.bincount(of, centred)
        k = len(centred)
        if k < 2:
            return math.nan
        variance += k / (k - 1) * float(centred @ centred) / len(values) ** 2
    return math.sqrt(variance)


def _verdict(
    difference: float, error: float, pairs: int, confidence: float
) -> tuple[Interval, float]:
    """Interval and p-value of a difference in [-1, 1].

    A standard error of 0 says nothing but that the samples agree; then both are Hoeffding's for the
    mean of ``pairs`` independent values in [-1, 1] (JASA 1963, U-statistics among them).
    """
    if math.isnan(error):
        return (-1.0, 1.0), 1.0
    if error == 0:
        half = math.sqrt(2 * math.log(2 / (1 - confidence)) / pairs)
        p = min(1.0, 2 * math.exp(-pairs * difference**2 / 2))
        return (max(-1.0, difference - half), min(1.0, difference + half)), p
    half = NormalDist().inv_cdf((1 + confidence) / 2) * error
    p = math.erfc(abs(difference) / error / math.sqrt(2))
    return (max(-1.0, difference - half), min(1.0, difference + half)), p


def _sum_of_squares(values: Ints) -> int:
    """Exactly, of values below 2^32 in size, which 64 bits do not hold."""
    high, low = np.abs(values) >> 16, np.abs(values) & 0xFFFF
    return (int(high @ high) << 32) + (int(high @ low) << 17) + int(low @ low)


def _checked(where: str, name: str, scores: Scores) -> Tensor:
    """Bring to float64, which holds every type: flat, neither empty nor NaN."""
    x = as_tensor(where, name, scores)
    if x.dim() < 1:
        raise ValueError(f"{where}: {name} must have at least one dimension, got a scalar")
    if x.numel() == 0:
        raise ValueError(f"{where}: {name} must not be empty")
    x = x.reshape(-1).double()
    check_no_nan(where, name, x)
    return x


def _same_samples(where: str, scores: tuple[str, Tensor], first: tuple[str, Tensor]) -> None:
    if len(scores[1]) != len(first[1]):
        raise ValueError(
            f"{where}: {scores[0]} must be of the samples of {first[0]}, {len(first[1])}, got "
            f"{len(scores[1])}"
        )


def _units(where: str, name: str, classes: ArrayLike | Tensor | None, n: int) -> Ints | None:
    """Classes as numbers from 0 on, each in use."""
    if classes is None:
        return None
    labels = classes if isinstance(classes, Tensor) else from_array(where, name, classes)
    check_integers(where, name, labels)
    if labels.numel() != n:
        raise ValueError(
            f"{where}: {name} must be one for each of {n} samples, got {labels.numel()}"
        )
    found: Ints = np.unique(labels.reshape(-1).cpu().numpy(), return_inverse=True)[1].reshape(-1)
    return found
