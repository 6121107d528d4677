"""OOD detection metrics: AUROC, AUPR, FPR at a TPR, by every convention that papers use.

Scores are **higher = more in-distribution (ID)**. All figures come from exact integer counts over
the sorted scores; divisions come last, in float64. Infinite scores are ordered like any other,
-0.0 equals +0.0, and NaN is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from oodkernels._checks import check_confidence, check_device, check_tpr, plain
from oodkernels.metrics.intervals import (
    Interval,
    auroc_interval,
    clopper_pearson,
    delong,
    quantile_ranks,
)
from oodkernels.ops.keys import scores_of_keys
from oodkernels.ops.roc import ROCAreas, exact_ceil, roc_counts, sort_keys

Scores = Tensor | ArrayLike

FIGURES: dict[str, str] = {
    "auroc": "probability that an ID score exceeds an OOD score, ties counted half",
    "aupr_in": "area under the precision-recall curve, positive = ID",
    "aupr_out": "area under the precision-recall curve, positive = OOD",
    "fpr_at_tpr": "false positive rate at the true positive rate `tpr`, by the convention's rule",
    "fpr_out_at_tpr": "share of ID flagged where a share `tpr` of OOD is flagged (positive = OOD)",
    "threshold": "score at which fpr_at_tpr is read",
    "threshold_out": "score at which fpr_out_at_tpr is read",
    "detection_error": "least mean of both error rates over all thresholds",
    "base_rate_in": "share of ID among all scores: aupr_in of a useless score",
    "base_rate_out": "share of OOD among all scores: aupr_out of a useless score",
    "tie_fraction": "share of the (ID, OOD) pairs with equal scores",
}
"""The figures of an :class:`OODResult`, in the order they are reported."""


def higher_is_better(figure: str) -> bool | None:
    """Whether a larger figure is the better one; None where neither is, as of a threshold.

    Args:
        figure: Its name in a result, such as "fpr95" or "auroc_lower", or a flat key that ends in
            it, such as "ood/far/auroc".
    """
    name = figure.rpartition("/")[2].removesuffix("_lower").removesuffix("_upper")
    if name.startswith("fpr") or name == "detection_error":
        return False
    return True if name in ("auroc", "aupr_in", "aupr_out", "id_accuracy") else None


@dataclass(frozen=True)
class Convention:
    """How a code base reads the FPR and the AUPR off the same scores.

    Attributes:
        name: What :func:`ood_metrics` calls it.
        positive: The class whose recall is the TPR, ``"id"`` or ``"ood"``.
        rule: How the threshold is found: ``"least"``, the first with TPR >= tpr in exact counts;
            ``"nearest"``, recall nearest tpr and, of thresholds with that recall, most false
            positives; ``"order"``, the floor(tpr n)-th score, only scores beyond it counted;
            ``"corner"``, the first with TPR >= tpr among the corners of scikit-learn's ROC curve.
        aupr: ``"average precision"`` or ``"trapezoid"``; tied scores are one point in both.
        source: Where the rule stands.
    """

    name: str
    positive: Literal["id", "ood"]
    rule: Literal["least", "nearest", "order", "corner"]
    aupr: Literal["average precision", "trapezoid"]
    source: str


CONVENTIONS: dict[str, Convention] = {
    c.name: c
    for c in (
        Convention("default", "id", "least", "average precision", "this library"),
        Convention(
            "mos", "id", "nearest", "average precision", "deeplearning-wisc/large_scale_ood"
        ),
        Convention("oe", "ood", "nearest", "average precision", "hendrycks/outlier-exposure"),
        Convention("dos", "id", "order", "trapezoid", "lygjwy/DOS"),
        Convention("openood", "ood", "corner", "trapezoid", "Jingkang50/OpenOOD 1.5"),
        Convention("pytorch-ood", "ood", "least", "trapezoid", "kkirchheim/pytorch-ood 0.4"),
    )
}
"""The conventions by name."""


def fpr_name(tpr: float) -> str:
    """``"fpr95"`` for 0.95: the name under which the FPR at a TPR is reported."""
    return f"fpr{100 * plain(tpr):.10g}"


def in_one_line(name: str) -> str:
    """A name in one line of text, with escapes in place of what cannot be printed."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines of text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


@dataclass(frozen=True)
class OODResult:
    """How well scores tell ID from OOD, see :data:`FIGURES`; returned by :func:`ood_metrics`.

    Attributes:
        auroc: Ties counted half; the same under every convention.
        aupr_in: Positive = ID; average precision or trapezoid as the convention has it.
        aupr_out: Positive = OOD, scores negated.
        fpr_at_tpr: FPR at the TPR ``tpr`` by the convention's positive class and rule.
        fpr_out_at_tpr: Share of ID scores <= ``threshold_out``; the same under every convention.
        threshold: Where ``fpr_at_tpr`` is read. Positive = ID: scores >= threshold are kept
            (``"dos"``: > threshold); positive = OOD: scores <= threshold are flagged.
        threshold_out: The least score at or below which lies a share ``tpr`` of OOD.
        detection_error: min over thresholds of (1 - TPR) / 2 + FPR / 2 (Liang et al., ICLR 2018).
        base_rate_in: n_id / (n_id + n_ood).
        base_rate_out: n_ood / (n_id + n_ood).
        tie_fraction: Share of the (ID, OOD) pairs that tie.
        tpr: The TPR asked for.
        true_positives: Positives on the positive side of ``threshold``.
        false_positives: Negatives there: ``fpr_at_tpr`` times their number.
        n_id: Number of ID scores.
        n_ood: Number of OOD scores.
        convention: Name of the convention used.
        confidence: Confidence of the intervals.
        auroc_interval: By DeLong's method, see :func:`oodkernels.metrics.auroc_interval`.
        fpr_interval: Of the population's FPR at the population's threshold: holds the truth with
            at least the stated confidence for any two distributions, since it allows for both the
            threshold's error (order statistics) and the rate's (Clopper-Pearson), so it is wider
            than need be. None under a rule other than ``"least"``, which tends to another limit.
        fpr_interval_fixed: Of the population's FPR at this very threshold (Clopper-Pearson): for
            a threshold that is deployed as it is.
    """

    auroc: float
    aupr_in: float
    aupr_out: float
    fpr_at_tpr: float
    fpr_out_at_tpr: float
    threshold: float
    threshold_out: float
    detection_error: float
    base_rate_in: float
    base_rate_out: float
    tie_fraction: float
    tpr: float
    true_positives: int
    false_positives: int
    n_id: int
    n_ood: int
    convention: str
    confidence: float
    auroc_interval: Interval
    fpr_interval: Interval | None
    fpr_interval_fixed: Interval

    @property
    def fpr95(self) -> float:
        """``fpr_at_tpr``, where the TPR asked for is 0.95."""
        return self._at_95("fpr_at_tpr")

    @property
    def fpr95_out(self) -> float:
        """``fpr_out_at_tpr``, where the TPR asked for is 0.95."""
        return self._at_95("fpr_out_at_tpr")

    def as_dict(self) -> dict[str, float]:
        """The :data:`FIGURES` by name, the FPRs under their :func:`fpr_name`."""
        name = fpr_name(self.tpr)
        names = {"fpr_at_tpr": name, "fpr_out_at_tpr": f"{name}_out"}
        return {names.get(figure, figure): getattr(self, figure) for figure in FIGURES}

    def __str__(self) -> str:
        """One figure a line, with its interval."""
        intervals = {"auroc": self.auroc_interval, fpr_name(self.tpr): self.fpr_interval}
        lines = [f"{self.n_id} ID and {self.n_ood} OOD scores, convention {self.convention!r}"]
        for name, value in self.as_dict().items():
            interval = intervals.get(name)
            bounds = f"  [{interval[0]:.6f}, {interval[1]:.6f}]" if interval else ""
            lines.append(f"{name:>16} {value:.6g}{bounds}")
        return "\n".join(lines)

    def _at_95(self, figure: str) -> float:
        if self.tpr != 0.95:
            raise AttributeError(
                f"this result has the FPR at a TPR of {self.tpr}, not 0.95: read {figure}"
            )
        value: float = getattr(self, figure)
        return value


@dataclass(frozen=True)
class OODResults(Mapping[str, OODResult]):
    """Results by name: of OOD sets (:func:`ood_metrics`) or conventions. A mapping; prints a table.

    Attributes:
        results: Name -> :class:`OODResult`.
    """

    results: dict[str, OODResult]
    _heading: str = field(default="OOD set", repr=False)

    def __getitem__(self, name: str) -> OODResult:
        return self.results[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)

    @property
    def average(self) -> dict[str, float]:
        """Unweighted mean of every figure over the results, as papers print it."""
        rows = [result.as_dict() for result in self.results.values()]
        return {name: math.fsum(row[name] for row in rows) / len(rows) for name in rows[0]}

    def __str__(self) -> str:
        """A row a result: FPR, AUROC and AUPRs in percent, the threshold, the convention."""
        first = next(iter(self.results.values()))
        fpr = fpr_name(first.tpr)
        rows = [[self._heading, fpr, "auroc", "aupr_in", "aupr_out", "threshold", "positive"]]
        figures = {name: result.as_dict() for name, result in self.results.items()}
        positives = [CONVENTIONS[r.convention].positive.upper() for r in self.results.values()]
        if self._heading == "OOD set" and len(self.results) > 1:
            figures["average"] = {**self.average, "threshold": math.nan}
            positives.append(positives[0])
        for (name, values), positive in zip(figures.items(), positives, strict=True):
            percent = [f"{100 * values[key]:.2f}" for key in rows[0][1:5]]
            threshold = "" if math.isnan(values["threshold"]) else f"{values['threshold']:.6g}"
            rows.append([in_one_line(name), *percent, threshold, positive])
        lines = [text_table(rows)]
        if self._heading == "OOD set":
            lines.append(f"convention: {first.convention}; FPR, AUROC and AUPR in percent")
        else:
            lines.append(f"{first.n_id} ID and {first.n_ood} OOD scores; figures in percent")
        return "\n".join(lines)


@overload
def ood_metrics(
    id_scores: Scores,
    ood_scores: Mapping[str, Scores],
    *,
    tpr: float = 0.95,
    convention: str = "default",
    confidence: float = 0.95,
) -> OODResults: ...


@overload
def ood_metrics(
    id_scores: Scores,
    ood_scores: Scores,
    *,
    tpr: float = 0.95,
    convention: str = "default",
    confidence: float = 0.95,
) -> OODResult: ...


def ood_metrics(
    id_scores: Scores,
    ood_scores: Scores | Mapping[str, Scores],
    *,
    tpr: float = 0.95,
    convention: str = "default",
    confidence: float = 0.95,
) -> OODResult | OODResults:
    """How well scores tell ID from OOD: AUROC, AUPR, FPR at a TPR and more, exactly.

    By default positive = ID: FPR95 is the share of OOD kept at the largest threshold that keeps
    95 % of ID, scores equal to it kept, and AUPR is average precision with tied scores grouped.

    Args:
        id_scores: Scores of ID samples, higher = more ID: a tensor or array of float64, float32,
            bfloat16 or float16, of any shape and strides. Integers below 2**53 become float64;
            booleans are refused.
        ood_scores: Scores of OOD samples, not labels: as many values as ``id_scores``, all of them
            0 or 1, are refused unless they have a name. Or several sets by name, for which the ID
            side is sorted once. Two types meet in the one that holds both.
        tpr: 0 < tpr <= 1, read as the decimal it prints as: 0.95 of 20 scores are 19.
        convention: A name in :data:`CONVENTIONS`.
        confidence: Of the intervals, in (0, 1).

    Returns:
        An :class:`OODResult`; for several sets an :class:`OODResults` by their names.

    Raises:
        ValueError: Scores are empty or hold NaN (the message has the count and the first index),
            are integers of 2**53 or more, or ``ood_scores`` look like labels; ``tpr``,
            ``convention`` or ``confidence`` is unknown or out of range.
        TypeError: Scores are not of a type above.
    """
    where = "ood_metrics"
    conventions = [_convention(convention)]
    tpr, confidence = check_tpr(where, tpr), check_confidence(where, confidence)
    inside = _Side(where, "id_scores", id_scores)
    if not isinstance(ood_scores, Mapping):
        outside = _unnamed(inside, ood_scores)
        return _evaluate(inside, outside, tpr, conventions, confidence)[0]
    if not ood_scores:
        raise ValueError("ood_metrics: ood_scores must name at least one set of scores, got none")
    results = {}
    for name, scores in ood_scores.items():
        outside = _Side(where, f"ood_scores[{name!r}]", scores)
        (results[name],) = _evaluate(inside, outside, tpr, conventions, confidence)
    return OODResults(results)


def precision_recall_areas(id_scores: Scores, ood_scores: Scores) -> ROCAreas:
    """Areas under both precision-recall curves (AUPR) by both rules in use, exactly.

    Average precision takes each point's precision back to the one before; the trapezoid joins them
    by straight lines, and is the larger as a rule (Davis & Goadrich, ICML 2006). Tied scores are
    one point in both.

    Args:
        id_scores: As for :func:`ood_metrics`.
        ood_scores: As for :func:`ood_metrics`, one set.

    Returns:
        ``average_precision_in``, ``average_precision_out``, ``trapezoid_in``, ``trapezoid_out``:
        positive = ID for ``in``, positive = OOD with negated scores for ``out``.

    Raises:
        ValueError: As :func:`ood_metrics`.
        TypeError: As :func:`ood_metrics`.
    """
    inside = _Side("precision_recall_areas", "id_scores", id_scores)
    return roc_counts(*_keys(inside, _unnamed(inside, ood_scores)))[1]


def compare_conventions(
    id_scores: Scores, ood_scores: Scores, *, tpr: float = 0.95, confidence: float = 0.95
) -> OODResults:
    """The same scores under every convention, from one sort; prints as a table.

    Args:
        id_scores: As for :func:`ood_metrics`.
        ood_scores: As for :func:`ood_metrics`, one set.
        tpr: As for :func:`ood_metrics`.
        confidence: As for :func:`ood_metrics`.

    Returns:
        An :class:`OODResults` with the names of :data:`CONVENTIONS`.

    Raises:
        ValueError: As :func:`ood_metrics`.
        TypeError: As :func:`ood_metrics`.
    """
    where = "compare_conventions"
    tpr, confidence = check_tpr(where, tpr), check_confidence(where, confidence)
    inside = _Side(where, "id_scores", id_scores)
    conventions = list(CONVENTIONS.values())
    outside = _unnamed(inside, ood_scores)
    results = _evaluate(inside, outside, tpr, conventions, confidence)
    return OODResults({result.convention: result for result in results}, "convention")


def _convention(name: str) -> Convention:
    if not isinstance(name, str) or name not in CONVENTIONS:
        raise ValueError(
            f"ood_metrics: convention must be one of {', '.join(CONVENTIONS)}, got {name!r}"
        )
    return CONVENTIONS[name]


def from_array(function: str, name: str, values: Any) -> Tensor:
    """An array, or what NumPy makes one of, as a tensor on the host.

    Args:
        function: Whom errors name.
        name: What errors call the values.
        values: Numbers or bools of any shape, strides and byte order.

    Raises:
        ValueError: They are lists of several lengths.
        TypeError: They are something else, or wider than 64 bits.
    """
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{function}: {name} must be an array: {error}") from None
    if array.dtype.kind not in "fiub" or array.dtype.itemsize > 8:
        raise TypeError(f"{function}: {name} must be numbers, got {array.dtype}")
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    usable = native.flags.writeable and all(stride >= 0 for stride in native.strides)
    return torch.from_numpy(native if usable else native.copy())


def as_tensor(function: str, name: str, scores: Any, device: torch.device | None = None) -> Tensor:
    """Scores as a floating-point tensor without gradient, by the rule in :func:`ood_metrics`.

    Args:
        function: Whom errors name.
        name: What errors call the scores.
        scores: A tensor, an array, or what NumPy makes one of.
        device: A metric's, where arrays are put and tensors must be; None for wherever they are.

    Raises:
        ValueError: They are on another device, or are integers of 2**53 or more.
        TypeError: They are not numbers.
    """
    if not isinstance(scores, Tensor):
        scores = from_array(function, name, scores).to(device)
    scores = scores.detach()
    if scores.dtype == torch.bool or scores.is_complex():
        raise TypeError(f"{function}: {name} must be numbers, got {scores.dtype}")
    if device is not None and scores.device != device:
        raise ValueError(
            f"{function}: {name} must be on the metric's device, {device}, got {scores.device}: "
            "move it with metric.to(...)"
        )
    if scores.is_floating_point():
        return scores if scores.itemsize > 1 else scores.float()
    converted = scores.double()
    # 32 bits are below it: nothing to look at, and no accelerator to wait for.
    if scores.itemsize > 4 and scores.numel() and converted.abs().max() >= 2**53:
        raise ValueError(
            f"{function}: {name} must be integers below 2**53, which float64 holds exactly"
        )
    return converted


class _Side:
    """One side's scores, sorted once for each type they are compared in."""

    def __init__(self, function: str, name: str, scores: Any) -> None:
        self.function, self.name = function, name
        self.scores = as_tensor(function, name, scores)
        self._keys: dict[torch.dtype, Tensor] = {}

    def keys(self, dtype: torch.dtype) -> Tensor:
        """Order-preserving integers of the scores as ``dtype``, ascending."""
        if dtype not in self._keys:
            self._keys[dtype] = sort_keys(self.scores.to(dtype), self.function, self.name)
        return self._keys[dtype]


def _unnamed(inside: _Side, ood_scores: Any) -> _Side:
    """OOD scores that have no name, unless they look like scikit-learn's labels of all scores."""
    where = inside.function
    cure = (
        f"for labels with 1 = OOD, write {where}(scores[labels == 0], scores[labels == 1]), and "
        "the other way round with 1 = ID"
    )
    if not isinstance(ood_scores, Tensor):
        ood_scores = from_array(where, "ood_scores", ood_scores)
    if ood_scores.dtype == torch.bool:
        raise TypeError(f"{where}: ood_scores must be numbers, got torch.bool: {cure}")
    outside = _Side(where, "ood_scores", ood_scores)
    zero, one, n = outside.scores == 0, outside.scores == 1, outside.scores.numel()
    if n == inside.scores.numel() and bool((zero | one).all() & zero.any() & one.any()):
        raise ValueError(
            f"{where}: ood_scores must be scores of OOD samples, got {n} values that are all 0 or "
            f"1, one for each of id_scores: {cure}; for scores that are so, write "
            "ood_metrics(id_scores, {'ood': ood_scores})"
        )
    return outside


def _keys(inside: _Side, outside: _Side) -> tuple[Tensor, Tensor]:
    """Sorted keys of both sides in the type that holds both."""
    dtype = torch.promote_types(inside.scores.dtype, outside.scores.dtype)
    check_device(inside.function, outside.name, outside.scores, "id_scores", inside.scores)
    return inside.keys(dtype), outside.keys(dtype)


def _evaluate(
    inside: _Side,
    outside: _Side,
    tpr: float,
    conventions: list[Convention],
    confidence: float,
) -> list[OODResult]:
    id_keys, ood_keys = _keys(inside, outside)
    dtype = torch.promote_types(inside.scores.dtype, outside.scores.dtype)
    n_id, n_ood = len(id_keys), len(ood_keys)
    pairs = n_id * n_ood
    counts, areas = roc_counts(id_keys, ood_keys)
    auroc, error = delong(counts.wins, n_id, n_ood, counts.id_squares, counts.ood_squares)
    by_id = _Sweep(id_keys, ood_keys, descending=True)
    by_ood = _Sweep(ood_keys, id_keys, descending=False)
    outer = by_ood.least(tpr)

    def score_at(point: _Point) -> float:
        return float(scores_of_keys(torch.tensor([point.key], dtype=id_keys.dtype), dtype))

    def result(convention: Convention) -> OODResult:
        sweep = by_id if convention.positive == "id" else by_ood
        point: _Point = getattr(sweep, convention.rule)(tpr)
        n_negative = len(sweep.negatives)
        average = convention.aupr == "average precision"
        least = convention.rule == "least"
        return OODResult(
            auroc=auroc,
            aupr_in=areas.average_precision_in if average else areas.trapezoid_in,
            aupr_out=areas.average_precision_out if average else areas.trapezoid_out,
            fpr_at_tpr=point.false_positives / n_negative,
            fpr_out_at_tpr=outer.false_positives / n_id,
            threshold=score_at(point),
            threshold_out=score_at(outer),
            detection_error=(pairs - counts.separation) / (2 * pairs),
            base_rate_in=n_id / (n_id + n_ood),
            base_rate_out=n_ood / (n_id + n_ood),
            tie_fraction=counts.ties / pairs,
            tpr=tpr,
            true_positives=point.true_positives,
            false_positives=point.false_positives,
            n_id=n_id,
            n_ood=n_ood,
            convention=convention.name,
            confidence=confidence,
            auroc_interval=auroc_interval(auroc, error, n_id, n_ood, confidence),
            fpr_interval=sweep.fpr_interval(tpr, confidence) if least else None,
            fpr_interval_fixed=clopper_pearson(point.false_positives, n_negative, confidence),
        )

    return [result(convention) for convention in conventions]


class _Point(NamedTuple):
    key: int
    true_positives: int
    false_positives: int


class _Sweep:
    """The threshold moving from the most positive key to the least, over sorted keys.

    ``descending``: higher keys are more positive (positive = ID), else lower ones (positive = OOD).
    """

    def __init__(self, positives: Tensor, negatives: Tensor, *, descending: bool) -> None:
        self.positives, self.negatives, self.descending = positives, negatives, descending

    def least(self, tpr: float) -> _Point:
        """The first threshold whose recall is at least tpr, in exact counts."""
        key = self._key(exact_ceil(tpr, len(self.positives)))
        return _Point(key, self._reached(self.positives, key), self._reached(self.negatives, key))

    def nearest(self, tpr: float) -> _Point:
        """Recall nearest tpr (of two, the higher); on a plateau short of recall 1, its last."""
        n = len(self.positives)
        above = self.least(tpr)
        below = self._passed(self.positives, above.key)
        reachable = below > 0 or self._passed(self.negatives, above.key) > 0
        if reachable and abs(below / n - tpr) < abs(above.true_positives / n - tpr):
            return self._last_with(below)
        return above if above.true_positives == n else self._last_with(above.true_positives)

    def order(self, tpr: float) -> _Point:
        """The floor(tpr n)-th positive, floor in float64; what lies strictly beyond it counts."""
        key = self._key(math.floor(tpr * len(self.positives)) or len(self.positives))
        return _Point(key, self._passed(self.positives, key), self._passed(self.negatives, key))

    def corner(self, tpr: float) -> _Point:
        """The first threshold with recall >= tpr that is not between two equal steps.

        scikit-learn's ``roc_curve`` keeps the first point, the last, and those where the step
        (positives and negatives gained) changes.
        """
        point = self.least(tpr)
        if not self._passed(self.positives, point.key) + self._passed(self.negatives, point.key):
            return point
        window = 256
        while True:
            keys, gained, is_rest = self._levels(point.key, window)
            changes = (gained[1:] != gained[:-1]).any(1).nonzero()
            if len(changes) or is_rest:
                kept = int(keys[int(changes[0]) if len(changes) else -1])
                reached = self._reached
                return _Point(kept, reached(self.positives, kept), reached(self.negatives, kept))
            window *= 4

    def fpr_interval(self, tpr: float, confidence: float) -> Interval:
        """Interval of the population's FPR at the population's threshold.

        The positives' order statistics bound the threshold with confidence c, the negatives beyond
        each bound its FPR with confidence c, and as the samples are independent both hold with
        c^2 = ``confidence``.
        """
        n, m = len(self.positives), len(self.negatives)
        each = math.sqrt(confidence)
        first, last = quantile_ranks(n, tpr, each)

        def bounds(rank: int) -> Interval:
            if not 1 <= rank <= n:
                return 0.0, 1.0
            return clopper_pearson(self._reached(self.negatives, self._key(rank)), m, each)

        return bounds(first)[0], bounds(last)[1]

    def _key(self, rank: int) -> int:
        """Key of the rank-th most positive positive, 1-based."""
        return int(self.positives[-rank if self.descending else rank - 1])

    def _reached(self, keys: Tensor, key: int) -> int:
        """How many keys are at least as positive as ``key``."""
        below = int(torch.searchsorted(keys, key, right=not self.descending))
        return len(keys) - below if self.descending else below

    def _passed(self, keys: Tensor, key: int) -> int:
        """How many keys are more positive than ``key``."""
        below = int(torch.searchsorted(keys, key, right=self.descending))
        return len(keys) - below if self.descending else below

    def _last_with(self, true_positives: int) -> _Point:
        """The last threshold before positive number ``true_positives + 1`` is reached."""
        false_positives = self._passed(self.negatives, self._key(true_positives + 1))
        ends = []
        for keys, count in ((self.positives, true_positives), (self.negatives, false_positives)):
            if count:
                ends.append(int(keys[-count if self.descending else count - 1]))
        key = min(ends) if self.descending else max(ends)
        return _Point(key, true_positives, false_positives)

    def _levels(self, key: int, count: int) -> tuple[Tensor, Tensor, bool]:
        """Distinct keys from ``key`` on, (positives, negatives) at each, and if these are all.

        Looks at ``count`` scores of either side.
        """
        windows, ends = [], []
        for keys in (self.positives, self.negatives):
            left = len(keys) - self._passed(keys, key)
            ahead = keys[max(0, left - count) : left].flip(0) if self.descending else keys[-left:]
            windows.append(ahead[:count] if left else keys[:0])
            if left > count:
                ends.append(windows[-1][-1])
        levels = torch.cat(windows).unique()
        for end in ends:  # beyond it, keys of that side may be missing
            levels = levels[levels >= end] if self.descending else levels[levels <= end]
        if self.descending:
            levels = levels.flip(0)
        gained = [
            torch.searchsorted(keys, levels, right=True) - torch.searchsorted(keys, levels)
            for keys in (self.positives, self.negatives)
        ]
        return levels, torch.stack(gained, 1), not ends
