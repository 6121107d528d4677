"""Decisions with guarantees: conformal p-values, control of false alarms, control of risk.

A sample's conformal p-value compares its score with those of held-out in-distribution (ID) samples:
of an ID sample it is below t with probability at most t, whatever the detector and the distribution
of its scores, ties included. What that rests on is exchangeability: calibration and test samples
drawn alike, the detector and all its settings fixed before both. A calibration set that had a part
in training or in the choice of the detector breaks it, and so do test samples that depend on each
other; each function says what else it needs.

Sources: Bates, Candes, Lei, Romano, Sesia, "Testing for outliers with conformal p-values", Annals
of Statistics 2023; Benjamini and Hochberg, JRSS B 1995; Storey, Taylor, Siegmund, JRSS B 2004;
Ramdas, Yang, Wainwright, Jordan, "Online control of the false discovery rate with decaying memory",
NeurIPS 2017 (LORD++); Ramdas, Zrnic, Wainwright, Jordan, "SAFFRON", ICML 2018.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from oodkernels._checks import check_confidence, check_real

__all__ = [
    "LORD",
    "SAFFRON",
    "ConformalPValues",
    "Discoveries",
    "RiskControl",
    "Steps",
    "benjamini_hochberg",
    "control_risk",
    "least_cost_threshold",
    "storey",
]

Floats = NDArray[np.float64]


class Steps(NamedTuple):
    """P-values of a group as a step function.

    A score's p-value is entry ``numpy.searchsorted(scores, score, side="right")``.
    """

    scores: Floats
    """(m,) calibration scores, ascending."""
    p_values: Floats
    """(m + 1,)."""
    counts: NDArray[np.int64]
    """(m,) how many calibration samples each score stands for."""


class ConformalPValues:
    """P-values of scores against the scores of held-out ID samples.

    With n calibration scores, p(s) = (1 + #{calibration scores <= s}) / (n + 1): marginally valid,
    on average over calibration sets. With ``delta``, a set that is unlucky is guarded against: with
    probability 1 - delta over the calibration set, p-values of all later ID samples are valid
    given it (Bates et al., section 3, by Simes' inequality generalised to k = n / 2).

    With ``groups`` the calibration scores are those of each group alone (Mondrian): valid within
    every group. A group of n scores cannot give a p-value below 1 / (n + 1): see ``least``.

    Args:
        id_scores: (n,) scores of ID samples, higher = more ID; finite or infinite, not NaN.
        groups: (n,) group (or class) of each, hashable values or integers; None: one group.
        delta: Of the guarantee given the calibration set, in (0, 1); None: marginal. With groups,
            of each group.

    Attributes:
        counts: Calibration scores in each group.
        least: The least p-value that each group can give.

    Raises:
        ValueError: There are no scores, one is NaN, shapes differ, or ``delta`` is out of range.
    """

    def __init__(
        self,
        id_scores: ArrayLike,
        groups: Iterable[Any] | None = None,
        *,
        delta: float | None = None,
    ) -> None:
        scores = _scores("ConformalPValues", "id_scores", id_scores)
        names = _groups("ConformalPValues", groups, len(scores))
        ones = np.ones(len(scores))
        parts = {k: (scores[rows], ones[rows]) for k, rows in _rows_of(names).items()}
        self._make(parts, groups is not None, delta)

    @classmethod
    def from_metric(cls, metric: Any, *, delta: float | None = None) -> ConformalPValues:
        """Take the ID scores that a metric has seen, in bounded memory.

        Where the metric has counted scores in bins, a calibration score counts as <= s where it
        may be: p-values are never below those of the scores themselves, so all guarantees stand.

        Args:
            metric: An :class:`oodkernels.OODMetrics`.
            delta: As of the class.
        """
        counted = metric.id_counts()
        made = cls.__new__(cls)
        made._make(
            {None: (np.asarray(counted.least, np.float64), np.asarray(counted.counts, float))},
            False,
            delta,
        )
        return made

    def _make(
        self, parts: Mapping[Any, tuple[Floats, Floats]], grouped: bool, delta: float | None
    ) -> None:
        if delta is not None:
            delta = check_confidence("ConformalPValues", delta, "delta")
        self.delta, self._grouped = delta, grouped
        self._sorted: dict[Any, tuple[Floats, Floats, Floats]] = {}
        self.counts: dict[Any, int] = {}
        for name, (scores, weights) in parts.items():
            order = np.argsort(scores, kind="stable")
            below = np.concatenate([[0], np.cumsum(weights[order])])
            n = int(below[-1])
            if n < 1:
                raise ValueError("ConformalPValues: there must be calibration scores, got none")
            self.counts[name] = n
            self._sorted[name] = scores[order], below, _adjusted(n, delta)

    @property
    def least(self) -> dict[Any, float]:
        """The least p-value that each group can give."""
        return {name: float(levels[1]) for name, (_, _, levels) in self._sorted.items()}

    def __call__(self, scores: ArrayLike, groups: Iterable[Any] | None = None) -> Floats:
        """P-values of scores; small = unlike the calibration samples.

        Args:
            scores: (m,) higher = more ID.
            groups: (m,) of each, where the calibration had groups: what the model predicts, say.

        Returns:
            (m,) float64 in (0, 1].

        Raises:
            ValueError: A score is NaN, shapes differ, groups are missing or not asked for, or a
                group has no calibration scores.
        """
        values = _scores("ConformalPValues", "scores", scores, empty=True)
        if (groups is not None) != self._grouped:
            wanted = "the groups of the scores" if self._grouped else "no groups"
            raise ValueError(f"ConformalPValues: it was calibrated with {wanted}")
        names = _groups("ConformalPValues", groups, len(values))
        out = np.empty(len(values))
        for name, rows in _rows_of(names).items():
            if name not in self._sorted:
                raise ValueError(
                    f"ConformalPValues: group {name!r} has no calibration scores; it has those of "
                    f"{', '.join(map(repr, list(self._sorted)[:8]))}"
                )
            ordered, below, levels = self._sorted[name]
            rank = below[np.searchsorted(ordered, values[rows], side="right")]
            out[rows] = levels[rank.astype(np.int64) + 1]
        return out

    def steps(self) -> dict[Any, Steps]:
        """P-values as step functions, by group."""
        return {
            name: Steps(
                ordered.copy(),
                levels[below.astype(np.int64) + 1],
                np.diff(below).astype(np.int64),
            )
            for name, (ordered, below, levels) in self._sorted.items()
        }

    def too_few(self, alpha: float) -> dict[Any, int]:
        """Groups that can give no p-value <= alpha, and how many calibration scores each has."""
        return {name: self.counts[name] for name, p in self.least.items() if p > alpha}


def _adjusted(n: int, delta: float | None) -> Floats:
    """Levels (n + 2,): entry r is the p-value of a score with r - 1 calibration scores at or below.

    Marginal: r / (n + 1). Given the set: b_r of Bates et al., eq. 13:
    b_(n + 1 - i) = 1 - delta^(1/k) (i ... (i - k + 1) / (n ... (n - k + 1)))^(1/k).
    """
    ranks = np.arange(n + 2, dtype=np.float64)
    if delta is None:
        return ranks / (n + 1)
    k = max(1, n // 2)
    i = np.arange(1, n + 1, dtype=np.float64)
    logs = np.full(n, -np.inf)
    enough = i >= k
    lgamma = np.vectorize(math.lgamma, otypes=[float])
    logs[enough] = (lgamma(i[enough] + 1) - lgamma(i[enough] - k + 1)) - (
        math.lgamma(n + 1) - math.lgamma(n - k + 1)
    )
    b = np.empty(n + 2)
    b[0], b[n + 1] = 0, 1
    b[n + 1 - i.astype(np.int64)] = -np.expm1((math.log(delta) + logs) / k)
    return b


# --- many tests at once ---------------------------------------------------------------------------


class Discoveries(NamedTuple):
    """What a procedure for many p-values found.

    Attributes:
        rejected: (m,) bool: called out-of-distribution.
        adjusted: (m,) the least level at which each would be.
        id_share: The share of ID samples that was assumed (1) or estimated (Storey).
    """

    rejected: NDArray[np.bool_]
    adjusted: Floats
    id_share: float


def benjamini_hochberg(p_values: ArrayLike, alpha: float = 0.05) -> Discoveries:
    """Flag samples of a batch with a false discovery rate of at most alpha.

    Of the samples flagged, at most a share alpha is ID on average. Holds for marginal conformal
    p-values of one calibration set: they are positively dependent in the way that is needed
    (Bates et al., theorem 2).

    Args:
        p_values: (m,) in [0, 1].
        alpha: In (0, 1).
    """
    return _step_up("benjamini_hochberg", p_values, alpha, 1.0)


def storey(p_values: ArrayLike, alpha: float = 0.05, cut: float = 0.5) -> Discoveries:
    """Flag as :func:`benjamini_hochberg`, with more power where much of a batch is OOD.

    The share of ID samples is estimated by (1 + #{p > cut}) / (m (1 - cut)), at most 1. Control
    is proved for independent p-values, and by Bates et al. for conformal ones of one calibration
    set.

    Args:
        p_values: (m,) in [0, 1].
        alpha: In (0, 1).
        cut: In (0, 1).
    """
    p = _p_values("storey", p_values)
    cut = check_confidence("storey", cut, "cut")
    share = min(1.0, (1 + int((p > cut).sum())) / (len(p) * (1 - cut))) if len(p) else 1.0
    return _step_up("storey", p, alpha, share)


def _step_up(where: str, p_values: ArrayLike, alpha: float, share: float) -> Discoveries:
    p = _p_values(where, p_values)
    alpha = check_confidence(where, alpha, "alpha")
    m = len(p)
    order = np.argsort(p, kind="stable")
    scaled = share * p[order] * m / np.arange(1, m + 1)
    adjusted = np.empty(m)
    adjusted[order] = np.minimum.accumulate(scaled[::-1])[::-1].clip(max=1)
    return Discoveries(adjusted <= alpha, adjusted, share)


class _Online:
    """Tests one after the other, at levels that follow from the discoveries before."""

    def __init__(self, alpha: float, wealth: float | None, share: float) -> None:
        where = type(self).__name__
        self.alpha = check_confidence(where, alpha, "alpha")
        most = share * self.alpha
        self.wealth = most / 2 if wealth is None else check_real(where, "wealth", wealth)
        if not 0 < self.wealth < most:
            raise ValueError(f"{where}: wealth must be in (0, {most:g}), got {wealth}")
        self.count = 0

    def _level(self) -> float:
        raise NotImplementedError

    def _learn(self, p: float, rejected: bool) -> None:
        raise NotImplementedError

    def __call__(self, p_values: ArrayLike) -> NDArray[np.bool_]:
        """Decide on the next samples, in their order.

        Args:
            p_values: (m,) in [0, 1].

        Returns:
            (m,) bool: called out-of-distribution.
        """
        p = _p_values(type(self).__name__, p_values)
        out = np.zeros(len(p), bool)
        for i, value in enumerate(p.tolist()):
            self.count += 1
            out[i] = value <= self._level()
            self._learn(value, bool(out[i]))
        return out

    def state_dict(self) -> dict[str, Any]:
        """Plain values, from which :meth:`load_state_dict` goes on."""
        return {k: list(v) if isinstance(v, list) else v for k, v in vars(self).items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where another left off; its settings must be the same."""
        where = type(self).__name__
        if set(state) != set(vars(self)):
            raise ValueError(f"{where}.load_state_dict: not a state of {where}")
        for name in ("alpha", "wealth"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"{where}.load_state_dict: {name} must be {getattr(self, name)}, got "
                    f"{state[name]}"
                )
        vars(self).update({k: list(v) if isinstance(v, list) else v for k, v in state.items()})


class LORD(_Online):
    """LORD++: the false discovery rate over a stream is at most alpha at every time.

    The t-th sample is tested at level gamma_t w + gamma_(t - t_1) (alpha - w) + alpha times the sum
    of gamma_(t - t_j) over the later discoveries t_j, with gamma_j proportional to
    log(max(j, 2)) / (j exp(sqrt(log j))). Proved for independent p-values; those of one
    calibration set are independent given it, and then valid only with ``delta`` of
    :class:`ConformalPValues`. A sample costs as many operations as there are discoveries.

    Args:
        alpha: In (0, 1).
        wealth: w, in (0, alpha); None: alpha / 2.
    """

    def __init__(self, alpha: float = 0.05, wealth: float | None = None) -> None:
        super().__init__(alpha, wealth, 1.0)
        self.discoveries: list[int] = []

    def _level(self) -> float:
        t = self.count
        level = self.wealth * _lord_gamma(t)
        for j, found in enumerate(self.discoveries):
            level += (self.alpha - (self.wealth if j == 0 else 0)) * _lord_gamma(t - found)
        return level

    def _learn(self, p: float, rejected: bool) -> None:
        if rejected:
            self.discoveries.append(self.count)


class SAFFRON(_Online):
    """SAFFRON: as :class:`LORD`, with more power where much of the stream is OOD.

    Only candidates, p <= ``candidate``, spend: the level follows from the samples that are none,
    with gamma_j proportional to j^-1.6. Proved for independent p-values, as LORD.

    Args:
        alpha: In (0, 1).
        wealth: In (0, (1 - candidate) alpha); None: half of that.
        candidate: In (0, 1).
    """

    def __init__(
        self, alpha: float = 0.05, wealth: float | None = None, candidate: float = 0.5
    ) -> None:
        self.candidate = check_confidence("SAFFRON", candidate, "candidate")
        super().__init__(alpha, wealth, 1 - self.candidate)
        self.non_candidates = 0
        self.since: list[int] = []  # non-candidates up to each discovery

    def _level(self) -> float:
        gain = (1 - self.candidate) * self.alpha
        level = self.wealth * _saffron_gamma(self.non_candidates + 1)
        for j, before in enumerate(self.since):
            weight = gain - (self.wealth if j == 0 else 0)
            level += weight * _saffron_gamma(self.non_candidates - before + 1)
        return min(self.candidate, level)

    def _learn(self, p: float, rejected: bool) -> None:
        self.non_candidates += p > self.candidate
        if rejected:
            self.since.append(self.non_candidates)


# Both sum to at most one; the first constant is that of the authors' paper.
def _lord_gamma(j: int) -> float:
    return 0.0722 * math.log(max(j, 2)) / (j * math.exp(math.sqrt(math.log(j))))


_ZETA = 2.2857656619  # sum of j^-1.6


def _saffron_gamma(j: int) -> float:
    return float(j**-1.6) / _ZETA


# --- thresholds with a bound on what they lose ----------------------------------------------------


class RiskControl(NamedTuple):
    """Thresholds that keep both risks, each at its confidence.

    Attributes:
        threshold: The largest that keeps the ID risk, so that it catches most OOD; -inf, which
            flags nothing, where the sample is too small for any.
        least: The least that keeps the OOD risk; None where no OOD was given.
        feasible: Whether ``least`` <= ``threshold``: both risks are kept at once.
        id_lost: Share of the calibration ID scores below ``threshold``.
        ood_kept: Share of the OOD scores at or above it; None where none were given.
    """

    threshold: float
    least: float | None
    feasible: bool
    id_lost: float
    ood_kept: float | None


def control_risk(
    id_scores: ArrayLike,
    ood_scores: ArrayLike | None = None,
    *,
    id_risk: float = 0.05,
    ood_risk: float | None = None,
    confidence: float = 0.95,
) -> RiskControl:
    """The largest threshold with a bound on the share of ID lost, and what OOD it keeps.

    Samples with scores below the threshold are flagged. With probability ``confidence`` over the
    ID sample, at most a share ``id_risk`` of all ID samples is flagged; the same for ``ood_risk``
    and OOD samples like those given. Exact in finite samples by order statistics, for any
    distribution, ties included; both samples must be drawn independently.

    Args:
        id_scores: (n,) higher = more ID.
        ood_scores: (m,) of labelled OOD samples.
        id_risk: In (0, 1).
        ood_risk: In (0, 1); asks for ``ood_scores``.
        confidence: Of each bound, in (0, 1).
    """
    where = "control_risk"
    id_risk = check_confidence(where, id_risk, "id_risk")
    confidence = check_confidence(where, confidence)
    inside = np.sort(_scores(where, "id_scores", id_scores))
    k = _rank(len(inside), id_risk, 1 - confidence)
    threshold = float(inside[k - 1]) if k else -math.inf
    least = kept = None
    if ood_scores is not None:
        outside = np.sort(_scores(where, "ood_scores", ood_scores))
        kept = float((outside >= threshold).mean())
        if ood_risk is not None:
            ood_risk = check_confidence(where, ood_risk, "ood_risk")
            # OOD kept are those at or above: above the k-th largest, strictly.
            k = _rank(len(outside), ood_risk, 1 - confidence)
            least = float(np.nextafter(outside[-k], math.inf)) if k else math.inf
    elif ood_risk is not None:
        raise ValueError(f"{where}: ood_risk needs ood_scores")
    lost = float((inside < threshold).mean())
    return RiskControl(threshold, least, least is None or least <= threshold, lost, kept)


def least_cost_threshold(
    id_scores: ArrayLike,
    ood_scores: ArrayLike,
    *,
    cost_id: float = 1.0,
    cost_ood: float = 1.0,
    ood_share: float = 0.5,
) -> tuple[float, float]:
    """The threshold of least expected cost on the samples given; no guarantee beyond them.

    Args:
        id_scores: (n,) higher = more ID.
        ood_scores: (m,).
        cost_id: Of an ID sample flagged, >= 0.
        cost_ood: Of an OOD sample kept, >= 0.
        ood_share: Of OOD among what will come, in (0, 1).

    Returns:
        (threshold, expected cost a sample): samples with scores below the threshold are flagged.
        Of several the largest.
    """
    where = "least_cost_threshold"
    ood_share = check_confidence(where, ood_share, "ood_share")
    for name, value in (("cost_id", cost_id), ("cost_ood", cost_ood)):
        if not value >= 0 or math.isinf(value):
            raise ValueError(f"{where}: {name} must be finite and >= 0, got {value}")
    inside = np.sort(_scores(where, "id_scores", id_scores))
    outside = np.sort(_scores(where, "ood_scores", ood_scores))
    at = np.concatenate([[-np.inf], np.union1d(inside, outside), [np.inf]])
    lost = np.searchsorted(inside, at) / len(inside)
    kept = 1 - np.searchsorted(outside, at) / len(outside)
    cost = (1 - ood_share) * cost_id * lost + ood_share * cost_ood * kept
    best = len(at) - 1 - int(np.argmin(cost[::-1]))
    return float(at[best]), float(cost[best])


def _rank(n: int, risk: float, error: float) -> int:
    """The largest k with P(Binomial(n, risk) < k) <= error; 0 where there is none.

    The k-th least of n independent draws has a share above ``risk`` of its population below it
    only if fewer than k draws fall into the least ``risk`` of it.
    """
    logs = math.log(risk), math.log1p(-risk)
    total = 0.0
    for k in range(n):
        choose = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
        total += math.exp(choose + k * logs[0] + (n - k) * logs[1])
        if total > error:
            return k
    return n


def _scores(where: str, name: str, values: ArrayLike, *, empty: bool = False) -> Floats:
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim != 1 or (not len(scores) and not empty):
        raise ValueError(f"{where}: {name} must be (n,) with n >= 1, got shape {scores.shape}")
    if (wrong := np.flatnonzero(np.isnan(scores))).size:
        raise ValueError(
            f"{where}: {name} must not hold NaN, got {wrong.size}, the first at index {wrong[0]}"
        )
    return scores


def _groups(where: str, groups: Iterable[Any] | None, n: int) -> list[Any]:
    if groups is None:
        return [None] * n
    names = groups.tolist() if hasattr(groups, "tolist") else list(groups)
    if len(names) != n:
        raise ValueError(f"{where}: groups must be one a score, {n}, got {len(names)}")
    return names


def _rows_of(names: list[Any]) -> dict[Any, list[int]]:
    """Where each name stands."""
    rows: dict[Any, list[int]] = {}
    for i, name in enumerate(names):
        rows.setdefault(name, []).append(i)
    return rows


def _p_values(where: str, values: ArrayLike) -> Floats:
    p = np.asarray(values, dtype=np.float64)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"{where}: p_values must be (m,) in [0, 1], got shape {p.shape}")
    return p
