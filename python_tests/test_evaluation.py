from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

pytest.importorskip("sklearn")

from hypothesis import given
from hypothesis import strategies as st

from oodkernels.evaluation import AVERAGE, Method, best, evaluate, ood_metrics, threshold


def slow_metrics(inside: list[float], outside: list[float]) -> dict[str, float]:
    """The definitions, in exact arithmetic."""
    thresholds = sorted({*inside, *outside}, reverse=True)

    def share(scores: list[float], t: float) -> Fraction:
        return Fraction(sum(s >= t for s in scores), len(scores))

    def average_precision(positive: list[float], negative: list[float]) -> Fraction:
        total, recall_before = Fraction(0), Fraction(0)
        for t in sorted({*positive, *negative}, reverse=True):
            hits = sum(s >= t for s in positive)
            false = sum(s >= t for s in negative)
            recall = share(positive, t)
            total += (recall - recall_before) * Fraction(hits, max(hits + false, 1))
            recall_before = recall
        return total

    t95 = max(t for t in thresholds if share(inside, t) >= Fraction(95, 100))
    wins = sum((a > b) + Fraction(a == b, 2) for a in inside for b in outside)
    exact = {
        "fpr95": share(outside, t95),
        "auroc": wins / (len(inside) * len(outside)),
        "aupr_in": average_precision(inside, outside),
        "aupr_out": average_precision([-s for s in outside], [-s for s in inside]),
    }
    return {name: float(value) for name, value in exact.items()}


few_levels = st.lists(st.sampled_from([-np.inf, -2.0, -0.0, 0.0, 0.5, 1.0, 1e30]), min_size=1)
many_levels = st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=50)


@given(few_levels | many_levels, few_levels | many_levels)
def test_metrics_follow_their_definitions(inside: list[float], outside: list[float]) -> None:
    expected = slow_metrics(inside, outside)
    assert ood_metrics(inside, outside) == pytest.approx(expected, abs=1e-12)


def test_metrics_of_all_tied_scores() -> None:
    found = ood_metrics([1.0] * 10, [1.0] * 10)
    assert found == {"fpr95": 1, "auroc": 0.5, "aupr_in": 0.5, "aupr_out": 0.5}


def test_metrics_of_101_levels() -> None:
    assert ood_metrics(range(101), range(101))["fpr95"] == pytest.approx(96 / 101)


def test_metrics_of_separate_scores() -> None:
    assert ood_metrics([2, 3], [0, 1]) == {"fpr95": 0, "auroc": 1, "aupr_in": 1, "aupr_out": 1}
    assert ood_metrics([0, 1], [2, 3])["fpr95"] == 1


def test_threshold_is_exact() -> None:
    # 0.95 * 20 is 19 exactly, and less in binary floating point for other sizes.
    for n in range(1, 500):
        scores = np.arange(n)
        t = threshold(scores)
        assert 100 * np.sum(scores >= t) >= 95 * n
        assert 100 * np.sum(scores >= t + 1) < 95 * n


def test_metrics_refuse_nan_with_count_and_index() -> None:
    with pytest.raises(ValueError, match="ood_scores must not hold NaN, got 2, the first at ind"):
        ood_metrics([1.0, 2.0], [0.0, np.nan, 1.0, np.nan])
    with pytest.raises(ValueError, match=r"id_scores must not hold NaN, got 1, .* index 0"):
        ood_metrics([np.nan], [0.0])


@pytest.mark.parametrize("scores", [[], [[1.0, 2.0]], 3.0])
def test_metrics_refuse_what_is_no_vector(scores: object) -> None:
    with pytest.raises(ValueError, match="id_scores must be a non-empty vector"):
        ood_metrics(scores, [1.0])  # type: ignore[arg-type]


def test_evaluate_averages_over_sets_and_best_knows_the_direction() -> None:
    id_scores = np.array([2.0, 3.0])
    ood = {"near": np.array([2.5, 0.0]), "far": np.array([0.0])}
    good = Method("a", "s", 0.9, id_scores, ood)
    bad = Method("b", "s", 0.8, -id_scores, {name: -scores for name, scores in ood.items()})
    rows = evaluate([good, bad])
    assert [row.ood_set for row in rows] == ["near", "far", AVERAGE] * 2
    near, far, average = rows[:3]
    assert (near.fpr95, far.fpr95, average.fpr95) == (0.5, 0, 0.25)
    assert average.auroc == pytest.approx((near.auroc + far.auroc) / 2)
    assert (near.n_id, near.n_ood, average.n_ood) == (2, 2, 3)
    top = best(rows)
    assert top[AVERAGE, "fpr95"] == 0.25
    assert top["far", "auroc"] == 1
    assert top["far", "id_accuracy"] == 0.9
