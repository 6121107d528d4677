"""Guarantees against simulation, procedures against plain restatements of their rules.

Rates are compared with their nominal value plus four standard errors of 2,000 draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from oodkernels.deploy import (
    LORD,
    SAFFRON,
    ConformalPValues,
    benjamini_hochberg,
    control_risk,
    least_cost_threshold,
    storey,
)

DRAWS = 2000
Floats = NDArray[np.float64]
Draw = Callable[[np.random.Generator, int], Floats]

SCORES: dict[str, Draw] = {
    "normal": lambda rng, n: rng.normal(size=n),
    "cauchy": lambda rng, n: rng.standard_cauchy(size=n),
    "six values": lambda rng, n: rng.integers(6, size=n).astype(float),
    "mostly one": lambda rng, n: np.where(rng.random(n) < 0.9, 1.0, rng.random(n)),
}
scores = pytest.mark.parametrize("draw", SCORES.values(), ids=SCORES)


def at_most(rate: float, nominal: float, spread: float | None = None) -> bool:
    sigma = math.sqrt(nominal * (1 - nominal)) if spread is None else spread
    return rate <= nominal + 4 * sigma / math.sqrt(DRAWS)


# --- p-values -------------------------------------------------------------------------------------


def test_rule() -> None:
    p = ConformalPValues([1.0, 2.0, 2.0, 4.0])
    assert p([0.5, 1, 2, 3, 4, np.inf, -np.inf]).tolist() == [0.2, 0.4, 0.8, 0.8, 1, 1, 0.2]
    assert p.counts == {None: 4}
    assert p.least == {None: 0.2}
    assert p([]).shape == (0,)


@scores
@pytest.mark.parametrize("n", [19, 100])
def test_marginal_coverage(draw: Draw, n: int) -> None:
    rng = np.random.default_rng(n)
    p = np.array([ConformalPValues(draw(rng, n))(draw(rng, 1))[0] for _ in range(DRAWS)])
    for t in (0.05, 0.1, 0.3):
        assert at_most(float((p <= t).mean()), t)
    if draw is SCORES["normal"]:  # nothing is given away: exact up to the grid of 1 / (n + 1)
        assert (p <= 0.3).mean() >= 0.3 - 1 / (n + 1) - 4 * math.sqrt(0.21 / DRAWS)


@pytest.mark.parametrize("n", [20, 200])
def test_coverage_given_the_calibration_set(n: int) -> None:
    """Of p-values at all levels at once: sorted uniforms must lie below the levels."""
    rng = np.random.default_rng(n)
    delta = 0.1
    failures = marginal = 0
    for _ in range(DRAWS):
        u = np.sort(rng.random(n))  # of scores u: P(score < u) = u
        levels = ConformalPValues(u, delta=delta)(np.append(u - 1e-12, 2.0))
        assert (np.diff(levels) >= 0).all()
        failures += bool((u > levels[:-1]).any())
        marginal += bool((u > ConformalPValues(u)(u - 1e-12)).any())
    assert at_most(failures / DRAWS, delta)
    assert marginal / DRAWS > 0.4  # what the adjustment is for


def test_levels_are_those_of_the_paper() -> None:
    n, delta = 8, 0.1
    k = n // 2
    p = ConformalPValues(np.arange(n, dtype=float), delta=delta)(np.arange(n) - 0.5)
    for r in range(1, n + 1):  # rank r - 1 below
        i = n + 1 - r
        product = math.prod(range(i - k + 1, i + 1)) if i >= k else 0
        whole = math.prod(range(n - k + 1, n + 1))
        expected = 1 - delta ** (1 / k) * (product / whole) ** (1 / k)
        assert p[r - 1] == pytest.approx(expected, rel=1e-12)


def test_groups() -> None:
    """In each group nominal, where one calibration for all is not."""
    rng = np.random.default_rng(0)
    shift = np.array([0.0, -2.0])
    hits = np.zeros(2)
    pooled = np.zeros(2)
    for _ in range(DRAWS):
        group = np.repeat([0, 1], [100, 40])
        cal = rng.normal(size=140) + shift[group]
        new = rng.normal(size=2) + shift
        hits += ConformalPValues(cal, group)(new, [0, 1]) <= 0.1
        pooled += ConformalPValues(cal)(new) <= 0.1
    assert at_most(hits[0] / DRAWS, 0.1)
    assert at_most(hits[1] / DRAWS, 0.1)
    assert not at_most(pooled[1] / DRAWS, 0.1)


def test_too_few_in_a_group() -> None:
    p = ConformalPValues(np.arange(30.0), ["a"] * 25 + ["b"] * 5)
    assert p.too_few(0.05) == {"b": 5}
    assert p.too_few(0.2) == {}
    with pytest.raises(ValueError, match=r"group 'c' has no calibration scores; it has .*'a', 'b'"):
        p([1.0], ["c"])


@pytest.mark.parametrize("exact", [True, False])
def test_from_metric(exact: bool) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("torchmetrics")
    from oodkernels import OODMetrics

    rng = np.random.default_rng(0)
    cal = rng.normal(size=2_000_000 if not exact else 500).astype(np.float32)
    metric = OODMetrics(exact=True) if exact else OODMetrics(memory="8MiB")
    metric.update_id(torch.from_numpy(cal))
    new = rng.normal(size=300).astype(np.float32)
    mine, plain = ConformalPValues.from_metric(metric)(new), ConformalPValues(cal)(new)
    if exact:
        assert (mine == plain).all()
    assert (mine >= plain).all()
    assert (mine - plain).max() < 1e-3


# --- many tests -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [benjamini_hochberg, storey])
@scores
def test_false_discovery_rate(method: Callable[..., object], draw: Draw) -> None:
    rng = np.random.default_rng(1)
    share = []
    power = []
    for _ in range(DRAWS // 4):
        p = ConformalPValues(draw(rng, 200))
        new = np.concatenate([draw(rng, 30), draw(rng, 10) - 4])
        found = method(p(new), 0.1).rejected  # type: ignore[attr-defined]
        share.append(found[:30].sum() / max(1, found.sum()))
        power.append(found[30:].mean())
    assert at_most(float(np.mean(share)), 0.1, 2 * float(np.std(share)))
    if draw is SCORES["normal"]:
        assert np.mean(power) > 0.5


def test_benjamini_hochberg_is_scipys() -> None:
    rng = np.random.default_rng(2)
    p = np.append(rng.random(50), rng.random(20) / 100)
    found = benjamini_hochberg(p, 0.05)
    np.testing.assert_allclose(found.adjusted, stats.false_discovery_control(p), rtol=1e-12)
    assert (found.rejected == (found.adjusted <= 0.05)).all()
    assert storey(p, 0.05).id_share == (1 + (p > 0.5).sum()) / (len(p) * 0.5)
    assert storey(p, 0.05).rejected.sum() >= found.rejected.sum()


def lord(p: Floats, alpha: float) -> list[bool]:
    """Ramdas et al. 2017, equation 9, term by term."""

    def gamma(j: int) -> float:
        return 0.0722 * math.log(max(j, 2)) / (j * math.exp(math.sqrt(math.log(j))))

    w, found = alpha / 2, []
    out = []
    for t in range(1, len(p) + 1):
        level = gamma(t) * w
        if found:
            level += (alpha - w) * gamma(t - found[0])
        level += alpha * sum(gamma(t - tau) for tau in found[1:])
        out.append(bool(p[t - 1] <= level))
        if out[-1]:
            found.append(t)
    return out


def saffron(p: Floats, alpha: float) -> list[bool]:
    """Ramdas et al. 2018, algorithm 1, with counts of candidates as the paper has them."""
    zeta = sum(j**-1.6 for j in range(1, 10**6)) + (10**6) ** -0.6 / 0.6

    def gamma(j: int) -> float:
        return float(j**-1.6) / zeta

    lam = 0.5
    w = (1 - lam) * alpha / 2
    found: list[int] = []
    out = []
    for t in range(1, len(p) + 1):
        candidates = p[: t - 1] <= lam
        level = w * gamma(t - int(candidates.sum()))
        for j, tau in enumerate(found):
            after = int(candidates[tau:].sum())
            weight = (1 - lam) * alpha - (w if j == 0 else 0)
            level += weight * gamma(t - tau - after)
        out.append(bool(p[t - 1] <= min(lam, level)))
        if out[-1]:
            found.append(t)
    return out


@pytest.mark.parametrize(("online", "rule"), [(LORD, lord), (SAFFRON, saffron)])
def test_online_rules(online: type[LORD], rule: Callable[[Floats, float], list[bool]]) -> None:
    rng = np.random.default_rng(3)
    p = np.where(rng.random(300) < 0.3, rng.random(300) / 1000, rng.random(300))
    expected = rule(p, 0.1)
    assert sum(expected) > 20
    first = online(0.1)
    got = first(p[:140]).tolist()
    second = online(0.1)
    second.load_state_dict(first.state_dict())
    assert got + second(p[140:]).tolist() == expected


@pytest.mark.parametrize("online", [LORD, SAFFRON])
def test_online_false_discovery_rate(online: type[LORD]) -> None:
    rng = np.random.default_rng(4)
    share, power = [], []
    for _ in range(DRAWS // 4):
        ood = rng.random(200) < 0.3
        p = np.where(ood, stats.norm.sf(rng.normal(size=200) + 3), rng.random(200))
        found = online(0.1)(p)
        share.append((found & ~ood).sum() / max(1, found.sum()))
        power.append(found[ood].mean())
    assert at_most(float(np.mean(share)), 0.1, 2 * float(np.std(share)))
    assert np.mean(power) > 0.1


def test_numpy_numbers_are_settings_and_not_kept() -> None:
    for online in (LORD(np.float32(0.1)), SAFFRON(np.float64(0.1), candidate=np.float32(0.5))):
        online(np.array([0.001, 0.9]))
        kept = online.state_dict()
        assert kept["alpha"] == 0.1
        assert all(type(v) in (int, float, list) for v in kept.values()), kept
    p = ConformalPValues([1.0, 2.0], delta=np.float64(0.1))
    assert type(p.delta) is float


def test_states_do_not_mix() -> None:
    with pytest.raises(ValueError, match=r"SAFFRON\.load_state_dict: not a state of SAFFRON"):
        SAFFRON().load_state_dict(LORD().state_dict())
    with pytest.raises(ValueError, match=r"LORD\.load_state_dict: alpha must be 0\.1, got 0\.05"):
        LORD(0.1).load_state_dict(LORD(0.05).state_dict())


# --- risks ----------------------------------------------------------------------------------------


@scores
def test_risk_of_id(draw: Draw) -> None:
    rng = np.random.default_rng(5)
    population = np.sort(draw(rng, 1_000_000))
    over = 0
    for _ in range(DRAWS):
        found = control_risk(draw(rng, 150), id_risk=0.1, confidence=0.9)
        over += np.searchsorted(population, found.threshold) / len(population) > 0.1 + 1e-3
    assert at_most(over / DRAWS, 0.1)
    if draw is SCORES["normal"]:
        assert over / DRAWS > 0.02  # not far too careful


def test_both_risks() -> None:
    rng = np.random.default_rng(6)
    inside, outside = rng.normal(size=2000), rng.normal(size=2000) - 4
    found = control_risk(inside, outside, id_risk=0.05, ood_risk=0.05)
    assert found.feasible
    assert found.least is not None
    assert found.least <= found.threshold
    assert (inside < found.threshold).mean() == found.id_lost <= 0.05
    assert found.ood_kept is not None
    assert stats.norm.sf(found.least + 4) <= 0.05
    assert not control_risk(inside, outside + 3, ood_risk=0.05).feasible
    assert control_risk(inside[:5]).threshold == -math.inf  # too few for any


def test_rank_is_binomial() -> None:
    for n, risk in ((40, 0.1), (300, 0.05), (10, 0.5), (3, 0.01)):
        for confidence in (0.9, 0.95):
            found = control_risk(np.arange(n, dtype=float), id_risk=risk, confidence=confidence)
            k = 0 if found.threshold == -math.inf else int(found.threshold) + 1
            assert stats.binom.cdf(k - 1, n, risk) <= 1 - confidence
            assert stats.binom.cdf(k, n, risk) > 1 - confidence


def test_least_cost() -> None:
    threshold, cost = least_cost_threshold([3.0, 4, 5], [1.0, 2, 3.5], ood_share=0.25)
    assert threshold == 3  # flags two of three OOD and no ID
    assert cost == pytest.approx(0.25 / 3)
    assert least_cost_threshold([1.0], [2.0], cost_ood=0)[0] == 1
    assert least_cost_threshold([1.0], [2.0], cost_id=0)[0] == math.inf


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ConformalPValues([]), r"id_scores must be \(n,\) with n >= 1, got shape \(0,\)"),
        (lambda: ConformalPValues([1, np.nan]), "must not hold NaN, got 1, the first at index 1"),
        (lambda: ConformalPValues([1.0], delta=1), r"delta must be in \(0, 1\), got 1"),
        (lambda: ConformalPValues([1.0], ["a", "b"]), "groups must be one a score, 1, got 2"),
        (lambda: ConformalPValues([1.0])([1.0], ["a"]), "calibrated with no groups"),
        (lambda: ConformalPValues([1.0], ["a"])([1.0]), "calibrated with the groups of the scores"),
        (lambda: benjamini_hochberg([0.5, 1.5]), r"p_values must be \(m,\) in \[0, 1\]"),
        (lambda: storey([0.5], cut=0), r"storey: cut must be in \(0, 1\), got 0"),
        (lambda: LORD(wealth=0.06), r"LORD: wealth must be in \(0, 0\.05\), got 0\.06"),
        (lambda: control_risk([1.0], ood_risk=0.1), "ood_risk needs ood_scores"),
        (lambda: least_cost_threshold([1.0], [2.0], cost_id=-1), "cost_id must be finite and >= 0"),
    ],
)
def test_bad_input(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
