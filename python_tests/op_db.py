"""One row an op: how to call it, what it must return, what it must refuse. test_ops.py runs them.

A row earns its op every test: the reference in float64, strides, dtypes, fake kernels, gradients,
``torch.compile``, ``torch.export``, vmap, errors, threads, and on CUDA graph capture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from oodkernels import reference

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INF, NAN = math.inf, math.nan


@dataclass
class Sample:
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    name: str = ""


@dataclass
class Refused:
    args: tuple[Any, ...]
    error: type[Exception]
    message: str  # a regular expression
    kwargs: dict[str, Any] = field(default_factory=dict)
    contents: bool = False  # on CUDA refused with OODK_VALIDATE=1 only, and unknown to the fake


@dataclass
class Op:
    name: str
    reference: Callable[..., Any]
    samples: Callable[[str, torch.dtype], Iterator[Sample]]
    refused: Callable[[str], Iterator[Refused]]
    # (output index, dtype) -> (rtol, atol), against the reference in float64.
    tolerance: Callable[[int, torch.dtype], tuple[float, float]]
    rowwise: tuple[int, ...] = (0,)  # positions of the arguments that have the leading dimensions
    problem: tuple[int, ...] = ()  # the same, where the op is one of all rows and not row by row
    float64: tuple[int, ...] = ()  # outputs that are float64 whatever the input
    differentiable: bool = False
    # Compares what no tolerance can, such as labels among nearly equal classes.
    compare: Callable[[Sample, Any, Any], None] | None = None

    @property
    def call(self) -> Callable[..., Any]:
        return getattr(torch.ops.oodk, self.name)


def offsets_of(widths: list[int], device: str, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor([0, *widths], device=device).cumsum(0).to(dtype)


# Widths of groups: narrow ones, wide ones, both, tails that no vector width divides.
GROUPINGS = {
    "mixed": [3, 70, 2, 130, 60, 17, 64, 65, 5],
    "one class": [2],
    "tiny": [2, 3, 4, 2, 11] * 12,
    "narrow": [11] * 10,
    "huge": [2113],
    "imagenet": [126, 125, 127, 126, 126, 126, 126, 126],
}


def logits_of(rows: tuple[int, ...], width: int, device: str, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(width + sum(rows))
    z = torch.randn(*rows, width, generator=generator, dtype=torch.float64) * 4
    return z.to(device, dtype)


def special_rows(width: int, device: str, dtype: torch.dtype) -> Tensor:
    """Rows of values that softmax treats specially, at the others, in the classes, everywhere."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(16, width, generator=generator, dtype=torch.float64)
    z[0, 0], z[1, width - 1], z[2, :] = NAN, NAN, NAN
    z[3, 0], z[4, width - 1], z[5, :] = INF, INF, INF
    z[6, 0], z[7, width - 1], z[8, :] = -INF, -INF, -INF
    z[9, 1:] = -INF
    z[10, 0], z[11, 0] = 1e4, -1e4
    z[12, :] = 1e4
    z[13] *= 1e4
    z[14] = z[14].round()  # ties
    z[15, :] = 0
    return z.to(device, dtype)


def mos_samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    for name, widths in GROUPINGS.items():
        groups = offsets_of(widths, device)
        for rows in ((37,), (1,)):
            z = logits_of(rows, sum(widths), device, dtype)
            yield Sample((z, groups), name=f"{name} {rows}")
        z = special_rows(sum(widths), device, dtype)
        yield Sample((z, groups), name=f"{name} special")
    widths = GROUPINGS["mixed"]
    groups = offsets_of(widths, device, torch.int32)
    for rows in ((), (0,), (2, 0), (2, 3), (2, 1, 19)):
        yield Sample((logits_of(rows, sum(widths), device, dtype), groups), name=f"rows {rows}")


def targets_of(sample: Sample, ignore_index: int = -100) -> Tensor:
    z, groups = sample.args
    n_classes = z.shape[-1] - (groups.shape[0] - 1)
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(n_classes, z.shape[:-1], generator=generator)
    if target.numel() > 3:
        if "special" not in sample.name:  # the reference's gradient of a row of NaN is never 0
            target.view(-1)[1] = ignore_index
        target.view(-1)[2] = n_classes - 1
        target.view(-1)[3] = 0
    return target.to(z.device)


def mos_loss_samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    for sample in mos_samples(device, dtype):
        z, groups = sample.args
        yield Sample((z, targets_of(sample), groups), name=sample.name)
    yield Sample((z, targets_of(sample, 7), groups, 7), name="ignore_index 7")


def groups_refused(device: str) -> Iterator[tuple[Tensor, Tensor, type[Exception], str, bool]]:
    z = torch.randn(4, 6, device=device)
    g = offsets_of([3, 3], device)
    yield torch.randint(9, (4, 6), device=device), g, TypeError, "logits must be float64", False
    yield torch.tensor(1.0, device=device), g, ValueError, "at least one dimension", False
    yield z, g.float(), TypeError, "groups must be int32 or int64", False
    yield z, g[None], ValueError, r"groups must have shape \(K \+ 1,\), got \(1, 3\)", False
    yield z, g[:0], ValueError, "groups must hold K .* got 0", False
    yield z, g[:1], ValueError, "groups must hold K .* got 1", False
    yield z, g + 1, ValueError, "groups must start at 0, got 1", True
    yield z, offsets_of([3, 2], device), ValueError, r"end at logits.size\(-1\) = 6, got 5", True
    yield z, offsets_of([5, 1], device), ValueError, "2 columns wide .* group 1", True
    yield z, offsets_of([7, -1], device), ValueError, "2 columns wide .* group 1", True
    yield z[:, :0], g, ValueError, r"end at logits.size\(-1\) = 0, got 6", True
    if device != "cpu":
        yield z, g.cpu(), ValueError, "groups must be on the device of logits", False


def mos_refused(device: str) -> Iterator[Refused]:
    for z, g, error, message, contents in groups_refused(device):
        yield Refused((z, g), error, message, contents=contents)


def mos_loss_refused(device: str) -> Iterator[Refused]:
    z = torch.randn(4, 6, device=device)
    g = offsets_of([3, 3], device)
    t = torch.tensor([0, 1, 2, 3], device=device)
    for bad_z, bad_g, error, message, contents in groups_refused(device):
        target = t if bad_z.dim() else t[0]
        yield Refused((bad_z, target, bad_g), error, message, contents=contents)
    yield Refused((z, t.int(), g), TypeError, "target must be int64")
    yield Refused((z, t[:3], g), ValueError, r"target must have shape .* got \(3,\)")
    yield Refused((z, t[None], g), ValueError, "target must have shape")
    yield Refused((z, t + 1, g), ValueError, r"in 0..3 .* got 4 in row 3", contents=True)
    yield Refused((z, t - 1, g), ValueError, "got -1 in row 0", contents=True)
    yield Refused((z, t - 100, g, -1), ValueError, "got -100 in row 0", contents=True)


def score_tolerance(output: int, dtype: torch.dtype) -> tuple[float, float]:
    return (1e-14, 1e-14) if dtype == torch.float64 else (0.0, 2e-6)


def log_tolerance(output: int, dtype: torch.dtype) -> tuple[float, float]:
    # The reference itself is no better in float64: a log-sum-exp of 1e4 has an ulp of 2e-12.
    return (1e-13, 4e-12) if dtype == torch.float64 else (1e-5, 1e-6)


def predict_tolerance(output: int, dtype: torch.dtype) -> tuple[float, float]:
    return log_tolerance(output, dtype) if output == 1 else score_tolerance(output, dtype)


def compare_predictions(sample: Sample, actual: Any, expected: Any) -> None:
    """Labels may differ only among classes whose probabilities the precision cannot tell apart."""
    z, groups = sample.args
    offsets = groups.tolist()
    parts = [z[..., a:b].double() for a, b in pairwise(offsets)]
    probs = torch.cat([p.softmax(-1)[..., 1:] for p in parts], -1)
    chosen = probs.gather(-1, actual[2][..., None])[..., 0]
    first_class = [a - k for k, a in enumerate(offsets)]
    for k in range(len(parts)):
        inside = actual[3] == k
        assert ((actual[2] >= first_class[k]) | ~inside).all()
        assert ((actual[2] < first_class[k + 1]) | ~inside).all()
    sure = (expected[4] - chosen).abs() > 1e-6
    assert not sure.any(), f"labels {actual[2][sure]} for {expected[2][sure]}"
    # Where the group is the same, so is the class: within a group the logits decide exactly.
    same = actual[3] == expected[3]
    assert torch.equal(actual[2][same], expected[2][same])
    assert same.double().mean() > 0.9 or same.numel() < 20


def logit_samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    for width in (1, 2, 7, 16, 63, 64, 65, 200, 1008):
        for rows in ((37,), (1,)):
            z = logits_of(rows, width, device, dtype)
            yield Sample((z,), name=f"{width} {rows}")
            yield Sample((z, 2.5), name=f"{width} {rows} T 2.5")
        if width > 1:
            yield Sample((special_rows(width, device, dtype),), name=f"{width} special")
    for shape in ((), (0,), (2, 0), (2, 3)):
        yield Sample((logits_of(shape, 100, device, dtype),), name=f"rows {shape}")
    yield Sample((logits_of((9,), 100, device, dtype),), {"temperature": 1000.0}, "T 1000")
    yield Sample((logits_of((9,), 100, device, dtype), 0.01), name="T 0.01")


def logit_refused(device: str) -> Iterator[Refused]:
    z = torch.randn(4, 6, device=device)
    yield Refused((z.long(),), TypeError, "logits must be float64")
    yield Refused((z[0, 0],), ValueError, "at least one dimension")
    yield Refused((z[:, :0],), ValueError, r"at least one class, got shape \(4, 0\)")
    for t in (0.0, -1.0, NAN, INF):
        yield Refused((z, t), ValueError, "temperature must be positive and finite")


def logit_tolerance(output: int, dtype: torch.dtype) -> tuple[float, float]:
    if dtype == torch.float64:
        return 1e-12, 1e-12
    return [(0.0, 2e-6), (0.0, 0.0), (2e-6, 2e-6), (1e-5, 4e-6), (0.0, 0.0)][output]


def outlier_samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    for sample in logit_samples(device, dtype):
        if len(sample.args) == 1 and not sample.kwargs:
            (z,) = sample.args
            random = torch.Generator().manual_seed(1)
            target = torch.randint(-1, z.shape[-1], z.shape[:-1], generator=random)
            if target.numel() > 2:
                target.view(-1)[::3] = -1
                target.view(-1)[-1] = z.shape[-1] - 1
            yield Sample((z, target.to(device)), name=sample.name)


def outlier_refused(device: str) -> Iterator[Refused]:
    z = torch.randn(4, 6, device=device)
    t = torch.tensor([-1, 0, 5, -1], device=device)
    yield Refused((z.long(), t), TypeError, "logits must be float64")
    yield Refused((z[0, 0], t[0]), ValueError, "at least one dimension")
    yield Refused((z[:, :0], t), ValueError, r"at least one class, got shape \(4, 0\)")
    yield Refused((z, t.int()), TypeError, "target must be int64")
    yield Refused((z, t[:3]), ValueError, r"target must have shape .* got \(3,\)")
    yield Refused((z, t[None]), ValueError, "target must have shape")
    yield Refused((z, t + 1), ValueError, r"in 0..5 or OOD = -1, got 6 in row 2", contents=True)
    yield Refused((z, t - 1), ValueError, "got -2 in row 0", contents=True)
    yield Refused((z, t * 0 - 100), ValueError, "got -100 in row 0", contents=True)
    if device != "cpu":
        yield Refused((z, t.cpu()), ValueError, "target must be on the device of logits")


CONFIDENT = [  # groups, classes of each, standard deviation of the logits, offset
    (500, 2, 4.0, 0.0),
    (100, 3, 12.0, 0.0),
    (40, 30, 9.0, 0.0),
    (6, 180, 40.0, 0.0),
    (30, 7, 60.0, 0.0),  # e^x underflows
    (12, 5, 4.0, -400.0),  # the others columns alone are left
    (1, 4, 50.0, 0.0),
]


def confident_rows(groups: int, classes: int, spread: float, offset: float) -> tuple[Tensor, ...]:
    """Logits (600, C + K), offsets, the group whose class has the best odds, and where that is so.

    It is so where float32 tells a row's two best groups apart.
    """
    generator = torch.Generator().manual_seed(groups)
    z = torch.randn(600, groups, classes + 1, generator=generator) * spread
    z[..., 1:] += offset
    exact = z.double()
    best = exact[..., 1:].max(-1)
    rest = exact.scatter(-1, best.indices[..., None] + 1, -torch.inf).logsumexp(-1) - best.values
    least = rest.topk(min(2, groups), largest=False).values
    clear = (least[:, -1] - least[:, 0] > 1e-5 * (1 + least[:, 0].abs())) | (groups == 1)
    assert clear.float().mean() > 0.99
    return z.flatten(1), torch.arange(groups + 1) * (classes + 1), rest.argmin(-1), clear


def points_of(*shape: int, k: int = 5, device: str, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Clusters far apart, of points in directions far apart."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    *batch, n, d = shape
    centres = torch.randn(*batch, k, d, generator=generator, dtype=torch.float64) * 5
    label = torch.randint(k, (*batch, n), generator=generator)
    x = centres.gather(-2, label[..., None].expand(shape))
    x = x + torch.randn(shape, generator=generator, dtype=torch.float64)
    return x.to(device, dtype)


def special_points(device: str, dtype: torch.dtype) -> Tensor:
    """Rows that are left out, zeros, duplicates."""
    x = points_of(40, 11, device=device, dtype=dtype)
    x[0, 3], x[7, 0], x[20, :], x[39, 10] = NAN, INF, -INF, NAN
    x[[4, 25]] = 0
    x[[5, 6, 21]] = x[8].clone()
    return x


def clusterings(device: str, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, int]]:
    """Points and k: tails that no vector width divides, degenerate sizes, batches."""
    for n, d, k in ((61, 9, 5), (50, 2, 3), (150, 33, 12), (20, 130, 1), (1, 3, 1)):
        yield f"{n, d, k}", points_of(n, d, k=k, device=device, dtype=dtype), k
    yield "special", special_points(device, dtype), 6
    yield "special: fewer points than clusters", points_of(4, 6, device=device, dtype=dtype), 9
    yield "all equal", torch.ones(9, 4, device=device, dtype=dtype), 4
    yield "special: no points", torch.ones(0, 4, device=device, dtype=dtype), 4
    for batch in ((3,), (2, 3), (1, 5)):
        yield f"batch {batch}", points_of(*batch, 40, 17, device=device, dtype=dtype), 5
    yield "special: all left out", torch.full((5, 4), NAN, device=device, dtype=dtype), 2


def kmeans_init_samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    for name, x, k in clusterings(device, dtype):
        yield Sample((x, k, 3, 0, 0, True), name=name)
        yield Sample((x, k, 2, 1, 2**40 + 7, False), name=f"{name}, plain, as they are")


def init_of(x: Tensor, k: int, n_init: int = 2) -> Tensor:
    """Rows to start from, distinct as far as there are so many."""
    n = x.shape[-2]
    rows = torch.arange(n_init * k).view(n_init, k) % max(n, 1)
    if n == 0:
        rows[:] = -1
    return rows.expand(*x.shape[:-2], n_init, k).to(x.device)


def kmeans_samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    for name, x, k in clusterings(device, dtype):
        yield Sample(
            (x, init_of(x, k, 1), 2, 0.0, False), name=f"{name}, as they are, 2 iterations"
        )
        if name == "special":  # zero is as far from all directions: nothing but rounding decides
            continue
        yield Sample((x, init_of(x, k), 300, 1e-4, True), name=name)
        if x.shape[-2] != 1:  # whose shift and variance are both nothing but rounding
            yield Sample((x, init_of(x, k, 1), 5, 1e-3, True, True), name=f"{name}, renormalised")
    x = points_of(60, 8, device=device, dtype=dtype)
    centroids = points_of(7, 8, device=device, dtype=torch.float64, seed=3)
    yield Sample((x, centroids, 0, 0.0, False), name="no iteration")
    yield Sample((x, centroids, 20, 0.0, False), name="centroids")
    centroids = centroids.clone()
    centroids[2] = NAN
    yield Sample((x, centroids.to(dtype), 1, 0.0, False), name="special: an unused centroid")


def points_refused(
    op: str, name: str, device: str
) -> Iterator[tuple[Tensor, type[Exception], str]]:
    x = torch.randn(6, 3, device=device)
    yield x.long(), TypeError, f"{name} must be float64, float32"
    yield x[0], ValueError, rf"{name} must have shape \(..., N, d\), got \(3,\)"
    yield x[:, :0], ValueError, rf"{name} must have at least one feature, got shape \(6, 0\)"


def kmeans_init_refused(device: str) -> Iterator[Refused]:
    x = torch.randn(6, 3, device=device)
    for bad, error, message in points_refused("kmeans_init", "x", device):
        yield Refused((bad, 2), error, message)
    yield Refused((x, 0), ValueError, "k must be at least 1 .* got 0")
    yield Refused((x, 2, 0), ValueError, "n_init must be at least 1 .* got 0")
    yield Refused((x, 2, 1, -1), ValueError, "n_trials must be at least 0 .* got -1")


def kmeans_refused(device: str) -> Iterator[Refused]:
    x = torch.randn(6, 3, device=device)
    rows = torch.tensor([[0, 1]], device=device)
    for bad, error, message in points_refused("kmeans", "x", device):
        yield Refused((bad, rows), error, message)
    for bad in (rows[0], rows[None], x[:2, :2], x[:0], rows[:, :0]):
        yield Refused((x, bad), ValueError, r"init must be int64 rows .* for x \(6, 3\)")
    yield Refused((x, rows.int()), TypeError, "init .*must be float64")
    yield Refused(
        (x, rows + 5), ValueError, r"init must hold rows of x, -1..5, got 6", contents=True
    )
    yield Refused((x, rows - 2), ValueError, r"init must hold rows .* got -2", contents=True)
    yield Refused((x, rows, -1), ValueError, "max_iter must be at least 0 .* got -1")
    for tol in (-1.0, NAN, INF):
        yield Refused((x, rows, 1, tol), ValueError, "tol must be finite and at least 0")


def nearest_samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    for name, x, k in clusterings(device, dtype):
        c = points_of(k, x.shape[-1], k=k, device=device, dtype=dtype, seed=1)
        yield Sample((x, c), name=name)
        yield Sample((x, c.double(), True), name=f"{name}, directions")
    x = points_of(5, 40, 19, device=device, dtype=dtype)
    c = points_of(5, 37, 19, k=37, device=device, dtype=dtype, seed=1)
    yield Sample((x, c), name="each its own centroids")
    c = c.clone()
    c[0, 1], c[1], c[2, 3:9] = c[0, 0].clone(), NAN, INF
    yield Sample((x, c), name="special: ties and unused centroids")
    yield Sample((x[0, 0], c[0]), name="a single point")


def nearest_refused(device: str) -> Iterator[Refused]:
    x, c = torch.randn(6, 3, device=device), torch.randn(2, 3, device=device)
    yield Refused((x.long(), c), TypeError, "x must be float64")
    yield Refused((x[0, 0], c), ValueError, "x must have at least one dimension")
    yield Refused((x, c.long()), TypeError, "centroids must be float64")
    yield Refused((x[:, :0], c[:, :0]), ValueError, "x must have at least one feature")
    for bad in (c[0], c[:, :2], c[:0], c[None]):
        yield Refused((x, bad), ValueError, r"centroids must have shape \(k, d\), .* x \(6, 3\)")


def kmeans_tolerance(output: int, dtype: torch.dtype) -> tuple[float, float]:
    return (1e-12, 1e-12) if dtype == torch.float64 else (2e-5, 2e-6)


def cluster_samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    for n, k, m in ((40, 5, 1), (100, 7, 9), (3, 5, 2), (1, 1, 1), (0, 2, 2)):
        for batch in ((), (4,), (2, 3)):
            generator = torch.Generator().manual_seed(n)
            labels = torch.randint(-1, k + 1, (*batch, n), generator=generator)
            scores = torch.randn(*batch, n, generator=generator).mul(4).round()
            if n > 10:
                scores[..., 3], scores[..., 4], scores[..., 5] = NAN, INF, -INF
            yield Sample(
                (labels.to(device), scores.to(device, dtype), k, m), name=f"{n, k, m} {batch}"
            )


def cluster_refused(device: str) -> Iterator[Refused]:
    labels = torch.tensor([0, 1, 1], device=device)
    scores = torch.randn(3, device=device)
    yield Refused((labels.int(), scores, 2), TypeError, "labels must be int64")
    yield Refused((labels, labels, 2), TypeError, "scores must be float64")
    yield Refused((labels[0], scores[0], 2), ValueError, "scores must have at least one dimension")
    yield Refused((labels, scores[:2], 2), ValueError, r"shape of scores, \(2,\), got \(3,\)")
    yield Refused((labels, scores, 0), ValueError, "k must be at least 1 .* got 0")
    yield Refused((labels, scores, 2, 0), ValueError, "m must be at least 1 .* got 0")


def dos_samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    for name, x, k in clusterings(device, dtype):
        generator = torch.Generator().manual_seed(k)
        n = x.shape[-2]
        scores = torch.randn(x.shape[:-1], generator=generator, dtype=torch.float64)
        if n > 10:
            scores[..., 3], scores[..., 4], scores[..., 5] = NAN, INF, -INF
        scores = scores.to(device, dtype)
        for n_select in {1, max(1, k - 2), k, min(3 * k + 1, n), n}:
            if 1 <= n_select <= n:
                yield Sample((x, scores, k, n_select, 2), name=f"{name}, {n_select}")
        if n > k > 1:
            yield Sample(
                (x, scores, k, k - 1), {"mode": "official", "seed": 5}, name=f"{name}, official"
            )


def dos_refused(device: str) -> Iterator[Refused]:
    x, s = torch.randn(6, 3, device=device), torch.randn(6, device=device)
    for bad, error, message in points_refused("dos_select", "features", device):
        yield Refused((bad, s, 2, 2), error, message)
    yield Refused((x, s.long(), 2, 2), TypeError, "scores must be float64")
    yield Refused(
        (x, s[:5], 2, 2), ValueError, r"scores must have shape features.shape\[:-1\], got"
    )
    yield Refused((x, s, 0, 2), ValueError, "k must be at least 1 .* got 0")
    yield Refused((x, s, 2, 0), ValueError, "n_select must be at least 1 .* got 0")
    yield Refused((x, s, 2, 7), ValueError, "n_select must be at most .* 6, got 7")
    yield Refused((x, s, 2, 2, 0), ValueError, "n_init must be at least 1 .* got 0")
    yield Refused((x, s, 2, 2, 1, -1), ValueError, "max_iter must be at least 0 .* got -1")
    yield Refused((x, s, 2, 2, 1, 1, NAN), ValueError, "tol must be finite and at least 0")
    yield Refused((x, s, 2, 2), ValueError, "mode must be default or official", {"mode": "best"})


OPS = [
    Op("mos_score", reference.mos_score, mos_samples, mos_refused, score_tolerance),
    Op(
        "mos_predict",
        reference.mos_predict,
        mos_samples,
        mos_refused,
        predict_tolerance,
        compare=compare_predictions,
    ),
    Op(
        "mos_log_others",
        reference.mos_log_others,
        mos_samples,
        mos_refused,
        log_tolerance,
        differentiable=True,
    ),
    Op(
        "mos_loss",
        reference.mos_loss,
        mos_loss_samples,
        mos_loss_refused,
        log_tolerance,
        rowwise=(0, 1),
        differentiable=True,
    ),
    Op(
        "logit_scores",
        reference.logit_scores,
        logit_samples,
        logit_refused,
        logit_tolerance,
    ),
    Op(
        "outlier_cross_entropy",
        reference.outlier_cross_entropy,
        outlier_samples,
        outlier_refused,
        log_tolerance,
        rowwise=(0, 1),
        differentiable=True,
    ),
    Op(
        "kmeans_init",
        reference.kmeans_init,
        kmeans_init_samples,
        kmeans_init_refused,
        kmeans_tolerance,
        rowwise=(),
        problem=(0,),
    ),
    Op(
        "kmeans",
        reference.kmeans,
        kmeans_samples,
        kmeans_refused,
        kmeans_tolerance,
        rowwise=(),
        problem=(0, 1),
        float64=(2,),
    ),
    Op(
        "nearest_centroid",
        reference.nearest_centroid,
        nearest_samples,
        nearest_refused,
        kmeans_tolerance,
    ),
    Op(
        "cluster_argmax",
        reference.cluster_argmax,
        cluster_samples,
        cluster_refused,
        kmeans_tolerance,
        rowwise=(),
        problem=(0, 1),
    ),
    Op(
        "dos_select",
        reference.dos_select,
        dos_samples,
        dos_refused,
        kmeans_tolerance,
        rowwise=(),
        problem=(0, 1),
        float64=(3,),
    ),
]
