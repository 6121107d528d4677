"""K-means: the quality gates, degenerate problems, determinism, the estimator, many processes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from points import INF, NAN, distributed_problems, features, problems, same
from processes import ranks
from torch import Tensor

from oodkernels import KMeansResult, kmeans, kmeans_init, nearest_centroid
from oodkernels import reference as ref
from oodkernels.cluster import _distributed as distributed
from oodkernels.ops import kmeans_lloyd as lloyd

HERE = Path(__file__).parent


def inertia(x: Tensor, centroids: Tensor) -> float:
    """In float64, of the nearest centroids."""
    return float(torch.cdist(x.double(), centroids.double()).amin(1).square().sum())


def directions(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x.double(), dim=-1)


# --- quality gates --------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("n", "d", "k"), [(500, 20, 7), (3000, 65, 40), (1000, 512, 3)])
def test_separated_data_gets_the_labels_of_float64(n: int, d: int, k: int, normalize: bool) -> None:
    generator = torch.Generator().manual_seed(n)
    truth = torch.randint(k, (n,), generator=generator)
    x = 10 * torch.randn(k, d, generator=generator)[truth] + torch.randn(n, d, generator=generator)
    init = kmeans_init(x, k, normalize=normalize)
    got = lloyd(x, init, normalize=normalize)
    expected = ref.kmeans(x.double(), init, normalize=normalize)
    assert torch.equal(got.labels, expected[1])
    torch.testing.assert_close(got.centroids.double(), expected[0], rtol=1e-5, atol=1e-5)
    assert float(got.inertia) == pytest.approx(float(expected[2]), rel=1e-5)
    assert got.n_iter == expected[3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("n", "d", "k"), [(2000, 342, 64), (1500, 2048, 256), (999, 3, 50)])
def test_labels_differ_from_float64_within_the_bound_only(
    n: int, d: int, k: int, normalize: bool, dtype: torch.dtype
) -> None:
    x = features(n, d, 300).to(dtype)
    if not normalize:
        x[: n // 2] += 30  # cancellation
    points = ref.kmeans_points(x.double(), normalize)[0]
    generator = torch.Generator().manual_seed(k)
    centroids = (points[torch.randperm(n, generator=generator)[:k]] * 0.9).float()
    labels, distance = nearest_centroid(x, centroids, normalize)
    exact = torch.cdist(points, centroids.double()).square()
    gap = exact.gather(1, labels[:, None])[:, 0] - exact.amin(1)
    u = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    norms = points.norm(dim=1) + centroids.double().norm(dim=1).max()
    assert (gap <= 2 * (d + 2) * u * norms.square()).all()
    if dtype != torch.float64:  # far better than the bound of the worst case
        assert (gap <= 40 * u * norms.square()).all()
    rtol = 1e-11 if dtype == torch.float64 else 3e-5
    chosen = (points - centroids.double()[labels]).square().sum(1)
    torch.testing.assert_close(distance.double(), chosen, rtol=rtol, atol=1e-6 * rtol)


@pytest.mark.parametrize(("n", "d", "k"), [(384, 342, 64), (2048, 512, 64), (3000, 64, 200)])
@pytest.mark.parametrize("iterations", [1, 3, 100])
def test_inertia_against_scikit_learn_and_faiss(n: int, d: int, k: int, iterations: int) -> None:
    sklearn = pytest.importorskip("sklearn.cluster")
    x = directions(features(n, d, 400)).float()
    init = kmeans_init(x, k, seed=1, normalize=False)
    start = x[init[0]]
    ours = [
        lloyd(x, init, iterations, 0.0, normalize=False),
        lloyd(x, start, iterations, 0.0, normalize=False),
    ]
    peers = {}
    fitted = sklearn.KMeans(k, init=start.numpy(), n_init=1, max_iter=iterations, tol=0)
    peers["scikit-learn"] = torch.from_numpy(fitted.fit(x.numpy()).cluster_centers_)
    try:
        import faiss
    except ImportError:
        pass
    else:
        clustering = faiss.Clustering(d, k)
        clustering.niter = iterations
        clustering.max_points_per_centroid = n
        clustering.min_points_per_centroid = 1
        faiss.copy_array_to_vector(start.numpy().ravel(), clustering.centroids)
        clustering.train(x.numpy(), faiss.IndexFlatL2(d))
        peers["faiss"] = torch.from_numpy(faiss.vector_to_array(clustering.centroids).reshape(k, d))
    for result in ours:
        found = inertia(x, result.centroids)
        assert float(result.inertia) == pytest.approx(found, rel=1e-5)
        for name, centroids in peers.items():
            assert found <= 1.001 * inertia(x, centroids), name


def seeding_gate(n: int, d: int, k: int, seeds: int) -> None:
    sklearn = pytest.importorskip("sklearn.cluster")
    threadpoolctl = pytest.importorskip("threadpoolctl")
    x = directions(features(n, d, 500, 1.5)).float()
    ours = [float(kmeans(x, k, seed=seed).inertia) for seed in range(seeds)]
    with threadpoolctl.threadpool_limits(1):  # faster, on so few points
        peers = [
            sklearn.KMeans(k, n_init=1, random_state=seed).fit(x.numpy()).inertia_
            for seed in range(seeds)
        ]
    error = np.hypot(np.std(ours), np.std(peers)) / np.sqrt(seeds)
    assert np.mean(ours) <= np.mean(peers) + 2 * error


def test_own_seeding_is_as_good_as_scikit_learns() -> None:
    seeding_gate(384, 342, 64, 50)


@pytest.mark.slow
def test_own_seeding_is_as_good_as_scikit_learns_on_more_points() -> None:
    seeding_gate(2048, 512, 256, 10)


def test_greedy_seeding_is_better_than_plain() -> None:
    x = features(600, 64, 200)
    greedy = [
        float(lloyd(x, kmeans_init(x, 40, seed=s, normalize=True), 0, normalize=True).inertia)
        for s in range(20)
    ]
    plain = [
        float(lloyd(x, kmeans_init(x, 40, 1, 1, seed=s, normalize=True), 0, normalize=True).inertia)
        for s in range(20)
    ]
    assert np.mean(greedy) < np.mean(plain)


# --- random numbers -------------------------------------------------------------------------------


def test_philox_gives_the_known_answers() -> None:
    """Of Random123's kat_vectors."""
    assert ref.philox((0, 0, 0, 0), 0) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    ones = 0xFFFFFFFF
    assert ref.philox((ones, ones, ones, ones), ones << 32 | ones) == (
        0x408F276D,
        0x41C83B0E,
        0xA20BC7C6,
        0x6D5451FD,
    )
    assert ref.philox((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0x299F31D0A4093822) == (
        0xD16CFE09,
        0x94FDCCEB,
        0x5001E420,
        0x24126EA1,
    )


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63)])
def test_seeds_of_any_size_draw_as_the_reference(seed: int) -> None:
    x = features(50, 10)
    assert torch.equal(
        kmeans_init(x, 6, 3, seed=seed, normalize=True),
        ref.kmeans_init(x.double(), 6, 3, 0, seed, normalize=True),
    )
    expected = [ref.uniform(ref.random_bits(seed, ref.SAMPLE, 0, 0, i)) for i in range(7)]
    assert distributed._uniforms(seed, ref.SAMPLE, 7).tolist() == expected


def test_first_centres_are_uniform() -> None:
    x = features(10, 4)
    first = torch.stack([kmeans_init(x, 1, seed=s, normalize=True)[0, 0] for s in range(2000)])
    assert first.bincount(minlength=10).sub(200).abs().max() < 60


# --- determinism ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "d", "k", "n_init"),
    [(384, 342, 64, 5), (2100, 33, 100, 3), (9000, 40, 11, 2), (70000, 16, 20, 1)],
)
def test_bits_do_not_depend_on_threads_or_repetition(n: int, d: int, k: int, n_init: int) -> None:
    x = features(n, d)
    x[7, 0] = NAN
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 4, 4):
            torch.set_num_threads(count)
            init = kmeans_init(x, k, n_init, normalize=True)
            results.append((init, *lloyd(x, init, 20, normalize=True)))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        same(result, results[0])


@pytest.mark.parametrize("batch", [2, 5, 9])
def test_bits_do_not_depend_on_the_place_in_a_batch(batch: int) -> None:
    x = torch.stack([features(90, 20, seed=b) for b in range(batch)])
    init = kmeans_init(x, 8, 2, seed=3, normalize=True)
    result = lloyd(x, init, normalize=True)
    for b in range(batch):
        assert torch.equal(init[b], kmeans_init(x[b], 8, 2, seed=3, normalize=True))
        same(tuple(output[b] for output in result), lloyd(x[b], init[b], normalize=True))
    nothing = lloyd(x[:0], init[:0], normalize=True)
    assert [tuple(t.shape) for t in nothing] == [(0, 8, 20), (0, 90), (0,), (0,)]


@pytest.mark.parametrize("n_init", [1, 9])
def test_bits_do_not_depend_on_the_number_of_restarts(n_init: int) -> None:
    """Which decides whether all products of points are computed, and how many are at once."""
    for n, k in ((700, 30), (3000, 3)):
        x = features(n, 40)
        many = kmeans_init(x, k, 40, seed=2, normalize=True)
        assert torch.equal(kmeans_init(x, k, n_init, seed=2, normalize=True), many[:n_init])


def test_labels_are_those_of_nearest_centroid() -> None:
    for n, k, max_iter in ((384, 64, 300), (384, 64, 1), (3000, 10, 2)):
        x = features(n, 50)
        result = lloyd(x, kmeans_init(x, k, 3, normalize=True), max_iter, normalize=True)
        labels, distance = nearest_centroid(x, result.centroids, normalize=True)
        assert torch.equal(labels, result.labels)
        assert float(distance.double().sum()) == pytest.approx(float(result.inertia), rel=1e-12)


def test_input_is_left_alone() -> None:
    x = features(200, 30)
    before = x.clone()
    lloyd(x, kmeans_init(x, 9, 2, normalize=True), normalize=True)
    assert torch.equal(x, before)


# --- degenerate problems --------------------------------------------------------------------------


def test_all_points_equal() -> None:
    x = torch.full((20, 6), 0.3)
    init = kmeans_init(x, 5, 2, normalize=True)
    assert all(len(set(rows)) == 5 for rows in init.tolist())
    result = lloyd(x, init, normalize=True)
    assert (result.labels == 0).all()
    assert float(result.inertia) == pytest.approx(0, abs=1e-10)
    assert result.centroids.isfinite().all()


def test_one_cluster_is_the_mean() -> None:
    x = features(300, 20)
    result = kmeans(x, 1, normalize=True)
    torch.testing.assert_close(
        result.centroids[0].double(), directions(x).mean(0), rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("n", [1, 2, 14, 65])
def test_as_many_clusters_as_points(n: int) -> None:
    x = features(n, 12)
    init = kmeans_init(x, n, 2, normalize=True)
    assert all(sorted(rows) == list(range(n)) for rows in init.tolist())
    result = lloyd(x, init, normalize=True)
    assert sorted(result.labels.tolist()) == list(range(n))
    assert float(result.inertia) == pytest.approx(0, abs=1e-10)


def test_fewer_points_than_clusters() -> None:
    x = features(8, 12)
    x[[1, 4]] = NAN
    init = kmeans_init(x, 9, 2, normalize=True)
    for rows in init.tolist():
        assert sorted(rows[:6]) == [0, 2, 3, 5, 6, 7]
        assert rows[6:] == [-1] * 3
    result = lloyd(x, init, normalize=True)
    assert result.centroids.isnan().any(-1).tolist() == [False] * 6 + [True] * 3
    assert result.labels[[1, 4]].tolist() == [-1, -1]
    assert sorted(result.labels.tolist())[2:] == list(range(6))


def test_a_subnormal_point_has_a_direction() -> None:
    tiny = torch.finfo(torch.float32).smallest_normal / 1024
    x = torch.tensor([[tiny, 0], [0, tiny], [3, 0.1]])
    assert nearest_centroid(x, torch.eye(2), normalize=True)[0].tolist() == [0, 1, 0]


def test_zero_points_stay_zero_and_are_clustered() -> None:
    x = features(100, 12)
    x[[3, 50]] = 0
    result = kmeans(x, 12, normalize=True, seed=1)
    assert (result.labels >= 0).all()
    assert result.labels[3] == result.labels[50]
    labels, distance = nearest_centroid(x[3], torch.eye(12)[:2] * 0.5, normalize=True)
    assert (int(labels), float(distance)) == (0, 0.25)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_rows_that_are_not_finite_change_nothing_else(value: float) -> None:
    x = features(120, 20)
    bad = torch.tensor([0, 33, 34, 119])
    good = torch.tensor([i for i in range(120) if i not in bad.tolist()])
    x[bad, torch.tensor([0, 19, 7, 5])] = value
    init = kmeans_init(x, 10, 3, normalize=True)
    alone = kmeans_init(x[good], 10, 3, normalize=True)
    assert torch.equal(init, good[alone])
    a, b = lloyd(x, init, normalize=True), lloyd(x[good], alone, normalize=True)
    same((a.centroids, a.labels[good], a.inertia, a.n_iter), tuple(b))
    assert (a.labels[bad] == -1).all()
    labels, distance = nearest_centroid(x, b.centroids, normalize=True)
    assert (labels[bad] == -1).all()
    assert distance[bad].isnan().all()
    assert distance[good].isfinite().all()


def test_extreme_norms() -> None:
    x = features(60, 8)
    scale = torch.logspace(-30, 30, 60)[:, None]
    labels = lloyd(x, torch.arange(5)[None], normalize=True).labels
    assert torch.equal(lloyd(x * scale, torch.arange(5)[None], normalize=True).labels, labels)
    huge = torch.full((3, 4), 1e30)  # squares overflow
    assert nearest_centroid(huge, huge)[0].tolist() == [-1] * 3
    assert nearest_centroid(huge.double(), huge)[0].tolist() == [0] * 3


def test_duplicates_of_centres_and_ties_go_to_the_lowest() -> None:
    x = features(100, 33)
    centroids = x[[5, 9, 5, 9, 5]]
    assert set(nearest_centroid(x, centroids)[0].tolist()) == {0, 1}
    far = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    assert nearest_centroid(torch.zeros(40, 2), far)[0].tolist() == [0] * 40
    many = torch.ones(100, 7)
    many[97:] = 2.0
    assert nearest_centroid(torch.full((20, 7), 2.0), many)[0].tolist() == [97] * 20


def test_empty_clusters_take_the_farthest_points() -> None:
    x = torch.tensor([[0.0], [0.1], [0.2], [9.0], [10.0], [30.0]])
    start = torch.tensor([[0.0], [100.0], [200.0]])  # the last two start empty
    result = lloyd(x, start, 1, 0.0, normalize=False)
    torch.testing.assert_close(result.centroids[:, 0], torch.tensor([9.3 / 4, 30.0, 10.0]))
    settled = lloyd(x, start, 50, 0.0, normalize=False)
    assert settled.labels.tolist() == [0, 0, 0, 2, 2, 1]


def test_stops_as_scikit_learn_does() -> None:
    sklearn = pytest.importorskip("sklearn.cluster")
    x = directions(features(4000, 8, 50, 2.0) + 0.05)  # zero is as far from all directions
    init = kmeans_init(x, 12, normalize=False)
    for tol in (0.0, 1e-4, 1e-2, 1.0):
        ours = lloyd(x, init, tol=tol, normalize=False)
        peer = sklearn.KMeans(12, init=x[init[0]].numpy(), n_init=1, tol=tol).fit(x.numpy())
        assert int(ours.n_iter) == peer.n_iter_
        assert ours.labels.tolist() == peer.labels_.tolist()
        assert float(ours.inertia) == pytest.approx(peer.inertia_, rel=1e-10)


def test_renormalised_centroids_are_directions() -> None:
    x = features(500, 20)
    result = lloyd(x, kmeans_init(x, 7, normalize=True), renormalize=True, normalize=True)
    norms = result.centroids.double().norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=1e-6, atol=0)


def test_seeding_on_a_sample_of_many_points() -> None:
    x = torch.randn(66000, 4)
    x[::1000] = NAN
    init = kmeans_init(x, 5, 2, normalize=False)
    rows = x.isfinite().all(1).nonzero()[:, 0]
    sample = len(rows) / 32768 * (np.arange(32768) + distributed._uniforms(0, ref.SAMPLE, 32768))
    sample = rows[torch.from_numpy(sample.astype(np.int64))]
    assert torch.equal(init, sample[kmeans_init(x[sample], 5, 2, normalize=False)])


def test_vmap_over_centroids() -> None:
    x, c = torch.randn(3, 20, 5), torch.randn(3, 4, 5)
    vmap = torch.func.vmap
    same(vmap(nearest_centroid)(x, c), nearest_centroid(x, c))
    same(vmap(nearest_centroid, in_dims=(None, 0))(x[0], c), nearest_centroid(x[[0, 0, 0]], c))
    one_each = tuple(t.squeeze(1) for t in nearest_centroid(x[:, :1], c))
    same(vmap(nearest_centroid)(x[:, 0], c), one_each)


# --- properties -----------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(problems(), st.booleans(), st.integers(0, 5), st.booleans())
def test_properties(
    problem: tuple[Tensor, int], normalize: bool, max_iter: int, renormalize: bool
) -> None:
    x, k = problem
    points, valid = ref.kmeans_points(x.double(), normalize)
    finite = int(valid.sum())
    init = kmeans_init(x, k, 2, normalize=normalize)
    for rows in init.tolist():
        used = [row for row in rows if row >= 0]
        assert len(used) == len(set(used)) == min(k, finite)
        assert valid[used].all()
        assert rows[: len(used)] == used
    centroids, labels, total, n_iter = lloyd(x, init, max_iter, 0.0, normalize, renormalize)
    assert torch.equal(labels >= 0, valid)
    assert labels.max() < k
    assert 0 <= n_iter <= max_iter
    if not finite:
        assert centroids.isnan().all()
        return
    distance = ref._squared_distances(points[valid], centroids.double())
    gap = distance.gather(1, labels[valid][:, None])[:, 0] - distance.amin(1)
    largest = float(points[valid].norm(dim=1).max())
    assert (gap <= 1e-4 * max(largest, 1e-30) ** 2).all()
    assert float(total) == pytest.approx(float(distance.amin(1).sum()), rel=1e-3, abs=1e-6)
    used = ~centroids.isnan().any(1)
    assert int(used.sum()) == min(k, finite)
    again = lloyd(x, init, max_iter, 0.0, normalize, renormalize)
    same(again, (centroids, labels, total, n_iter))


@settings(max_examples=60, deadline=None)
@given(problems(), st.integers(0, 10))
def test_inertia_never_grows(problem: tuple[Tensor, int], max_iter: int) -> None:
    x, k = problem
    init = kmeans_init(x, k, normalize=True)
    before = float(lloyd(x, init, max_iter, 0.0, normalize=True).inertia)
    after = float(lloyd(x, init, max_iter + 1, 0.0, normalize=True).inertia)
    assert after <= before * (1 + 1e-5) + 1e-6


@pytest.mark.parametrize(("seed", "n", "d", "k"), [(121, 42, 35, 8), (228, 45, 17, 10)])
def test_max_iter_does_not_change_a_run_that_has_settled(seed: int, n: int, d: int, k: int) -> None:
    """Nor the way there: points with equally near centroids are many where they are rounded."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=random).round()
    init = kmeans_init(x, k, normalize=True)
    runs = [lloyd(x, init, max_iter, 0.0, normalize=True) for max_iter in range(1, 13)]
    inertia = [float(run.inertia) for run in runs]
    assert inertia == sorted(inertia, reverse=True)
    for run in runs:
        if int(run.n_iter) == int(runs[-1].n_iter):
            same(run, runs[-1])


# --- Python layer ---------------------------------------------------------------------------------


def test_faiss_gives_the_same_layout() -> None:
    pytest.importorskip("faiss")
    x = features(500, 16, 6, 0.1)
    x[3, 3] = NAN
    ours = kmeans(x, 6, n_init=5, normalize=True)
    theirs = kmeans(x, 6, n_init=5, max_iter=25, normalize=True, backend="faiss")
    assert isinstance(theirs, KMeansResult)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert theirs.labels[3] == -1
    assert float(theirs.inertia) >= 0.999 * float(ours.inertia)
    with pytest.raises(ValueError, match="faiss needs at least k = 5 finite points, got 4"):
        kmeans(x[:5], 5, backend="faiss")


def far_from_zero() -> tuple[Tensor, float]:
    """float32 rows around 1e4, and the inertia that 12 clusters leave."""
    sklearn = pytest.importorskip("sklearn.cluster")
    x = features(4000, 8, 12, 0.5, seed=3)
    shifted = x + 1e4
    peer = sklearn.KMeans(12, n_init=5, random_state=0).fit(shifted.double().numpy())
    return shifted, float(peer.inertia_)


def test_faiss_far_from_zero() -> None:
    pytest.importorskip("faiss")
    x, expected = far_from_zero()
    found = kmeans(x, 12, n_init=5, max_iter=50, backend="faiss")
    assert float(found.inertia) == pytest.approx(expected, rel=0.05)
    assert inertia(x, found.centroids) == pytest.approx(float(found.inertia), rel=1e-3)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"k": 2.0}, TypeError, "^kmeans: k must be an int, got 2.0"),
        ({"k": True}, TypeError, "^kmeans: k must be an int, got True"),
        ({"max_iter": 3.5}, TypeError, "^kmeans: max_iter must be an int, got 3.5"),
        ({"seed": None}, TypeError, "^kmeans: seed must be an int, got None"),
        ({"normalize": 1}, TypeError, "^kmeans: normalize must be True or False, got 1"),
        ({"backend": "faiss", "k": 0}, ValueError, "^kmeans: k must be at least 1"),
        ({"backend": "faiss", "max_iter": -1}, ValueError, "^kmeans: max_iter must be at least 0"),
    ],
)
def test_kmeans_refuses_numbers_of_other_kinds(
    given: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        kmeans(features(10, 3), **{"k": 2, **given})


def test_numpy_scalars_are_taken() -> None:
    x = features(60, 4)
    expected = kmeans(x, 3, n_init=2, max_iter=9, tol=0.5, seed=4, normalize=True)
    found = kmeans(
        x,
        np.int64(3),
        n_init=np.int32(2),
        max_iter=np.uint8(9),
        tol=np.float32(0.5),
        seed=np.int64(4),
        normalize=np.True_,
        renormalize=np.False_,
    )
    same(found, expected)


def test_missing_faiss_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"oodkernels\[faiss\]"):
        kmeans(features(10, 3), 2, backend="faiss")


# --- many processes -------------------------------------------------------------------------------


def share(rank: int, world: int) -> list[KMeansResult]:
    results = []
    for x, k, options in distributed_problems():
        cuts = torch.linspace(0, 1, world + 1).square().mul(len(x)).long().tolist()  # uneven
        mine = x[cuts[rank] : cuts[rank + 1]]
        results.append(kmeans(mine, k, group=torch.distributed.group.WORLD, **options))
    return results


@pytest.mark.parametrize("world", [2, 4])
def test_distributed(world: int, tmp_path: Path) -> None:
    parts = ranks(tmp_path, world, share)
    for i, (x, k, options) in enumerate(distributed_problems()):
        exact = x.double() if float(x.nanmean()) > 1e3 else x  # far from zero
        one = kmeans(exact, k, **options)
        for part in parts:
            same((part[i].centroids, part[i].inertia), (parts[0][i].centroids, parts[0][i].inertia))
        labels = torch.cat([part[i].labels for part in parts])
        assert torch.equal(labels, one.labels)
        torch.testing.assert_close(
            parts[0][i].centroids, one.centroids.to(x.dtype), rtol=1e-5, atol=1e-6, equal_nan=True
        )
        assert float(parts[0][i].inertia) == pytest.approx(float(one.inertia), rel=1e-6, abs=1e-9)
        assert parts[0][i].n_iter == one.n_iter
