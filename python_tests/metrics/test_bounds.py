"""Certified bounds against every placement of the scores in their intervals."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oodkernels.metrics.streaming._bounds import Intervals, _dot, figures
from oodkernels.ops.roc import exact_ceil

TPR = 0.75


def decode(keys):
    return keys.astype(float), keys.astype(float)


def intervals(bins):
    low, high, n_id, n_ood = (np.array(c, np.int64) for c in zip(*bins, strict=True))
    return Intervals(low, high, n_id, n_ood, decode)


def exact(ids, oods, tpr=TPR):
    """Every figure by its definition, in fractions."""
    pairs = [(i > o) + Fraction(i == o, 2) for i in ids for o in oods]

    def ap(positives, negatives):
        total = Fraction(0)
        for x in positives:
            t = sum(p >= x for p in positives)
            total += Fraction(t, t + sum(n >= x for n in negatives))
        return total / len(positives)

    def at_recall(positives, negatives):
        t = sorted(positives, reverse=True)[exact_ceil(tpr, len(positives)) - 1]
        return t, Fraction(sum(n >= t for n in negatives), len(negatives))

    threshold, fpr = at_recall(ids, oods)
    negated_ids, negated_oods = [-i for i in ids], [-o for o in oods]
    threshold_out, fpr_out = at_recall(negated_oods, negated_ids)
    errors = [
        Fraction(sum(i < t for i in ids), 2 * len(ids))
        + Fraction(sum(o >= t for o in oods), 2 * len(oods))
        for t in [*ids, *oods, max(ids) + 1]
    ]
    return {
        "auroc": sum(pairs) / len(pairs),
        "aupr_in": ap(ids, oods),
        "aupr_out": ap(negated_oods, negated_ids),
        "fpr_at_tpr": fpr,
        "fpr_out_at_tpr": fpr_out,
        "threshold": threshold,
        "threshold_out": -threshold_out,
        "detection_error": min(errors),
        "base_rate_in": Fraction(len(ids), len(ids) + len(oods)),
        "base_rate_out": Fraction(len(oods), len(ids) + len(oods)),
        "tie_fraction": Fraction(sum(i == o for i in ids for o in oods), len(pairs)),
    }


def placements(bins):
    """Every choice of a coordinate for each score, as (ids, oods)."""
    choices = [
        list(
            itertools.product(
                itertools.combinations_with_replacement(range(low, high + 1), n_id),
                itertools.combinations_with_replacement(range(low, high + 1), n_ood),
            )
        )
        for low, high, n_id, n_ood in bins
    ]
    for choice in itertools.product(*choices):
        yield (
            [x for ids, _ in choice for x in ids],
            [x for _, oods in choice for x in oods],
        )


def extremes(bins):
    found = [exact(*p) for p in placements(bins)]
    return {k: (min(f[k] for f in found), max(f[k] for f in found)) for k in found[0]}


def check(bins, *, attained=()):
    bounded = figures(intervals(bins), TPR)
    for name, (least, most) in extremes(bins).items():
        b = bounded[name]
        assert b.lower <= b.estimate <= b.upper
        assert b.lower <= least + Fraction(1, 10**12), name
        assert b.upper >= most - Fraction(1, 10**12), name
        if name in attained:
            assert b.lower == pytest.approx(float(least), abs=1e-12), name
            assert b.upper == pytest.approx(float(most), abs=1e-12), name


counts = st.integers(0, 2)


@given(
    st.lists(st.tuples(st.sampled_from([0, 3]), counts, counts), min_size=1, max_size=3).filter(
        lambda c: 0 < sum(b[1] for b in c) <= 4 and 0 < sum(b[2] for b in c) <= 4
    )
)
@settings(max_examples=40, deadline=None)
def test_disjoint_bins_attain_their_bounds(bins):
    """Bins of one key and bins of four, in any order: no bound can be narrower."""
    placed, low = [], 0
    for width, n_id, n_ood in bins:
        placed.append((low, low + width, n_id, n_ood))
        low += width + 1
    check(
        placed,
        attained=(
            "auroc",
            "aupr_in",
            "aupr_out",
            "fpr_at_tpr",
            "fpr_out_at_tpr",
            "threshold",
            "threshold_out",
            "detection_error",
        ),
    )


@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 3), counts, counts), min_size=1, max_size=4
    ).filter(lambda c: 0 < sum(b[2] for b in c) <= 3 and 0 < sum(b[3] for b in c) <= 3)
)
@settings(max_examples=80, deadline=None)
def test_overlapping_intervals_hold_every_placement(bins):
    check(
        [(low, low + width, n_id, n_ood) for low, width, n_id, n_ood in bins],
        attained=("auroc", "fpr_at_tpr", "fpr_out_at_tpr", "threshold", "detection_error"),
    )


def test_points_have_no_width():
    rng = np.random.default_rng(0)
    keys = np.arange(50)
    bins = Intervals(keys, keys, rng.integers(0, 9, 50), rng.integers(0, 9, 50), decode)
    ids, oods = np.repeat(keys, bins.n_id).tolist(), np.repeat(keys, bins.n_ood).tolist()
    for name, value in exact(ids, oods).items():
        b = figures(bins, TPR)[name]
        assert b.lower == b.estimate == b.upper == pytest.approx(float(value), abs=1e-14), name


def test_a_trillion_scores_do_not_overflow():
    n = 10**12
    keys = np.arange(4)
    half = np.array([n, 0, n, 0])
    bounded = figures(Intervals(keys, keys, half[::-1].copy(), half, decode), 0.95)
    assert bounded["auroc"].estimate == 0.75
    assert bounded["auroc"].lower == bounded["auroc"].upper
    assert bounded["fpr_at_tpr"].estimate == 0.5


def test_exact_products():
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 10**12, 1000), rng.integers(0, 10**12, 1000)
    assert _dot(a, b) == sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))


def test_tpr_is_read_as_a_decimal():
    assert exact_ceil(0.95, 20) == 19
    assert exact_ceil(0.95, 100) == 95
    assert exact_ceil(1.0, 7) == 7
