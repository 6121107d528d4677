"""Paired tests against their definitions, resampling and simulation; Holm against its rule."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score

from oodkernels.metrics import (
    compare_detectors,
    fpr_name,
    holm,
    ood_metrics,
    paired_test,
)


def correlated(rng, n, m, rho=0.8, shifts=(1.5, 1.2)):
    """Scores of two detectors that share most of their noise: (id, id), (ood, ood)."""
    common_id, common_ood = rng.normal(size=n), rng.normal(size=m)
    ids, oods = [], []
    for shift in shifts:
        ids.append(math.sqrt(rho) * common_id + math.sqrt(1 - rho) * rng.normal(size=n) + shift)
        oods.append(math.sqrt(rho) * common_ood + math.sqrt(1 - rho) * rng.normal(size=m))
    return tuple(ids), tuple(oods)


def restated(ids, oods):
    """DeLong's covariance by all pairs, as in the paper: difference and standard error."""
    v10, v01 = [], []
    for x, y in zip(ids, oods, strict=True):
        psi = (x[:, None] > y) + 0.5 * (x[:, None] == y)
        v10.append(psi.mean(1))
        v01.append(psi.mean(0))
    covariance = np.cov(v10) / len(ids[0]) + np.cov(v01) / len(oods[0])
    contrast = np.array([1, -1])
    return v10[0].mean() - v10[1].mean(), math.sqrt(max(0, contrast @ covariance @ contrast))


@pytest.mark.parametrize("decimals", [8, 1, 0], ids=["distinct", "some ties", "few values"])
def test_delong_is_its_definition(decimals):
    rng = np.random.default_rng(0)
    ids, oods = correlated(rng, 80, 45)
    ids, oods = [[a.round(decimals) for a in side] for side in (ids, oods)]
    result = paired_test(ids, oods)
    difference, error = restated(ids, oods)
    assert result.auroc_difference == pytest.approx(difference, rel=1e-12)
    assert result.auroc_standard_error == pytest.approx(error, rel=1e-10)
    for found, x, y in zip(result.auroc, ids, oods, strict=True):
        labels = np.r_[np.ones(len(x)), np.zeros(len(y))]
        assert found == pytest.approx(roc_auc_score(labels, np.r_[x, y]), rel=1e-12)
        assert found == ood_metrics(x, {"": y})[""].auroc
    z = difference / error
    assert result.auroc_p == pytest.approx(2 * stats.norm.sf(abs(z)), rel=1e-9)
    low, high = result.auroc_interval
    half = stats.norm.ppf(0.975) * error
    assert (low, high) == pytest.approx((difference - half, difference + half), rel=1e-9)


def test_fpr_is_that_of_ood_metrics():
    rng = np.random.default_rng(1)
    ids, oods = correlated(rng, 400, 300)
    for tpr in (0.95, 0.8, np.float32(0.5)):
        result = paired_test(ids, oods, tpr=tpr)
        expected = [ood_metrics(x, y, tpr=tpr).fpr_at_tpr for x, y in zip(ids, oods, strict=True)]
        assert list(result.fpr) == expected
        assert result.fpr_difference == pytest.approx(expected[0] - expected[1], abs=1e-15)


def test_standard_errors_are_those_of_resampling():
    """Paired bootstrap: ID and OOD samples are drawn anew, the same for both detectors."""
    rng = np.random.default_rng(2)
    ids, oods = correlated(rng, 1500, 1200)
    result = paired_test(ids, oods)
    differences = []
    for _ in range(400):
        i, j = rng.integers(0, 1500, 1500), rng.integers(0, 1200, 1200)
        again = paired_test([x[i] for x in ids], [y[j] for y in oods])
        differences.append((again.auroc_difference, again.fpr_difference))
    auroc, fpr = np.std(differences, axis=0, ddof=1)
    assert result.auroc_standard_error == pytest.approx(auroc, rel=0.12)
    assert result.fpr_standard_error == pytest.approx(fpr, rel=0.2)


@pytest.mark.parametrize("size", [(200, 150), (1000, 2000)])
def test_intervals_cover_and_tests_err_as_often_as_they_say(size):
    rng = np.random.default_rng(3)
    normal, shifts = stats.norm(), (1.5, 1.2)
    truth_auroc = [normal.cdf(s / math.sqrt(2)) for s in shifts]
    truth_fpr = [normal.sf(s - normal.ppf(0.95)) for s in shifts]
    repeats = 400
    covered, wrong = np.zeros(2), np.zeros(2)
    for _ in range(repeats):
        result = paired_test(*correlated(rng, *size), confidence=0.9)
        for i, (truth, (low, high)) in enumerate(
            ((truth_auroc, result.auroc_interval), (truth_fpr, result.fpr_interval))
        ):
            covered[i] += low <= truth[0] - truth[1] <= high
        equal = paired_test(*correlated(rng, *size, shifts=(1.5, 1.5)), confidence=0.9)
        wrong += equal.auroc_p < 0.1, equal.fpr_p < 0.1
    sigma = math.sqrt(0.09 / repeats)
    assert np.all(np.abs(covered / repeats - 0.9) < 4 * sigma), covered / repeats
    assert np.all(wrong / repeats < 0.1 + 4 * sigma), wrong / repeats


def test_pairing_finds_what_single_intervals_do_not():
    ids, oods = correlated(np.random.default_rng(4), 800, 800, rho=0.97, shifts=(1.5, 1.4))
    single = [ood_metrics(x, y).auroc_interval for x, y in zip(ids, oods, strict=True)]
    assert single[0][0] < single[1][1]  # they overlap
    assert paired_test(ids, oods).auroc_p < 1e-3


def test_no_monotone_map_matters():
    """Detectors have scales of their own: only orders count."""
    ids, oods = correlated(np.random.default_rng(5), 90, 70)
    mapped = [(a, np.exp(3 * b) - 7) for a, b in (ids, oods)]
    assert paired_test(ids, oods) == paired_test(*mapped)
    swapped = paired_test(ids[::-1], oods[::-1])
    assert swapped.auroc_difference == -paired_test(ids, oods).auroc_difference
    assert swapped.fpr_p == paired_test(ids, oods).fpr_p


@given(
    scores=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 3), st.booleans()), min_size=4, max_size=30
    ).filter(lambda s: 0 < sum(ood for *_, ood in s) < len(s))
)
@settings(max_examples=150, deadline=None)
def test_few_values_of_any_kind(scores):
    ids = [[float(s[i]) for s in scores if not s[2]] for i in (0, 1)]
    oods = [[float(s[i]) for s in scores if s[2]] for i in (0, 1)]
    result = paired_test(ids, oods)
    if min(len(ids[0]), len(oods[0])) > 1:
        difference, error = restated(*([np.array(x) for x in side] for side in (ids, oods)))
        assert result.auroc_difference == pytest.approx(difference, abs=1e-12)
        assert result.auroc_standard_error == pytest.approx(error, abs=1e-7)
    for name in ("auroc", "fpr"):
        low, high = getattr(result, f"{name}_interval")
        assert -1 <= low <= getattr(result, f"{name}_difference") <= high <= 1
        assert 0 <= getattr(result, f"{name}_p") <= 1


def test_what_says_nothing():
    x, y = np.arange(200.0) + 100, np.arange(50.0)
    same = paired_test((x, x * 2), (y, y * 2))
    assert (same.auroc_difference, same.auroc_p, same.fpr_p) == (0, 1, 1)
    half = math.sqrt(2 * math.log(2 / 0.05) / 50)
    assert same.auroc_interval == same.fpr_interval == pytest.approx((-half, half))
    against = paired_test((x, -x), (y, y))
    assert against.auroc == (1, 0)
    assert against.auroc_p == pytest.approx(2 * math.exp(-25))
    single = paired_test(([1.0], [2.0]), ([0.0, 1], [3.0, 1]))
    assert math.isnan(single.auroc_standard_error)
    assert single.auroc_interval == (-1, 1)
    # Fewer than five ID scores below the threshold: its FPR is anything.
    few = paired_test((x, x[::-1]), (y + 90, y + 80), tpr=0.99)
    assert math.isnan(few.fpr_standard_error)
    assert (few.fpr_interval, few.fpr_p) == ((-1, 1), 1)


def test_millions_of_scores_do_not_overflow():
    """Squares of placements add up to more than 64 bits hold."""
    n = 3_000_000
    x = torch.arange(n, dtype=torch.float64)
    result = paired_test((x, -x), (x - 0.5, x + n))
    assert result.auroc == (0.5 + 0.5 / n, 0)
    v = (np.arange(n) + 1) / n
    error = math.sqrt(v.var(ddof=1) / n + (1 - (np.arange(n) / n)).var(ddof=1) / n)
    assert result.auroc_standard_error == pytest.approx(error, rel=1e-9)


# --- samples that are not independent -------------------------------------------------------------


def clustered(rng, id_classes=60, ood_classes=50, each=12, shifts=(1.5, 1.3)):
    """Scores of two detectors, each of which finds some classes harder than the other does."""
    ids, oods = [], []
    for shift in shifts:
        for side, classes, mean in ((ids, id_classes, shift), (oods, ood_classes, 0)):
            effect = np.repeat(rng.normal(size=classes), each)
            side.append(mean + 0.7 * effect + 0.7 * rng.normal(size=classes * each))
    labels = (np.repeat(np.arange(c), each) for c in (id_classes, ood_classes))
    return tuple(ids), tuple(oods), dict(zip(("id_classes", "ood_classes"), labels, strict=True))


def test_classes_of_one_sample_change_nothing():
    ids, oods = correlated(np.random.default_rng(8), 300, 200)
    expected = paired_test(ids, oods)
    classes = {"id_classes": np.arange(300)[::-1], "ood_classes": torch.arange(200) * 7 - 5}
    result = paired_test(ids, oods, **classes)
    assert (result.id_units, result.ood_units) == (300, 200)
    for name in ("auroc", "fpr"):
        for part in ("difference", "standard_error", "p", "interval"):
            found, wanted = (getattr(r, f"{name}_{part}") for r in (result, expected))
            assert found == pytest.approx(wanted, rel=1e-9)


def test_errors_of_classes_are_those_of_drawing_classes_anew():
    rng = np.random.default_rng(9)
    ids, oods, classes = clustered(rng)
    result = paired_test(ids, oods, **classes)
    assert (result.id_units, result.ood_units) == (60, 50)
    differences = []
    for _ in range(400):
        drawn = [rng.integers(0, k, k)[:, None] * 12 + np.arange(12) for k in (60, 50)]
        i, j = (d.reshape(-1) for d in drawn)
        again = paired_test([x[i] for x in ids], [y[j] for y in oods])
        differences.append((again.auroc_difference, again.fpr_difference))
    auroc, fpr = np.std(differences, axis=0, ddof=1)
    assert result.auroc_standard_error == pytest.approx(auroc, rel=0.12)
    assert result.fpr_standard_error == pytest.approx(fpr, rel=0.25)
    assert result.auroc_standard_error > 2 * paired_test(ids, oods).auroc_standard_error


def test_intervals_of_classes_cover():
    """Where those that take samples for independent do not."""
    rng = np.random.default_rng(10)
    sigma = math.sqrt(2 * 2 * 0.49)
    normal = stats.norm()
    truth = normal.cdf(1.5 / sigma) - normal.cdf(1.3 / sigma)
    hits = np.zeros(2)
    for _ in range(300):
        ids, oods, classes = clustered(rng)
        for i, options in enumerate((classes, {})):
            low, high = paired_test(ids, oods, confidence=0.9, **options).auroc_interval
            hits[i] += low <= truth <= high
    covered = hits / 300
    assert abs(covered[0] - 0.9) < 4 * math.sqrt(0.09 / 300)
    assert covered[1] < 0.7


def test_classes_of_sets():
    ids, oods, classes = clustered(np.random.default_rng(11))
    names = ("a", "b")
    sets = {"s": dict(zip(names, oods, strict=True)), "t": dict(zip(names, oods, strict=True))}
    result = compare_detectors(
        dict(zip(names, ids, strict=True)),
        sets,
        id_classes=classes["id_classes"].tolist(),
        ood_classes={"t": classes["ood_classes"]},
    )
    assert result.pairs["t", "a", "b"] == paired_test(ids, oods, **classes)
    alone = paired_test(ids, oods, id_classes=classes["id_classes"])
    assert result.pairs["s", "a", "b"] == alone
    with pytest.raises(
        ValueError, match=r"ood_classes must be of sets in .*\['s', 't'\], got \['u'"
    ):
        compare_detectors(dict(zip(names, ids, strict=True)), sets, ood_classes={"u": [0]})


def test_classes_are_checked():
    ids, oods, classes = clustered(np.random.default_rng(12))
    single = paired_test(ids, oods, id_classes=np.zeros(720, int))
    assert math.isnan(single.auroc_standard_error)
    assert math.isnan(single.fpr_standard_error)
    with pytest.raises(TypeError, match=r"id_classes must be integers, got torch.float64"):
        paired_test(ids, oods, id_classes=np.zeros(720))
    with pytest.raises(ValueError, match=r"ood_classes must be one for each of 600 .* 720"):
        paired_test(ids, oods, ood_classes=classes["id_classes"])


# --- many comparisons -----------------------------------------------------------------------------


def test_holm_is_its_rule():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1, 1]
    assert holm([]) == []
    rng = np.random.default_rng(6)
    for _ in range(20):
        p = rng.random(7) ** 3
        order = np.argsort(p)
        rejected = set()
        for rank, i in enumerate(order):  # the procedure itself, at one level
            if p[i] * (7 - rank) >= 0.05:
                break
            rejected.add(int(i))
        assert {i for i, q in enumerate(holm(p)) if q < 0.05} == rejected


@pytest.mark.parametrize(
    ("p", "error", "match"),
    [
        ([0.5, math.nan], ValueError, r"holm: p_values\[1\] must not be NaN"),
        ([1.5], ValueError, r"holm: p_values\[0\] must be in \[0, 1\], got 1.5"),
        (["a"], TypeError, r"holm: p_values\[0\] must be a number, got 'a'"),
    ],
)
def test_holm_refuses(p, error, match):
    with pytest.raises(error, match=match):
        holm(p)


def many(seed=7, n=600, m=500):
    rng = np.random.default_rng(seed)
    ids, near = correlated(rng, n, m, shifts=(1.5, 1.49, 0.5))
    far = correlated(rng, n, m // 2, shifts=(0, 0, 0))[1]
    names = ("good", "as good", "bad")
    return dict(zip(names, ids, strict=True)), {
        "near": dict(zip(names, near, strict=True)),
        "far": {name: y - 2 for name, y in zip(names, far, strict=True)},
    }


def test_all_pairs_on_all_sets():
    ids, oods = many()
    result = compare_detectors(ids, oods)
    assert result.detectors == ("good", "as good", "bad")
    assert len(result.pairs) == 6
    for (name, a, b), pair in result.pairs.items():
        assert pair == paired_test((ids[a], ids[b]), (oods[name][a], oods[name][b]))
    raw = [pair.auroc_p for pair in result.pairs.values()]
    assert list(result.p_auroc.values()) == holm(raw)
    for figure in ("auroc", "fpr"):
        assert set(result.as_good_as_best("near", figure)) == {"good", "as good"}
        assert result.best("near", figure) in ("good", "as good")
    assert result.figures("far")["bad"] == ood_metrics(ids["bad"], oods["far"]["bad"]).auroc
    table = str(result).splitlines()
    assert table[0].split() == [
        "detector",
        *(["near", "auroc", "near", fpr_name(0.95)]),
        "far",
        "auroc",
        "far",
        "fpr95",
    ]
    assert [line.split()[0] for line in table[1:4]] == ["good", "as", "bad"]
    assert [line.count("=") for line in table[1:4]] == [4, 4, 0]


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda i, o: ({"a": i["good"]}, o), ValueError, "must be two detectors .* got 1 and 2"),
        (lambda i, o: (i, {}), ValueError, "one OOD set, got 3 and 0"),
        (
            lambda i, o: (i, {"near": {"good": [1.0]}}),
            ValueError,
            r"ood_scores\['near'\] must have the detectors \['good', 'as good', 'bad'\], got",
        ),
        (
            lambda i, o: ({**i, "bad": i["bad"][1:]}, o),
            ValueError,
            r"id_scores\['bad'\] must be of the samples of id_scores\['good'\], 600, got 599",
        ),
        (
            lambda i, o: (i, {"x": {**o["near"], "bad": [0.0, math.nan]}}),
            ValueError,
            r"ood_scores\['x'\]\['bad'\] must not be NaN, got 1 NaN, the first at index 1",
        ),
        (lambda i, o: ({**i, "good": []}, o), ValueError, r"id_scores\['good'\] must not be empty"),
        (lambda i, o: ({**i, "good": 1.0}, o), ValueError, "at least one dimension, got a scalar"),
        (lambda i, o: ({**i, "good": ["a"]}, o), TypeError, r"\['good'\] must be numbers"),
    ],
)
def test_compare_refuses(change, error, match):
    with pytest.raises(error, match=f"^compare_detectors: .*{match}"):
        compare_detectors(*change(*many()))


def test_paired_test_refuses():
    with pytest.raises(ValueError, match="must be pairs, one for each detector, got 3 and 2"):
        paired_test(([1.0],) * 3, ([0.0],) * 2)
    with pytest.raises(ValueError, match=r"ood_scores\[1\] must be of the samples of .* 1, got 2"):
        paired_test(([1.0],) * 2, ([0.0], [0.0, 1.0]))
    with pytest.raises(ValueError, match=r"paired_test: tpr must be in \(0, 1\], got 0"):
        paired_test(([1.0],) * 2, ([0.0],) * 2, tpr=0)
