"""Confidence intervals for rates, quantiles and the area under the ROC curve.

Exact where they can be: binomial proportions by Clopper and Pearson (Biometrika 1934), quantiles
by order statistics; the AUROC by DeLong et al. (Biometrics 1988) on the logit scale.
"""

from __future__ import annotations

import math
from fractions import Fraction
from statistics import NormalDist

import numpy as np

from oodkernels._checks import check_confidence, check_int, check_number

Interval = tuple[float, float]


def clopper_pearson(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """Exact interval for a binomial proportion.

    Each end errs with probability at most (1 - confidence) / 2, whatever the true proportion.

    Args:
        successes: 0 <= successes <= trials.
        trials: >= 1.
        confidence: In (0, 1).

    Returns:
        (low, high) in [0, 1].

    Raises:
        ValueError: An argument is out of its range.
        TypeError: An argument is not a number, or not an integer where it counts.
    """
    where = "clopper_pearson"
    confidence = check_confidence(where, confidence)
    successes = check_int(where, "successes", successes)
    trials = check_int(where, "trials", trials)
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(
            f"{where}: successes must be in 0..trials and trials >= 1, got {successes} of {trials}"
        )
    tail = (1 - confidence) / 2
    failures = trials - successes
    low = _beta_quantile(successes, failures + 1, lower=tail) if successes else 0.0
    high = _beta_quantile(successes + 1, failures, lower=1 - tail) if failures else 1.0
    return low, high


def quantile_ranks(n: int, q: float, confidence: float = 0.95) -> tuple[int, int]:
    """Ranks of the order statistics between which a population's q-quantile lies.

    With x_(1) <= ... <= x_(n) an independent sample, x_(low) <= quantile <= x_(high) with
    probability at least ``confidence`` (each side errs with at most half of the rest), for any
    distribution, ties included.

    Args:
        n: Sample size, >= 1.
        q: In [0, 1].
        confidence: In (0, 1).

    Returns:
        (low, high), 1-based; low = 0 stands for -inf and high = n + 1 for +inf, where the sample
        is too small to bound that side.

    Raises:
        ValueError: An argument is out of its range.
        TypeError: An argument is not a number, or not an integer where it counts.
    """
    where = "quantile_ranks"
    confidence = check_confidence(where, confidence)
    n, q = check_int(where, "n", n), check_number(where, "q", q)
    if n < 1 or not 0 <= q <= 1:
        raise ValueError(f"{where}: n must be >= 1 and q in [0, 1], got n={n}, q={q}")
    tail = (1 - confidence) / 2

    def first(share: float) -> int:
        # Smallest k in 0..n with P(Binomial(n, q) <= k) > share: near where a normal has it.
        def holds(k: int) -> bool:
            return k >= n or (k >= 0 and _binomial_cdf(k, n, q) > share)

        sigma = math.sqrt(n * q * (1 - q))
        guess = int(n * q + NormalDist().inv_cdf(share) * sigma)
        reach = 2
        while holds(guess - reach) and guess - reach >= 0:
            reach *= 4
        low = max(0, guess - reach)
        reach = 2
        while not holds(guess + reach):
            reach *= 4
        high = min(n, guess + reach)
        while low < high:
            middle = (low + high) // 2
            if holds(middle):
                high = middle
            else:
                low = middle + 1
        return low

    # x_(r) <= quantile unless at most r - 1 values are; x_(s) >= it unless at least s are below.
    return first(tail), first(1 - tail) + 1


def delong(
    wins: int, n_id: int, n_ood: int, id_squares: int, ood_squares: int
) -> tuple[float, float]:
    """AUROC and its standard error by DeLong et al., from exact integer sums.

    Args:
        wins: Twice the pairs that the ID score wins, plus the tied pairs.
        n_id: Number of ID scores.
        n_ood: Number of OOD scores.
        id_squares: Sum over ID scores x of (2 #{ood < x} + #{ood = x})^2.
        ood_squares: Sum over OOD scores y of (2 #{id > y} + #{id = y})^2.

    Returns:
        (auroc, standard error); the error is NaN where a side has one score.

    Raises:
        TypeError: An argument is not an integer.
    """
    wins, n_id, n_ood, id_squares, ood_squares = (
        check_int("delong", name, value)  # of any size, which NumPy's are not
        for name, value in (
            ("wins", wins),
            ("n_id", n_id),
            ("n_ood", n_ood),
            ("id_squares", id_squares),
            ("ood_squares", ood_squares),
        )
    )
    auroc = wins / (2 * n_id * n_ood)
    if n_id < 2 or n_ood < 2:
        return auroc, math.nan
    variance = Fraction(0)
    for count, others, squares in ((n_id, n_ood, id_squares), (n_ood, n_id, ood_squares)):
        # Sample variance of the placements (2 others is their scale), over their count.
        spread = Fraction(count * squares - wins * wins, count * (count - 1))
        variance += spread / (4 * others * others * count)
    return auroc, math.sqrt(variance)


def auroc_interval(
    auroc: float, standard_error: float, n_id: int, n_ood: int, confidence: float = 0.95
) -> Interval:
    """Interval for the AUROC: normal on the logit scale, from DeLong's standard error.

    Asymptotic: near its nominal coverage from about 30 scores a side on, below it where the AUROC
    is so near 0 or 1 that only a few pairs are misordered. Where all pairs have the same outcome
    the standard error is 0 and says nothing; then min(n_id, n_ood) disjoint pairs with that one
    outcome bound the AUROC, which is exact. With one score on a side nothing is known: (0, 1).

    Args:
        auroc: In [0, 1].
        standard_error: As :func:`delong` returns it.
        n_id: Number of ID scores.
        n_ood: Number of OOD scores.
        confidence: In (0, 1).

    Returns:
        (low, high) in [0, 1].

    Raises:
        ValueError: ``confidence`` is out of its range.
        TypeError: ``confidence`` is not a number.
    """
    confidence = check_confidence("auroc_interval", confidence)
    if math.isnan(standard_error):
        return 0.0, 1.0
    if standard_error == 0 or not 0 < auroc < 1:
        slack = 1 - ((1 - confidence) / 2) ** (1 / min(n_id, n_ood))
        return max(0.0, auroc - slack), min(1.0, auroc + slack)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    logit = math.log(auroc) - math.log1p(-auroc)
    half = z * standard_error / (auroc * (1 - auroc))
    return _sigmoid(logit - half), _sigmoid(logit + half)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(max(x, -745)) / (1 + math.exp(x))


# --- the binomial and the beta distribution -------------------------------------------------------


def _stirling_error(n: int) -> float:
    """Stirling's error, log n! - log(sqrt(2 pi n) (n / e)^n)."""
    if n < 16:
        return math.lgamma(n + 1) - (n + 0.5) * math.log(n) + n - 0.5 * math.log(2 * math.pi)
    m = float(n) * n
    return (1 / 12 - (1 / 360 - (1 / 1260 - (1 / 1680 - 1 / 1188 / m) / m) / m) / m) / n


def _deviance(x: float, mean: float) -> float:
    """Deviance x log(x / mean) + mean - x without cancellation at x near mean."""
    if abs(x - mean) > 0.1 * (x + mean):
        return x * math.log(x / mean) + mean - x
    v = (x - mean) / (x + mean)
    total, term, k = (x - mean) * v, 2 * x * v, 1
    while True:
        term *= v * v
        k += 2
        if total + term / k == total:
            return total
        total += term / k


def _binomial_pmf(k: int, n: int, p: float, q: float) -> float:
    """P(Binomial(n, p) = k), q = 1 - p: Loader's saddle-point form (2000)."""
    if k in (0, n):
        only, other = (p, q) if k else (q, p)
        return math.exp(n * (math.log1p(-other) if other < 0.5 else math.log(only)))
    exponent = (
        _stirling_error(n)
        - _stirling_error(k)
        - _stirling_error(n - k)
        - _deviance(k, n * p)
        - _deviance(n - k, n * q)
    )
    return math.exp(exponent) * math.sqrt(n / (2 * math.pi * k * (n - k)))


def _binomial_upper(k: int, n: int, p: float, q: float) -> float:
    """P(Binomial(n, p) >= k) for k above the mean, where the terms of the sum fall from k on."""
    terms = min(n - k, int(10 * math.sqrt(n * p * q)) + 60)  # the rest is below 1e-20 of the first
    i = np.arange(k, k + terms, dtype=np.float64)
    return _binomial_pmf(k, n, p, q) * (1 + float(np.cumprod((n - i) / (i + 1) * (p / q)).sum()))


def _beta_cdf(x: float, a: int, b: int) -> float:
    """Incomplete beta function I_x(a, b) = P(Binomial(a + b - 1, x) >= a), a, b >= 1."""
    n = a + b - 1
    if x <= 0 or x >= 1:
        return float(x > 0)
    if a > n * x:
        return _binomial_upper(a, n, x, 1 - x)
    return 1 - _binomial_upper(b, n, 1 - x, x)


def _beta_quantile(a: int, b: int, lower: float) -> float:
    """Find x with I_x(a, b) = lower: Newton's method inside a shrinking bracket."""
    low, high = 0.0, 1.0
    # From Wilson's normal approximation.
    n, z = a + b - 1, NormalDist().inv_cdf(lower)
    x = (a - 0.5 + z * z / 2 + z * math.sqrt((a - 0.5) * (b - 0.5) / n + z * z / 4)) / (n + z * z)
    for _ in range(200):
        error = _beta_cdf(x, a, b) - lower
        if error > 0:
            high = x
        else:
            low = x
        density = _binomial_pmf(a - 1, n - 1, x, 1 - x) * n if n > 1 else 1.0
        following = x - error / density if density > 0 else low
        if not low < following < high:
            following = (low + high) / 2
        if abs(following - x) <= 1e-13 * x or following in (low, high):
            return following
        x = following
    return x


def _binomial_cdf(k: int, n: int, p: float) -> float:
    """P(Binomial(n, p) <= k)."""
    if k >= n or p <= 0:
        return 1.0
    return _beta_cdf(1 - p, n - k, k + 1)
