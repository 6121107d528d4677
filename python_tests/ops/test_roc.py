"""roc_metrics, its sort and its sums, against scikit-learn, brute force and the reference."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from decimal import ROUND_CEILING, Decimal
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_code
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor
from torch._subclasses import FakeTensorMode

from oodkernels import reference
from oodkernels.ops import ROCMetricsResult, roc_metrics
from oodkernels.ops.keys import scores_of_keys
from oodkernels.ops.roc import exact_ceil, roc_counts, sort_keys

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INF = float("inf")

floats = pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).removeprefix("torch."))


def score_sets() -> Iterator[tuple[str, Tensor, Tensor]]:
    """Pairs of score sets, float64."""
    g = torch.Generator().manual_seed(0)

    def normal(n: int) -> Tensor:
        return torch.randn(n, generator=g, dtype=torch.float64)

    yield "normal", normal(3000) + 1, normal(2000)
    yield "reversed", normal(300) - 3, normal(200)
    yield "separated", normal(300) + 100, normal(200)
    yield "few values", (normal(3000) + 1).round(), normal(5000).round()
    yield "two values", (normal(50) > 0).double(), (normal(60) > 0.5).double()
    yield "all tied", torch.ones(70), torch.ones(30)
    yield "1 wins", torch.tensor([2.0]), torch.tensor([1.0])
    yield "1 loses", torch.tensor([1.0]), torch.tensor([2.0])
    yield "1 ties", torch.tensor([1.0]), torch.tensor([1.0])
    yield "1 against many", torch.tensor([0.3]), normal(5000)
    yield "many against 3", normal(20_000), normal(3)
    yield "sorted", normal(9000).sort().values + 1, normal(9000).sort().values
    yield "piled up", 1 - normal(20000).exp() * 1e-6, 1 - normal(20000).exp() * 1e-5
    infinite = torch.cat([normal(40), torch.tensor([INF, INF, -INF])])
    yield "infinite", infinite, torch.cat([infinite[::2], torch.tensor([INF, -INF, -INF])])
    tiny, huge = 5e-324, 1.7e308
    extreme = torch.tensor([tiny, -tiny, 0.0, -0.0, 2e-310, huge, -huge, 1e-40, -1e-40, 6e-8])
    yield "extreme", extreme, extreme[torch.tensor([3, 3, 2, 0, 1, 5, 6, 7])]
    yield "zeros", torch.tensor([0.0, -0.0, -0.0]), torch.tensor([-0.0, 0.0])
    # Levels that span chunks of the sums, and sizes at their borders.
    tie = torch.zeros(30000)
    yield "a tie across chunks", torch.cat([normal(5000), tie]), torch.cat([tie, normal(7000)])
    for n in (8191, 8192, 8193):
        yield f"{n}", normal(n), normal(8192)
    yield "many", normal(60_001) + 0.5, normal(39_999)


CASES = {name: (x.double(), y.double()) for name, x, y in score_sets()}
cases = pytest.mark.parametrize("case", CASES)


def as_type(case: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x, y = CASES[case]
    return x.to(dtype), y.to(dtype)


def ranks(x: Tensor, y: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Order and ties of the scores in finite numbers, and which are ID."""
    both = torch.cat([x, y]).double().numpy() + 0.0
    return np.unique(both, return_inverse=True)[1], np.arange(len(both)) < len(x)


@cases
@floats
def test_sklearn(case: str, dtype: torch.dtype) -> None:
    x, y = as_type(case, dtype)
    actual = roc_metrics(x, y)
    rank, is_id = ranks(x, y)
    expected = (
        roc_auc_score(is_id, rank),
        average_precision_score(is_id, rank),
        average_precision_score(~is_id, -rank),
    )
    np.testing.assert_allclose([float(f) for f in actual[:3]], expected, rtol=1e-12, atol=0)


@cases
@floats
def test_reference(case: str, dtype: torch.dtype) -> None:
    x, y = as_type(case, dtype)
    exact = [
        ROCMetricsResult._fields.index(f) for f in ("threshold", "threshold_out", "n_id", "n_ood")
    ]
    for tpr in (0.95, 1.0, 0.5, 1e-9, 0.07)[: 5 if len(x) < 5000 else 1]:
        actual = torch.stack(list(roc_metrics(x, y, tpr)))
        expected = reference.roc_metrics(x, y, tpr)
        assert actual.dtype == torch.float64
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-15)
        assert torch.equal(actual[exact], expected[exact])


@cases
def test_fpr_by_hand(case: str) -> None:
    x, y = CASES[case]
    result = roc_metrics(x, y, 0.95)
    n, m = len(x), len(y)
    least = int((Decimal("0.95") * n).to_integral_value(ROUND_CEILING))
    threshold = x.sort(descending=True).values[least - 1]
    assert result.threshold == threshold
    assert result.fpr_at_tpr == int((y >= threshold).sum()) / m
    assert int((x >= threshold).sum()) >= least
    least = int((Decimal("0.95") * m).to_integral_value(ROUND_CEILING))
    threshold = y.sort().values[least - 1]
    assert result.threshold_out == threshold
    assert result.fpr_out_at_tpr == int((x <= threshold).sum()) / n


def brute_counts(x: np.ndarray, y: np.ndarray) -> tuple[int, ...]:
    """The sums in Python's integers, one score at a time."""
    xs, ys = np.sort(x), np.sort(y)
    p = [
        int(np.searchsorted(ys, v) + np.searchsorted(ys, v, "right")) for v in xs
    ]  # 2 below + equal
    q = [2 * len(xs) - int(np.searchsorted(xs, v) + np.searchsorted(xs, v, "right")) for v in ys]
    ties = sum(int(np.searchsorted(ys, v, "right") - np.searchsorted(ys, v)) for v in xs)
    best = 0
    for v in np.unique(np.concatenate([xs, ys])):
        kept = len(xs) - int(np.searchsorted(xs, v)), len(ys) - int(np.searchsorted(ys, v))
        best = max(best, kept[0] * len(ys) - kept[1] * len(xs))
    return sum(p), ties, sum(v * v for v in p), sum(v * v for v in q), best


@pytest.mark.parametrize("case", [name for name in CASES if name != "many"])
def test_counts_are_exact(case: str) -> None:
    x, y = CASES[case]
    counts, _ = roc_counts(sort_keys(x), sort_keys(y))
    assert counts == brute_counts(x.numpy(), y.numpy())


def test_counts_beyond_64_bits() -> None:
    # Expanded scores: 2^21 each, so that the sums of squares pass 2^64.
    n = 1 << 21
    x, y = torch.tensor(1.0).expand(n), torch.tensor(0.0).expand(n)
    counts, areas = roc_counts(sort_keys(x), sort_keys(y))
    assert counts == (2 * n * n, 0, 4 * n**3, 4 * n**3, n * n)
    assert areas == (1, 1, 1, 1)
    counts, _ = roc_counts(sort_keys(x), sort_keys(x))
    assert counts == (n * n, n * n, n**3, n**3, 0)


scores = st.lists(st.sampled_from([-INF, -2.5, -1.0, -0.0, 0.0, 1e-45, 1.0, 3.0, INF]), min_size=1)
any_scores = st.lists(st.floats(allow_nan=False, width=32), min_size=1, max_size=60)


@settings(max_examples=100, deadline=None)
@given(st.one_of(scores, any_scores), st.one_of(scores, any_scores), st.sampled_from(FLOATS))
def test_any_scores(a: list[float], b: list[float], dtype: torch.dtype) -> None:
    x, y = torch.tensor(a, dtype=dtype), torch.tensor(b, dtype=dtype)
    torch.testing.assert_close(
        torch.ops.oodk.roc_metrics(x, y), reference.roc_metrics(x, y), rtol=1e-12, atol=1e-15
    )
    counts, _ = roc_counts(sort_keys(x), sort_keys(y))
    assert counts == brute_counts(x.double().numpy() + 0.0, y.double().numpy() + 0.0)
    # Swapping the sides and turning the scores about changes nothing but names.
    mirrored = roc_metrics(-y, -x)
    direct = roc_metrics(x, y)
    assert direct.auroc == mirrored.auroc
    assert direct.fpr_at_tpr == mirrored.fpr_out_at_tpr
    assert direct.threshold == -mirrored.threshold_out
    assert direct.detection_error == mirrored.detection_error
    torch.testing.assert_close(direct.aupr_in, mirrored.aupr_out, rtol=1e-13, atol=0)


# --- the sort -------------------------------------------------------------------------------------


@floats
@pytest.mark.parametrize("n", [1, 2, 31, 4097, 100_003])
def test_sort_of_any_bits(dtype: torch.dtype, n: int) -> None:
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    low, high = torch.iinfo(bits).min, torch.iinfo(bits).max
    generator = torch.Generator().manual_seed(n)
    x = torch.randint(low, high, (n,), generator=generator, dtype=bits).view(dtype)
    x = torch.where(x.isnan(), torch.tensor(-0.0, dtype=dtype), x)
    keys = sort_keys(x)
    assert keys.dtype == bits
    assert bool((keys[1:] >= keys[:-1]).all())
    expected = x.sort().values
    assert torch.equal(scores_of_keys(keys, dtype), expected + 0.0)
    levels = expected.double().unique_consecutive()
    assert len(keys.unique_consecutive()) == len(levels)


def test_sort_of_every_half() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        x = x[~x.isnan()]
        keys = sort_keys(x.flip(0))
        assert len(keys.unique()) == len(x) - 1  # both zeros
        assert torch.equal(scores_of_keys(keys, dtype), x.sort().values)


@pytest.mark.parametrize("low_bits", [0, 11, 22, 40])
def test_sort_where_digits_are_constant(low_bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    integers = torch.randint(0, 1 << 11, (50_000,), generator=generator) << low_bits
    x = (integers + (0x3FF << 52)).view(torch.float64)
    assert torch.equal(sort_keys(x), integers.sort().values + (0x3FF << 52))


def test_strides() -> None:
    x = torch.randn(60, 50, generator=torch.Generator().manual_seed(0))
    views = [
        x,
        x[:, 3],
        x[::2, ::3],
        x.t(),
        x[5],
        x[:1, :1],
        x[None, :, None],
        x[3:4].expand(7, 50),
    ]
    for view in views:
        dense = view.clone(memory_format=torch.contiguous_format).flatten()
        assert torch.equal(sort_keys(view), sort_keys(dense))
        assert roc_metrics(view, x[0]) == roc_metrics(dense, x[0])
    assert torch.equal(
        sort_keys(torch.tensor(2.5).expand(1000)), sort_keys(torch.full((1000,), 2.5))
    )


# --- what is refused ------------------------------------------------------------------------------


@floats
def test_nan(dtype: torch.dtype) -> None:
    x = torch.zeros(100_000, dtype=dtype)
    x[[70_001, 70_002, 99_999]] = torch.tensor(float("nan"), dtype=dtype)
    x[70_001] = -x[70_001]
    good = torch.zeros(3, dtype=dtype)
    with pytest.raises(
        ValueError, match=r"roc_metrics: id_scores .* NaN, got 3, the first at index 70001"
    ):
        roc_metrics(x, good)
    with pytest.raises(ValueError, match=r"ood_scores .* NaN, got 2, the first at index 35000"):
        roc_metrics(good, x[1::2])
    roc_metrics(good, torch.full((5,), INF, dtype=dtype))


def refused() -> list[tuple[tuple[Any, ...], type[Exception], str]]:
    x = torch.randn(5)
    return [
        ((x[:0], x), ValueError, "roc_metrics: id_scores must not be empty"),
        ((x, x[:0]), ValueError, "roc_metrics: ood_scores must not be empty"),
        ((torch.zeros(0, 3), x), ValueError, "id_scores must not be empty"),
        ((x.long(), x), TypeError, "id_scores must be float64, float32"),
        ((x, x.bool()), TypeError, "ood_scores must have the type of id_scores"),
        ((x, x.double()), TypeError, "ood_scores must have the type of id_scores"),
        ((x[0], x), ValueError, "id_scores must have at least one dimension"),
        ((x, x[0]), ValueError, "ood_scores must have at least one dimension"),
        ((x, x, 0.0), ValueError, r"tpr must be in \(0, 1\], got 0.0"),
        ((x, x, 1.01), ValueError, "tpr must be in"),
        ((x, x, float("nan")), ValueError, "tpr must be in"),
    ]


@pytest.mark.parametrize(("args", "error", "message"), refused())
def test_refused(args: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        torch.ops.oodk.roc_metrics(*args)
    with FakeTensorMode() as mode, pytest.raises(error, match=message):
        torch.ops.oodk.roc_metrics(
            *(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args)
        )


def test_refused_keys() -> None:
    keys = torch.arange(5)
    counts = torch.ops.oodk._roc_counts
    for args, error, message in (
        ((keys.float(), keys), TypeError, "id_keys must be int64, int32 or int16"),
        ((keys, keys.int()), TypeError, "ood_keys must have the type of id_keys"),
        ((keys, keys[:0]), ValueError, r"ood_keys must have shape \(N,\), N >= 1, got \(0,\)"),
        ((keys[None], keys), ValueError, r"id_keys must have shape \(N,\)"),
    ):
        with pytest.raises(error, match=message):
            counts(*args)
        with FakeTensorMode() as mode, pytest.raises(error, match=message):
            counts(*map(mode.from_tensor, args))


def test_unsorted_keys_stay_in_bounds() -> None:
    generator = torch.Generator().manual_seed(0)
    for n in (1, 100, 50_000):
        keys = torch.randint(-5, 5, (n,), generator=generator)
        torch.ops.oodk._roc_counts(keys, keys.flip(0).contiguous())
        wide = torch.randint(-(2**62), 2**62, (n,), generator=generator)
        torch.ops.oodk._roc_counts(wide, wide.sort(descending=True).values)


# --- tpr, threads, torch --------------------------------------------------------------------------


def test_share_is_a_decimal() -> None:
    assert exact_ceil(0.95, 20) == 19
    assert exact_ceil(0.07, 100) == 7  # 0.07 * 100 is 7.000000000000001
    for text in ("0.95", "0.07", "0.29", "0.999", "1e-05", "1.0"):
        for n in (*range(1, 300), 10**9, 10**12 + 1):
            expected = (Decimal(text) * n).to_integral_value(ROUND_CEILING)
            assert exact_ceil(float(text), n) == expected


def test_same_bits_on_any_number_of_threads() -> None:
    before = torch.get_num_threads()
    try:
        for case in ("many", "a tie across chunks"):
            for dtype in FLOATS:
                x, y = as_type(case, dtype)
                results = []
                for threads in (1, 2, 3, 7):
                    torch.set_num_threads(threads)
                    results.append(torch.stack(list(roc_metrics(x, y))))
                assert all(torch.equal(result, results[0]) for result in results)
    finally:
        torch.set_num_threads(before)


def test_opcheck() -> None:
    for case in ("normal", "1 ties", "infinite"):
        for dtype in (torch.float32, torch.bfloat16):
            x, y = as_type(case, dtype)
            keys = sort_keys(x), sort_keys(y)
            torch.library.opcheck(torch.ops.oodk._roc_keys.default, (x,))
            torch.library.opcheck(torch.ops.oodk._roc_counts.default, keys)
            torch.library.opcheck(torch.ops.oodk.roc_metrics.default, (x, y))


@pytest.mark.parametrize(("backend", "dynamic"), [("aot_eager", False), ("inductor", True)])
def test_compile(backend: str, dynamic: bool) -> None:
    compiled = torch.compile(roc_metrics, fullgraph=True, dynamic=dynamic, backend=backend)
    for case in ("normal", "infinite", "few values"):
        x, y = as_type(case, torch.float32)
        assert compiled(x, y, 0.95) == roc_metrics(x, y, 0.95)
    with pytest.raises(ValueError, match=r"ood_scores .* NaN, got 2, the first at index 3"):
        compiled(x, y.index_fill(0, torch.tensor([3, 5]), math.nan), 0.95)
    torch._dynamo.reset()


def test_not_differentiable() -> None:
    x = torch.randn(9, requires_grad=True)
    for figure in roc_metrics(x, x.detach() - 1):
        assert not figure.requires_grad
        with pytest.raises(RuntimeError, match="does not require grad"):
            figure.backward()


MEMORY = """
import resource, torch
from oodkernels.ops import roc_metrics
torch.set_num_threads(2)
x, y = torch.randn(10_000_000), torch.randn(10_000_000)
roc_metrics(x[:100_000], y[:100_000])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
roc_metrics(x, y)
extra = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(extra * 1024 / (x.nbytes + y.nbytes))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads ru_maxrss in KiB")
def test_extra_memory_is_at_most_twice_the_input() -> None:
    done = run_code(MEMORY)
    assert float(done.stdout) < 2, done.stderr


def test_numpy_tpr() -> None:
    x, y = torch.arange(20.0), torch.arange(20.0) - 5
    expected = roc_metrics(x, y, 0.95)
    for tpr in (np.float64(0.95), np.float32(0.95)):
        assert exact_ceil(tpr, 20) == 19
        assert torch.equal(torch.stack(roc_metrics(x, y, tpr)), torch.stack(expected))
    assert exact_ceil(np.int64(1), 20) == exact_ceil(1, 20) == 20
