"""Outlier miners: the authors' rules restated, what each is for, draws, state, pools, errors."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from oodkernels import cluster_argmax, dos_select
from oodkernels.training import (
    MINERS,
    DOSMiner,
    NTOMMiner,
    OutlierMiner,
    POEMMiner,
    UniformMiner,
)

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
NAMES = sorted(MINERS)


def candidates(n: int = 384, d: int = 20, c: int = 10, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features (n, d) and logits (n, c + 1)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator)
    return x, 3 * torch.randn(n, c + 1, generator=generator)


def samples(n: int = 500, d: int = 20, seed: int = 1) -> tuple[Tensor, Tensor]:
    """ID samples (label >= 0) and outliers (-1) on two sides of the plane x[0] = 0."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * n, d, generator=generator)
    labels = torch.cat([torch.arange(n) % 7, torch.full((n,), -1)])
    x[:, 0] = x[:, 0].abs() * torch.where(labels < 0, -1, 1) + 3 * torch.where(labels < 0, -1, 1)
    return x, labels


# --- the authors' rules ---------------------------------------------------------------------------


@pytest.mark.parametrize("q", [0.0, 0.125, 0.5])
@pytest.mark.parametrize(("n_pool", "n"), [(384, 64), (4000, 1000), (37, 5)])
def test_ntom_is_the_window_of_the_authors(q: float, n_pool: int, n: int) -> None:
    _, logits = candidates(n_pool)
    conf = torch.softmax(logits.double(), 1)[:, -1].numpy()
    start = int(q * n_pool)
    expected = np.argsort(conf)[start : start + n]
    got = NTOMMiner(q).select(None, logits, n)
    assert got.tolist() == expected.tolist()


def test_ntom_ends_with_the_last_where_the_window_would_pass_it() -> None:
    _, logits = candidates(40)
    order = NTOMMiner(0.0).select(None, logits, 40)
    assert torch.equal(NTOMMiner(0.9).select(None, logits, 10), order[30:])
    assert torch.equal(NTOMMiner(0.9).select(None, logits, 40), order)


def bayes(x: Tensor, y: Tensor, sigma: float, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the posterior, by the textbook's other route: n x n, not d x d.

    Rasmussen & Williams, Gaussian Processes for Machine Learning, equation 2.11 and the matrix
    inversion lemma.
    """
    z, t = x.double().numpy(), y.double().numpy()
    kernel = sigma * z @ z.T + noise * np.eye(len(z))
    gain = sigma * np.linalg.solve(kernel, z).T
    return gain @ t, sigma * np.eye(z.shape[1]) - gain @ z * sigma


@pytest.mark.parametrize("mode", ["default", "official"])
def test_poem_draws_from_the_posterior(mode: Any) -> None:
    x, labels = samples(30, 4)
    y = torch.where(labels < 0, -3.0, 3.0)
    mean, covariance = bayes(x, y, 20.0, 0.5)
    if mode == "official":
        covariance *= 20.0
    miner = POEMMiner(mode=mode)
    for part in (slice(0, 7), slice(7, 60)):
        miner.update(x[part], labels[part])
    got_mean, factor = miner.posterior()
    np.testing.assert_allclose(got_mean, mean, rtol=1e-9)
    # On one-hot candidates the distances are the weights themselves, but for the sign.
    drawn = np.empty((4000, 4))
    for i in range(len(drawn)):
        miner.select(torch.eye(4, dtype=torch.float64), None, 1)
        assert miner.last is not None
        assert miner.last.scores is not None
        drawn[i] = miner.last.scores
    spread = np.sqrt(np.diag(covariance))
    far = np.abs(mean) > 4 * spread
    assert far.any()
    np.testing.assert_allclose(drawn.mean(0)[far], np.abs(mean)[far], atol=5 * spread.max() / 60)
    np.testing.assert_allclose((drawn**2).mean(0), mean**2 + spread**2, rtol=0.1)
    np.testing.assert_allclose(factor @ factor.T, np.linalg.inv(bayes(x, y, 20, 0.5)[1]), rtol=1e-6)


def test_poem_takes_the_smallest_distances() -> None:
    x, labels = samples()
    pool = 2 * torch.randn(3000, 20)
    miner = POEMMiner()
    miner.update(x, labels)
    got = miner.select(pool, None, 100)
    assert miner.last is not None
    distance = miner.last.scores
    assert distance is not None
    _, expected = torch.topk(distance, 100, largest=False)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("score", ["absent-class", "energy", "max-logit"])
@pytest.mark.parametrize(("k", "n"), [(None, 64), (10, 64), (64, 10)])
def test_dos_is_the_authors_step(score: Any, k: int | None, n: int) -> None:
    x, logits = candidates()
    miner = DOSMiner(k, score=score)
    rows = miner.select(x, logits, n).tolist()
    log = miner.last
    assert log is not None
    assert log.labels is not None
    exact = logits.double()
    value = {
        "absent-class": 1 - exact.softmax(1)[:, -1],
        "energy": exact.logsumexp(1),
        "max-logit": exact.amax(1),
    }[score]
    clusters = k or n
    assert log.clusters == clusters
    per_cluster = max(1, n // clusters)
    best = cluster_argmax(log.labels, value, clusters, per_cluster).flatten()
    best = best[best >= 0]
    if clusters > n:
        best = best[value[best].argsort(descending=True)][:n]
    assert len(set(rows)) == len(rows) == n
    assert set(best.tolist()) <= set(rows)
    x = torch.nn.functional.normalize(x.double(), dim=1)
    centroids = torch.stack([x[log.labels == c].mean(0) for c in range(clusters)])
    settled = torch.cdist(x, centroids).argmin(1) == log.labels
    assert settled.double().mean() > 0.95  # of Lloyd's iteration, which stops at a tolerance


def test_dos_is_the_op() -> None:
    x, logits = candidates()
    miner = DOSMiner(n_init=2, mode="official", k=80)
    rows = miner.select(x, logits, 30)
    assert miner.last is not None
    scores = miner.last.scores
    assert scores is not None
    seed = DOSMiner()._bits()
    assert torch.equal(dos_select(x, scores, 80, 30, 2, seed=seed, mode="official").indices, rows)


# --- what each is for -----------------------------------------------------------------------------


def test_uniform_selects_each_equally_often() -> None:
    miner = UniformMiner()
    counts = torch.zeros(12)
    for _ in range(3000):
        counts[miner.select(torch.zeros(12, 1), None, 4)] += 1
    assert counts.sum() == 12000
    assert (counts - 1000).abs().max() < 5 * math.sqrt(3000 * 2 / 9)


def test_ntom_leaves_out_the_hardest_and_the_easy() -> None:
    logits = torch.zeros(800, 2)
    logits[:, -1] = torch.linspace(-8, 8, 800)[torch.randperm(800)]
    absent = logits[NTOMMiner(0.125).select(None, logits, 200), -1]
    assert absent.amin() == logits[:, -1].sort().values[100]
    assert absent.amax() == logits[:, -1].sort().values[299]


def test_poem_picks_near_the_boundary() -> None:
    x, labels = samples()
    pool = torch.randn(4000, 20)
    pool[:, 0] *= 4
    miner = POEMMiner()
    miner.update(x, labels)
    chosen = pool[miner.select(pool, None, 200), 0].abs()
    assert chosen.mean() < 0.3 * pool[:, 0].abs().mean()
    miner.reset()
    blind = pool[miner.select(pool, None, 200), 0].abs()
    assert blind.mean() > 2 * chosen.mean()


def test_dos_covers_clusters_more_evenly_than_greedy() -> None:
    """Eight kinds of outliers; one looks far more in-distribution than the others."""
    generator = torch.Generator().manual_seed(0)
    kind = torch.arange(400) % 8
    x = torch.eye(8)[kind] * 5 + torch.rand(400, 8, generator=generator)
    logits = torch.randn(400, 4, generator=generator)
    logits[kind == 3, -1] -= 20
    greedy = DOSMiner(k=1).select(x, logits, 40)
    diverse = DOSMiner(k=8).select(x, logits, 40)
    assert (kind[greedy] == 3).all()
    assert kind[diverse].bincount(minlength=8).tolist() == [5] * 8


def test_ties_go_to_the_lowest_index() -> None:
    logits = torch.zeros(600, 3)
    logits[::3, -1] = 1.0
    easy, hard = [i for i in range(600) if i % 3 == 0], [i for i in range(600) if i % 3]
    assert NTOMMiner(0.0).select(None, logits, 550).tolist() == (hard + easy)[:550]
    assert NTOMMiner(0.5).select(None, logits, 200).tolist() == (hard + easy)[300:500]
    assert POEMMiner().select(torch.ones(600, 3), None, 70).tolist() == list(range(70))


def test_hard_scores_never_saturate() -> None:
    """1 - p and p are both constant here in float32; the order is still that of the logits."""
    for offset in (-60.0, 60.0):
        logits = torch.zeros(100, 3)
        logits[:, -1] = offset + torch.arange(100).flip(0) / 10
        assert NTOMMiner(0.0).select(None, logits, 100).tolist() == list(range(99, -1, -1))
        rows = DOSMiner(k=1, n_init=1).select(torch.rand(100, 4), logits, 10)
        assert rows.tolist() == list(range(99, 89, -1))


# --- draws and state ------------------------------------------------------------------------------


def steps(miner: OutlierMiner, count: int, first: int = 0) -> list[list[int]]:
    chosen = []
    for i in range(first, first + count):
        x, logits = candidates(seed=i)
        chosen.append(miner.select(x, logits, 32).tolist())
        miner.update(*samples(seed=i))
    return chosen


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_resumed_draws_as_uninterrupted(name: str, device: str) -> None:
    torch.manual_seed(0)
    expected = steps(MINERS[name](seed=5), 6)
    torch.manual_seed(1)
    assert all(len(set(rows)) == 32 for rows in expected)
    miner = MINERS[name](seed=5)
    assert steps(miner, 3) == expected[:3]
    buffer = io.BytesIO()
    torch.save(miner.state_dict(), buffer)
    buffer.seek(0)
    resumed = MINERS[name](seed=9)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    assert steps(resumed, 3, 3) == expected[3:]
    assert steps(miner, 3, 3) == expected[3:]


@pytest.mark.parametrize("name", ["uniform", "poem"])
def test_draws_vary_with_step_and_seed(name: str) -> None:
    x, logits = candidates()
    miner = MINERS[name](seed=1)
    first, second = (miner.select(x, logits, 32).tolist() for _ in range(2))
    other = MINERS[name](seed=2).select(x, logits, 32).tolist()
    assert first != second
    assert first != other


def test_a_failed_selection_is_none() -> None:
    x, logits = candidates()
    miner = UniformMiner()
    with pytest.raises(ValueError, match="n must be"):
        miner.select(x, logits, 0)
    assert miner.step == 0
    assert miner.last is None
    assert torch.equal(miner.select(x, None, 9), UniformMiner().select(None, logits, 9))


def test_state_of_another_miner_is_refused() -> None:
    with pytest.raises(ValueError, match=r"DOSMiner\.load_state_dict: state must be of a DOSMiner"):
        DOSMiner().load_state_dict(POEMMiner().state_dict())
    with pytest.raises(ValueError, match=r"state must have .*gram"):
        POEMMiner().load_state_dict({"miner": "POEMMiner", "seed": 0, "step": 0})


# --- pools, types, arrays -------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_memory_mapped_pool_is_the_pool_in_memory(name: str, tmp_path: Path) -> None:
    x, logits = candidates(40_000, 8)
    expected = MINERS[name](**block(name)).select(x, logits, 500)
    arrays = []
    for key, value in (("x", x), ("logits", logits)):
        np.save(tmp_path / f"{key}.npy", value.numpy())
        arrays.append(np.load(tmp_path / f"{key}.npy", mmap_mode="r"))
    assert torch.equal(MINERS[name](**block(name)).select(*arrays, 500), expected)


def block(name: str) -> dict[str, Any]:
    return {"block": 384} if name == "dos" else {}


@pytest.mark.parametrize(
    ("pool", "n", "size"), [(1000, 130, 100), (1000, 7, 100), (1001, 1001, 100)]
)
def test_blocks_share_the_selection(pool: int, n: int, size: int) -> None:
    x, logits = candidates(pool, 6)
    miner = DOSMiner(block=size, n_init=1)
    rows = miner.select(x, logits, n)
    assert len(rows.unique()) == n
    log = miner.last
    assert log is not None
    assert log.labels is not None
    assert log.occupancy is not None
    assert log.clusters == n
    assert int(log.occupancy.sum()) == pool
    assert log.labels.amax() < n
    if n == 130:  # thirteen of each block of a hundred, each the hardest of its cluster
        assert log.scores is not None
        best = cluster_argmax(log.labels, log.scores, log.clusters)[:, 0]
        assert set(best[best >= 0].tolist()) <= set(rows.tolist())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_types_are_read_as_such(name: str, dtype: torch.dtype) -> None:
    x, logits = (t.to(dtype) for t in candidates())
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    got = MINERS[name](seed=3).select(x, logits, 40)
    assert torch.equal(got, MINERS[name](seed=3).select(x.to(wide), logits.to(wide), 40))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_and_inputs_are_left_alone(name: str) -> None:
    x, logits = (t.requires_grad_() for t in candidates())
    before = x.detach().clone(), logits.detach().clone()
    assert not MINERS[name]().select(x, logits, 5).requires_grad
    assert torch.equal(x, before[0])
    assert torch.equal(logits, before[1])


def test_poem_updates_are_one_whatever_the_batches() -> None:
    x, labels = samples(20_000, 3)
    whole, parts = POEMMiner(), POEMMiner()
    whole.update(x, labels)
    for rows, y in zip(x.split(777), labels.split(777), strict=True):
        parts.update(rows.numpy(), y)
    for a, b in zip(whole.posterior(), parts.posterior(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


# --- log ------------------------------------------------------------------------------------------


def test_log_counts_clusters_and_scores() -> None:
    x = torch.eye(3).repeat_interleave(torch.tensor([5, 2, 1]), 0)
    _, logits = candidates(8)
    miner = DOSMiner(k=4)
    rows = miner.select(x, logits, 4)
    log = miner.last
    assert log is not None
    assert log.occupancy is not None
    occupancy = log.occupancy
    # Three directions for four clusters: one stays empty, or takes a duplicate of another's.
    assert int(occupancy.sum()) == 8
    assert len(occupancy) == 4
    assert log.empty_clusters == int((occupancy == 0).sum())
    histogram = log.histogram(bins=5)
    assert histogram is not None
    assert histogram.candidates.sum() == 8
    assert histogram.selected.sum() == 4
    assert (histogram.selected <= histogram.candidates).all()
    assert log.scores is not None
    assert histogram.edges[0] == float(log.scores.amin())
    summary = log.summary()
    assert summary["empty_clusters"] == log.empty_clusters
    assert summary["score_mean_selected"] == float(log.scores[rows].mean())


def test_log_of_uniform_has_neither() -> None:
    miner = UniformMiner()
    miner.select(torch.rand(9, 2), None, 3)
    assert miner.last is not None
    assert miner.last.occupancy is None
    assert miner.last.empty_clusters is None
    assert miner.last.histogram() is None
    assert miner.last.summary() == {"step": 0, "candidates": 9, "selected": 3}


# --- errors ---------------------------------------------------------------------------------------

X, Z = candidates(6, 4, 2)
BAD_X, BAD_Z = X.clone(), Z.clone()
BAD_X[4, 1], BAD_Z[2, 0] = math.nan, math.inf


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.select(X, Z, 7), ValueError, r"n must be in 1\.\.6.*got 7"),
        (lambda m: m.select(X, Z, 0), ValueError, "got 0"),
        (lambda m: m.select(X[:5], Z, 2), ValueError, "same candidates"),
        (lambda m: m.select(X[0], Z, 2), ValueError, r"features must have shape"),
        (lambda m: m.select(X, Z[:, :0], 2), ValueError, r"logits must have shape"),
        (lambda m: m.select(X, Z.long(), 2), TypeError, "logits must be float64"),
        (lambda m: m.select(X, [1.0], 2), TypeError, "tensor or array, got list"),
        (lambda m: m.select(None, None, 2), ValueError, "must be given"),
        (lambda m: m.select(X, Z, 2.5), TypeError, "integer"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_bad_arguments_are_named(
    name: str, call: Callable[[Any], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(MINERS[name]())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: NTOMMiner().select(X, None, 2), r"NTOMMiner\.select: logits must be given"),
        (lambda: POEMMiner().select(None, Z, 2), r"POEMMiner\.select: features must be given"),
        (lambda: DOSMiner().select(None, Z, 2), r"DOSMiner\.select: features must be given"),
        (lambda: NTOMMiner().select(X, BAD_Z, 2), "1 rows that are not, the first at index 2"),
        (lambda: POEMMiner().select(BAD_X, Z, 2), "1 rows that are not, the first at index 4"),
        (lambda: DOSMiner().select(BAD_X, Z, 2), "features must be finite.*index 4"),
        (lambda: DOSMiner().select(X, BAD_Z, 2), "logits must be finite.*index 2"),
        (lambda: NTOMMiner().select(None, Z[:, :1], 2), r"C \+ 1 >= 2 columns"),
        (lambda: POEMMiner().update(BAD_X, torch.zeros(6).long()), "finite.*index 4"),
        (lambda: POEMMiner().update(X, torch.zeros(5).long()), r"labels must have shape \(6,\)"),
        (lambda: UniformMiner(seed=-1), "seed must be >= 0"),
        (lambda: NTOMMiner(q=1.0), r"q must be in \[0, 1\)"),
        (lambda: NTOMMiner(score="msp"), "score must be absent-class"),  # type: ignore[arg-type]
        (lambda: POEMMiner(sigma=0), "sigma must be positive"),
        (lambda: POEMMiner(mode="paper"), "mode must be default"),  # type: ignore[arg-type]
        (lambda: DOSMiner(k=0), "k must be >= 1"),
        (lambda: DOSMiner(block=0), "block must be >= 1"),
    ],
)
def test_bad_settings_and_rows_are_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_poem_refuses_another_width_and_keeps_what_it_knew() -> None:
    miner = POEMMiner()
    miner.update(*samples(d=20))
    before = miner.state_dict()
    for call in (
        lambda: miner.update(*samples(d=21)),
        lambda: miner.select(torch.rand(5, 21), None, 2),
        lambda: miner.update(torch.full((1, 20), math.inf), torch.tensor([-1])),
    ):
        with pytest.raises(ValueError, match=r"width of those before, 20, got 21|finite"):
            call()
    after = miner.state_dict()
    assert torch.equal(before["gram"], after["gram"])
    assert torch.equal(before["moment"], after["moment"])
    with pytest.raises(TypeError, match="labels must be integers"):
        miner.update(samples()[0], torch.zeros(1000))
