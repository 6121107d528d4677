"""Outlier mining: NTOM and POEM over a pool of 400k, DOS a step, beside the authors' rules.

    pytest benchmarks/test_mining.py --benchmark-only --benchmark-group-by=group

"official" is the authors' loop over batches, restated in torch and NumPy without its faults (a list
of Python floats, concatenation anew for every batch); "torch" is careful plain torch. d = 342 is
DenseNet-101's width, 101 columns CIFAR-100's classes and the absent one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from clustering import QUICK, features, measure
from peers import official_dos
from torch import Tensor

from oodkernels.training import DOSMiner, NTOMMiner, POEMMiner

POOL, WIDTH, COLUMNS = (4000, 20, 11) if QUICK else (400_000, 342, 101)
CIFAR = POOL // 8  # 50,000 ID images for a pool of 400,000
SIGMA, NOISE, TARGET = 20.0, 0.5, 3.0


@pytest.fixture(scope="module")
def pool() -> Tensor:
    return features(POOL, WIDTH)


@pytest.fixture(scope="module")
def seen() -> tuple[Tensor, Tensor]:
    """What POEM's regression is fitted to: as many ID samples as outliers."""
    labels = torch.arange(2 * CIFAR) % 2 - 1
    return features(2 * CIFAR, WIDTH, seed=1), labels


@pytest.mark.parametrize("peer", ["oodkernels", "official", "torch"])
def test_ntom(benchmark: Any, peer: str) -> None:
    benchmark.group = f"NTOM, pool of {POOL}"
    logits = 3 * torch.randn(POOL, COLUMNS, generator=torch.Generator().manual_seed(0))
    n, start = 2 * CIFAR, POOL // 8
    miner = NTOMMiner(0.125)

    def official() -> np.ndarray:
        conf = np.concatenate([z.softmax(1)[:, -1].numpy() for z in logits.split(400)])
        return np.argsort(conf)[start : start + n]

    calls = {
        "oodkernels": lambda: miner.select(None, logits, n),
        "official": official,
        "torch": lambda: logits.softmax(1)[:, -1].argsort()[start : start + n],
    }
    got = measure(benchmark, calls[peer], peer=peer)
    expected = logits.log_softmax(1)[:, -1].argsort()[start : start + n]
    agree = len(np.intersect1d(np.asarray(got), expected.numpy())) / n
    assert agree > 0.999  # but for ties in float32


@pytest.mark.parametrize("peer", ["oodkernels", "official", "torch"])
def test_poem_selection(benchmark: Any, pool: Tensor, seen: Any, peer: str) -> None:
    """Thompson sampling and the pool's scores; all peers from one posterior."""
    benchmark.group = f"POEM selection, pool of {POOL}"
    miner = POEMMiner(SIGMA, NOISE, TARGET)
    miner.update(*seen)
    mean, factor = miner.posterior()
    covariance = torch.cholesky_inverse(factor)

    def draw() -> Tensor:
        normal = torch.distributions.MultivariateNormal(mean, covariance)
        return normal.sample().float()

    def official() -> Tensor:
        beta = draw()[None]
        distance = torch.cat([(beta @ z.T).T.abs().squeeze() for z in pool.split(2000)])
        return torch.topk(distance, CIFAR, largest=False).indices

    calls = {
        "oodkernels": lambda: miner.select(pool, None, CIFAR),
        "official": official,
        "torch": lambda: (pool @ draw()).abs().topk(CIFAR, largest=False).indices,
    }
    measure(benchmark, calls[peer], peer=peer)


@pytest.mark.parametrize("peer", ["oodkernels", "official"])
def test_poem_update(benchmark: Any, seen: Any, peer: str) -> None:
    """The regression's posterior from the features of an epoch."""
    benchmark.group = f"POEM update, {2 * CIFAR} samples"
    x, labels = seen

    def ours() -> Tensor:
        miner = POEMMiner(SIGMA, NOISE, TARGET)
        miner.update(x, labels)
        return miner.posterior()[0]

    def official() -> Tensor:
        z = x.double()
        y = torch.where(labels < 0, -TARGET, TARGET).double()
        inverse = torch.inverse(z.T @ z / NOISE + torch.eye(WIDTH) / SIGMA)
        torch.linalg.eigh(SIGMA * inverse)  # a check of theirs
        return inverse @ (z.T @ y / NOISE)

    got = measure(benchmark, {"oodkernels": ours, "official": official}[peer], peer=peer)
    torch.testing.assert_close(got, ours(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("peer", ["oodkernels", "official"])
def test_dos_step(benchmark: Any, peer: str) -> None:
    """384 candidates, as many clusters as are selected; scores from logits included."""
    n = 16 if QUICK else 64
    benchmark.group = f"DOS step, 384 x {WIDTH} x {n}"
    x = features(384, WIDTH)
    logits = 3 * torch.randn(384, COLUMNS, generator=torch.Generator().manual_seed(0))
    miner = DOSMiner()
    calls = {
        "oodkernels": lambda: miner.select(x, logits, n),
        "official": lambda: official_dos(x, logits.softmax(1)[:, -1], n, n, None),
    }
    measure(benchmark, calls[peer], peer=peer)


def test_dos_pool(benchmark: Any) -> None:
    """A whole pool, in blocks of 384 as the steps of an epoch would meet them."""
    n = 1000 if QUICK else 40_000
    benchmark.group = f"DOS, pool of {n}"
    x = features(n, WIDTH)
    logits = torch.randn(n, COLUMNS, generator=torch.Generator().manual_seed(0))
    miner = DOSMiner(block=384)
    measure(benchmark, lambda: miner.select(x, logits, n // 6), seconds=10)
