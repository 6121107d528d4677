"""Streaming metrics: update rate and memory against binned peers, and how wide the bounds are.

``python benchmarks/test_streaming.py 1e8`` prints the bound widths of long streams of every kind.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torchmetrics
from shapes import QUICK

from oodkernels.metrics.streaming import OODMetrics
from oodkernels.ops import roc_histogram_

BATCH = 200_000 if QUICK else 1_000_000

KINDS: dict[str, Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]] = {
    "normal": lambda x, ood, t: x - 2 * ood,
    "msp": lambda x, ood, t: torch.sigmoid(3 * x + 6 - 3 * ood),
    "mahalanobis": lambda x, ood, t: 400 * x - 300 * ood,
    "narrow": lambda x, ood, t: 1000 + x - ood,
    "drift": lambda x, ood, t: x + 100 * t - 2 * ood,
    "jump": lambda x, ood, t: x + (1000 if t >= 0.5 else 0) - 2 * ood,
    "widening": lambda x, ood, t: x * (1 + 100 * t) - 2 * ood,
    "bfloat16": lambda x, ood, t: (x - 2 * ood).bfloat16(),
    "float16": lambda x, ood, t: (x - 2 * ood).half(),
    "ceiling": lambda x, ood, t: torch.where(x > 0.5 + ood, torch.ones(()), x - ood),
    "1000 values": lambda x, ood, t: ((x - ood) * 125).round() / 3,
}


def batches(
    kind: str, n: int, prevalence: float = 0.5
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """n scores in batches; the noise repeats, what a kind makes of it follows the stream."""
    g = torch.Generator().manual_seed(0)
    noise = [
        (torch.randn(BATCH, generator=g), torch.rand(BATCH, generator=g) < prevalence)
        for _ in range(16)
    ]
    for i in range(n // BATCH):
        x, is_ood = noise[i % 16]
        # A shift far below the noise, lest the values repeat.
        yield KINDS[kind](x + 1e-4 * (i // 16), is_ood.float(), i * BATCH / n), is_ood


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("kind", ["normal", "msp", "mahalanobis", "bfloat16", "1000 values"])
@pytest.mark.parametrize("sides", ["labels", "id"])
def test_update(kind: str, sides: str, threads: int, measure: Any) -> None:
    """One batch into a metric that has seen 16."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        metric = OODMetrics()
        stream = list(batches(kind, 16 * BATCH))
        for scores, is_ood in stream:
            metric.update(scores, is_ood)
        scores, is_ood = stream[0]
        labels = is_ood if sides == "labels" else False
        measure(lambda: metric.update(scores, labels), nbytes=scores.nbytes)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("peer", ["copy", "histc", "roc_histogram_", "binned AUROC"])
def test_peers(peer: str, measure: Any) -> None:
    """A plain copy, plain histograms, and torchmetrics' AUROC on 1000 thresholds."""
    scores, is_ood = next(batches("msp", BATCH))
    target, counts = torch.empty_like(scores), torch.zeros(2, 65536 + 4, dtype=torch.int64)
    table = (torch.arange(65536) << 5) | 16
    auroc = torchmetrics.classification.BinaryAUROC(thresholds=1000)
    label = is_ood.long()
    fn = {
        "copy": lambda: target.copy_(scores),
        "histc": lambda: torch.histc(scores, bins=65536, min=0, max=1),
        "roc_histogram_": lambda: roc_histogram_(counts, table, scores, 0),
        "binned AUROC": lambda: auroc.update(scores, label),
    }[peer]
    measure(fn, nbytes=scores.nbytes)


@pytest.mark.parametrize("kind", ["normal", "msp", "bfloat16"])
def test_compute(kind: str, measure: Any) -> None:
    metric = OODMetrics()
    for scores, is_ood in batches(kind, 8 * BATCH):
        metric.update(scores, is_ood)

    def compute() -> Any:
        metric._computed = None
        return metric.compute()

    measure(compute)


def widths(n: int, kinds: list[str]) -> None:
    """Print a line a stream."""
    figures = ("auroc", "fpr95", "aupr_in", "aupr_out", "fpr95_out", "detection_error")
    print(f"{n:.0e} scores, 16 MiB, {torch.get_num_threads()} threads; upper - lower:")
    print(f"{'stream':<18}" + "".join(f"{f:>16}" for f in figures) + "   M scores/s  compute s")
    for prevalence in (0.5, 0.01):
        for kind in kinds:
            metric, spent = OODMetrics(), 0.0
            for scores, is_ood in batches(kind, n, prevalence):
                start = time.perf_counter()
                metric.update(scores, is_ood)
                spent += time.perf_counter() - start
            start = time.perf_counter()
            result = metric.compute()
            took = time.perf_counter() - start
            line = f"{kind + (' 1 %' if prevalence == 0.01 else ''):<18}"
            line += "".join(f"{result[f + '_upper'] - result[f + '_lower']:16.1e}" for f in figures)
            print(f"{line}{n / spent / 1e6:13.0f}{took:11.2f}", flush=True)


if __name__ == "__main__":
    widths(
        int(float(sys.argv[1])) if len(sys.argv) > 1 else 10_000_000, sys.argv[2:] or list(KINDS)
    )
