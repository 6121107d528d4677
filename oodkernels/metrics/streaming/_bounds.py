r"""The least and the largest figure that scores known only by interval allow.

Every score is known to lie in an interval of an ordered axis, and how many scores of each side
share an interval is known: bins of a histogram, or single points, which are scores known exactly.
Intervals may overlap. A figure's bounds hold for every placement of the scores in their intervals.

*Monotone figures* (AUROC, the FPRs, the thresholds, the detection error): raising an ID score or
lowering an OOD score never makes them worse. Their extremes are hence those of two placements, in
which every score sits at an end of its interval: ID up and OOD down, or ID down and OOD up. Both
are possible, so these bounds are attained.

*Average precision* is not monotone: of two positives tied above nothing but a negative, raising
one lowers the figure, because a tie shares the precision at its end. For a placement x it is the
mean over the positives i of the precision :math:`T(x_i) / (T(x_i) + F(x_i))`, where T(t) and F(t)
count the positives and the negatives at or above t. Each is bounded on its own:

- *Above*: T is at most :math:`T^+`, all positives at their upper ends, and F at least
  :math:`F^-`, all negatives at their lower ends, so the precision of i is at most the maximum of
  :math:`T^+(t) / (T^+(t) + F^-(t))` over t in i's interval. In a bin that overlaps no other this is
  attained: positives tied with each other above all negatives of the bin.
- *Below*: with :math:`T^-`, :math:`F^+` the other way round, order the positives of one interval
  from the top. The j-th has at least j of them at or above it, itself included, so
  :math:`T \ge E + j`, where E counts the positives of other intervals in :math:`T^-`. In a bin that
  overlaps no other E and F^+ do not depend on t, and the bound
  :math:`\sum_j (E + j) / (E + j + F^+)` is attained: all negatives first, then the positives one
  by one. Positives that tie have more, since T counts the whole tie for each of them. At a point
  all positives tie, and their precision is that of the whole group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from oodkernels.ops.roc import exact_ceil

Ints: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]

_ROUNDING = 1e-14
"""More than the float64 rounding errors of a sum of a million terms that adds up to 1."""


@dataclass(frozen=True)
class Intervals:
    """How many ID and OOD scores lie in each interval.

    Attributes:
        low: (n,) first coordinate of each interval.
        high: (n,) last coordinate, >= low; equal for a point, whose scores tie.
        n_id: (n,) number of ID scores, one row.
        n_ood: (n,) number of OOD scores.
        decode: Coordinates to the least and the largest score each may stand for.
    """

    low: Ints
    high: Ints
    n_id: Ints
    n_ood: Ints
    decode: Callable[[Ints], tuple[Floats, Floats]]


@dataclass(frozen=True)
class Bounded:
    """An estimate and what it cannot lie outside of."""

    estimate: float
    lower: float
    upper: float

    @classmethod
    def between(cls, a: float, b: float) -> Bounded:
        """The middle of two bounds, the estimate that can be wrong by least."""
        low, high = min(a, b), max(a, b)
        return cls(low if low == high else low + (high - low) / 2, low, high)


def figures(intervals: Intervals, tpr: float) -> dict[str, Bounded]:
    """Every figure with its bounds, under the names of :data:`oodkernels.metrics.FIGURES`.

    Both sides must have scores; the FPRs are named ``fpr_at_tpr`` and ``fpr_out_at_tpr``.
    """
    used = np.flatnonzero((intervals.n_id > 0) | (intervals.n_ood > 0))
    used = used[np.argsort(intervals.low[used], kind="stable")]
    low, high = intervals.low[used], intervals.high[used]
    n_id, n_ood = intervals.n_id[used], intervals.n_ood[used]
    grid, place = np.unique(np.concatenate((low, high)), return_inverse=True)
    first, last = place[: low.size], place[low.size :]

    def placed(weights: Ints, at: NDArray[np.intp]) -> Ints:
        total = np.zeros(grid.size, np.int64)
        np.add.at(total, at, weights)
        return total

    id_low, id_high = placed(n_id, first), placed(n_id, last)
    ood_low, ood_high = placed(n_ood, first), placed(n_ood, last)
    total_id, total_ood = int(n_id.sum()), int(n_ood.sum())
    pairs = total_id * total_ood

    best, worst = (id_high, ood_low), (id_low, ood_high)
    wins = [_doubled_wins(*side) / (2 * pairs) for side in (best, worst)]
    at = [_at_recall(*side, exact_ceil(tpr, total_id)) for side in (best, worst)]
    out = [_at_recall(o[::-1], i[::-1], exact_ceil(tpr, total_ood)) for i, o in (best, worst)]
    errors = [_detection_error(*side, total_id, total_ood) for side in (best, worst)]

    def threshold(places: list[int]) -> Bounded:
        coordinates = np.asarray([min(places), max(places)])
        lows, highs = intervals.decode(grid[coordinates])
        middle = np.asarray([(grid[coordinates[0]] + grid[coordinates[1]]) // 2])
        lower, upper = float(lows[0]), float(highs[1])
        estimate = float(np.clip(intervals.decode(middle)[0][0], lower, upper))
        return Bounded(estimate, lower, upper)

    point = first == last
    sure_ties = _dot(placed(n_id * point, first), placed(n_ood * point, first))
    above, below = _certain(id_low, ood_high), _certain(ood_low, id_high)
    base = total_id / (total_id + total_ood)
    return {
        "auroc": Bounded.between(*wins),
        "aupr_in": _average_precision(first, last, n_id, n_ood, grid.size),
        "aupr_out": _average_precision(
            grid.size - 1 - last, grid.size - 1 - first, n_ood, n_id, grid.size
        ),
        "fpr_at_tpr": Bounded.between(*(false / total_ood for _, false in at)),
        "fpr_out_at_tpr": Bounded.between(*(false / total_id for _, false in out)),
        "threshold": threshold([g for g, _ in at]),
        "threshold_out": threshold([grid.size - 1 - g for g, _ in out]),
        "detection_error": Bounded.between(*errors),
        "base_rate_in": Bounded.between(base, base),
        "base_rate_out": Bounded.between(
            total_ood / (total_id + total_ood), total_ood / (total_id + total_ood)
        ),
        "tie_fraction": Bounded.between(sure_ties / pairs, (pairs - above - below) / pairs),
    }


def curves(intervals: Intervals, points: int = 2048) -> tuple[Floats, Floats, Floats]:
    """ROC curves as (FPR, TPR), (2, P) each: outermost, estimated and innermost.

    The outer and the inner one are of the best and the worst placement; in the one between, the
    scores of an interval tie.
    """
    low, high = 2 * intervals.low, 2 * intervals.high

    def curve(at_id: Ints, at_ood: Ints) -> Floats:
        _, place = np.unique(np.concatenate((at_id, at_ood)), return_inverse=True)
        steps = np.zeros((2, int(place.max(initial=-1)) + 1))
        np.add.at(steps[1], place[: at_id.size], intervals.n_id / intervals.n_id.sum())
        np.add.at(steps[0], place[at_id.size :], intervals.n_ood / intervals.n_ood.sum())
        path = np.pad(steps[:, ::-1].cumsum(1), ((0, 0), (1, 0)))
        # Points chosen evenly along the curve, not along the scores.
        along = path.sum(0)
        chosen = np.searchsorted(along, np.linspace(0, along[-1], points))
        return path[:, np.unique(np.minimum(chosen, along.size - 1))]

    middle = low // 2 + high // 2
    return curve(high, low), curve(middle, middle), curve(low, high)


def _dot(a: Ints, b: Ints) -> int:
    """The exact sum of products, which may exceed 64 bits."""
    used = a != 0
    a, b = a[used], b[used]
    if not a.size:
        return 0
    if int(a.sum()) * int(np.abs(b).max()) < 2**62:
        return int(a @ b)
    # Limbs of 31 bits; products are below 2^62 and are summed in Python where 64 bits might not do.
    low = (1 << 31) - 1
    parts = ((a & low, 0), (a >> 31, 31)), ((b & low, 0), (b >> 31, 31))
    return sum(
        int((x * y >> 31).sum()) << (i + j + 31) for x, i in parts[0] for y, j in parts[1]
    ) + sum(int((x * y & low).sum()) << (i + j) for x, i in parts[0] for y, j in parts[1])


def _doubled_wins(ids: Ints, oods: Ints) -> int:
    """Twice the pairs with ID above OOD, plus the ties."""
    return _dot(ids, 2 * np.cumsum(oods) - oods)


def _certain(upper: Ints, lower: Ints) -> int:
    """Pairs in which a score of the first is strictly above one of the second."""
    return _dot(upper, np.cumsum(lower) - lower)


def _at_recall(positives: Ints, negatives: Ints, k: int) -> tuple[int, int]:
    """Where the k-th positive from the top is, and how many negatives are there or above."""
    from_top = np.cumsum(positives[::-1])
    i = int(np.searchsorted(from_top, k))
    return positives.size - 1 - i, int(negatives[::-1][: i + 1].sum())


def _detection_error(ids: Ints, oods: Ints, total_id: int, total_ood: int) -> float:
    gain = np.cumsum(ids[::-1]) / total_id - np.cumsum(oods[::-1]) / total_ood
    return (1 - max(0.0, float(gain.max()))) / 2


def _at_or_above(weights: Ints) -> Floats:
    """(size + 1,): how many are at each place or above, none beyond the last."""
    return np.append(np.cumsum(weights[::-1])[::-1], 0).astype(np.float64)


def _harmonic(start: Floats, n: Ints) -> Floats:
    """Sum_{j=1..n} of 1 / (start + j), or for large starts very little more.

    There by the midpoint rule, whose integral exceeds the sum of a convex function.
    """
    begin = torch.from_numpy(start + 1)
    sums = (torch.digamma(begin + torch.from_numpy(n)) - torch.digamma(begin)).numpy()
    return np.where(start < 1000, sums, np.log1p(n / (start + 0.5)))


def _average_precision(
    first: NDArray[np.intp], last: NDArray[np.intp], positives: Ints, negatives: Ints, size: int
) -> Bounded:
    """Bounds as in this module's head; places ascend with the rank of a positive."""

    def above(weights: Ints, at: NDArray[np.intp]) -> Floats:
        total = np.zeros(size, np.int64)
        np.add.at(total, at, weights)
        return _at_or_above(total)

    most_t, least_t = above(positives, last), above(positives, first)
    most_f, least_f = above(negatives, last), above(negatives, first)
    has = positives > 0
    first, last, n = first[has], last[has], positives[has]
    total = int(n.sum())
    point = first == last

    highest = _ratio(most_t, least_f)
    upper = n * _over_ranges(np.maximum, highest, first, last)

    tied = n * _ratio(least_t[first], most_f[first])
    others, false = least_t[first] - n, most_f[first]
    lower = np.where(point, tied, n - false * _harmonic(others + false, n))
    # Where an interval has other ends inside, E and F+ vary over it: the least for the first
    # positive stands for all of them.
    wide = ~point & (last > first + 1) | (~point & (least_t[last] != others))
    if wide.any():
        lowest = _ratio(least_t + 1, most_f)
        inner = _over_ranges(np.minimum, lowest, first[wide] + 1, last[wide])
        own = (others[wide] + 1) / (others[wide] + 1 + false[wide])
        lower[wide] = n[wide] * np.minimum(inner, own)

    # Half of what may be above a score is: the order within a bin is taken as even.
    t = np.where(point, least_t[first] + most_t[first], least_t[last + 1] + most_t[first] + 1)
    f = np.where(point, least_f[first] + most_f[first], least_f[last + 1] + most_f[first])
    middle = float((n * _ratio(t, f)).sum()) / total

    bounds = float(lower.sum()) / total, float(upper.sum()) / total
    if point.all() and np.array_equal(most_f, least_f):
        return Bounded(bounds[1], bounds[1], bounds[1])
    low, high = max(0.0, bounds[0] - _ROUNDING), min(1.0, bounds[1] + _ROUNDING)
    return Bounded(min(max(middle, low), high), low, high)


def _ratio(t: Floats, f: Floats) -> Floats:
    return np.divide(t, t + f, out=np.ones_like(t), where=t + f > 0)


def _over_ranges(
    reduce: np.ufunc, values: Floats, first: NDArray[np.intp], last: NDArray[np.intp]
) -> Floats:
    """``reduce`` over values[first..last] for each pair."""
    ends = np.stack((first, last + 1), 1).reshape(-1)
    out: Floats = reduce.reduceat(values, ends)[::2]
    return out
