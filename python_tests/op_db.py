"""One row an op: how to call it, what it must return, what it must refuse. test_ops.py runs them.

A row earns its op every test: the reference in float64, strides, dtypes, fake kernels, gradients,
``torch.compile``, ``torch.export``, vmap, errors, threads, and on CUDA graph capture.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oodkernels import reference
from oodkernels.metrics.streaming._sketch import Cells, Layout, Sketch
from oodkernels.ops.histogram import N_FACTS, N_PREFIXES
from oodkernels.ops.keys import keys_of_scores, order_key

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
    sets: tuple[int, ...] = ()  # the same, where all that they hold is one set
    like_input: tuple[int, ...] = ()  # outputs of the type of the logits
    as_is: bool = False  # the reference, too, must see the type of the input
    varied: int = 0  # position of the argument whose strides the op follows
    says: str = ""  # how its errors begin, where it is not with its name
    functional: Callable[..., Any] | None = None  # of an op that changes its argument
    differentiable: bool = False
    # Compares what no tolerance can, such as labels among nearly equal classes.
    compare: Callable[[Sample, Any, Any], None] | None = None

    @property
    def overload(self) -> Callable[..., Any]:
        return getattr(torch.ops.oodk, self.name).default

    @property
    def call(self) -> Callable[..., Any]:
        return self.functional or getattr(torch.ops.oodk, self.name)

    @property
    def mapped(self) -> tuple[int, ...]:
        return self.rowwise or self.problem or self.sets


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


def gen_samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    gamma, m = [0.1, 0.1, 2.0, 0.5], [100, 3, 1000, 7]
    for width in (1, 2, 7, 16, 33, 65, 200, 1008):
        for name, z in (
            ("normal", logits_of((37,), width, device, dtype)),
            ("confident", logits_of((37,), width, device, dtype) * 10),
            ("ties", logits_of((37,), width, device, dtype).round()),
            ("special", special_rows(max(width, 2), device, dtype)),
        ):
            yield Sample((z, gamma, m), name=f"{width} {name}")
    for shape in ((), (0,), (2, 0), (2, 3)):
        z = logits_of(shape, 100, device, dtype)
        yield Sample((z, gamma[:1], [10]), name=f"rows {shape}")
        yield Sample((z, [], []), name=f"rows {shape}, none")


def gen_refused(device: str) -> Iterator[Refused]:
    z = torch.randn(4, 6, device=device)
    yield Refused((z.long(), [0.1], [3]), TypeError, "logits must be float64")
    yield Refused((z[0, 0], [0.1], [3]), ValueError, "at least one dimension")
    yield Refused((z[:, :0], [0.1], [3]), ValueError, r"at least one class, got shape \(4, 0\)")
    yield Refused((z, [0.1], [3, 4]), ValueError, "gamma and m must be as many, got 1 and 2")
    yield Refused((z, [0.1], [0]), ValueError, "m must be at least 1, got 0")
    for gamma in (0.0, -1.0, NAN, INF):
        yield Refused((z, [gamma], [3]), ValueError, "gamma must be positive and finite, got")


def gen_tolerance(output: int, dtype: torch.dtype) -> tuple[float, float]:
    # Of a logit of 1e4, float32 knows the logarithm of its probability to 1e-3.
    return (1e-10, 1e-10) if dtype == torch.float64 else (4e-6, 1e-6)


def scaled_samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    some = torch.tensor([3.0, 0.5, 40.0, 1.0, 0.0, -1.0, 3.0, 1e-3, 900.0], dtype=wide)
    for width in (1, 2, 7, 64, 65, 200, 1008):
        bias = logits_of((), width, "cpu", wide).to(device)
        for name, z in (
            ("normal", logits_of((11,), width, device, dtype)),
            ("special", special_rows(max(width, 2), device, dtype)),
        ):
            scale = some.expand(len(z), -1).to(device)
            yield Sample((z, scale), name=f"{width} {name}")
            yield Sample((z, scale[:, :1]), name=f"{width} {name}, one")
            if name == "normal":
                yield Sample((z, scale, bias), name=f"{width} {name}, bias")
    for shape in ((), (0,), (2, 0), (2, 3)):
        z, own = logits_of(shape, 40, device, dtype), torch.rand(*shape, 3, dtype=wide).to(device)
        yield Sample((z, own * 9), name=f"rows {shape}")
        yield Sample((z, own[..., :0]), name=f"rows {shape}, none")


def scaled_refused(device: str) -> Iterator[Refused]:
    z, one = torch.randn(4, 6, device=device), torch.ones(4, 2, device=device)
    yield Refused((z.long(), one), TypeError, "logits must be float64")
    yield Refused((z[0, 0], one), ValueError, "at least one dimension")
    yield Refused((z[:, :0], one), ValueError, r"at least one class, got shape \(4, 0\)")
    yield Refused((z, one.double()), TypeError, "scale must be ")
    for bad in (one[0], one[:3], one[None]):
        yield Refused((z, bad), ValueError, r"scale must have shape \(..., P\) .* logits \(4, 6\)")
    yield Refused((z, one, z[0].double()), TypeError, "bias must be ")
    for bad in (z, z[0, :5]):
        yield Refused((z, one, bad), ValueError, r"bias must have shape \(C,\) = \(6,\), got")
    if device != "cpu":
        yield Refused((z, one.cpu()), ValueError, "scale must be on the device of logits")


def distance_samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for width in (1, 2, 7, 31, 64, 65, 200):
        for name, x in (
            ("normal", logits_of((13,), width, device, dtype)),
            ("special", special_rows(max(width, 2), device, dtype)),
        ):
            table = logits_of((9,), x.shape[-1], device, wide).flip(1)
            index = torch.arange(len(x) * 3, device=device).view(-1, 3) % 9
            yield Sample((x, table, index), name=f"{width} {name}")
    table = logits_of((9,), 20, device, wide)
    for shape in ((), (0,), (2, 0), (2, 3)):
        x = logits_of(shape, 20, device, dtype)
        for m in (0, 1, 4):
            index = torch.full((*shape, m), 8, device=device)
            yield Sample((x, table, index), name=f"rows {shape}, {m}")


def distance_refused(device: str) -> Iterator[Refused]:
    x, table = torch.randn(4, 6, device=device), torch.randn(3, 6, device=device)
    index = torch.zeros(4, 2, dtype=torch.int64, device=device)
    yield Refused((x.long(), table, index), TypeError, "x must be float64")
    yield Refused((x[0, 0], table, index), ValueError, "at least one dimension")
    yield Refused((x[:, :0], table, index), ValueError, r"one column, got shape \(4, 0\)")
    yield Refused((x, table.double(), index), TypeError, "table must be ")
    for bad in (table[0], table[:, :5], table[None]):
        yield Refused((x, bad, index), ValueError, r"table must have shape \(K, d\) .* x, 6, got")
    yield Refused((x, table, index.int()), TypeError, "index must be int64")
    for bad in (index[0], index[:3], index[None]):
        yield Refused(
            (x, table, bad), ValueError, r"index must have shape \(..., m\) .* x \(4, 6\)"
        )
    for bad in (-1, 3):
        message = f"index must name rows of table, 0..2, got {bad}"
        yield Refused((x, table, index + bad), ValueError, message, contents=True)
    if device != "cpu":
        yield Refused((x, table.cpu(), index), ValueError, "table must be on the device of x")


def distance_tolerance(output: int, dtype: torch.dtype) -> tuple[float, float]:
    # In float64 the reference's sums are no better where positive and negative values cancel.
    return (1e-10, 1e-10) if dtype == torch.float64 else (2e-7, 1e-9)


def feature_samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    some = torch.tensor([85.0, 0.0, 50.0, 100.0, 90.0, 90.0], dtype=torch.float64, device=device)
    for width in (1, 2, 7, 31, 64, 65, 200, 1008):
        for name, x in (
            ("normal", logits_of((37,), width, device, dtype)),
            ("zeros and ties", logits_of((37,), width, device, dtype).relu().mul(4).round()),
            ("long tail", logits_of((11,), width, device, dtype).mul(2).exp()),
            ("special", special_rows(max(width, 2), device, dtype)),
        ):
            yield Sample((x, some), name=f"{width} {name}")
            yield Sample((x, some[:1], True), name=f"{width} {name}, rectified")
    for shape in ((), (0,), (2, 0), (2, 3)):
        x = logits_of(shape, 100, device, dtype)
        yield Sample((x, some[:0]), name=f"rows {shape}, none")
        own = torch.rand(*shape, 3, dtype=torch.float64).mul(100).to(device)
        yield Sample((x, own), name=f"rows {shape}, their own")


def feature_refused(device: str) -> Iterator[Refused]:
    x = torch.randn(4, 6, device=device)
    p = torch.tensor([90.0, 50.0], dtype=torch.float64, device=device)
    yield Refused((x.long(), p), TypeError, "features must be float64")
    yield Refused((x[0, 0], p), ValueError, "features must have at least one dimension")
    yield Refused((x[:, :0], p), ValueError, r"at least one feature, got shape \(4, 0\)")
    yield Refused((x, p.float()), TypeError, "percentiles must be float64")
    for bad in (p[0], p.expand(3, 2), p.expand(1, 4, 2)):
        yield Refused((x, bad), ValueError, r"percentiles must have shape \(P,\), or .*\(4, 6\)")
    for bad in (NAN, -1.0, 100.5):
        yield Refused((x, p * 0 + bad), ValueError, "in per cent, in 0..100", contents=True)
    if device != "cpu":
        yield Refused((x, p.cpu()), ValueError, "percentiles must be on the device of features")


def feature_tolerance(output: int, dtype: torch.dtype) -> tuple[float, float]:
    if output == 3:
        return 0.0, 0.0
    # In float64 the reference's sums are no better where positive and negative values cancel.
    return (1e-10, 1e-10) if dtype == torch.float64 else (2e-7, 1e-9)


def shape_samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def limit(*values: float) -> Tensor:
        return torch.tensor(values, dtype=wide, device=device)

    for width in (1, 7, 64, 65, 200):
        for name, x in (
            ("normal", logits_of((19,), width, device, dtype).relu() + 0.01),
            ("zeros and ties", logits_of((19,), width, device, dtype).relu().round()),
            ("special", special_rows(max(width, 2), device, dtype).abs()),
        ):
            for p in (65.0, 90.0):
                # Sums of 1e4 and the like have no place in float16.
                for shape in ("ash-p", "ash-b", "ash-s", "scale")[: 1 if name == "special" else 4]:
                    yield Sample((x, shape, p), name=f"{width} {name}, {shape} {p}")
            high = logits_of((), x.shape[-1], device, wide)
            yield Sample((x, "clip", None, None, limit(1.5)), name=f"{width} {name}, clip")
            yield Sample((x, "clip", None, None, high), name=f"{width} {name}, clip each")
            yield Sample((x, "vra", None, limit(0.5), high + 9), name=f"{width} {name}, vra")
            equal = torch.arange(8).to(high) / 2 + 0.5  # values on their edges too
            for edges in (equal, limit(-1, 0, 0.25, 0.5, 3, 1e3)):
                bins = (x, "optfs", None, edges, limit(*range(2, len(edges) + 1)))
                yield Sample(bins, name=f"{width} {name}, optfs of {len(edges) - 1}")
    for rows in ((), (0,), (2, 3)):
        yield Sample((logits_of(rows, 100, device, dtype).abs(), "ash-s", 90.0), name=f"{rows}")


def shape_refused(device: str) -> Iterator[Refused]:
    x, one = torch.randn(4, 6, device=device), torch.ones(1, device=device)
    yield Refused((x, "ash"), ValueError, "shape must be clip, .* or optfs, got 'ash'")
    yield Refused((x.long(), "ash-p", 90.0), TypeError, "features must be float64")
    yield Refused((x[:, :0], "ash-p", 90.0), ValueError, "at least one feature")
    yield Refused((x[:1].expand(4, 6), "ash-p", 90.0), ValueError, "stride 0 in dimension 0")
    yield Refused((x, "ash-p"), ValueError, "percentile must be given for ash-p")
    yield Refused((x, "clip", 90.0, None, one), ValueError, "percentile must not be given for clip")
    yield Refused((x, "vra", None, None, one), ValueError, "low must be given for vra")
    yield Refused((x, "clip", None, one, one), ValueError, "low must not be given for clip")
    yield Refused((x, "clip"), ValueError, "high must be given for clip")
    yield Refused((x, "scale", 90.0, None, one), ValueError, "high must not be given for scale")
    yield Refused((x, "clip", None, None, one.double()), TypeError, "high must be ")
    for bad in (one[0], one.expand(5), one[None]):
        yield Refused((x, "clip", None, None, bad), ValueError, r"shape \(1,\) or \(6,\)")
    for p in (-1.0, 100.5, NAN):
        yield Refused((x, "ash-p", p), ValueError, "percentile must be in per cent, in 0..100")
    yield Refused((x, "optfs", None, None, one), ValueError, "low must be given for optfs")
    two = torch.arange(2.0, device=device)
    for low, high in ((one, one), (two, two), (one, one[:0]), (two, one[None])):
        yield Refused(
            (x, "optfs", None, low, high), ValueError, r"shapes \(bins \+ 1,\) and \(bins"
        )
    if device != "cpu":
        yield Refused((x, "clip", None, None, one.cpu()), ValueError, "high must be on the device")


def shape_call(features: Tensor, *args: Any) -> Tensor:
    """``shape_features_`` on a copy of the features, unless they are to be refused; returns it."""
    shared = any(n > 1 and s == 0 for n, s in zip(features.shape, features.stride(), strict=True))
    features = features if shared else features.detach().clone()
    torch.ops.oodk.shape_features_(features, *args)
    return features


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


def duplicates(seed: int) -> tuple[Tensor, Tensor, bool]:
    """Rounded points, many of them equal, float64; rows to start from; whether to normalise."""
    random = torch.Generator().manual_seed(seed)
    n, d, k = torch.randint(2**20, (3,), generator=random).tolist()
    n, d, k = 20 + n % 180, 1 + d % 3, 2 + k % 28
    x = torch.randn(n, d, generator=random, dtype=torch.float64).mul(1.5).round() / (1 + seed % 3)
    return x, torch.randint(0, n, (1, k), generator=random), bool(seed % 2)


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


def neighbor_samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    for q, n, d, k in ((37, 70, 9, 5), (3, 40, 33, 40), (1, 1, 1, 1), (20, 300, 130, 7)):
        x = points_of(q, d, device=device, dtype=dtype)
        bank = points_of(n, d, device=device, dtype=dtype, seed=1)
        yield Sample((x, bank, k), name=f"{q, n, d, k}")
        yield Sample((x, bank, k, True), name=f"{q, n, d, k}, directions")
    bank = points_of(90, 11, device=device, dtype=dtype, seed=1)
    yield Sample((special_points(device, dtype), bank, 6), name="special")
    yield Sample((special_points(device, dtype), bank, 6, True), name="special, directions")
    far = (points_of(30, 11, device=device, dtype=dtype).float() + 400).to(dtype)
    yield Sample((far, (bank.float() + 400).to(dtype), 4), name="far from 0")
    same = torch.ones(70, 4, device=device, dtype=dtype)
    yield Sample((same[:9], same, 50), name="all equal")
    for shape in ((11,), (0, 11), (2, 3, 11), (2, 0, 11)):
        x = logits_of(shape[:-1], 11, device, dtype)
        yield Sample((x, bank, 3), {"normalize": True}, name=f"queries {shape}")


def neighbor_refused(device: str) -> Iterator[Refused]:
    x, bank = torch.randn(6, 3, device=device), torch.randn(5, 3, device=device)
    yield Refused((x.long(), bank, 2), TypeError, "queries must be float64")
    yield Refused((x[0, 0], bank, 2), ValueError, "queries must have at least one dimension")
    yield Refused((x, bank.long(), 2), TypeError, "bank must be float64")
    yield Refused(
        (x, bank.double(), 2), TypeError, "bank must be float64 where queries are, .* got"
    )
    yield Refused(
        (x.double(), bank, 2), TypeError, "bank must be float64 where queries are, .* got"
    )
    yield Refused((x[:, :0], bank[:, :0], 2), ValueError, "queries must have at least one feature")
    for bad in (bank[0], bank[:, :2], bank[None]):
        yield Refused((x, bad, 1), ValueError, r"bank must have shape \(N, d\) .* queries, 3, got")
    for k in (0, -1, 6):
        yield Refused((x, bank, k), ValueError, f"at most the rows of bank, 5, got {k}")
    for value in (NAN, INF, 1e30):
        bad = bank.clone()
        bad[3, 1] = value
        message = "bank must be finite, squared norms too, .* row 3"
        yield Refused((x, bad, 1), ValueError, message, contents=True)
    if device != "cpu":
        yield Refused((x, bank.cpu(), 2), ValueError, "bank must be on the device of queries")


def compare_neighbors(sample: Sample, actual: Any, expected: Any) -> None:
    """Rows may differ only among those whose distances the precision cannot tell apart."""
    d2, rows = (a.reshape(-1, a.shape[-1]) for a in expected)
    found = actual[1].reshape(rows.shape)
    assert torch.equal(found < 0, rows < 0), sample.name
    assert all(len(set(r)) == len(r) or r[0] < 0 for r in found.tolist()), sample.name
    gap = 1e-4 * (1 + d2[:, :-1].abs()) if rows.shape[1] > 1 else d2[:, :0]
    apart = d2.diff(dim=1) > gap
    edge = torch.ones_like(found[:, :1], dtype=torch.bool)
    clear = torch.cat([edge, apart], 1) & torch.cat([apart, ~edge], 1)
    assert torch.equal(found[clear], rows[clear]), sample.name
    if sample.name == "all equal":
        assert torch.equal(found, rows)


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


# --- the ops that others are made of --------------------------------------------------------------


def plain(samples: Iterator[Sample]) -> Iterator[Sample]:
    """Those without special values, whose statistics no result shows."""
    return (sample for sample in samples if "special" not in sample.name)


def random_like(x: Tensor, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)


def mos_statistics(logits: Tensor, groups: Tensor) -> Tensor:
    """The largest logit m of each group and its sum of exp(z - m), (..., K, 2)."""
    parts = [logits[..., a:b] for a, b in pairwise(groups.tolist())]
    m = torch.stack([z.amax(-1) for z in parts], -1)
    s = torch.stack([(z - z.amax(-1, keepdim=True)).exp().sum(-1) for z in parts], -1)
    return torch.stack([m, s], -1)


def outlier_statistics(logits: Tensor) -> Tensor:
    m = logits.amax(-1)
    return torch.stack([m, (logits - m[..., None]).exp().sum(-1)], -1)


def gradient_of(outputs: Callable[[Tensor], Any], logits: Tensor, *grads: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = logits.detach().clone().requires_grad_()
        out = outputs(leaf)
        out = out if isinstance(out, tuple) else (out,)
        return torch.autograd.grad(out, leaf, grads)[0]


def _mos_log_others(logits: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    return reference.mos_log_others(logits, groups), mos_statistics(logits, groups)


def _mos_log_others_backward(grad: Tensor, logits: Tensor, groups: Tensor, stats: Tensor) -> Tensor:
    return gradient_of(lambda z: reference.mos_log_others(z, groups), logits, grad)


def _mos_loss(
    logits: Tensor, target: Tensor, groups: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    return (
        reference.mos_loss(logits, target, groups, ignore_index),
        mos_statistics(logits, groups),
    )


def _mos_loss_backward(
    grad: Tensor, logits: Tensor, target: Tensor, groups: Tensor, stats: Tensor, ignore_index: int
) -> Tensor:
    return gradient_of(lambda z: reference.mos_loss(z, target, groups, ignore_index), logits, grad)


def _outlier_cross_entropy(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (*reference.outlier_cross_entropy(logits, target), outlier_statistics(logits))


def _outlier_cross_entropy_backward(
    grad_loss: Tensor, grad_logsumexp: Tensor, logits: Tensor, target: Tensor, stats: Tensor
) -> Tensor:
    return gradient_of(
        lambda z: reference.outlier_cross_entropy(z, target), logits, grad_loss, grad_logsumexp
    )


def _outlier_loss(
    logits: Tensor, target: Tensor, weight: float, absent: bool, mean: bool
) -> tuple[Tensor, Tensor]:
    last = logits.shape[-1] - 1
    is_ood = (target == -1) | (absent & (target == last))
    n_ood = is_ood.sum()
    share = torch.where(is_ood, n_ood, is_ood.numel() - n_ood) if mean else 1
    weights = torch.where(is_ood, weight, 1.0).double() / share
    target = torch.where(is_ood & absent, last, target)

    def loss(z: Tensor) -> Tensor:
        return (weights * reference.outlier_cross_entropy(z, target)[0]).sum()

    return loss(logits), gradient_of(loss, logits, torch.ones_like(logits[..., 0].sum()))


def mos_backward_samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    for sample in plain(mos_samples(device, dtype)):
        z, groups = sample.args
        log_others, stats = torch.ops.oodk._mos_log_others(z, groups)
        yield Sample((random_like(log_others), z, groups, stats), name=sample.name)


def mos_inner_loss_samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    for sample in plain(mos_loss_samples(device, dtype)):
        z, target, groups, *ignored = sample.args
        yield Sample((z, target, groups, *(ignored or [-100])), name=sample.name)


def mos_loss_backward_samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    for sample in mos_inner_loss_samples(device, dtype):
        z, target, groups, ignored = sample.args
        loss, stats = torch.ops.oodk._mos_loss(*sample.args)
        yield Sample((random_like(loss), z, target, groups, stats, ignored), name=sample.name)


def outlier_backward_samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    for sample in plain(outlier_samples(device, dtype)):
        loss, logsumexp, stats = torch.ops.oodk._outlier_cross_entropy(*sample.args)
        grads = random_like(loss), random_like(logsumexp, 4)
        yield Sample((*grads, *sample.args, stats), name=sample.name)


def outlier_loss_samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    for sample in plain(outlier_samples(device, dtype)):
        if sample.args[1].numel():
            for absent in (False, True):
                for mean in (False, True):
                    yield Sample((*sample.args, 0.5, absent, mean), name=sample.name)


def mos_inner_loss_refused(device: str) -> Iterator[Refused]:
    for case in mos_loss_refused(device):
        ignored = () if len(case.args) == 4 else (-100,)
        yield Refused((*case.args, *ignored), case.error, case.message, contents=case.contents)


def stale(op: str, device: str, *first: str) -> Iterator[Refused]:
    """Gradients and statistics that belong to other logits; ``first``: names of the gradients."""
    z = torch.randn(4, 6, device=device)
    g = offsets_of([3, 3], device)
    t = torch.tensor([0, 1, 2, 3], device=device)
    if op == "_outlier_cross_entropy_backward":
        good: list[Any] = [z[:, 0], z[:, 0], z, t, z[:, :2]]
    else:
        good = [z[:, :2], z, g, z.new_ones(4, 2, 2)]
        if op == "_mos_loss_backward":
            good = [z[:, 0], z, t, g, z.new_ones(4, 2, 2), -100]
    names = {i: name for i, name in enumerate((*first, "", "", "", "")) if name}
    names[next(i for i in range(len(good) - 1, -1, -1) if isinstance(good[i], Tensor))] = "stats"
    for i, name in names.items():
        args = list(good)
        args[i] = good[i][:3]
        yield Refused(tuple(args), ValueError, f"{name} has the wrong shape, ")
        args[i] = good[i].double()
        yield Refused(tuple(args), TypeError, f"{name} must be ")
    wrong = [z.long() if a is z else a for a in good]
    yield Refused(tuple(wrong), TypeError, "logits must be float64")


def outlier_loss_refused(device: str) -> Iterator[Refused]:
    for case in outlier_refused(device):
        yield Refused((*case.args, 0.5, False, True), case.error, case.message, {}, case.contents)


def gradient_tolerance(output: int, dtype: torch.dtype) -> tuple[float, float]:
    return {
        torch.float64: (1e-11, 1e-12),
        torch.float32: (1e-5, 1e-6),
        torch.bfloat16: (2**-8, 1e-6),
        torch.float16: (2**-11, 1e-6),
    }[dtype]


def loss_tolerance(output: int, dtype: torch.dtype) -> tuple[float, float]:
    return gradient_tolerance(output, dtype) if output else log_tolerance(output, dtype)


# --- scores of two sets ---------------------------------------------------------------------------


def score_samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    for shape in ((90,), (1,), (20, 7), (3, 2, 5)):
        x = logits_of(shape[:-1], shape[-1], device, dtype)
        yield Sample((x,), name=f"{shape}")
        yield Sample((x.round(),), name=f"{shape}, ties")
    x = logits_of((), 50, device, dtype)
    x[:4] = torch.tensor([INF, -INF, 0.0, -0.0])
    yield Sample((x,), name="infinite, signed zeros")


def roc_samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    for sample in score_samples(device, dtype):
        (x,) = sample.args
        yield Sample((x, x - 1), name=sample.name)
        yield Sample((x, x.reshape(-1)[::3] + 0.5, 0.5), name=f"{sample.name}, sizes")


def keys_samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    for sample in score_samples(device, dtype):
        (x,) = sample.args
        yield Sample((x,), name=sample.name)
    x = logits_of((20,), 7, device, dtype)
    yield Sample((torch.where(x.abs() > 3, x * INF * 0, x),), name="NaN of both signs")


def counts_samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    for sample in roc_samples(device, dtype):
        keys = (torch.ops.oodk._roc_keys(x) for x in sample.args[:2])
        yield Sample(tuple(keys), name=sample.name)


def histogram_samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    prefixes = torch.arange(N_PREFIXES, device=device)
    for shift in (16, 13):
        table = shift | prefixes << 5 + 16 - shift
        bins = N_PREFIXES << 16 - shift
        for i, sample in enumerate(score_samples(device, dtype)):
            (x,) = sample.args
            counts = torch.zeros(2, bins + N_FACTS, dtype=torch.int64, device=device)
            rows = (x > 0) if i % 2 else None
            yield Sample((counts, table, x, 0, rows), name=f"{sample.name}, {shift}")
    atoms = order_key(x.reshape(-1)).unique()
    first = torch.searchsorted((atoms >> 16).long() + N_PREFIXES // 2, prefixes)
    table = table | first << 32
    table[:-1] |= first.diff() << 56
    counts = counts.new_zeros(2, bins + len(atoms) + N_FACTS)
    yield Sample((counts, table, x, 1, None, atoms), name="atoms")


def _roc_keys(scores: Tensor) -> Tensor:
    keys = keys_of_scores(scores.reshape(-1))
    keys[scores.reshape(-1).isnan()] = torch.iinfo(keys.dtype).max
    return keys.sort().values


def _roc_counts(id_keys: Tensor, ood_keys: Tensor) -> tuple[Tensor, Tensor]:
    x, y = id_keys.tolist(), ood_keys.tolist()
    levels = sorted({*x, *y})
    above = [2 * sum(b < a for b in y) + y.count(a) for a in x]
    below = [2 * sum(a > b for a in x) + x.count(b) for b in y]
    kept = [(sum(a >= v for a in x), sum(b >= v for b in y)) for v in reversed(levels)]
    flagged = [(sum(b <= v for b in y), sum(a <= v for a in x)) for v in levels]
    sums = [
        sum(above),
        sum(y.count(a) for a in x),
        sum(v * v for v in above),
        sum(v * v for v in below),
        max(0, *(a * len(y) - b * len(x) for a, b in kept)),
    ]

    def areas(points: list[tuple[int, int]]) -> list[float]:
        """Average precision and trapezoid of (positives, negatives) so far."""
        n = points[-1][0]
        curve = [(0.0, 1.0), *((p / n, p / (p + q)) for p, q in points)]
        average = sum((r1 - r0) * p1 for (r0, _), (r1, p1) in pairwise(curve))
        trapezoid = sum((r1 - r0) * (p0 + p1) / 2 for (r0, p0), (r1, p1) in pairwise(curve))
        return [average, trapezoid]

    averages, trapezoids = zip(areas(kept), areas(flagged), strict=True)
    counts = torch.tensor([[v >> 62, v & (1 << 62) - 1] for v in sums])
    both = torch.tensor([*averages, *trapezoids], dtype=torch.float64)
    return counts.to(id_keys.device), both.to(id_keys.device)


def histogram_call(counts: Tensor, *args: Any) -> Tensor:
    """``roc_histogram_`` on a copy of ``counts``, which it returns."""
    counts = counts.clone()
    torch.ops.oodk.roc_histogram_(counts, *args)
    return counts


def histogram_reference(counts: Tensor, *args: Any) -> Tensor:
    counts = counts.clone()
    reference.roc_histogram_(counts, *args)
    return counts


def steering_samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    layout = Layout.of(7 * 2**20, 2)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(30_000, generator=g).to(device, dtype)
    few = (x * 40).round() / 7
    rows = (torch.rand(x.shape, generator=g) < 0.3).to(device, torch.uint8)

    def sample(sketch: Sketch, x: Tensor, share: float, name: str, first: bool = False) -> Sample:
        state = [getattr(sketch, f.name) for f in dataclasses.fields(Sketch)]
        args = (*(t.clone() for t in state), x, 0, rows, first, layout.half, share)
        return Sample(args, name=name)

    sketch = Sketch.empty(layout, 2, x.device)
    yield sample(sketch, x, layout.share, "empty", first=True)
    yield sample(sketch, few, layout.share, "few values", first=True)
    if dtype == torch.float32:  # float64 would have halves of bins where rounding decides
        sketch.count(x, rows, layout, first=True)
        sketch.adapted.zero_()
        yield sample(sketch, 3 * x + 1, layout.share, "wider")
        # In memory that does not do for so fine bins.
        yield sample(sketch, x, layout.share / 64, "coarser")


def steering_call(*args: Any) -> tuple[Tensor, ...]:
    state = [t.detach().clone() for t in args[:7]]
    torch.ops.oodk._steer_histogram_(*state, *args[7:])
    return tuple(state)


def steering_reference(*args: Any) -> tuple[Tensor, ...]:
    sketch = Sketch(*(t.clone() for t in args[:7]))
    x, _, rows, first, half, share = args[7:]
    layout = Layout(sketch.bins, len(sketch.atoms), half, share)
    sketch.steer(x.reshape(-1), rows, layout, first=first)
    return tuple(getattr(sketch, f.name) for f in dataclasses.fields(Sketch))


def compare_steering(sample: Sample, actual: Any, expected: Any) -> None:
    """The same scores in the same intervals, in whatever order blocks lie."""
    ours, theirs = Sketch(*actual), Sketch(*expected)
    for name in ("atoms", "used", "scale", "adapted", "facts"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), (sample.name, name)
    for fields in (31, 0x7FFFFFFF << 32):  # shifts; atoms
        assert torch.equal(ours.table & fields, theirs.table & fields), sample.name
    assert torch.equal(ours.blocks >= 0, theirs.blocks >= 0), sample.name
    a, b = (Cells.sum([s.cells()]) for s in (ours, theirs))
    assert np.array_equal(a.codes, b.codes), sample.name
    assert np.array_equal(a.counts, b.counts), sample.name


def steering_refused(device: str) -> Iterator[Refused]:
    sample = next(steering_samples(device, torch.float32)).args

    def put(at: int, value: Any) -> tuple[Any, ...]:
        return (*sample[:at], value, *sample[at + 1 :])

    blocks, table = sample[1], sample[2]
    yield Refused(put(7, sample[7].long()), TypeError, "scores must be float64")
    yield Refused(put(1, blocks.long()), TypeError, "blocks must be")
    yield Refused(
        put(1, blocks[:8]), ValueError, r"blocks must be contiguous, of shape \(9, 65536\)"
    )
    yield Refused(put(4, sample[4][None]), ValueError, r"used must be contiguous, of shape \(\)")
    yield Refused(put(8, 2), ValueError, "side must be in 0..1, got 2")
    yield Refused(put(12, 0.0), ValueError, "share must be positive, got 0")
    outside = blocks.where(blocks != 0, 2**30)
    yield Refused(put(1, outside), ValueError, "blocks must lie in counts", contents=True)
    none = torch.full_like(blocks, -1)
    yield Refused(put(1, none), ValueError, "hold one for each prefix", contents=True)
    astray = table | 0x3FFFFFF << 6
    yield Refused(put(2, astray), ValueError, "table points outside of counts", contents=True)


def scores_refused(device: str, argument: str) -> Iterator[tuple[Tensor, type[Exception], str]]:
    x = torch.randn(5, device=device)
    yield x.long(), TypeError, f"{argument} must be float64"
    yield x[0], ValueError, f"{argument} must have at least one dimension"
    yield x[:0], ValueError, f"{argument} must not be empty"


def roc_refused(device: str) -> Iterator[Refused]:
    x = torch.randn(5, device=device)
    for bad, error, message in scores_refused(device, "id_scores"):
        yield Refused((bad, bad), error, message)
    for tpr in (0.0, 1.01, NAN):
        yield Refused((x, x, tpr), ValueError, r"tpr must be in \(0, 1\], got")
    yield Refused((x, x.double()), TypeError, "ood_scores must have the type of id_scores")
    yield Refused((x / 0 * 0, x), ValueError, "id_scores must not hold NaN, got 5", contents=True)


def keys_refused(device: str) -> Iterator[Refused]:
    for bad, error, message in scores_refused(device, "scores"):
        yield Refused((bad,), error, message)


def counts_refused(device: str) -> Iterator[Refused]:
    keys = torch.arange(5, device=device)
    yield Refused((keys.float(), keys), TypeError, "id_keys must be int64, int32 or int16")
    yield Refused((keys, keys.int()), TypeError, "ood_keys must have the type of id_keys")
    for bad in (keys[:0], keys[None]):
        yield Refused((keys, bad), ValueError, r"ood_keys must have shape \(N,\), N >= 1, got")


def histogram_refused(device: str) -> Iterator[Refused]:
    counts, table, x, _, _ = next(histogram_samples(device, torch.float32)).args
    yield Refused((counts, table, x.long(), 0), TypeError, "scores must be float64")
    yield Refused((counts.double(), table, x, 0), TypeError, "counts must be")
    yield Refused((counts[:, :4], table, x, 0), ValueError, "counts must have shape")
    yield Refused((counts, table[:5], x, 0), ValueError, "table must have shape")
    yield Refused((counts, table, x, 2), ValueError, "side must be in 0..1, got 2")
    rows = (x > 0)[1:]
    yield Refused((counts, table, x, 0, rows), ValueError, "rows must have the shape of scores")
    yield Refused((counts, table, x, 0, x), TypeError, "rows must be uint8 or bool")
    yield Refused((counts, table, x, 0, None, table), TypeError, "atoms must be")
    yield Refused((counts, table, x / 0 * 0, 0), ValueError, "NaN, got 90 NaN", contents=True)


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
        "scaled_energy",
        reference.scaled_energy,
        scaled_samples,
        scaled_refused,
        lambda output, dtype: (1e-10, 1e-10) if dtype == torch.float64 else (1e-6, 1e-5),
        rowwise=(0, 1),
    ),
    Op("gen_scores", reference.gen_scores, gen_samples, gen_refused, gen_tolerance),
    Op(
        "indexed_distances",
        reference.indexed_distances,
        distance_samples,
        distance_refused,
        distance_tolerance,
        rowwise=(0, 2),
    ),
    Op(
        "feature_stats",
        reference.feature_stats,
        feature_samples,
        feature_refused,
        feature_tolerance,
    ),
    Op(
        "shape_features_",
        reference.shape_features,
        shape_samples,
        shape_refused,
        lambda output, dtype: gradient_tolerance(output, dtype),
        rowwise=(),
        like_input=(0,),
        functional=shape_call,
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
        "nearest_neighbors",
        reference.nearest_neighbors,
        neighbor_samples,
        neighbor_refused,
        kmeans_tolerance,
        compare=compare_neighbors,
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
    Op(
        "_mos_log_others",
        _mos_log_others,
        lambda device, dtype: plain(mos_samples(device, dtype)),
        mos_refused,
        log_tolerance,
        says="mos_log_others",
    ),
    Op(
        "_mos_log_others_backward",
        _mos_log_others_backward,
        mos_backward_samples,
        lambda device: stale("_mos_log_others_backward", device, "grad"),
        gradient_tolerance,
        rowwise=(0, 1, 3),
        like_input=(0,),
    ),
    Op(
        "_mos_loss",
        _mos_loss,
        mos_inner_loss_samples,
        mos_inner_loss_refused,
        log_tolerance,
        rowwise=(0, 1),
        says="mos_loss",
    ),
    Op(
        "_mos_loss_backward",
        _mos_loss_backward,
        mos_loss_backward_samples,
        lambda device: stale("_mos_loss_backward", device, "grad"),
        gradient_tolerance,
        rowwise=(0, 1, 2, 4),
        like_input=(0,),
    ),
    Op(
        "_outlier_cross_entropy",
        _outlier_cross_entropy,
        lambda device, dtype: plain(outlier_samples(device, dtype)),
        outlier_refused,
        log_tolerance,
        rowwise=(0, 1),
        says="outlier_cross_entropy",
    ),
    Op(
        "_outlier_cross_entropy_backward",
        _outlier_cross_entropy_backward,
        outlier_backward_samples,
        lambda device: stale(
            "_outlier_cross_entropy_backward", device, "grad_loss", "grad_logsumexp"
        ),
        gradient_tolerance,
        rowwise=(0, 1, 2, 3, 4),
        like_input=(0,),
    ),
    Op(
        "_outlier_loss",
        _outlier_loss,
        outlier_loss_samples,
        outlier_loss_refused,
        loss_tolerance,
        rowwise=(),
        sets=(0, 1),
        like_input=(1,),
        says="outlier_cross_entropy",
    ),
    Op(
        "roc_metrics",
        reference.roc_metrics,
        roc_samples,
        roc_refused,
        lambda output, dtype: (1e-12, 1e-15),
        rowwise=(),
        sets=(0, 1),
        float64=(0,),
    ),
    Op(
        "_roc_keys",
        _roc_keys,
        keys_samples,
        keys_refused,
        lambda output, dtype: (0.0, 0.0),
        rowwise=(),
        sets=(0,),
        as_is=True,
    ),
    Op(
        "_roc_counts",
        _roc_counts,
        counts_samples,
        counts_refused,
        lambda output, dtype: (1e-12, 1e-15),
        rowwise=(),
        float64=(1,),
    ),
    Op(
        "roc_histogram_",
        histogram_reference,
        histogram_samples,
        histogram_refused,
        lambda output, dtype: (0.0, 0.0),
        rowwise=(),
        as_is=True,
        varied=2,
        functional=histogram_call,
    ),
    Op(
        "_steer_histogram_",
        steering_reference,
        steering_samples,
        steering_refused,
        lambda output, dtype: (0.0, 0.0),
        rowwise=(),
        float64=(5,),
        as_is=True,
        varied=7,
        functional=steering_call,
        compare=compare_steering,
    ),
]
