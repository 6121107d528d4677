"""AURC, OSCR, CCR and AUPR against their definitions and scikit-learn."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from oodkernels.metrics import (
    ood_metrics,
    open_set_metrics,
    precision_recall_areas,
    risk_coverage,
)

# --- risk and coverage ----------------------------------------------------------------------------


def area(correct):
    """AURC of answers in an order: the definition."""
    wrong = np.cumsum([not ok for ok in correct])
    return float(np.mean(wrong / np.arange(1, len(correct) + 1)))


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_aurc_is_the_mean_over_all_orders_of_ties(values):
    areas, lowest = [], math.inf
    for order in itertools.permutations(values):
        lowest = min(lowest, area([ok for _, ok in order]))
        if all(a >= b for (a, _), (b, _) in itertools.pairwise(order)):
            areas.append(area([ok for _, ok in order]))
    result = risk_coverage([c for c, _ in values], [ok for _, ok in values])
    assert result.aurc == pytest.approx(np.mean(areas), abs=1e-12)
    assert result.optimal == pytest.approx(lowest, abs=1e-12)
    assert result.e_aurc == pytest.approx(np.mean(areas) - lowest, abs=1e-12)
    assert result.risk == sum(not ok for _, ok in values) / len(values)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_aurc_of_many_answers(dtype):
    rng = np.random.default_rng(0)
    confidence = torch.from_numpy(rng.random(50_000)).to(dtype)
    correct = torch.from_numpy(rng.random(50_000)) < 0.3 + 0.6 * confidence.double()
    result = risk_coverage(confidence, correct)
    jittered = confidence.double() + 1e-6 * torch.from_numpy(rng.random(50_000))
    order = torch.argsort(jittered, descending=True)
    assert result.aurc == pytest.approx(area(correct[order].tolist()), abs=2e-4)
    r = result.risk
    assert result.optimal == pytest.approx(r + (1 - r) * math.log(1 - r), abs=1e-4)
    shuffled = torch.randperm(50_000)
    assert risk_coverage(confidence[shuffled], correct[shuffled]).aurc == result.aurc


def test_extremes():
    assert risk_coverage([1.0, 0.5], [True, True]) == risk_coverage([0.5, 0.5], [True, True])
    assert risk_coverage([1.0], [True]).aurc == 0
    worst = risk_coverage([0.5, 0.25], [False, False])
    assert (worst.aurc, worst.e_aurc, worst.risk) == (1, 0, 1)
    infinite = risk_coverage([math.inf, -math.inf, 0.0, -0.0], [True, False, True, True])
    assert infinite.e_aurc == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize(
    ("confidence", "correct", "error", "match"),
    [
        ([], np.zeros(0, bool), ValueError, "confidence must not be empty"),
        ([0.5, math.nan], [True, False], ValueError, "confidence must not be NaN, got 1.*index 1"),
        ([0.5], [1], TypeError, "correct must be bool, got torch.int64"),
        ([0.5], [True, False], ValueError, r"shape of confidence, \(1,\), got \(2,\)"),
    ],
)
def test_risk_coverage_refuses(confidence, correct, error, match):
    with pytest.raises(error, match=f"^risk_coverage: .*{match}"):
        risk_coverage(confidence, correct)


# --- open-set classification ----------------------------------------------------------------------


def restated(ids, correct, oods, fpr):
    """By all pairs, and by OpenOOD's rule."""
    right = ids[correct]
    wins, ties = (right[:, None] > oods).sum(), (right[:, None] == oods).sum()
    pairs = len(ids) * len(oods)
    t = np.sort(oods)[-math.ceil(fpr * len(oods) - 1e-9)]
    return (wins + ties / 2) / pairs, wins / pairs, ((ids > t) & correct).mean()


small = st.lists(st.integers(0, 4).map(float), min_size=1, max_size=25).map(np.array)


@given(small, small, st.integers(0, 2**25), st.sampled_from([0.001, 0.1, 0.25, 0.5, 1]))
@settings(max_examples=100, deadline=None)
def test_open_set_is_the_definition(ids, oods, bits, fpr):
    correct = np.array([bool(bits >> i & 1) for i in range(len(ids))])
    result = open_set_metrics(ids, correct, oods, fprs=[fpr])
    expected = restated(ids, correct, oods, fpr)
    assert (result.oscr, result.oscr_strict, result.ccr[fpr]) == pytest.approx(expected, abs=1e-12)
    assert result.accuracy == correct.mean()


def test_open_set_of_all_right_is_the_auroc():
    rng = np.random.default_rng(0)
    x, y = rng.normal(1, 1, 500).astype(np.float32), rng.normal(0, 1, 400)
    result = open_set_metrics(x, np.ones(500, bool), y)
    assert result.oscr == ood_metrics(x, y).auroc
    assert list(result.ccr) == [1e-4, 1e-3, 1e-2, 1e-1]
    assert result.ccr[1e-4] == (x > y.max()).mean()
    correct = rng.random(500) < 0.7
    curve = open_set_metrics(x, correct, y, fprs=np.linspace(0.1, 1, 10))
    assert list(curve.ccr.values()) == sorted(curve.ccr.values())
    # The area under the curve, by one rectangle an OOD sample.
    steps = open_set_metrics(x, correct, y, fprs=[i / 400 for i in range(1, 401)]).ccr.values()
    assert np.mean(list(steps)) == pytest.approx(curve.oscr, abs=1e-12)


@pytest.mark.parametrize(
    ("given_", "error", "match"),
    [
        (([], np.zeros(0, bool), [1.0]), ValueError, "id_scores must not be empty"),
        (([1.0], [True], []), ValueError, "ood_scores must not be empty"),
        (([math.nan], [False], [1.0]), ValueError, "id_scores must not hold NaN, got 1"),
        (([1.0], [True], [math.nan]), ValueError, "ood_scores must not hold NaN, got 1"),
        (([1.0], [1], [1.0]), TypeError, "correct must be bool"),
        (([1.0, 2.0], [True], [1.0]), ValueError, r"shape of id_scores, \(2,\), got \(1,\)"),
        (([1.0], [True], [True]), TypeError, "ood_scores must be numbers"),
    ],
)
def test_open_set_refuses(given_, error, match):
    with pytest.raises(error, match=f"^open_set_metrics: .*{match}"):
        open_set_metrics(*given_)
    with pytest.raises(ValueError, match=r"open_set_metrics: fprs must be in \(0, 1\], got 0"):
        open_set_metrics([1.0], [True], [0.0], fprs=[0])


# --- areas under precision-recall curves ----------------------------------------------------------


@pytest.mark.parametrize("decimals", [8, 0], ids=["distinct", "ties"])
def test_areas_are_those_of_scikit_learn(decimals):
    rng = np.random.default_rng(0)
    x, y = rng.normal(1, 1, 300).round(decimals), rng.normal(0, 1, 200).round(decimals)
    areas = precision_recall_areas(x, y)
    for side, sign, label in (
        ("in", 1, np.r_[np.ones(300), np.zeros(200)]),
        ("out", -1, np.r_[np.zeros(300), np.ones(200)]),
    ):
        scores = sign * np.r_[x, y]
        precision, recall, _ = sk.precision_recall_curve(label, scores)
        expected = sk.average_precision_score(label, scores), sk.auc(recall, precision)
        found = (getattr(areas, f"{rule}_{side}") for rule in ("average_precision", "trapezoid"))
        assert tuple(found) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="precision_recall_areas: ood_scores must be scores of"):
        precision_recall_areas([0.5, 1.0], [0, 1])
