"""The rows that benchmarks.gpu measures: every op at the shapes that matter, beside its peers.

    python benchmarks/gpu_ops.py bench --group mos --out FILE [--device cpu]   # our times
    python benchmarks/gpu_ops.py peers --group mos --out FILE   # adds those of the peers
    python benchmarks/gpu_ops.py graphs --out FILE     # each op captured in a graph and replayed
    python benchmarks/gpu_ops.py samples               # few and small calls, for compute-sanitizer

Timed are replays of a CUDA graph of at least ten calls, over as many sets of inputs as exceed the
L2 cache four times, and the median taken: what launches a call from Python, often slower than the
kernel, stays out. What cannot be captured is timed call by call with CUDA events; each figure says
which. Rates are shares of a copy (bytes read and written) and of a float32 matrix product, measured
in the same process just before. FILE is up to date after every measurement, so that a run that is
stopped loses nothing.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Protocol

import clustering
import peers
import torch
from shapes import MosCase, logits_of, roc_scores
from torch import Tensor

import oodkernels as oodk
from oodkernels import ops
from oodkernels.ops.histogram import N_FACTS, N_PREFIXES

Inputs = tuple[Tensor, ...]
FLOATS = (torch.bfloat16, torch.float32)
CAPTURED = 10
"""The fewest calls of a graph that is timed."""
EXACT = 0.999
"""The least share of K-means' labels that float64 must confirm."""


@dataclass
class Row:
    op: str
    shape: str
    dtype: torch.dtype
    call: Callable[..., Any]
    inputs: Sequence[Inputs]  # calls take turns
    nbytes: int = 0  # the least that a call reads and writes
    flop: float = 0.0  # of its matrix products
    # ms are those of one of so many equal steps of a call, or of the "iterations" of its figures.
    steps: int = 1
    peers: dict[str, Callable[..., Any]] = field(default_factory=dict)
    # How far a peer's result is from ours, and how far it may be.
    difference: Callable[[Any, Any], float] | None = None
    tolerance: float = 0.0
    figures: Callable[[Any], dict[str, float]] | None = None  # of our result
    wanted: dict[str, float] = field(default_factory=dict)  # on an H100; see gpu.misses
    capture: bool = True  # whether it can be captured in a graph

    def describe(self) -> dict[str, Any]:
        return {
            "op": self.op,
            "shape": self.shape,
            "dtype": str(self.dtype).removeprefix("torch."),
            "wanted": self.wanted,
        }


@dataclass
class Setting:
    device: str
    tiny: bool

    def sets(self, nbytes: int) -> int:
        """How many sets of inputs of so many bytes the L2 cache cannot hold, by far."""
        if self.tiny:
            return 2
        l2 = torch.cuda.get_device_properties(0).L2_cache_size
        return max(2, min(512, math.ceil(4 * l2 / nbytes)))

    def shapes(self, *full: Any, tiny: Any) -> Sequence[Any]:
        return (tiny,) if self.tiny else full


# --- timing ---------------------------------------------------------------------------------------


Calls = Sequence[Callable[[], Any]]


class Clock(Protocol):
    def times(self, calls: Iterator[Callable[[], Any]]) -> list[float]:
        """Seconds of each call."""

    def graph(self, calls: Calls) -> Callable[[], Any] | None:
        """What makes all the calls at once without the host; None where there is no such thing."""


class CudaClock:
    """Events on the stream: a call that waits for the GPU or works on the host is timed as well."""

    def graph(self, calls: Calls) -> Callable[[], Any] | None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # a gradient's buffers belong to the stream of its first use
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return graph.replay

    def times(self, calls: Iterator[Callable[[], Any]]) -> list[float]:
        events = []
        for call in calls:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return [1e-3 * start.elapsed_time(end) for start, end in events]


class HostClock:
    def graph(self, calls: Calls) -> Callable[[], Any] | None:
        return None

    def times(self, calls: Iterator[Callable[[], Any]]) -> list[float]:
        found = []
        for call in calls:
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
        return found


def captured(clock: Clock, calls: Calls) -> tuple[Callable[[], Any] | None, str]:
    """The graph of all the calls, or why there is none."""
    try:
        return clock.graph(calls), ""
    except Exception as error:
        return None, str(error).splitlines()[0]


def measure(
    clock: Clock,
    call: Callable[..., Any],
    inputs: Sequence[Inputs],
    seconds: float,
    steps: int = 1,
    capture: bool = False,
) -> dict[str, Any]:
    """Median and quartiles in ms of a step, of as many calls as fit into some seconds, once it is
    warm; of replays of a graph of CAPTURED calls or more, where they are to be captured and can
    be."""
    calls: Calls = [partial(call, *each) for each in inputs]
    first = clock.times(iter(calls[:1]))[0]  # compilation and the like stay out
    graph, why = None, "not captured"
    if capture:
        turns = calls * math.ceil(CAPTURED / len(calls))
        graph, why = captured(clock, turns)
        if graph is not None:
            calls, steps = [graph], steps * len(turns)
    once = min(clock.times(islice(cycle(calls), 2)))
    rounds = max(3 if once < seconds else 1, min(500, int(seconds / max(once, 1e-6))))
    times = sorted(clock.times(islice(cycle(calls), rounds)))
    low, high = times[len(times) // 4], times[-1 - len(times) // 4]
    return {
        "clock": "graph" if graph else f"calls: {why}" if why else "calls",
        "ms": 1e3 * statistics.median(times) / steps,
        "quartiles_ms": [1e3 * low / steps, 1e3 * high / steps],
        "first_ms": 1e3 * first,
        "rounds": rounds,
    }


def ceilings(clock: Clock, setting: Setting) -> dict[str, float]:
    """What a large copy and a large matrix product reach: GB/s and TFLOP/s."""
    n = 1 << (20 if setting.tiny else 28)  # a GiB of float32
    buffers = [torch.randn(n, device=setting.device) for _ in range(2)]
    target = torch.empty_like(buffers[0])
    copy = measure(clock, target.copy_, [(b,) for b in buffers], 0.1)["ms"]
    found = {"copy GB/s": 8e-6 * n / copy}
    del buffers, target
    m = 128 if setting.tiny else 8192
    for dtype in (torch.float32, torch.bfloat16):
        a = [torch.randn(m, m, device=setting.device, dtype=dtype) for _ in range(3)]
        product = measure(clock, torch.mm, [(a[0], a[1]), (a[1], a[2])], 0.1)["ms"]
        found[f"{str(dtype)[6:]} TFLOP/s"] = 2e-9 * m**3 / product
    return found


def rates(row: Row, ms: float, found: dict[str, float]) -> dict[str, Any]:
    """Achieved rate and its share of the ceiling."""
    if row.flop:
        rate = 1e-9 * row.flop / row.steps / ms
        return {"rate": f"{rate:.3g} TFLOP/s", "share": rate / found["float32 TFLOP/s"]}
    if row.nbytes:
        rate = 1e-6 * row.nbytes / row.steps / ms
        return {"rate": f"{rate:.4g} GB/s", "share": rate / found["copy GB/s"]}
    return {}


# --- rows: MOS and logits -------------------------------------------------------------------------


def mos_cases(s: Setting) -> Iterator[tuple[str, MosCase, list[Inputs]]]:
    """ImageNet-1k and ImageNet-21k heads: rows x columns, the others' included."""
    shapes = s.shapes((65536, 1000, 8), (8192, 21841, 38), tiny=(64, 100, 10))
    for rows, classes, k in shapes:
        for dtype in FLOATS:
            case = MosCase((rows, classes, k), dtype, s.device)
            width = case.groups.width
            more = range(1, s.sets(case.nbytes))
            others = [logits_of(rows, width, dtype, s.device, seed) for seed in more]
            yield f"{rows} x {width}", case, [(z,) for z in (case.logits, *others)]


MOS_WANTED = {"share": 0.85, "compiled": 3.0}


def far(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).abs().max())


def reordered(functions: dict[str, Any]) -> dict[str, Any]:
    """What is asked for first: time may run out."""
    first = ["compiled-split", "compiled-padded", "official", "eager-split", "eager-padded"]
    return {name: functions[name] for name in sorted(functions, key=lambda n: (n not in first, n))}


def mos_rows(s: Setting) -> Iterator[Row]:
    for shape, case, inputs in mos_cases(s):
        dtype, g = case.logits.dtype, case.groups
        scores = peers.mos_scores(case)
        yield Row(
            "mos_score",
            shape,
            dtype,
            scores.pop("oodk"),
            inputs,
            case.nbytes,
            peers=reordered(scores),
            difference=far,
            tolerance=1e-5 if dtype == torch.float32 else 2e-2,
            wanted=MOS_WANTED,
        )
        yield Row(
            "mos_predict",
            shape,
            dtype,
            lambda z, g=g: oodk.mos_predict(z, g),
            inputs,
            case.nbytes,
            peers={
                "official": lambda z, case=case: peers.official_predict(z, case.slices),
                "compiled": peers.bind(peers.compiled(peers.official_predict), case.slices),
            },
            difference=lambda ours, theirs: float(
                (ours.prob.double() - theirs[0].double()).abs().max()
            ),
            tolerance=1e-5 if dtype == torch.float32 else 2e-2,
            wanted=MOS_WANTED,
        )
        yield Row(
            "mos_log_others",
            shape,
            dtype,
            lambda z, g=g: oodk.mos_log_others(z, g),
            inputs,
            case.nbytes,
        )


def mos_loss_rows(s: Setting) -> Iterator[Row]:
    for shape, case, inputs in mos_cases(s):
        dtype = case.logits.dtype
        losses = peers.mos_losses(case)
        rows = len(case.target)
        yield Row(
            "mos_loss fwd",
            shape,
            dtype,
            losses["oodk"],
            inputs,
            case.nbytes,
            wanted={"share": 0.85},
        )
        leaves = [(z.clone().requires_grad_(),) for (z,) in inputs]
        steps = {name: partial(peers.gradient, loss) for name, loss in losses.items()}
        yield Row(
            "mos_loss fwd+bwd",
            shape,
            dtype,
            steps.pop("oodk"),
            leaves,
            3 * case.nbytes,  # the logits twice, and a gradient as large
            peers=reordered(steps),
            difference=lambda ours, theirs, n=rows: n * far(ours, theirs),
            tolerance=1e-4 if dtype == torch.float32 else 0.1,  # peers round the softmax
            wanted=MOS_WANTED,
        )


def logit_rows(s: Setting) -> Iterator[Row]:
    for shape, case, inputs in mos_cases(s):
        yield Row(
            "logit_scores",
            shape,
            case.logits.dtype,
            oodk.logit_scores,
            inputs,
            case.nbytes,
            peers={
                "compiled": peers.compiled(peers.eager_logit_scores),
                "eager": peers.eager_logit_scores,
            },
            difference=lambda ours, theirs: far(ours.msp, theirs[0]),
            tolerance=1e-5 if case.logits.dtype == torch.float32 else 2e-2,
            wanted=MOS_WANTED,
        )


def outlier_rows(s: Setting) -> Iterator[Row]:
    """Outlier Exposure's loss and gradient: a third of the rows is ID, and they come first."""
    for shape, case, inputs in mos_cases(s):
        dtype, rows, columns = case.logits.dtype, *case.logits.shape
        ids = torch.randint(columns, (rows // 3,), device=s.device)
        target = torch.cat([ids, ids.new_full((rows - len(ids),), -1)])

        def step(loss: Callable[[Tensor, Tensor], Tensor], labels: Tensor) -> Callable[..., Tensor]:
            return partial(peers.gradient, peers.bind(loss, labels))

        yield Row(
            "outlier_cross_entropy",
            shape,
            dtype,
            step(oodk.outlier_exposure_loss, target),
            [(z.clone().requires_grad_(),) for (z,) in inputs],
            3 * case.nbytes,  # as for mos_loss
            peers={
                "compiled": step(peers.compiled(peers.softmax_outlier_exposure), ids),
                "official": step(peers.official_outlier_exposure, ids),
                "eager": step(peers.softmax_outlier_exposure, ids),
            },
            difference=lambda ours, theirs, n=rows: n * far(ours, theirs),
            tolerance=1e-4 if dtype == torch.float32 else 0.1,
        )


# --- rows: metrics --------------------------------------------------------------------------------


def torchmetrics_peer(x: Tensor, y: Tensor) -> tuple[float, ...]:
    classification = importlib.import_module("torchmetrics.functional.classification")
    return peers.torchmetrics_roc(classification, *peers.unit_scores(x, y))


def roc_rows(s: Setting) -> Iterator[Row]:
    for size in s.shapes(10**8, 10**7, tiny=2000):
        x, y = (t.to(s.device) for t in roc_scores(size))
        inputs = [(x, y)] + [(x.roll(i), y.roll(i)) for i in range(1, s.sets(4 * size))]
        yield Row(
            "roc_metrics",
            f"{size:.0e}",
            torch.float32,
            oodk.roc_metrics,
            inputs,
            4 * size,
            peers={"eager": peers.torch_roc}
            | ({"torchmetrics": torchmetrics_peer} if size < 10**8 else {}),
            difference=lambda ours, theirs: abs(float(ours.auroc) - theirs[1]),
            tolerance=1e-5,
            wanted={"ms": 40.0} if size == 10**8 else {},
        )


def streaming_rows(s: Setting) -> Iterator[Row]:
    """Scores that spread over the bins, and scores of which half are at one value."""
    size = 1 << (17 if s.tiny else 26)  # at least what OODMetrics counts at once
    generator = torch.Generator(s.device).manual_seed(0)
    spread = [
        torch.randn(size, generator=generator, device=s.device) for _ in range(s.sets(4 * size))
    ]
    table = (torch.arange(N_PREFIXES, device=s.device) << 5) | 16
    counts = torch.zeros(2, N_PREFIXES + N_FACTS, dtype=torch.int64, device=s.device)

    def count(x: Tensor) -> Tensor:
        counts.zero_()  # a MiB, beside 256 of scores
        ops.roc_histogram_(counts, table, x, 0)
        return counts

    for name, scores in (("spread", spread), ("ties", [x.clamp(min=0) for x in spread])):
        yield Row(
            "roc_histogram_",
            f"{size:.1e} {name}",
            torch.float32,
            count,
            [(x,) for x in scores],
            4 * size,
            peers={"histc": lambda x: torch.histc(x, bins=N_PREFIXES, min=-6, max=6)},
            wanted={"share": 0.6},
        )

    metric = oodk.OODMetrics().to(s.device)
    for x in spread:
        metric.update(x, False)
    yield Row(
        "OODMetrics.update",
        f"{size:.1e}",
        torch.float32,
        lambda x: metric.update(x, False),
        [(x,) for x in spread],
        4 * size,
        peers={"torchmetrics": binned_auroc(s.device)},
        wanted={"share": 0.6},
        capture=False,
    )


def binned_auroc(device: str) -> Callable[[Tensor], Any]:
    """torchmetrics' metric of bounded memory, on 100 thresholds."""
    from torchmetrics.classification import BinaryAUROC

    metric = BinaryAUROC(thresholds=100, validate_args=False).to(device)
    return lambda x: metric.update(x.sigmoid(), torch.zeros_like(x, dtype=torch.int64))


# --- rows: K-means and DOS ------------------------------------------------------------------------


def points(s: Setting, batch: int, n: int, d: int) -> list[Tensor]:
    """Directions without structure, so that no method settles before the last iteration: as many
    (batch, n, d) as take turns."""
    generator = torch.Generator(s.device).manual_seed(0)
    return [
        clustering.directions(
            torch.rand(batch, n, d, generator=generator, device=s.device).square()
        )
        for _ in range(s.sets(4 * batch * n * d))
    ]


ITERATIONS = clustering.ITERATIONS


def torch_iterations(
    x: Tensor, start: Tensor, step: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> list[Tensor]:
    """Labels, problem after problem."""
    found = []
    for points_of_one, centroids in zip(x, start, strict=True):
        for _ in range(ITERATIONS):
            labels, centroids = step(points_of_one, centroids)
        found.append(labels)
    return found


def flash_iterations(x: Tensor, start: Tensor) -> Tensor:
    flash = importlib.import_module("flash_kmeans")
    k = start.shape[1]
    # It moves the centroids in place.
    return flash.batch_kmeans_Euclid(
        x, k, max_iters=ITERATIONS, tol=-1.0, init_centroids=start.clone()
    )


def faiss_iterations(x: Tensor, start: Tensor) -> Tensor:
    """Its copies to and from the host included: it takes NumPy arrays."""
    return torch.stack(
        [
            clustering.faiss_kmeans(a, c.shape[0], ITERATIONS, c, gpu=True)
            for a, c in zip(x.cpu().numpy(), start.cpu().numpy(), strict=True)
        ]
    )


def lloyd_figures(x: Tensor, result: Any) -> dict[str, float]:
    """How many iterations there were, and the share of labels that float64 would give."""
    same = total = 0
    for a, c, labels in zip(x, result.centroids, result.labels, strict=True):
        for rows, label in zip(a.split(8192), labels.split(8192), strict=True):
            same += int((torch.cdist(rows.double(), c.double()).argmin(1) == label).sum())
            total += len(rows)
    return {"iterations": float(result.n_iter.min()), "exact_labels": same / total}


def kmeans_rows(s: Setting) -> Iterator[Row]:
    shapes = s.shapes(
        (1, 300_000, 342, 64), (32, 16384, 128, 100), (1, 384, 342, 64), tiny=(2, 96, 20, 8)
    )
    for batch, n, d, k in shapes:
        name = f"{n} x {d} x {k}" if batch == 1 else f"{batch} x {n} x {d} x {k}"
        xs = points(s, batch, n, d)
        inputs = [(x, x[:, torch.randperm(n)[:k].to(s.device)].contiguous()) for x in xs]
        flop = 2.0 * batch * n * d * k
        yield Row(
            "kmeans iteration",
            name,
            torch.float32,
            lambda x, start: ops.kmeans_lloyd(x, start, ITERATIONS, 0.0, normalize=False),
            inputs,
            flop=flop * ITERATIONS,
            steps=ITERATIONS,
            peers={
                "flash-kmeans": flash_iterations,
                "compiled": partial(
                    torch_iterations, step=peers.compiled(clustering.torch_lloyd_step)
                ),
                "eager": partial(torch_iterations, step=clustering.torch_lloyd_step),
                "faiss-gpu": faiss_iterations,
            },
            figures=partial(lloyd_figures, xs[0]),
            wanted={"flash-kmeans": 1.0} if n > 384 else {},
        )
        yield Row(
            "nearest_centroid",
            name,
            torch.float32,
            ops.nearest_centroid,
            inputs,
            flop=flop,
            peers={"eager": nearest, "compiled": peers.compiled(nearest)},
            difference=lambda ours, theirs: float((ours[0] != theirs).double().mean()),
            tolerance=1e-3,  # of the labels, where two centroids are equally near
        )
        yield Row(
            "kmeans_init x 5",
            name,
            torch.float32,
            lambda x, start, k=k: ops.kmeans_init(x, k, 5, normalize=False),
            inputs,
            peers={"eager": seedings} if n < 10**5 and batch < 3 else {},
        )


def nearest(x: Tensor, centroids: Tensor) -> Tensor:
    score = torch.baddbmm(centroids.square().sum(-1).unsqueeze(1), x, centroids.mT, alpha=-2)
    return score.argmin(-1)


def seedings(x: Tensor, start: Tensor) -> list[Tensor]:
    generator = torch.Generator(x.device).manual_seed(0)
    k = start.shape[1]
    return [clustering.torch_seeding(a, k, generator) for a in x for _ in range(5)]


def best_of_each(labels: Tensor, scores: Tensor, k: int) -> Tensor:
    """cluster_argmax for m = 1 with two sorts; clusters are not empty."""
    order = scores.argsort(descending=True, stable=True)
    order = order[labels[order].argsort(stable=True)]
    first = torch.searchsorted(labels[order], torch.arange(k, device=labels.device))
    return order[first]


def official_step(x: Tensor, score: Tensor, k: int, n_select: int, limit: int | None) -> Tensor:
    """To the CPU, selected there by scikit-learn and NumPy, and back."""
    rows = peers.official_dos(x.cpu(), -score.cpu(), k, n_select, limit)
    return torch.from_numpy(rows).to(x.device)


def dos_rows(s: Setting) -> Iterator[Row]:
    for n, d, k in s.shapes((384, 342, 64), (2048, 512, 64), (8192, 512, 256), tiny=(96, 20, 8)):
        sets = s.sets(4 * n * d)
        x = clustering.features(n * sets, d).view(sets, n, d).to(s.device)
        scores = -torch.rand(sets, n).to(s.device)
        select = min(k, 64)
        step = partial(official_step, k=k, n_select=select)
        yield Row(
            "dos_select",
            f"{n} x {d} x {k}",
            torch.float32,
            lambda x, score, k=k, select=select: oodk.dos_select(x, score, k, select, n_init=5),
            list(zip(x, scores, strict=True)),
            peers={
                "official": partial(step, limit=1),
                "official, all threads": partial(step, limit=None),
                "eager K-means": lambda x, score, k=k: clustering.torch_kmeans(
                    clustering.directions(x), k, 5
                ),
            }
            if n < 8192
            else {},
            wanted={"ms": 0.5, "official": 200.0} if n == 384 else {},
        )
    for n, k in s.shapes((384, 64), (300_000, 64), (1 << 24, 1000), tiny=(96, 8)):
        generator = torch.Generator(s.device).manual_seed(0)
        inputs = [
            (
                torch.randint(k, (n,), generator=generator, device=s.device),
                torch.randn(n, generator=generator, device=s.device),
            )
            for _ in range(s.sets(12 * n))
        ]
        yield Row(
            "cluster_argmax",
            f"{n} x {k}",
            torch.float32,
            lambda labels, scores, k=k: oodk.cluster_argmax(labels, scores, k),
            inputs,
            12 * n,
            peers={"eager": partial(best_of_each, k=k)},
            difference=lambda ours, theirs: float((ours[:, 0] != theirs).sum()),
        )


# --- rows: features and banks ---------------------------------------------------------------------


def sorted_stats(x: Tensor, percentiles: Tensor) -> tuple[Tensor, ...]:
    """feature_stats from a sorted copy of the rows."""
    x = x.float()
    k = (x.shape[-1] * (1 - percentiles / 100)).round().long().clamp(min=1)
    ordered = x.sort(-1, descending=True).values
    top = ordered.cumsum(-1)[:, k - 1]
    return x.abs().sum(-1), x.norm(dim=-1), x.sum(-1), ordered[:, k - 1], top


def eager_gen(z: Tensor, gamma: float, m: int) -> Tensor:
    """The authors' form, which float32 gets wrong for confident rows."""
    p = z.float().softmax(-1).topk(m).values
    return -(p * (1 - p)).pow(gamma).sum(-1)


def eager_energies(z: Tensor, scale: Tensor) -> Tensor:
    """scaled_energy a scale at a time."""
    return torch.stack([(z.float() * one[:, None]).logsumexp(-1) for one in scale.unbind(-1)], -1)


def gathered(x: Tensor, table: Tensor, index: Tensor) -> tuple[Tensor, ...]:
    """indexed_distances from a copy of the rows that are named."""
    rows = table[index]
    away = x[:, None] - rows
    return (x[:, None] * rows).sum(-1), away.abs().sum(-1), away.norm(dim=-1)


def eager_scale_(x: Tensor, percentile: float) -> Tensor:
    largest = x.topk(round(x.shape[-1] * (1 - percentile / 100)), sorted=False).values
    return x.mul_((x.sum(-1) / largest.sum(-1)).exp().unsqueeze(-1))


def searched(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """nearest_neighbors by products and topk, a part of the queries at a time."""
    norms = bank.float().square().sum(-1)
    parts = []
    for q in queries.split(max(1, (1 << 28) // len(bank))):
        distance = norms - 2 * (q @ bank.T).float() + q.float().square().sum(-1, keepdim=True)
        parts.append(distance.topk(k, largest=False))
    return torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts])


def posthoc_rows(s: Setting) -> Iterator[Row]:
    for n, d in s.shapes((65536, 2048), (65536, 512), tiny=(64, 48)):
        for dtype, count in itertools.product(FLOATS, (1, 20)):
            percentiles = torch.linspace(50, 95, count, dtype=torch.float64, device=s.device)
            inputs = [
                (logits_of(n, d, dtype, s.device, seed).relu(),)
                for seed in range(s.sets(n * d * dtype.itemsize))
            ]
            yield Row(
                "feature_stats",
                f"{n} x {d}, {count} %",
                dtype,
                lambda x, p=percentiles: ops.feature_stats(x, p),
                inputs,
                n * d * dtype.itemsize,
                peers={
                    "compiled": peers.bind(peers.compiled(sorted_stats), percentiles),
                    "eager": peers.bind(sorted_stats, percentiles),
                },
                difference=lambda ours, theirs: far(ours.threshold, theirs[3]),
                tolerance=1e-6,
                wanted={"share": 0.5},
            )
    for shape, case, inputs in mos_cases(s):
        m = min(100, case.logits.shape[1])
        yield Row(
            "gen_scores",
            shape,
            case.logits.dtype,
            lambda z, m=m: ops.gen_scores(z, [0.1], [m]),
            inputs,
            case.nbytes,
            peers={
                "compiled": peers.bind(peers.compiled(eager_gen), 0.1, m),
                "eager": peers.bind(eager_gen, 0.1, m),
            },
        )
        for count in (1, 20):
            z = case.logits.reshape(-1, case.logits.shape[-1])
            scales = torch.linspace(0.5, 3, count, device=s.device).expand(len(z), count)
            scales = scales.contiguous()
            yield Row(
                "scaled_energy",
                f"{shape}, {count}",
                z.dtype,
                ops.scaled_energy,
                [(one[0].reshape(z.shape), scales) for one in inputs],
                z.nbytes + 2 * scales.nbytes,
                peers={
                    "compiled": peers.compiled(eager_energies),
                    "eager": eager_energies,
                },
                difference=far,
                tolerance=1e-5,
            )
    for n, d, m, k in s.shapes(
        (65536, 2048, 1, 1000), (65536, 1000, 10, 1000), tiny=(64, 48, 2, 7)
    ):
        generator = torch.Generator(s.device).manual_seed(0)
        table = torch.randn(k, d, generator=generator, device=s.device)
        index = torch.randint(k, (n, m), generator=generator, device=s.device)
        yield Row(
            "indexed_distances",
            f"{n} x {d}, {m} of {k}",
            torch.float32,
            ops.indexed_distances,
            [
                (torch.randn(n, d, generator=generator, device=s.device), table, index)
                for _ in range(s.sets(4 * n * d))
            ],
            4 * n * d + (8 + 3 * 4) * n * m,
            peers={"compiled": peers.compiled(gathered), "eager": gathered} if m == 1 else {},
            difference=lambda ours, theirs: far(ours.l2, theirs[2]),
            tolerance=1e-5,
        )
    for n, d in s.shapes((4096, 2048), tiny=(16, 48)):  # a block that the L2 cache holds
        for name in ("clip", "ash-s", "scale"):
            high = torch.ones(1, device=s.device)
            options = {"high": high} if name == "clip" else {"percentile": 85.0}
            x = logits_of(n, d, torch.float32, s.device).relu()
            yield Row(
                "shape_features_",
                f"{n} x {d}, {name}",
                torch.float32,
                partial(ops.shape_features_, shape=name, **options),
                [(x,), (x.clone(),)],
                2 * n * d * 4,
                peers={"eager": partial(eager_scale_, percentile=85.0)} if name == "scale" else {},
            )
    for n, m, d, k in s.shapes(
        (10_000, 200_000, 512, 50), (256, 1_281_167, 768, 1), tiny=(20, 300, 16, 5)
    ):
        generator = torch.Generator(s.device).manual_seed(0)
        bank = torch.randn(m, d, generator=generator, device=s.device)
        queries = [
            torch.randn(n, d, generator=generator, device=s.device)
            for _ in range(s.sets(4 * m * d))
        ]
        yield Row(
            "nearest_neighbors",
            f"{n} x {m} x {d}, {k}",
            torch.float32,
            lambda q, bank, k=k: ops.nearest_neighbors(q, bank, k),
            [(q, bank) for q in queries],
            flop=2.0 * n * m * d,
            peers={"eager": partial(searched, k=k)},
            difference=lambda ours, theirs: float(
                (ours.distances - theirs[0]).abs().max() / ours.distances.max()
            ),
            tolerance=1e-3,  # cancellation in the peer
        )


GROUPS = {
    "mos": mos_rows,
    "mos_loss": mos_loss_rows,
    "logits": logit_rows,
    "outlier": outlier_rows,
    "roc": roc_rows,
    "streaming": streaming_rows,
    "kmeans": kmeans_rows,
    "dos": dos_rows,
    "posthoc": posthoc_rows,
}


# --- what is done with them -----------------------------------------------------------------------


# The package a peer is, where it need not be installed.
PACKAGES = {"flash-kmeans": "flash_kmeans", "faiss-gpu": "faiss", "torchmetrics": "torchmetrics"}


class Report:
    """A file of JSON, as it stands after every addition."""

    def __init__(self, path: Path | None) -> None:
        self.path: Path | None = path
        self.found: dict[str, Any] = {"rows": []}
        if path and path.exists():
            self.found = json.loads(path.read_text())

    def save(self) -> None:
        if self.path:
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps(self.found))
            os.replace(part, self.path)


class DeviceLostError(Exception):
    """After an error of the GPU that no later call of the process can get over."""


def attempt(action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What it finds, or why it failed, and "lost" where the device is."""
    found: dict[str, Any]
    try:
        found = action()
    except Exception as error:
        found = {"failed": f"{type(error).__name__}: {error}"}
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except Exception as error:
            found = {"failed": str(error), **found, "lost": True}
    return found


TIMING = 0.4
"""Seconds of timing of a row, or of a peer; TINY_TIMING on the CPU."""
TINY_TIMING = 0.02


def recorded(report: Report, to: dict[str, Any], found: dict[str, Any]) -> None:
    to.update(found)
    report.save()
    if found.get("lost"):
        raise DeviceLostError(found["failed"])


def bench(
    rows: Iterator[Row], clock: Clock, setting: Setting, report: Report, seconds: float
) -> None:
    """Our rows, one after the other."""
    deadline = time.monotonic() + seconds
    each = TINY_TIMING if setting.tiny else TIMING
    limits = report.found["ceilings"] = ceilings(clock, setting)

    def ours(row: Row) -> dict[str, Any]:
        figures = row.figures(row.call(*row.inputs[0])) if row.figures else {}
        if not figures.get("exact_labels", 1.0) >= EXACT:
            raise ValueError(f"{figures['exact_labels']:.4%} of the labels are those of float64")
        steps = int(figures.get("iterations", row.steps))
        found = measure(clock, row.call, row.inputs, each, steps, row.capture)
        return found | rates(row, found["ms"], limits) | {"figures": figures}

    for row in rows:
        result = row.describe() | {"peers": {}}
        if setting.tiny:
            result["wanted"] = {}
        report.found["rows"].append(result)
        late = time.monotonic() > deadline
        found = {"skipped": "no time was left"} if late else attempt(partial(ours, row))
        recorded(report, result, found)


def bench_peers(
    rows: Iterator[Row], clock: Clock, setting: Setting, report: Report, seconds: float
) -> None:
    """The peers of the rows that the report has: the first of every row, the second, and so on."""
    deadline = time.monotonic() + seconds
    each = TINY_TIMING if setting.tiny else TIMING

    def theirs(row: Row, peer: Callable[..., Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if row.difference:
            found["difference"] = row.difference(row.call(*row.inputs[0]), peer(*row.inputs[0]))
            found["differs"] = not found["difference"] <= row.tolerance
        return found | measure(clock, peer, row.inputs, each, row.steps, row.capture)

    # There are fewer results than rows where our run was stopped, none where there was no such run.
    kept = list(zip(rows, report.found["rows"], strict=False))
    if not kept:
        raise ValueError(f"peers: --out must have rows of bench, got none: {report.path}")
    for row, result in kept:
        if any(result[key] != value for key, value in row.describe().items()):
            raise ValueError(
                f"peers: --out must have these rows, got {result} for {row.describe()}"
            )
    for turn in range(max((len(row.peers) for row, _ in kept), default=0)):
        for row, result in kept:
            if turn >= len(row.peers):
                continue
            name, peer = list(row.peers.items())[turn]
            to = result["peers"].setdefault(name, {})
            if time.monotonic() > deadline:
                recorded(report, to, {"skipped": "no time was left"})
            elif name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None:
                recorded(report, to, {"skipped": "not installed"})
            else:
                recorded(report, to, attempt(partial(theirs, row, peer)))


def flat(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result or () for t in flat(part)]


def capture(row: Row) -> dict[str, Any]:
    """Capture a call in a graph, replay it on other values, and compare with the call itself."""
    first, second = row.inputs[0], row.inputs[1]
    held = [t.detach().clone().requires_grad_(t.requires_grad) for t in first]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # a gradient's buffers belong to the stream of its first use
        row.call(*held)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = flat(row.call(*held))
    with torch.no_grad():
        for to, source in zip(held, second, strict=True):
            to.copy_(source)
    graph.replay()
    replayed = [t.clone() for t in captured]
    expected = [t.clone() for t in flat(row.call(*second))]
    for a, b in zip(replayed, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    return {}


def graphs(setting: Setting, report: Report, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    for rows in GROUPS.values():
        for row in rows(setting):
            if not row.capture:
                continue
            result = row.describe()
            report.found["rows"].append(result)
            late = time.monotonic() > deadline
            skipped = {"skipped": "no time was left"}
            recorded(report, result, skipped if late else attempt(partial(capture, row)))


def samples(setting: Setting, seconds: float) -> int:
    """Small calls of every op, of every kind that the tests know, forward and backward; one of each
    op before a second of any. Exit status."""
    sys.path.append(str(Path(__file__).resolve().parent.parent / "python_tests"))
    from op_db import OPS

    def gradient_too(op: Any, x: Tensor, *args: Any, **kwargs: Any) -> None:
        out = op.call(x.clone().requires_grad_(), *args, **kwargs)
        sum(t.sum() for t in flat(out)).backward()

    def calls_of(op: Any) -> Iterator[Callable[[], Any]]:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            for sample in op.samples(setting.device, dtype):
                run = partial(gradient_too, op) if op.differentiable else op.call
                yield partial(run, *sample.args, **sample.kwargs)

    turns = [calls_of(op) for op in OPS]
    turns += [
        (partial(row.call, *row.inputs[0]) for row in GROUPS[name](setting))
        for name in ("roc", "streaming")
    ]
    deadline, done, failed = time.monotonic() + seconds, 0, 0
    while turns and time.monotonic() < deadline:
        for turn in list(turns):
            call = next(turn, None)
            if call is None:
                turns.remove(turn)
                continue
            try:
                call()
                done += 1
            except NotImplementedError as error:  # no kernel for this device
                print(str(error).splitlines()[0])
                turns.remove(turn)
                failed += 1
    if setting.device == "cuda":
        torch.cuda.synchronize()
    print(f"{done} samples, {failed} ops without a kernel")
    return 1 if failed else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The rows that benchmarks.gpu measures")
    parser.add_argument("mode", choices=["bench", "peers", "graphs", "samples"])
    parser.add_argument("--group", choices=GROUPS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args(arguments)
    timing = {"bench": bench, "peers": bench_peers}.get(options.mode)
    tiny = options.device == "cpu" or timing is None
    setting, report = Setting(options.device, tiny), Report(options.out)
    try:
        if timing:
            clock = CudaClock() if options.device == "cuda" else HostClock()
            timing(GROUPS[options.group](setting), clock, setting, report, options.seconds)
        elif options.mode == "graphs":
            graphs(setting, report, options.seconds)
        else:
            return samples(setting, options.seconds)
    except DeviceLostError as error:
        print(f"the device is lost: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
