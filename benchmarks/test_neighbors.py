"""The k nearest rows of a bank beside faiss, torch and the product of matrices alone.

    pytest benchmarks/test_neighbors.py --benchmark-only --benchmark-group-by=group

GFLOP/s count the products: 2 x queries x bank x features. "torch.mm" is the product and no more,
in blocks that stay in the caches, and so what no search by products can beat; "torch" takes the k
largest of each block. Every peer is first held against our distances. Group "score": the k-NN
detector by each of its backends. Group "disk": a bank in a file of 10 GB, with the most memory that
the process took.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clustering import QUICK, directions, features, measure, median
from torch import Tensor

from oodkernels import nearest_neighbors
from oodkernels.detectors import KNN

Shape = tuple[int, int, int, int]  # queries, rows of the bank, features, k
ALL: tuple[Shape, ...] = ((2_000, 50_000, 512, 50), (10_000, 200_000, 512, 50))
DISK: Shape = (40, 3_000, 16, 5) if QUICK else (500, 10_000_000, 512, 50)
QUERIES, BLOCK = 2048, 8192  # rows and columns of a product

shapes = pytest.mark.parametrize(
    "shape", ((40, 300, 16, 5),) if QUICK else ALL, ids=lambda s: "x".join(map(str, s))
)


@cache
def problem(queries: int, rows: int, d: int) -> tuple[Tensor, Tensor]:
    return directions(features(queries, d, seed=1)), directions(features(rows, d))


def product(x: Tensor, bank: Tensor) -> None:
    out = x.new_empty(QUERIES * BLOCK)
    for queries in x.split(QUERIES):
        for block in bank.split(BLOCK):
            size = len(queries), len(block)
            torch.mm(queries, block.T, out=out[: size[0] * size[1]].view(size))


def by_topk(x: Tensor, bank: Tensor, k: int) -> Tensor:
    """Squared distances to the k nearest, (N, k)."""
    half = bank.square().sum(1) / 2
    found = []
    for queries in x.split(QUERIES):
        best = x.new_empty(len(queries), 0)
        for block, norms in zip(bank.split(BLOCK), half.split(BLOCK), strict=True):
            near = torch.addmm(-norms, queries, block.T).topk(min(k, len(block))).values
            best = torch.cat([best, near], 1)
            best = best.topk(min(k, best.shape[1])).values
        found.append(queries.square().sum(1, keepdim=True) - 2 * best)
    return torch.cat(found)


def by_faiss(x: Tensor, bank: Tensor, k: int) -> Callable[[], Tensor]:
    faiss = pytest.importorskip("faiss")
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(bank.shape[1])
    index.add(bank.numpy())
    return lambda: torch.from_numpy(index.search(x.numpy(), k)[0])


@pytest.mark.parametrize(
    "peer", ["oodkernels", "oodkernels, bfloat16", "faiss", "torch", "torch.mm"]
)
@shapes
def test_search(benchmark: Any, shape: Shape, peer: str) -> None:
    benchmark.group = f"search {shape}"
    x, bank = problem(*shape[:3])
    k = shape[3]
    half = bank.bfloat16() if "bfloat16" in peer else bank
    calls: dict[str, Callable[[], Any]] = {
        "oodkernels": lambda: nearest_neighbors(x, bank, k).distances,
        "oodkernels, bfloat16": lambda: nearest_neighbors(x, half, k).distances,
        "faiss": by_faiss(x, bank, k) if peer == "faiss" else lambda: None,
        "torch": lambda: by_topk(x, bank, k),
        "torch.mm": lambda: product(x, bank),
    }
    found = measure(benchmark, calls[peer], peer=peer)
    if found is not None:
        expected = nearest_neighbors(x[:50], half, k).distances
        torch.testing.assert_close(found[:50], expected, rtol=1e-4, atol=1e-5)
    flop = 2 * shape[0] * shape[1] * shape[2]
    benchmark.extra_info["GFLOP/s"] = 1e-9 * flop / median(benchmark)


@pytest.mark.parametrize("peer", ["native", "faiss", "torch"])
@shapes
def test_score(benchmark: Any, shape: Shape, peer: Any) -> None:
    benchmark.group = f"score {shape}"
    if peer == "faiss":
        pytest.importorskip("faiss")
    x, bank = problem(*shape[:3])
    detector = KNN(shape[3], peer).fit(features=bank)
    measure(benchmark, lambda: detector.score(features=x), peer=peer)


SEARCH = """
import json, re, sys, time
import torch
from oodkernels.data import open_arrays
from oodkernels.ops import nearest_neighbors
queries, k, threads = map(int, sys.argv[2:])
torch.set_num_threads(threads)
(bank,) = open_arrays(sys.argv[1]).values()
x = torch.randn(queries, bank.shape[1], generator=torch.Generator().manual_seed(1))
start = time.perf_counter()
nearest_neighbors(x, bank.chunks(100_000), k, normalize=True)
seconds = time.perf_counter() - start
(peak,) = re.findall(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())
print(json.dumps({"search s": seconds, "peak MiB": int(peak) / 1024}))
"""


def test_disk(benchmark: Any, tmp_path: Path) -> None:
    """A bank of float16 in a ``.npy`` file, read in chunks by a process of its own."""
    queries, rows, d, k = DISK
    benchmark.group = f"disk {DISK}"
    block = features(min(rows, 100_000), d).half().numpy()
    path = tmp_path / "bank.npy"
    bank = np.lib.format.open_memmap(path, "w+", np.float16, (rows, d))
    for i in range(0, rows, len(block)):
        bank[i : i + len(block)] = np.roll(block, i // len(block), 1)[: rows - i]
    del bank
    arguments = [str(path), *map(str, (queries, k, torch.get_num_threads()))]

    def search() -> dict[str, float]:
        done = subprocess.run(
            [sys.executable, "-c", SEARCH, *arguments],
            check=True,
            cwd=tmp_path,  # in a checkout its unbuilt sources would come before the package
            stdout=subprocess.PIPE,
            text=True,
        )
        found: dict[str, float] = json.loads(done.stdout)
        return found

    found = benchmark.pedantic(search, rounds=1)
    benchmark.extra_info.update(found, peer="oodkernels", threads=torch.get_num_threads())
