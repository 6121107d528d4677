"""roc_metrics and its sort against scikit-learn, torchmetrics, pytorch-ood, NumPy and torch.

Every peer computes AUROC, AUPR-in, AUPR-out and FPR95; what it computes beyond that is not timed.
``OODK_BENCH_LARGE=1`` adds 5e7 scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import peers
import pytest
import torch
from shapes import ROC_SIZES, roc_scores
from torch import Tensor

from oodkernels.metrics.ood import ood_metrics
from oodkernels.ops import roc_metrics
from oodkernels.ops.roc import sort_keys

sizes = pytest.mark.parametrize("size", ROC_SIZES, ids="{:.0e}".format)
dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["f32", "f64", "bf16"]
)

SLOW = 5 * 10**6  # peers that take seconds a run beyond this size run once


@pytest.fixture(params=["1", "all"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1 if request.param == "1" else before)
    yield
    torch.set_num_threads(before)


def peer(name: str, x: Tensor, y: Tensor) -> Callable[[], Any]:
    if name == "sklearn":
        return lambda: peers.sklearn_roc(x.numpy(), y.numpy())
    if name == "numpy":
        return lambda: peers.numpy_roc(x.numpy(), y.numpy())
    if name == "torch":
        return lambda: peers.torch_roc(x, y)
    if name == "torchmetrics":
        classification = pytest.importorskip("torchmetrics.functional.classification")
        unit, label = peers.unit_scores(x, y)
        return lambda: peers.torchmetrics_roc(classification, unit, label)
    metrics = peers.pytorch_ood("metrics")
    label = torch.cat([torch.zeros(len(x)), -torch.ones(len(y))]).long()
    outlier = -torch.cat([x, y])
    return lambda: peers.pytorch_ood_roc(metrics, outlier, label)


@dtypes
@sizes
def test_roc_metrics(size: int, dtype: torch.dtype, threads: None, measure: Any) -> None:
    x, y = roc_scores(size, dtype)
    measure(lambda: roc_metrics(x, y), scores=size)


@sizes
def test_ood_metrics(size: int, threads: None, measure: Any) -> None:
    x, y = roc_scores(size)
    measure(lambda: ood_metrics(x, y), scores=size)


@sizes
def test_ten_sets(size: int, threads: None, measure: Any) -> None:
    """Ten OOD sets of a tenth of the OOD scores each: the ID side is sorted once."""
    x, y = roc_scores(size)
    sets = {str(i): part for i, part in enumerate(y.chunk(10))}
    measure(lambda: ood_metrics(x, sets), scores=size)


@pytest.mark.parametrize("name", ["sklearn", "torchmetrics", "pytorch-ood", "numpy", "torch"])
@sizes
def test_peers(size: int, name: str, threads: None, benchmark: Any) -> None:
    x, y = roc_scores(size)
    fn = peer(name, x, y)
    fpr, auroc = fn()[:2]
    expected = ood_metrics(x, y)
    assert abs(auroc - expected.auroc) < 1e-5
    assert abs(fpr - expected.fpr95) < 0.01 or name == "pytorch-ood"  # whose positive is OOD
    if size > SLOW:
        benchmark.pedantic(fn, rounds=1, iterations=1)
    else:
        benchmark(fn)
    if not benchmark.disabled:
        benchmark.extra_info["threads"] = torch.get_num_threads()
        benchmark.extra_info["Mscores/s"] = round(size / benchmark.stats.stats.median / 1e6, 2)


@pytest.mark.parametrize("name", ["oodk", "torch.sort", "np.sort"])
@dtypes
@sizes
def test_sort(size: int, dtype: torch.dtype, name: str, threads: None, measure: Any) -> None:
    x, _ = roc_scores(2 * size, dtype)
    if name == "np.sort" and dtype == torch.bfloat16:
        pytest.skip("NumPy has no bfloat16")
    run: dict[str, Callable[[], Any]] = {
        "oodk": lambda: sort_keys(x),
        "torch.sort": lambda: torch.sort(x),
        "np.sort": lambda: np.sort(x.numpy()),
    }
    measure(run[name], scores=size)
