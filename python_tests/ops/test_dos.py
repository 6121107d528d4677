"""DOS: what is selected, against a plain restatement of the official rule and for any input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from points import NAN, features, problems, same
from torch import Tensor

from oodkernels import cluster_argmax, dos_select, kmeans_init
from oodkernels import reference as ref
from oodkernels.ops import kmeans_lloyd as lloyd


def official(
    labels: np.ndarray, prob: np.ndarray, k: int, batch: int, rng: np.random.Generator
) -> tuple[list[int], int]:
    """The rule of Jiang et al.'s code, given labels and p(C + 1 | x): rows, how many are fill."""
    chosen: list[int] = []
    m = 1 if k > batch else batch // k
    for c in range(min(k, batch)):
        members = np.flatnonzero(labels == c)
        if len(members) > m:
            members = members[np.argsort(prob[members], kind="stable")[:m]]
        chosen.extend(members.tolist())
    others = np.setdiff1d(np.arange(len(labels)), chosen)
    fill = rng.permutation(others)[: batch - len(chosen)].tolist()
    return chosen + fill, len(fill)


@pytest.mark.parametrize("mode", ["default", "official"])
@pytest.mark.parametrize(
    ("n", "k", "n_select"),
    [(384, 64, 64), (200, 10, 64), (200, 64, 10), (100, 100, 30), (50, 7, 50), (80, 1, 9)],
)
def test_selection_is_the_official_one(n: int, k: int, n_select: int, mode: str) -> None:
    x, prob = features(n, 40), torch.rand(n, generator=torch.Generator().manual_seed(1))
    indices, labels, _, _ = dos_select(x, -prob, k, n_select, mode=mode, seed=9)
    rows = indices.tolist()
    assert len(rows) == len(set(rows)) == n_select
    if mode == "default" and k > n_select:
        best = cluster_argmax(labels, -prob, k)[:, 0]
        best = best[best >= 0]
        expected = best[prob[best].argsort(stable=True)][:n_select].tolist()
        assert set(rows) == set(expected) or len(expected) < n_select
        return
    expected, fill = official(labels.numpy(), prob.numpy(), k, n_select, np.random.default_rng(0))
    assert set(rows[: n_select - fill]) == set(expected[: n_select - fill])


def test_fill_is_uniform() -> None:
    """A cluster of one row and one of the rest: half of n_select from these, and the fill."""
    x = torch.cat([torch.eye(2)[:1], torch.eye(2)[1:].expand(20, 2) + 0.01 * torch.rand(20, 2)])
    scores = torch.arange(21.0)
    counts = torch.zeros(21)
    for seed in range(2000):
        counts[dos_select(x, scores, 2, 8, n_init=1, seed=seed).indices] += 1
    assert (counts[[0, 17, 18, 19, 20]] == 2000).all()
    others = counts[1:17]
    assert others.sum() == 2000 * 3
    assert (others - 375).abs().max() < 80


@pytest.mark.parametrize("seed", [0, 3, -5, 2**62])
def test_it_is_seeding_clustering_and_selection(seed: int) -> None:
    x, scores = features(300, 30), torch.randn(300)
    x[[4, 77]] = NAN
    indices, labels, centroids, inertia = dos_select(x, scores, 20, 70, seed=seed)
    one = lloyd(x, kmeans_init(x, 20, 5, seed=seed, normalize=True), normalize=True)
    same((centroids, labels, inertia), (one.centroids, one.labels, one.inertia))
    assert torch.equal(indices, ref.dos_selection(labels, scores, 20, 70, seed))
    again = dos_select(x, scores, 20, 70, seed=seed)
    same(again, (indices, labels, centroids, inertia))
    assert not torch.equal(dos_select(x, scores, 20, 70, seed=seed + 1).indices, indices)


def test_batch_is_many_single_calls() -> None:
    x = torch.stack([features(100, 12, seed=b) for b in range(6)]).view(2, 3, 100, 12)
    scores = torch.rand(2, 3, 100)
    threads = torch.get_num_threads()
    try:
        for count in (1, 4):
            torch.set_num_threads(count)
            batch = dos_select(x, scores, 10, 33, seed=2)
            for i in range(2):
                for j in range(3):
                    single = dos_select(x[i, j], scores[i, j], 10, 33, seed=2)
                    same(tuple(output[i, j] for output in batch), single)
    finally:
        torch.set_num_threads(threads)
    nothing = dos_select(x[:0], scores[:0], 10, 33)
    assert [tuple(t.shape) for t in nothing] == [(0, 3, 33), (0, 3, 100), (0, 3, 10, 12), (0, 3)]


def test_scores_that_are_nan_come_last() -> None:
    x = features(60, 8)
    scores = torch.full((60,), NAN)
    scores[::2] = torch.randn(30)
    labels = dos_select(x, scores, 5, 5).labels
    best = cluster_argmax(labels, scores, 5, 60)
    for rows in best.tolist():
        found = [row for row in rows if row >= 0]
        nan = [row % 2 for row in found]
        assert nan == sorted(nan)
        assert [row for row in found if row % 2] == sorted(row for row in found if row % 2)


def test_too_few_finite_rows_leave_minus_one() -> None:
    x = features(20, 6)
    x[5:] = NAN
    indices = dos_select(x, torch.rand(20), 3, 8).indices.tolist()
    assert sorted(indices[:5]) == [0, 1, 2, 3, 4]
    assert indices[5:] == [-1] * 3


def test_scores_may_differ_in_type_and_layout() -> None:
    x = features(90, 14)
    scores = torch.randn(90, dtype=torch.float64)
    expected = dos_select(x, scores, 9, 20)
    wide = torch.stack([scores, scores * 0], 1)
    same(dos_select(x.T.contiguous().T, wide[:, 0], 9, 20), expected)
    half = scores.half()
    same(dos_select(x, half, 9, 20), dos_select(x, half.double(), 9, 20))


@settings(max_examples=150, deadline=None)
@given(
    problems(),
    st.data(),
    st.sampled_from(["default", "official"]),
    st.integers(-(2**63), 2**63 - 1),
)
def test_properties(problem: tuple[Tensor, int], data: st.DataObject, mode: str, seed: int) -> None:
    x, k = problem
    n = len(x)
    n_select = data.draw(st.integers(1, n))
    value = st.sampled_from([0.0, 1.0, -1.0, 2.5, NAN, float("inf"), -float("inf")])
    scores = torch.tensor(data.draw(st.lists(value, min_size=n, max_size=n)))
    indices, labels, _, _ = dos_select(x, scores, k, n_select, 2, 5, seed=seed, mode=mode)
    selected = [row for row in indices.tolist() if row >= 0]
    finite = int((labels >= 0).sum())
    assert len(selected) == len(set(selected)) == min(n_select, finite)
    assert indices.tolist()[len(selected) :] == [-1] * (n_select - len(selected))
    assert (labels[selected] >= 0).all()
    assert torch.equal(indices, ref.dos_selection(labels, scores, k, n_select, seed, mode))
    m = 1 if k > n_select else n_select // k
    ranked = torch.where(scores.isnan(), -torch.inf, scores)
    for c in range(k if k <= n_select else 0):
        members = (labels == c).nonzero()[:, 0]
        best = ranked[members].sort(descending=True).values[:m]
        taken = ranked[[row for row in selected if labels[row] == c]]
        assert torch.equal(taken.sort(descending=True).values[: len(best)], best)
