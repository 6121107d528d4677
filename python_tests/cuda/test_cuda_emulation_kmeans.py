"""The CUDA kernels of K-means and DOS, run on the CPU (cuda_emulator.py).

They run as on a GPU, launch by launch, and are held against the CPU backend where nothing but the
data decides, and against float64 within the stated bound elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cuda_emulator import DTYPES, INDEX, Emulator, needs_compiler
from op_db import cluster_samples, duplicates, points_of, special_points
from points import same
from torch import Tensor

from oodkernels import cluster_argmax, reference
from oodkernels.ops import kmeans_init, kmeans_lloyd

pytestmark = needs_compiler

NAN, INF = math.nan, math.inf
f64, f32, bf16, f16 = DTYPES


def wide(x: Tensor) -> torch.dtype:
    return f64 if x.dtype == f64 else f32


# Where the way changes: all iterations in a launch; all products, for seeding alone; neither.
SMALL: dict[str, Any] = {}
MIDDLE: dict[str, Any] = {"small": 0}
LARGE: dict[str, Any] = {"small": 0, "gram": 0}
ways = pytest.mark.parametrize("way", [SMALL, MIDDLE, LARGE], ids=["small", "middle", "large"])


def problem(x: Tensor, normalize: bool, **values: int) -> dict[str, Any]:
    """What a call is given; x may be a slice of wider rows."""
    defaults = {"threads": 64, "small": 1024, "gram": 8192, "memory": 1 << 30, "orders": 2}
    return {
        "dtype": DTYPES.index(x.dtype),
        "batch": math.prod(x.shape[:-2]),
        "n": x.shape[-2],
        "d": x.shape[-1],
        "stride": x.stride(-2),
        "offset": x.storage_offset(),
        "normalize": int(normalize),
        "seeding_limit": 1 << 16,
        "sample": 1 << 15,
        **defaults,
        **values,
    }


def storage(x: Tensor) -> Tensor:
    return torch.tensor([], dtype=x.dtype).set_(x.untyped_storage())


def seeds(
    emulator: Emulator,
    x: Tensor,
    k: int,
    n_init: int = 1,
    n_trials: int = 0,
    seed: int = 0,
    normalize: bool = True,
    **way: Any,
) -> Tensor:
    trials = n_trials or 2 + int(math.log(k))
    (rows,) = emulator.run(
        "kmeans_init",
        {"x": storage(x)},
        {"rows": INDEX},
        **problem(x, normalize, k=k, restarts=n_init, trials=trials, seed=seed, **way),
    )
    return rows.view(*x.shape[:-2], n_init, k)


def fit(
    emulator: Emulator,
    x: Tensor,
    init: Tensor | tuple[int, int, int],
    max_iter: int = 6,
    tol: float = 1e-4,
    normalize: bool = True,
    renormalize: bool = False,
    **way: Any,
) -> tuple[Tensor, ...]:
    """From rows, from centroids, or as k, n_init and seed have it."""
    inputs = {"x": storage(x)}
    start = {"start": 0, "seed": 0, "trials": 0}
    if isinstance(init, tuple):
        k, restarts, start["seed"] = init
        start["trials"] = 2 + int(math.log(k))
    elif init.dtype == torch.int64:
        restarts, k = init.shape[-2:]
        start["start"], inputs["init"] = 1, init
    else:
        restarts, k = 1, init.shape[-2]
        start["start"], inputs["init"] = 2, init.to(wide(x))
    options = {"max_iter": max_iter, "tol": tol, "renormalize": int(renormalize)}
    centroids, labels, inertia, n_iter = emulator.run(
        "kmeans_fit",
        inputs,
        {"centroids": wide(x), "labels": INDEX, "inertia": f64, "n_iter": torch.int64},
        **problem(x, normalize, k=k, restarts=restarts, **way),
        **start,
        **options,
    )
    batch = x.shape[:-2]
    shape = (*batch, k, x.shape[-1])
    return (
        centroids.view(shape),
        labels.view(x.shape[:-1]),
        inertia.view(batch),
        n_iter.view(batch),
    )


def nearest(
    emulator: Emulator, x: Tensor, centroids: Tensor, normalize: bool
) -> tuple[Tensor, ...]:
    """centroids (..., k, d) for x (..., N, d), or (k, d) for all points."""
    if centroids.dim() == 2:
        x = x.reshape(-1, x.shape[-1])
    labels, distance = emulator.run(
        "kmeans_nearest",
        {"x": storage(x), "centroids": centroids.to(wide(x))},
        {"labels": INDEX, "distance": wide(x)},
        k=centroids.shape[-2],
        **problem(x, normalize),
    )
    return labels.view(x.shape[:-1]), distance.view(x.shape[:-1])


def close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """The same labels and iterations; centroids and inertia up to rounding."""
    rtol, atol = (1e-12, 1e-12) if found[0].dtype == f64 else (2e-5, 2e-6)
    for x, y in zip(found, expected, strict=True):
        exact = x.dtype == torch.int64
        bounds = (0, 0) if exact else (rtol, atol)
        torch.testing.assert_close(x, y, rtol=bounds[0], atol=bounds[1], equal_nan=True)


# --- seeding --------------------------------------------------------------------------------------


def clusterings() -> Iterator[Any]:
    """x, k: tails, degenerate sizes, rows that are left out, batches, all types, gaps."""

    def points(*shape: int, k: int = 5, dtype: torch.dtype = f32) -> Tensor:
        return points_of(*shape, k=k, device="cpu", dtype=dtype)

    yield pytest.param(points(61, 9, dtype=bf16), 5, id="bf16")
    yield pytest.param(points(130, 33, k=12, dtype=f64), 12, id="f64")
    yield pytest.param(points(70, 130, dtype=f16)[3:, 1:-2], 3, id="f16, a slice")
    yield pytest.param(points(20, 17), 1, id="one cluster")
    yield pytest.param(points(1, 3), 1, id="one point")
    yield pytest.param(points(9, 4), 9, id="as many clusters as points")
    yield pytest.param(points(4, 6), 40, id="fewer points than clusters")
    yield pytest.param(special_points("cpu", f32), 6, id="special")
    yield pytest.param(torch.ones(70, 4), 4, id="all equal")
    yield pytest.param(points(2, 2, 40, 17), 5, id="batch")
    yield pytest.param(torch.full((5, 4), NAN), 2, id="all left out")
    yield pytest.param(torch.ones(0, 4), 4, id="no points")


cases = pytest.mark.parametrize(("x", "k"), list(clusterings()))


@ways
@cases
def test_seeds_are_those_of_the_cpu(
    emulator: Emulator, x: Tensor, k: int, way: dict[str, Any]
) -> None:
    for arguments in ((3, 0, 0, True), (2, 1, -(2**40) - 7, False)):
        assert torch.equal(seeds(emulator, x, k, *arguments, **way), kmeans_init(x, k, *arguments))


def test_seeds_from_a_sample(emulator: Emulator) -> None:
    x = points_of(90, 7, device="cpu", dtype=f32)
    x[5, 2] = NAN
    rows = [i for i in range(90) if i != 5]
    draws = [
        reference.uniform(reference.random_bits(3, reference.SAMPLE, 0, 0, j)) for j in range(40)
    ]
    sample = torch.tensor([rows[int(len(rows) / 40 * (j + u))] for j, u in enumerate(draws)])
    found = seeds(emulator, x, 6, 2, 0, 3, **LARGE, seeding_limit=64, sample=40)
    assert torch.equal(found, sample[kmeans_init(x[sample], 6, 2, 0, 3, normalize=True)])
    few = seeds(emulator, x, 6, 2, 0, 3, **LARGE, seeding_limit=89, sample=40)  # valid rows
    assert torch.equal(few, kmeans_init(x, 6, 2, 0, 3, normalize=True))


@pytest.mark.parametrize("n", [65_537, 100_003, 2**31 - 2])
def test_the_last_stratum_stays_inside(emulator: Emulator, n: int) -> None:
    """The largest draw there is rounds, added to the last stratum's number, to the next one."""
    for j, expected in ((32_767, n - 1), (0, (n - 1) // 32_768)):
        (at,) = emulator.run("kmeans_stratum", {}, {"at": torch.int64}, n=n, count=32_768, j=j)
        assert at.tolist() == [expected]


# --- Lloyd's iteration ----------------------------------------------------------------------------


@pytest.mark.parametrize("way", [SMALL, LARGE], ids=["small", "large"])
@cases
def test_clustering_is_that_of_the_cpu(
    emulator: Emulator, x: Tensor, k: int, way: dict[str, Any]
) -> None:
    n = x.shape[-2]
    rows = torch.arange(2 * k).view(2, k) % max(n, 1) if n else torch.full((2, k), -1)
    init = rows.expand(*x.shape[:-2], 2, k).contiguous()
    few = (init[..., :1, :], 2, 0.0, False)
    close(fit(emulator, x, *few, **way), kmeans_lloyd(x, *few))
    if not (x == 0).any():  # zero is as far from all directions: nothing but rounding decides
        close(fit(emulator, x, init, 4, **way), kmeans_lloyd(x, init, 4, normalize=True))
        if n > 1:
            again = (init[..., :1, :], 3, 1e-3, True, True)
            close(fit(emulator, x, *again, **way), kmeans_lloyd(x, *again))


@pytest.mark.parametrize("way", [SMALL, LARGE], ids=["small", "large"])
def test_clustering_from_centroids(emulator: Emulator, way: dict[str, Any]) -> None:
    x = points_of(60, 8, device="cpu", dtype=f32)
    centroids = points_of(7, 8, device="cpu", dtype=f64, seed=3)
    for max_iter in (0, 20):
        arguments = (x, centroids, max_iter, 0.0, False)
        close(fit(emulator, *arguments, **way), kmeans_lloyd(*arguments))
    centroids[2] = NAN
    close(
        fit(emulator, x, centroids, 1, 0.0, False, **way), kmeans_lloyd(x, centroids, 1, 0.0, False)
    )
    bad = torch.tensor([[3, -1, 60, 2**40, -(2**63), 9, 9]])  # rows that x does not have, a double
    good = torch.tensor([[3, -1, -1, -1, -1, 9, 9]])
    same(fit(emulator, x, bad, 3, **way), fit(emulator, x, good, 3, **way))


@pytest.mark.parametrize("way", [SMALL, LARGE], ids=["small", "large"])
def test_empty_clusters_take_the_farthest_points(emulator: Emulator, way: dict[str, Any]) -> None:
    x = torch.tensor([[0.0], [0.1], [0.2], [9.0], [10.0], [30.0]])
    start = torch.tensor([[0.0], [100.0], [200.0]])  # the last two start empty
    centroids, *_ = fit(emulator, x, start, 1, 0.0, False, **way)
    torch.testing.assert_close(centroids[:, 0], torch.tensor([9.3 / 4, 30.0, 10.0]))
    settled = fit(emulator, x, start, 50, 0.0, False, **way)
    assert settled[1].tolist() == [0, 0, 0, 2, 2, 1]
    close(settled, kmeans_lloyd(x, start, 50, 0.0, False))
    many = torch.cat([x[:1], x[3:4] + 200 + torch.arange(12)[:, None]])  # of clusters that keep one
    close(fit(emulator, x, many, 3, 0.0, False, **way), kmeans_lloyd(x, many, 3, 0.0, False))


@pytest.mark.parametrize("way", [SMALL, LARGE], ids=["small", "large"])
def test_bits_do_not_depend_on_the_batch(emulator: Emulator, way: dict[str, Any]) -> None:
    x = points_of(3, 45, 20, device="cpu", dtype=f32)
    x[1, 7, 3] = INF
    init = seeds(emulator, x, 6, 2, **way)
    one_by_one = {**way, "memory": 1}
    assert torch.equal(seeds(emulator, x, 6, 2, **one_by_one), init)
    result = fit(emulator, x, init, **way)
    same(fit(emulator, x, init, **one_by_one), result)
    alone = fit(emulator, x[1].clone(), init[1], **way)
    same(alone, tuple(output[1] for output in result))
    labels, distance = nearest(emulator, x, result[0], normalize=True)
    assert torch.equal(labels, result[1])
    assert float(distance[0].double().sum()) == pytest.approx(float(result[2][0]), rel=1e-12)


@pytest.mark.parametrize("way", [SMALL, LARGE], ids=["small", "large"])
def test_seeding_and_clustering_in_one_call(emulator: Emulator, way: dict[str, Any]) -> None:
    x = points_of(2, 50, 12, device="cpu", dtype=f32)
    init = seeds(emulator, x, 5, 3, seed=9, **way)
    same(fit(emulator, x, init, **way), fit(emulator, x, (5, 3, 9), **way))


@pytest.mark.parametrize("way", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("dtype", [f64, f32], ids=lambda d: str(d)[6:])
def test_where_numbers_are_short_of_room(
    emulator: Emulator, way: dict[str, Any], dtype: torch.dtype
) -> None:
    """Far from 0, and next to the largest number: clusters are those of the points near 1."""
    near = points_of(70, 6, k=6, device="cpu", dtype=f64)
    largest = near.norm(dim=1).max()
    far = (near + (1e4 if dtype == f32 else 1e11)).to(dtype)
    huge = (near / largest * (0.99 * torch.finfo(dtype).max) ** 0.5).to(dtype)
    for x, unit in ((far, 1.0), (huge, float(huge.double().norm(dim=1).max() / largest))):
        exact = (x.double() - x.double().mean(0) * (unit == 1)) / unit
        arguments: tuple[Any, ...] = (6, 2, 0, 0, False)
        init = seeds(emulator, x, *arguments, **way)
        assert all(len(set(rows)) == 6 for rows in init.tolist())
        assert torch.equal(init, kmeans_init(x, *arguments))
        found = fit(emulator, x, init, 5, 1e-4, False, **way)
        close(found, kmeans_lloyd(x, init, 5, 1e-4, False))
        expected = kmeans_lloyd(exact, init, 5, 1e-4, False)
        assert torch.equal(found[1], expected[1])
        assert float(found[2]) == pytest.approx(float(expected[2]) * unit**2, rel=1e-3)
        labels, distance = nearest(emulator, x, found[0], normalize=False)
        assert torch.equal(labels, found[1])
        assert float(distance.double().sum()) == pytest.approx(float(found[2]), rel=1e-9)
        again = fit(emulator, x, found[0], 1, 0.0, False, **way)
        assert float(again[2]) == pytest.approx(float(found[2]), rel=1e-2)


def test_duplicates_do_not_go_round(emulator: Emulator) -> None:
    longest = 0
    for seed in (555, 3, 12):
        x, init, normalize = duplicates(seed)
        x = x.float()
        for way in (SMALL, LARGE):
            found = fit(emulator, x, init, 200, 0.0, normalize, **way, orders=1)
            longest = max(longest, int(found[3]))
    assert longest < 60


# --- nearest centroid -----------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    ("n", "d", "k", "processors"), [(150, 37, 140, 1), (70, 16, 64, 9), (130, 3, 5, 1)]
)
def test_labels_differ_from_float64_within_the_bound_only(
    emulator: Emulator, n: int, d: int, k: int, processors: int, dtype: torch.dtype, normalize: bool
) -> None:
    random = torch.Generator().manual_seed(n)
    x = torch.randn(n, d, generator=random, dtype=f64).relu().to(dtype)
    x[0], x[1, d - 1] = 0, NAN
    if not normalize:
        x[n // 2 :] += 30  # cancellation
    points, valid = reference.kmeans_points(x.double(), normalize)
    centroids = points[2 + torch.randperm(n - 2, generator=random)[torch.arange(k) % (n - 2)]] * 0.9
    centroids[k // 2], centroids[k - 1] = NAN, centroids[0]  # unused, tied
    labels, distance = nearest(emulator, x, centroids.float(), normalize)
    assert (labels == -1).tolist() == (~valid).tolist() == distance.isnan().tolist()
    assert not (labels == k - 1).any()
    points, labels, distance = points[valid], labels[valid], distance[valid]
    centroids = centroids.float().double()
    exact = torch.cdist(points, centroids).square().nan_to_num(nan=INF)
    gap = exact.gather(1, labels[:, None])[:, 0] - exact.amin(1)
    norms = points.norm(dim=1) + centroids.norm(dim=1).nan_to_num().max()
    u = 2.0**-53 if dtype == f64 else 2.0**-24
    assert (gap <= 2 * (d + 2) * u * norms.square()).all()
    chosen = (points - centroids[labels]).square().sum(1)
    rtol = 1e-11 if dtype == f64 else 3e-5
    torch.testing.assert_close(distance.double(), chosen, rtol=rtol, atol=1e-6 * rtol)


@pytest.mark.parametrize("dtype", [f64, f32])
def test_extreme_norms(emulator: Emulator, dtype: torch.dtype) -> None:
    x = points_of(30, 8, device="cpu", dtype=dtype)
    expected = nearest(emulator, x, x[:5], normalize=True)[0]
    far = 300 if dtype == f64 else 36
    scale = torch.logspace(-far, far, 30, dtype=f64)[:, None].to(dtype)
    assert torch.equal(nearest(emulator, x * scale, x[:5], normalize=True)[0], expected)
    huge = torch.full((3, 4), 1e300 if dtype == f64 else 1e30, dtype=dtype)  # squares overflow
    assert nearest(emulator, huge, huge, normalize=False)[0].tolist() == [-1] * 3
    assert nearest(emulator, huge, huge / huge, normalize=True)[0].tolist() == [0] * 3
    tiny = x * (1e-312 if dtype == f64 else 3e-41)  # the inverse of its norm is not a number
    distance = nearest(emulator, tiny, torch.nn.functional.normalize(x[:5]), normalize=True)[1]
    unit = torch.nn.functional.normalize(tiny.double() / tiny.double().abs().amax(1, keepdim=True))
    chosen = torch.cdist(unit, torch.nn.functional.normalize(x[:5].double())).square().amin(1)
    torch.testing.assert_close(distance.double(), chosen, rtol=1e-4, atol=1e-6)


# --- selection ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_cluster_argmax(emulator: Emulator, dtype: torch.dtype) -> None:
    for sample in cluster_samples("cpu", dtype):
        labels, scores, k, m = sample.args
        (best,) = emulator.run(
            "dos_argmax",
            {"labels": labels, "scores": scores},
            {"best": INDEX},
            **selection(scores, k, m),
        )
        expected = cluster_argmax(labels, scores, k, m)
        assert torch.equal(best.view_as(expected), expected), sample.name


def selection(scores: Tensor, k: int, m: int) -> dict[str, Any]:
    n = scores.shape[-1]
    return {
        "dtype": DTYPES.index(scores.dtype),
        "batch": math.prod(scores.shape[:-1]),
        "n": n,
        "stride": n,
        "threads": 64,
        "k": k,
        "m": m,
    }


@pytest.mark.parametrize("mode", ["default", "official"])
@pytest.mark.parametrize(
    ("n", "k", "n_select"),
    [(40, 5, 12), (40, 5, 40), (60, 9, 4), (60, 90, 1), (300, 7, 200), (20, 30, 10), (30, 1, 7)],
)
def test_selection(emulator: Emulator, n: int, k: int, n_select: int, mode: str) -> None:
    random = torch.Generator().manual_seed(n)
    labels = torch.randint(-1, k, (2, n), generator=random)
    labels[:, : n - 50] = 0  # most in one cluster: much to fill
    scores = torch.randn(2, n, generator=random, dtype=f64).mul(3).round()
    scores[:, 3], scores[:, 5], scores[:, 6] = NAN, -INF, INF
    m = 1 if k > n_select else n_select // k
    for seed, dtype in ((0, f32), (-7, f64)):
        (selected,) = emulator.run(
            "dos_select",
            {"labels": labels, "scores": scores.to(dtype)},
            {"selected": INDEX},
            **selection(scores.to(dtype), k, m),
            n_select=n_select,
            visited=n_select if mode == "official" and k > n_select else k,
            best_clusters=int(mode == "default" and k > n_select),
            seed=seed,
        )
        for b in range(2):
            expected = reference.dos_selection(labels[b], scores[b], k, n_select, seed, mode)
            assert torch.equal(selected.view(2, -1)[b], expected)
