"""Conventions against independent restatements of each rule, intervals against their promises."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pytorch_ood_package import pytorch_ood
from scipy import stats
from sklearn import metrics as sk

from oodkernels.metrics import ood as metrics
from oodkernels.metrics.intervals import auroc_interval, clopper_pearson, delong, quantile_ranks
from oodkernels.metrics.ood import (
    CONVENTIONS,
    FIGURES,
    OODResult,
    compare_conventions,
    fpr_name,
    ood_metrics,
)

Array = NDArray[np.float64]

# --- the rules, restated: (positives, negatives) with higher = more positive ----------------------


def counts_at(pos: Array, neg: Array) -> list[tuple[float, int, int]]:
    """(threshold, true positives, false positives) at every distinct score, the highest first."""
    levels = np.unique(np.concatenate([pos, neg]))[::-1]
    return [(t, int((pos >= t).sum()), int((neg >= t).sum())) for t in levels]


def fpr_least(pos: Array, neg: Array, tpr: float) -> float:
    for _, tp, fp in counts_at(pos, neg):
        if tp / len(pos) >= tpr:
            return fp / len(neg)
    raise AssertionError


def fpr_nearest(pos: Array, neg: Array, tpr: float) -> float:
    # Thresholds up to the first with recall 1; of the nearest recalls the highest, then most FP.
    points = counts_at(pos, neg)
    first_full = next(i for i, (_, tp, _) in enumerate(points) if tp == len(pos))
    return min(
        ((abs(tp / len(pos) - tpr), -tp, -fp) for _, tp, fp in points[: first_full + 1]),
    )[2] / -len(neg)


def fpr_order(pos: Array, neg: Array, tpr: float) -> float:
    threshold = np.sort(pos)[-int(np.floor(tpr * len(pos)))]
    return float((neg > threshold).mean())


def fpr_corner(pos: Array, neg: Array, tpr: float) -> float:
    label = np.r_[np.ones(len(pos)), np.zeros(len(neg))]
    fprs, tprs, _ = sk.roc_curve(label, ranked(np.r_[pos, neg]))
    return float(fprs[np.argmax(tprs >= tpr)])


def ranked(scores: Array) -> NDArray[np.int64]:
    """Finite numbers with the order and the ties of the scores, which scikit-learn wants."""
    return np.unique(scores + 0.0, return_inverse=True)[1]


def average_precision(pos: Array, neg: Array) -> float:
    label = np.r_[np.ones(len(pos)), np.zeros(len(neg))]
    return float(sk.average_precision_score(label, ranked(np.r_[pos, neg])))


def trapezoid(pos: Array, neg: Array) -> float:
    label = np.r_[np.ones(len(pos)), np.zeros(len(neg))]
    precision, recall, _ = sk.precision_recall_curve(label, ranked(np.r_[pos, neg]))
    return float(sk.auc(recall, precision))


Rule = Callable[[Array, Array, float], float]
RULES: dict[str, tuple[bool, Rule, Callable[[Array, Array], float]]] = {  # positive = OOD?
    "default": (False, fpr_least, average_precision),
    "mos": (False, fpr_nearest, average_precision),
    "oe": (True, fpr_nearest, average_precision),
    "dos": (False, fpr_order, trapezoid),
    "openood": (True, fpr_corner, trapezoid),
    "pytorch-ood": (True, fpr_least, trapezoid),
}


def check_conventions(x: Array, y: Array, tpr: float = 0.95) -> None:
    results = compare_conventions(x, y, tpr=tpr)
    assert list(results) == list(RULES) == list(CONVENTIONS)
    for name, (ood_positive, rule, area) in RULES.items():
        result = results[name]
        assert result.convention == name
        assert (CONVENTIONS[name].positive == "ood") == ood_positive
        pos, neg = (-y, -x) if ood_positive else (x, y)
        assert result.fpr_at_tpr == rule(pos, neg, tpr), name
        assert result.aupr_in == pytest.approx(area(x, y), rel=1e-12, abs=0), name
        assert result.aupr_out == pytest.approx(area(-y, -x), rel=1e-12, abs=0), name
        # The threshold is where the false positives are counted.
        t = result.threshold
        kept = (y > t if name == "dos" else y >= t) if not ood_positive else x <= t
        assert kept.sum() == result.false_positives, name
        assert result == ood_metrics(x, y, convention=name, tpr=tpr)


def test_all_tied() -> None:
    results = compare_conventions(np.zeros(10), np.zeros(10))
    assert {name: r.fpr95 for name, r in results.items()} == {
        "default": 1,
        "mos": 1,
        "oe": 1,
        "dos": 0,
        "openood": 1,
        "pytorch-ood": 1,
    }
    check_conventions(np.zeros(10), np.zeros(10))


def test_101_levels() -> None:
    levels = np.arange(101.0)
    results = compare_conventions(levels, levels)
    assert {name: round(r.fpr95, 4) for name, r in results.items()} == {
        "default": 0.9505,
        "mos": 0.9505,
        "oe": 0.9505,
        "dos": 0.9307,
        "openood": 1.0,
        "pytorch-ood": 0.9505,
    }
    check_conventions(levels, levels)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("grain", [0, 1, 4], ids=["distinct", "few values", "some ties"])
def test_conventions(seed: int, grain: int) -> None:
    rng = np.random.default_rng(seed)
    n, m = rng.integers(1, 400, 2)
    x, y = rng.normal(1, 1, n), rng.normal(0, 1, m)
    if grain:
        x, y = np.round(x * grain) / grain, np.round(y * grain) / grain
    for tpr in (0.95, 0.8, 0.5, 0.05, 1.0):
        check_conventions(x, y, tpr)


small = st.lists(st.integers(0, 9).map(float), min_size=1, max_size=40).map(np.array)


@settings(max_examples=100, deadline=None)
@given(small, small, st.sampled_from([0.95, 0.9, 0.5, 0.3, 1 / 3]))
def test_conventions_of_few_values(x: Array, y: Array, tpr: float) -> None:
    assume(len(x) != len(y) or set(y) != {0, 1})  # which would be taken for labels
    check_conventions(x, y, tpr)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_scores_one_ulp_apart(dtype: type) -> None:
    for centre in (1.0, -3.0, 60000.0):
        ladder = [dtype(centre)]
        for _ in range(40):
            ladder.append(np.nextafter(ladder[-1], dtype(np.inf)))
        rng = np.random.default_rng(0)
        check_conventions(rng.choice(ladder[5:], 60), rng.choice(ladder[:30], 50))


def test_corner_far_from_the_threshold() -> None:
    # Equal steps for thousands of levels, behind one that ties thousands of scores.
    y = np.r_[np.arange(5000.0), np.full(3000, 4760.0)]
    x = np.r_[np.arange(5000.0), np.full(3000, 4760.0)] + 0.0
    check_conventions(x, y)
    check_conventions(np.r_[x, 4990.0], y)


def test_pytorch_ood_itself() -> None:
    functional = pytorch_ood("metrics.functional")
    rng = np.random.default_rng(0)
    for _ in range(5):
        x, y = rng.normal(1, 1, 300).round(1), rng.normal(0, 1, 200).round(1)
        outlier = -torch.from_numpy(np.r_[x, y])
        label = torch.from_numpy(np.r_[np.zeros(len(x)), -np.ones(len(y))])
        result = ood_metrics(x, y, convention="pytorch-ood")
        assert result.fpr95 == float(functional.fpr_at_tpr(outlier, label))
        assert result.auroc == pytest.approx(float(functional.auroc(outlier, label)), rel=1e-12)
        for side in ("in", "out"):
            theirs = functional.aupr(outlier, label, "id" if side == "in" else "ood")
            assert getattr(result, f"aupr_{side}") == pytest.approx(float(theirs), rel=1e-12)


def test_torchmetrics_agrees_inside_0_1() -> None:
    # Outside, it applies a sigmoid, and so ties what float32 then cannot tell apart.
    classification = pytest.importorskip("torchmetrics.functional.classification")
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(500, generator=generator, dtype=torch.float64) ** 0.5
    y = torch.rand(400, generator=generator, dtype=torch.float64)
    label = torch.cat([torch.ones(500), torch.zeros(400)]).long()
    result = ood_metrics(x, y)
    theirs = classification.binary_auroc(torch.cat([x, y]), label)
    assert result.auroc == pytest.approx(float(theirs), rel=1e-6)
    saturated = classification.binary_auroc(torch.cat([x + 400, y + 400]).float(), label)
    assert float(saturated) == 0.5
    assert ood_metrics((x + 400).float(), (y + 400).float()).auroc > 0.6


# --- results --------------------------------------------------------------------------------------


def binormal(rng: np.random.Generator, n: int, m: int) -> tuple[Array, Array]:
    return rng.normal(1.5, 1, n), rng.normal(0, 1, m)


def test_figures() -> None:
    x, y = binormal(np.random.default_rng(0), 400, 100)
    result = ood_metrics(x, y)
    assert list(result.as_dict()) == [
        "auroc",
        "aupr_in",
        "aupr_out",
        "fpr95",
        "fpr95_out",
        "threshold",
        "threshold_out",
        "detection_error",
        "base_rate_in",
        "base_rate_out",
        "tie_fraction",
    ]
    assert set(FIGURES) <= set(OODResult.__dataclass_fields__)
    assert (result.n_id, result.n_ood, result.true_positives) == (400, 100, 380)
    assert result.fpr95 == result.fpr_at_tpr == result.false_positives / 100
    assert (result.base_rate_in, result.base_rate_out, result.tie_fraction) == (0.8, 0.2, 0)
    fpr, tpr, _ = sk.roc_curve(np.r_[np.ones(400), np.zeros(100)], np.r_[x, y])
    assert result.detection_error == pytest.approx(((1 - tpr) / 2 + fpr / 2).min(), rel=1e-12)
    for text in ("400 ID and 100 OOD", "'default'", "fpr95", "auroc"):
        assert text in str(result)


def test_fpr_has_the_name_of_its_tpr() -> None:
    x, y = binormal(np.random.default_rng(0), 100, 100)
    assert fpr_name(0.95) == "fpr95"
    assert fpr_name(0.999) == "fpr99.9"
    result = ood_metrics(x, y, tpr=0.8)
    assert "fpr80" in result.as_dict()
    assert "fpr95" not in result.as_dict()
    with pytest.raises(AttributeError, match=r"at a TPR of 0.8, not 0.95: read fpr_at_tpr"):
        _ = result.fpr95
    with pytest.raises(AttributeError, match="read fpr_out_at_tpr"):
        _ = result.fpr95_out


def test_many_sets_sort_id_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x, y = binormal(rng, 300, 200)
    sets = {"near": y, "far": y - 2, "tiny": y[:1]}
    calls = []
    original = metrics.sort_keys
    monkeypatch.setattr(
        metrics, "sort_keys", lambda s, f, name: calls.append(name) or original(s, f, name)
    )
    results = ood_metrics(x, sets)
    assert calls == ["id_scores", "ood_scores['near']", "ood_scores['far']", "ood_scores['tiny']"]
    assert list(results) == list(sets)
    assert len(results) == 3
    for name, scores in sets.items():
        assert results[name] == ood_metrics(x, scores)
    for figure in ("auroc", "fpr95", "aupr_out"):
        mean = np.mean([getattr(results[name], figure) for name in sets])
        assert results.average[figure] == pytest.approx(mean)
    table = str(results).splitlines()
    assert [line.split()[0] for line in table[:5]] == ["OOD", "near", "far", "tiny", "average"]
    assert table[-1].startswith("convention: default")
    table = str(compare_conventions(x, y)).splitlines()
    assert [line.split()[0] for line in table[:-1]] == ["convention", *CONVENTIONS]


def test_inputs() -> None:
    rng = np.random.default_rng(0)
    x, y = binormal(rng, 50, 40)
    expected = ood_metrics(x, y)
    read_only = y.copy()
    read_only.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for a, b in (
            (x.tolist(), y.tolist()),
            (torch.from_numpy(x), y),
            (x[::-1], y[::-1].reshape(8, 5)),
            (x, read_only),
            (x.astype(">f8"), y),
            (torch.from_numpy(x).requires_grad_(), y),
        ):
            assert ood_metrics(a, b) == expected
    # Integers are scores; two types meet in the one that holds both.
    assert ood_metrics([3, 2, 1], np.array([0, 1], np.uint8)).auroc == 5.5 / 6
    half, single = torch.tensor([1.0, 2.0]).bfloat16(), torch.tensor([1.001, 0.5]).half()
    assert ood_metrics(half, single).auroc == 0.75
    assert ood_metrics(half, single).threshold == 1.0
    assert ood_metrics(torch.tensor([0.1]), np.array([0.1])).tie_fraction == 0


def test_refused() -> None:
    x = np.arange(5.0)
    for call in (ood_metrics, compare_conventions):
        name = call.__name__
        with pytest.raises(ValueError, match=f"^{name}: id_scores must not be empty"):
            call([], x)
        with pytest.raises(ValueError, match=f"^{name}: ood_scores .* NaN, got 1, .* index 2"):
            call(x, [0, 1, np.nan])
        with pytest.raises(TypeError, match=f"^{name}: id_scores must be numbers, got torch.bool"):
            call(x > 2, x)
        with pytest.raises(TypeError, match=f"^{name}: ood_scores must be numbers, got torch.bool"):
            call(x, torch.ones(3).bool())
        with pytest.raises(TypeError, match="id_scores must be numbers"):
            call(["a"], x)
        with pytest.raises(TypeError, match=r"id_scores must be numbers, got torch\.complex64"):
            call(torch.ones(2, dtype=torch.complex64), x)
        with pytest.raises(ValueError, match="id_scores must have at least one dimension"):
            call(1.0, x)
        with pytest.raises(ValueError, match=r"ood_scores must be integers below 2\*\*53"):
            call(x, [2**53 + 1])
        for tpr in (0.0, -1.0, 1.5, math.nan):
            with pytest.raises(ValueError, match=rf"^{name}: tpr must be in \(0, 1\]"):
                call(x, x, tpr=tpr)
        with pytest.raises(ValueError, match=r"confidence must be in \(0, 1\), got 1"):
            call(x, x, confidence=1)
    with pytest.raises(ValueError, match=r"convention must be one of default, mos, .* got 'odin'"):
        ood_metrics(x, x, convention="odin")
    with pytest.raises(ValueError, match="must name at least one set"):
        ood_metrics(x, {})
    with pytest.raises(ValueError, match=r"ood_scores\['b'\] must not hold NaN"):
        ood_metrics(x, {"a": x, "b": [np.nan]})


@pytest.mark.parametrize(
    "labels",
    [
        [0, 1, 1, 0],
        [0.0, 1.0, 1.0, 0.0],
        np.array([[1, 0], [0, 1]], np.uint8),
        torch.tensor([0, 0, 1, 0]),
        torch.tensor([0, 0, 1, 0], dtype=torch.bfloat16),
    ],
)
def test_labels_are_not_taken_for_scores(labels: object) -> None:
    """scikit-learn's (scores, labels) would come out as figures of scores that are 0 and 1."""
    x = np.array([4.0, 1.0, 2.0, 3.0])
    flags = torch.as_tensor(labels).bool()
    for call in (ood_metrics, compare_conventions):
        name = call.__name__
        cure = rf"write {name}\(scores\[labels == 0\], scores\[labels == 1\]\)"
        with pytest.raises(ValueError, match=f"^{name}: ood_scores .* got 4 values .*{cure}"):
            call(x, labels)
        with pytest.raises(TypeError, match=rf"must be numbers, got torch.bool: .*{cure}"):
            call(x, flags)
    # Said to be scores, of another number, of one value, or beside others, they are scores.
    assert ood_metrics(x, {"ood": labels})["ood"].n_ood == 4
    assert ood_metrics(x[:3], labels).n_ood == 4
    assert ood_metrics(x, np.ones(4)).fpr95 == 1
    assert ood_metrics(x, [0, 1, 0.5, 0]).n_ood == 4


# --- intervals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 10, 57, 1000, 123_456, 10**7, 10**9])
def test_clopper_pearson_is_scipys(n: int) -> None:
    for k in sorted({0, 1, n // 100, n // 20, n // 2, n - 1, n}):
        for confidence in (0.5, 0.95, 0.999):
            low, high = clopper_pearson(k, n, confidence)
            tail = (1 - confidence) / 2
            expected_low = stats.beta.ppf(tail, k, n - k + 1) if k else 0.0
            expected_high = stats.beta.ppf(1 - tail, k + 1, n - k) if k < n else 1.0
            assert low == pytest.approx(expected_low, rel=1e-10, abs=1e-15)
            assert high == pytest.approx(expected_high, rel=1e-10, abs=1e-15)


@pytest.mark.parametrize("n", [1, 5, 20, 59, 60, 100, 1000, 10**6, 10**9])
def test_quantile_ranks_are_the_narrowest(n: int) -> None:
    for q in (0.05, 0.95, 0.5):
        low, high = quantile_ranks(n, q, 0.95)
        # P(x_(low) > quantile) = P(at most low - 1 are below), which must not pass the tail.
        assert low == 0 or stats.binom.cdf(low - 1, n, q) <= 0.025
        assert stats.binom.cdf(low, n, q) > 0.025
        assert high == n + 1 or stats.binom.cdf(high - 1, n, q) >= 0.975
        assert high == 1 or stats.binom.cdf(high - 2, n, q) < 0.975


def test_delong_is_its_definition() -> None:
    rng = np.random.default_rng(0)
    for decimals in (8, 0):
        x, y = (a.round(decimals) for a in binormal(rng, 60, 35))
        wins = (x[:, None] > y) + 0.5 * (x[:, None] == y)
        by_id, by_ood = wins.mean(1), wins.mean(0)
        expected = math.sqrt(by_id.var(ddof=1) / len(x) + by_ood.var(ddof=1) / len(y))
        auroc, error = delong(
            int(2 * wins.sum()),
            len(x),
            len(y),
            int(((2 * wins.sum(1)) ** 2).sum()),
            int(((2 * wins.sum(0)) ** 2).sum()),
        )
        assert auroc == wins.mean() == pytest.approx(ood_metrics(x, y).auroc, rel=1e-15)
        assert error == pytest.approx(expected, rel=1e-12)


def test_auroc_interval_is_near_the_bootstraps() -> None:
    rng = np.random.default_rng(1)
    x, y = binormal(rng, 300, 200)
    low, high = ood_metrics(x, y).auroc_interval
    sample = [
        sk.roc_auc_score(
            np.r_[np.ones(300), np.zeros(200)], np.r_[rng.choice(x, 300), rng.choice(y, 200)]
        )
        for _ in range(1000)
    ]
    np.testing.assert_allclose([low, high], np.quantile(sample, [0.025, 0.975]), atol=0.004)


def test_degenerate_auroc_intervals() -> None:
    separated = ood_metrics(np.arange(30.0) + 100, np.arange(20.0))
    assert separated.auroc_interval == (pytest.approx(0.025 ** (1 / 20)), 1.0)
    low, high = ood_metrics(np.zeros(30), np.zeros(20)).auroc_interval
    assert low < 0.5 < high
    assert ood_metrics([1.0], [0.0, 1.0]).auroc_interval == (0, 1)
    for interval in (auroc_interval(1e-12, 1e-3, 9, 9), auroc_interval(1 - 1e-12, 1e-3, 9, 9)):
        assert 0 <= interval[0] <= interval[1] <= 1


def covered(truth: float, interval: tuple[float, float] | None) -> bool:
    assert interval is not None
    return interval[0] <= truth <= interval[1]


@pytest.mark.parametrize("shape", [(60, 80), (400, 300)])
def test_coverage(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    repeats, shift = 500, 1.5
    normal = stats.norm()
    truth = {
        "auroc": normal.cdf(shift / math.sqrt(2)),
        "fpr": normal.sf(shift - normal.ppf(0.95)),  # OOD kept where 95 % of ID is
    }
    hits = dict.fromkeys(["auroc", "fpr", "fixed", "fpr pytorch-ood"], 0)
    for _ in range(repeats):
        x, y = binormal(rng, *shape)
        result = ood_metrics(x, y, confidence=0.9)
        hits["auroc"] += covered(truth["auroc"], result.auroc_interval)
        hits["fpr"] += covered(truth["fpr"], result.fpr_interval)
        hits["fixed"] += covered(normal.sf(result.threshold), result.fpr_interval_fixed)
        mirrored = ood_metrics(x, y, confidence=0.9, convention="pytorch-ood")
        hits["fpr pytorch-ood"] += covered(truth["fpr"], mirrored.fpr_interval)
    sigma = math.sqrt(0.9 * 0.1 / repeats)
    share = {name: count / repeats for name, count in hits.items()}
    assert abs(share["auroc"] - 0.9) < 4 * sigma
    for name in ("fpr", "fpr pytorch-ood", "fixed"):
        assert share[name] > 0.9 - 3 * sigma, name
    assert share["fixed"] < 0.97  # conservative, but not without end


def test_fpr_interval_shrinks_as_the_root_of_the_sizes() -> None:
    rng = np.random.default_rng(0)
    width = []
    for scale in (1, 16):
        low, high = ood_metrics(*binormal(rng, 2000 * scale, 3000 * scale)).fpr_interval or (0, 0)
        width.append(high - low)
    assert width[0] < 0.2
    assert width[1] == pytest.approx(width[0] / 4, rel=0.2)


def test_coverage_with_ties() -> None:
    rng = np.random.default_rng(0)
    repeats, hits = 500, 0
    p_id, p_ood = np.array([0.02, 0.08, 0.3, 0.6]), np.array([0.4, 0.3, 0.2, 0.1])
    truth = p_ood[1:].sum()  # P(ID >= 1) = 0.98 >= 0.95 > P(ID >= 2)
    for _ in range(repeats):
        x, y = (rng.choice(4, 150, p=p).astype(float) for p in (p_id, p_ood))
        hits += covered(truth, ood_metrics(x, y).fpr_interval)
    assert hits / repeats > 0.95


def test_fpr_interval_of_few_scores_admits_it() -> None:
    low, high = ood_metrics(np.arange(10.0), np.arange(10.0)).fpr_interval or (0, 0)
    assert high == 1.0  # ten ID scores do not bound the 5 % quantile from below
    assert low > 0
    assert ood_metrics(np.arange(10.0), np.arange(10.0), convention="mos").fpr_interval is None


# --- NumPy's numbers ------------------------------------------------------------------------------


def test_numpy_numbers_are_arguments() -> None:
    x, y = binormal(np.random.default_rng(0), 300, 200)
    expected = ood_metrics(x, y, tpr=0.9, confidence=0.8)
    for kind in (np.float64, np.float32, np.float16):
        result = ood_metrics(x, y, tpr=kind(0.9), confidence=kind(0.8))
        assert result == expected
        assert type(result.tpr) is float
        assert "fpr90" in result.as_dict()
        other = compare_conventions(x, y, tpr=kind(0.9), confidence=kind(0.8))
        assert other["default"] == expected
        assert fpr_name(kind(0.999)) == "fpr99.9"
    assert clopper_pearson(np.int64(5), np.uint8(7), np.float32(0.9)) == clopper_pearson(5, 7, 0.9)
    ranks = quantile_ranks(np.int32(200), np.float32(0.95), np.float16(0.9))
    assert ranks == quantile_ranks(200, 0.95, 0.9)
    big = 10**10  # whose square no 64 bits hold
    numbers = [big, 10**5, 10**5, 10**15 + 7, 10**15 + 9]
    assert delong(*map(np.int64, numbers)) == delong(*numbers)
    assert auroc_interval(
        np.float32(0.5), np.float64(0.1), np.int64(9), np.int64(9), np.float32(0.9)
    )


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: ood_metrics([1.0], [0.0], tpr="0.9"), "ood_metrics: tpr must be a number"),
        (lambda: ood_metrics([1.0], [0.0], tpr=True), "ood_metrics: tpr must be a number"),
        (lambda: compare_conventions([1.0], [0.0], confidence=None), "confidence must be a number"),
        (lambda: clopper_pearson(1.5, 3), "clopper_pearson: successes must be an int, got 1.5"),
        (lambda: quantile_ranks(10.0, 0.5), "quantile_ranks: n must be an int, got 10.0"),
        (lambda: quantile_ranks(10, "a"), "quantile_ranks: q must be a number, got 'a'"),
        (lambda: delong(1.0, 1, 1, 1, 1), "delong: wins must be an int, got 1.0"),
    ],
)
def test_what_is_no_number(call: Callable[[], object], match: str) -> None:
    with pytest.raises(TypeError, match=match):
        call()


@pytest.mark.parametrize("side", ["id_scores", "ood_scores"])
@pytest.mark.parametrize(
    ("scores", "error", "match"),
    [
        (3.0, ValueError, "must have at least one dimension"),
        (np.float32(3), ValueError, "must have at least one dimension"),
        (torch.tensor(3.0), ValueError, "must have at least one dimension"),
        (torch.empty(0), ValueError, "must not be empty"),
        ([[1.0], [2.0, 3.0]], ValueError, "must be an array: "),
        ([None], TypeError, "must be numbers, got object"),
        (np.array([1], dtype="datetime64[s]"), TypeError, "must be numbers, got datetime64"),
        (np.array([1], dtype=np.longdouble), TypeError, "must be numbers, got float128"),
        ([-math.inf, math.nan, math.nan], ValueError, "must not hold NaN, got 2.*index 1"),
    ],
)
def test_every_kind_of_input_is_refused_by_name(
    side: str, scores: object, error: type, match: str
) -> None:
    given = {"id_scores": [1.0, 2.0], "ood_scores": [0.0], side: scores}
    for call in (ood_metrics, compare_conventions):
        with pytest.raises(error, match=f"^{call.__name__}: {side} {match}"):
            call(**given)


def test_every_kind_of_input_is_taken() -> None:
    expected = ood_metrics([3.0, math.inf, 1.0], [0.0, -math.inf, 1.0])
    storage = torch.tensor([3.0, 9, math.inf, 9, 1, 9], dtype=torch.float64)
    for x in (
        storage[::2],
        storage[::2].reshape(3, 1).expand(3, 1),
        storage[::2].float(),
        storage[::2].numpy()[::-1],
        (3, np.inf, 1),
        [np.float64(3), math.inf, True + 0],
        storage[::2].to(torch.float8_e5m2),
    ):
        assert ood_metrics(x, [0.0, -math.inf, 1.0]) == expected
