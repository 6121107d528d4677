"""Random calls of every op: strange shapes, strides and contents, beside protected pages.

In ``python_tests``: ``python -m fuzz.ops --cases 1000000``, on every instruction set that this
processor has. A case is its seed and its number, which are printed when it fails or crashes:
``python -m fuzz.ops --seed 7 --first 1234 --cases 1 --capability avx2`` is that case alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import mmap
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from fuzz.guarded import Arena
from op_db import FLOATS, INF, NAN, OPS, Op, Sample, compare_predictions
from torch import Tensor

from oodkernels import _C, reference
from oodkernels.metrics.streaming._sketch import Layout, Sketch
from oodkernels.ops.histogram import N_FACTS, N_PREFIXES
from oodkernels.ops.keys import keys_of_scores

HERE = Path(__file__).parent
EXTREMES = (-(2**63), -(2**62), -(2**31) - 1, -2, -1, 0, 1, 2**31, 2**32 + 5, 2**62, 2**63 - 1)
MOST_FAILURES = 10


class Draw:
    """All that one case draws."""

    def __init__(self, seed: str, arenas: list[Arena]) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(60))
        self.free = iter(arenas)
        self.dtype = self.random.choice(FLOATS)

    def one_in(self, n: int) -> bool:
        return self.random.randrange(n) == 0

    def integers(self, low: int, high: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator)

    def normal(self, shape: tuple[int, ...], special: bool = True) -> Tensor:
        """Float64 values that ``dtype`` holds: smooth, tied, tiny, with NaN and infinities."""
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        x = x * self.random.choice((4.0, 4.0, 1.0, 0.01))
        if self.one_in(5):
            x = x.round()
        if special and x.numel() and self.one_in(6):
            at = self.integers(0, x.numel(), (self.random.randint(1, 4),))
            values = [self.random.choice((NAN, INF, -INF, 0.0, -0.0)) for _ in at]
            x.view(-1)[at] = torch.tensor(values, dtype=torch.float64)
        x = x.to(self.dtype)
        for dim in range(x.dim()):
            if x.shape[dim] > 1 and self.one_in(12):
                x = x.narrow(dim, 0, 1).expand_as(x)
        return x

    def leading(self) -> tuple[int, ...]:
        rank = self.random.choice((0, 1, 1, 1, 1, 2))
        return tuple(self.random.choice((0, 1, 2, 3, 4, 7)) for _ in range(rank))

    def laid_out(self, values: Tensor, contiguous: bool = False) -> Tensor:
        """The values in guarded memory, at strides of any kind, 0 where they have it."""
        strides, step = [0] * values.dim(), 1
        order = list(range(values.dim()))[::-1]
        if not contiguous and self.one_in(4):
            self.random.shuffle(order)
        for dim in order:
            if values.shape[dim] > 1 and values.stride(dim) == 0:
                continue
            if not contiguous and self.one_in(4):
                step += self.random.randint(1, 5)
            strides[dim] = step
            step *= max(values.shape[dim], 1)
        return next(self.free).place(values, tuple(strides), at_end=not self.one_in(4))

    def offsets(self) -> tuple[Tensor, int, bool]:
        """Offsets of groups, the width they are for, and whether they are good."""
        widths = [self.random.randint(2, 40) for _ in range(self.random.randint(1, 6))]
        if self.one_in(10):
            widths[0] += self.random.randint(100, 700)
        offsets = [0, *accumulate(widths)]
        width, good = offsets[-1], not self.one_in(5)
        if not good:
            kind = self.random.randrange(5)
            at = self.random.randrange(len(offsets))
            if kind == 0:
                offsets[at] = self.random.choice(EXTREMES)
            elif kind == 1:
                offsets[at] += self.random.choice((-1, 1)) * self.random.randint(1, 50)
            elif kind == 2:
                self.random.shuffle(offsets)
            elif kind == 3:
                offsets = [self.random.choice((*EXTREMES, width, 0)) for _ in offsets]
            else:  # both ends are right
                inside = [self.random.choice(EXTREMES) for _ in range(self.random.randint(1, 3))]
                offsets = [0, *inside, width]
        steps = [b - a for a, b in pairwise(offsets)]
        good = offsets[0] == 0 and offsets[-1] == width and min(steps) >= 2
        small = all(-(2**31) <= o < 2**31 for o in offsets) and self.one_in(2)
        return torch.tensor(offsets, dtype=torch.int32 if small else torch.int64), width, good

    def classes(self, low: int, high: int, shape: tuple[int, ...]) -> tuple[Tensor, bool]:
        """Targets low..high - 1, and whether they are good."""
        target, good = self.integers(low, high, shape), True
        if target.numel() and self.one_in(6):
            wrong = self.random.choice([e for e in (*EXTREMES, high) if not low <= e < high])
            target.view(-1)[self.random.randrange(target.numel())] = wrong
            good = False
        return target, good


class Case:
    """A call, and what must come of it."""

    def __init__(
        self,
        *args: Any,
        good: bool = True,
        known: bool = True,
        check: Callable[[tuple[Tensor, ...]], None] | None = None,
    ) -> None:
        self.args = args
        self.good = good  # else a ValueError
        self.known = known  # else any result or a ValueError, so long as nothing is torn
        self.check = check  # instead of the reference


CASES: dict[str, Callable[[Draw], Case]] = {}


def case(*names: str) -> Callable[[Any], Any]:
    def register(make: Any) -> Any:
        for name in names:
            CASES[name] = (lambda draw, name=name: make(draw, name)) if len(names) > 1 else make
        return make

    return register


# --- MOS, scores of logits, losses ----------------------------------------------------------------


@case("mos_score", "mos_predict", "mos_log_others", "_mos_log_others")
def _(draw: Draw, name: str) -> Case:
    groups, width, good = draw.offsets()
    z = draw.normal((*draw.leading(), width), special=not name.startswith("_"))
    return Case(draw.laid_out(z), draw.laid_out(groups), good=good)


@case("_mos_log_others_backward")
def _(draw: Draw) -> Case:
    groups, width, good = draw.offsets()
    z = draw.normal((*draw.leading(), width), special=False)
    return with_statistics(draw, z, (z, groups), good, torch.ops.oodk._mos_log_others)


@case("mos_loss", "_mos_loss", "_mos_loss_backward")
def _(draw: Draw, name: str) -> Case:
    groups, width, good = draw.offsets()
    z = draw.normal((*draw.leading(), width), special=False)
    ignored = draw.random.choice((-100, -1, 2))
    classes = max(1, width - len(groups) + 1)  # where the groups are wrong there may be none
    target, _ = draw.classes(0, classes, z.shape[:-1])
    if target.numel() and draw.one_in(3):
        target.view(-1)[draw.random.randrange(target.numel())] = ignored
    right = bool(((target == ignored) | ((target >= 0) & (target < classes))).all())
    args = z, target, groups
    if name.endswith("backward"):
        return with_statistics(draw, z, args, good and right, torch.ops.oodk._mos_loss, ignored)
    return Case(*map(draw.laid_out, args), ignored, good=good and right)


def with_statistics(
    draw: Draw, z: Tensor, args: tuple[Tensor, ...], good: bool, forward: Any, *more: Any
) -> Case:
    """A backward op on what its forward saved, or on any numbers of that shape."""
    known = good and not draw.one_in(6)
    if good:
        *outs, stats = forward(*args, *more)
    else:
        outs = [z.new_zeros(z.shape[:-1]).to(wide(z))]
        groups = args[-1]
        if forward is torch.ops.oodk._mos_log_others:
            outs = [outs[0].new_zeros((*z.shape[:-1], len(groups) - 1))]
        stats = outs[0].new_zeros((*z.shape[:-1], len(groups) - 1, 2))
    if not known:
        stats = draw.normal(tuple(stats.shape)).to(stats)
    grads = [draw.normal(tuple(o.shape), special=False).to(o) for o in outs]
    return Case(
        *map(draw.laid_out, grads),
        *map(draw.laid_out, args),
        draw.laid_out(stats),
        *more,
        good=good,
        known=known or not good,
    )


def wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@case("logit_scores")
def _(draw: Draw) -> Case:
    z = draw.normal((*draw.leading(), draw.random.choice((1, 2, 5, 16, 33, 64, 129, 700))))
    return Case(draw.laid_out(z), draw.random.choice((1.0, 1.0, 0.5, 10.0)))


@case("shape_features_")
def _(draw: Draw) -> Case:
    width = draw.random.choice((1, 2, 5, 16, 33, 64, 129, 700))
    x = draw.normal((*draw.leading(), width), special=draw.one_in(2))
    placed = draw.laid_out(x)
    good = all(n <= 1 or s for n, s in zip(placed.shape, placed.stride(), strict=True))
    limit = draw.normal((draw.random.choice((1, width)),), False).to(wide(x)).contiguous()
    if draw.one_in(2):
        return Case(placed, "clip", None, None, draw.laid_out(limit), good=good, known=good)
    if draw.one_in(3):
        edges = draw.normal((draw.random.choice((2, 5, 40)),), False).sort().values.to(wide(x))
        factors = torch.ones(len(edges) - 1).to(edges)
        return Case(placed, "optfs", None, edges, factors, good=good, known=good)
    # What exp(sum / sum) is of sums that cancel, nobody knows.
    return Case(placed, draw.random.choice(("ash-p", "scale")), 65.0, good=good, known=False)


@case("gen_scores")
def _(draw: Draw) -> Case:
    z = draw.normal((*draw.leading(), draw.random.choice((1, 2, 5, 16, 33, 64, 129, 700))))
    n = draw.random.randint(0, 4)
    gamma = [draw.random.choice((0.1, 0.5, 2.0)) for _ in range(n)]
    return Case(draw.laid_out(z), gamma, [draw.random.choice((1, 2, 10, 100, 999)) for _ in gamma])


@case("feature_stats")
def _(draw: Draw) -> Case:
    x = draw.normal((*draw.leading(), draw.random.choice((1, 2, 5, 16, 33, 64, 129, 700))))
    batch = draw.random.choice(((), tuple(x.shape[:-1])))
    p = draw.integers(0, 101, (*batch, draw.random.choice((0, 1, 3, 9)))).double()
    good = not (p.numel() and draw.one_in(8))
    if not good:
        p.view(-1)[0] = draw.random.choice((-1.0, 100.1, NAN, INF))
    return Case(draw.laid_out(x), draw.laid_out(p), draw.one_in(2), good=good)


@case("scaled_energy")
def _(draw: Draw) -> Case:
    z = draw.normal((*draw.leading(), draw.random.choice((1, 2, 5, 16, 33, 64, 129, 700))))
    scale = draw.normal((*z.shape[:-1], draw.random.choice((0, 1, 3, 9)))).abs().to(wide(z))
    bias = draw.normal((z.shape[-1],), False).to(wide(z)).contiguous() if draw.one_in(2) else None
    return Case(draw.laid_out(z), draw.laid_out(scale), bias)


@case("indexed_distances")
def _(draw: Draw) -> Case:
    x = draw.normal((*draw.leading(), draw.random.choice((1, 2, 5, 16, 33, 64, 129, 700))))
    rows = draw.random.choice((1, 2, 40))
    table = draw.normal((rows, x.shape[-1])).to(wide(x))
    index, good = draw.classes(0, rows, (*x.shape[:-1], draw.random.choice((0, 1, 3))))
    return Case(draw.laid_out(x), draw.laid_out(table), draw.laid_out(index), good=good)


def classified(draw: Draw) -> tuple[Tensor, Tensor, bool]:
    z = draw.normal((*draw.leading(), draw.random.choice((1, 2, 5, 16, 33, 64, 129, 700))), False)
    target, good = draw.classes(-1, z.shape[-1], z.shape[:-1])
    return z, target, good


@case("outlier_cross_entropy", "_outlier_cross_entropy", "_outlier_loss")
def _(draw: Draw, name: str) -> Case:
    z, target, good = classified(draw)
    args: list[Any] = [draw.laid_out(z), draw.laid_out(target)]
    known = True
    if name == "_outlier_loss":
        args += [draw.random.choice((0.0, 0.5, 2.0)), draw.one_in(2), draw.one_in(2)]
        known = bool(target.numel())
    return Case(*args, good=good, known=known)


@case("_outlier_cross_entropy_backward")
def _(draw: Draw) -> Case:
    z, target, good = classified(draw)
    rows = target.clamp(-1, z.shape[-1] - 1)
    outs = torch.ops.oodk._outlier_cross_entropy(z, rows)
    known = not draw.one_in(6)
    stats = outs[2] if known else draw.normal(tuple(outs[2].shape)).to(outs[2])
    grads = [draw.normal(tuple(o.shape), special=False).to(o) for o in outs[:2]]
    args = map(draw.laid_out, (*grads, z, target, stats))
    return Case(*args, good=good, known=known or not good)


# --- scores of two sets ---------------------------------------------------------------------------


def scores(draw: Draw, most: int = 60) -> Tensor:
    shape = draw.random.choice(((draw.random.randint(1, most),), (3, draw.random.randint(1, 20))))
    return draw.normal(shape)


@case("_roc_keys")
def _(draw: Draw) -> Case:
    x = scores(draw, draw.random.choice((60, 5000)))
    return Case(draw.laid_out(x))


@case("roc_metrics")
def _(draw: Draw) -> Case:
    x, y = scores(draw), scores(draw)
    good = not (x.isnan().any() or y.isnan().any())
    return Case(draw.laid_out(x), draw.laid_out(y), draw.random.choice((0.95, 0.5, 1.0)), good=good)


@case("_roc_counts")
def _(draw: Draw) -> Case:
    ordered = not draw.one_in(2)
    most = 40 if ordered else draw.random.choice((40, 3000, 60_000))
    keys = []
    for _ in range(2):
        x = draw.normal((draw.random.randint(most // 8 + 1, most),)).nan_to_num(0.5)
        key = keys_of_scores(x)
        if not ordered and draw.one_in(3):
            info = torch.iinfo(key.dtype)
            key = draw.integers(info.min // 2, info.max // 2, key.shape).to(key.dtype)
        keys.append(draw.laid_out(key.sort().values if ordered else key))
    return Case(*keys, known=ordered and all((k == k.sort().values).all() for k in keys))


@case("roc_histogram_")
def _(draw: Draw) -> Case:
    shift = draw.random.choice((16, 16, 15))
    x = scores(draw, 300)
    prefixes = torch.arange(N_PREFIXES)
    bins = N_PREFIXES << 16 - shift
    table, atoms = shift | prefixes << 5 + 16 - shift, None
    if draw.one_in(3):
        atoms = keys_of_scores(x.float().reshape(-1)).unique()
        first = torch.searchsorted((atoms >> 16).long() + N_PREFIXES // 2, torch.arange(65537))
        table = table | first[:-1] << 32 | first.diff().clamp(max=127) << 56
    known = not draw.one_in(5)
    if not known:
        some = draw.integers(0, N_PREFIXES, (3000,))
        table[some] = draw.integers(-(2**63), 2**63 - 1, (3000,))
    n_rows = draw.random.randint(1, 3)
    side, rows, good = draw.random.randrange(n_rows), None, not x.isnan().any()
    if draw.one_in(2):
        rows = draw.integers(0, n_rows - side, x.shape).to(torch.uint8)
        if draw.one_in(4):
            rows.view(-1)[0] = draw.random.choice((n_rows, 255))
            good = False
    width = bins + (0 if atoms is None else len(atoms)) + N_FACTS
    counts = draw.laid_out(torch.zeros(n_rows, width, dtype=torch.int64), contiguous=True)
    return Case(
        counts,
        draw.laid_out(table, contiguous=True),
        draw.laid_out(x),
        side,
        None if rows is None else draw.laid_out(rows),
        None if atoms is None else draw.laid_out(atoms),
        good=good,
        known=known or not good,
    )


@case("_steer_histogram_")
def _(draw: Draw) -> Case:
    x = scores(draw, 5000)
    layout = Layout(2 * N_PREFIXES + draw.random.randrange(3000), 300, False, 1e-5)
    n_rows, known = draw.random.randint(1, 3), draw.one_in(2)
    sketch = Sketch.empty(layout, n_rows, x.device)
    sketch.count(draw.normal((300,)).nan_to_num(0, 1, -1), 0, layout, first=True)
    if draw.one_in(2):
        sketch.adapted.zero_()
    before, places = sketch.counts.sum(1), draw.integers(0, N_PREFIXES, (300,))
    if not known:
        wild = draw.integers(-(2**63), 2**63 - 1, (300,))
        which = draw.random.randrange(4)
        if which < 2:
            sketch.table[places] = wild
        elif which == 2:
            sketch.blocks[draw.integers(0, 8, (300,)), places] = (wild >> 40).int()
        else:
            sketch.atoms[:] = (wild >> 32).int()
    side, rows = draw.random.randrange(n_rows), None
    if draw.one_in(2):
        rows = draw.laid_out(draw.integers(0, 256, x.shape).to(torch.uint8))
    state = [getattr(sketch, f.name) for f in dataclasses.fields(Sketch)]

    def check(found: tuple[Tensor, ...]) -> None:
        assert torch.equal(found[0].sum(1), before)

    first = draw.one_in(2)
    args = (draw.laid_out(x), side, rows, first, False, draw.random.choice((1e-5, 1e-9, 1.0)))
    return Case(*state, *args, known=known, check=check)


# --- K-means and DOS ------------------------------------------------------------------------------


def points(draw: Draw, most: int = 24) -> Tensor:
    batch = draw.random.choice(((), (), (), (2,)))
    return draw.normal((*batch, draw.random.randint(1, most), draw.random.randint(1, 40)))


def valid_rows(x: Tensor, normalize: bool) -> Tensor:
    return reference.kmeans_points(x, normalize)[1]


def check_labels(x: Tensor, labels: Tensor, k: int, normalize: bool) -> None:
    valid = valid_rows(x, normalize)
    assert ((labels >= 0) & (labels < k) == valid).all(), (labels, valid)
    assert (labels[~valid] == -1).all()


def check_nearest(
    x: Tensor, c: Tensor, labels: Tensor, normalize: bool, each: bool = False
) -> Tensor:
    """Labels are those of exact arithmetic up to the bound of ops/kmeans.py.

    Returns the squared distances, or of each problem their sum.
    """
    exact, usable = reference.kmeans_points(x.double(), normalize)
    usable &= valid_rows(x, normalize)
    d2 = (exact[..., None, :] - c.double().unsqueeze(-3)).square().sum(-1)
    d2 = torch.where(c.isfinite().all(-1).unsqueeze(-2), d2, INF)
    some = usable & d2.isfinite().any(-1)
    assert ((labels >= 0) == some).all(), (labels, some)
    assert (labels < c.shape[-2]).all()
    chosen = d2.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    norms = exact.norm(dim=-1) + c.double().norm(dim=-1).nan_to_num(0, 0, 0).max()
    u = 2.0**-53 if x.dtype == torch.float64 else 2.0**-24
    bound = 2 * (x.shape[-1] + 2) * u * norms.square()
    assert (chosen - d2.amin(-1) <= bound)[some].all()
    return chosen if each else torch.where(some, chosen, 0).sum(-1)


@case("kmeans_init")
def _(draw: Draw) -> Case:
    x, k, n_init = points(draw), draw.random.randint(1, 8), draw.random.randint(1, 3)
    normalize = draw.one_in(2)

    def check(found: tuple[Tensor, ...]) -> None:
        rows = found[0]
        assert rows.shape == (*x.shape[:-2], n_init, k)
        valid = valid_rows(x, normalize).unsqueeze(-2).expand(*rows.shape[:-1], -1)
        for chosen, usable in zip(
            rows.reshape(-1, k).tolist(), valid.reshape(-1, x.shape[-2]), strict=True
        ):
            taken = [row for row in chosen if row >= 0]
            assert len(taken) == len(set(taken)) == min(k, int(usable.sum())), chosen
            assert all(usable[row] for row in taken), chosen
            assert chosen == [*taken, *[-1] * (k - len(taken))], chosen

    seed = draw.random.choice((0, -1, 2**62))
    return Case(draw.laid_out(x), k, n_init, 0, seed, normalize, check=check)


@case("kmeans")
def _(draw: Draw) -> Case:
    x, k = points(draw), draw.random.randint(1, 6)
    normalize, good = draw.one_in(2), True
    if draw.one_in(3):
        init = draw.normal((*x.shape[:-2], k, x.shape[-1]))
    else:
        init = draw.integers(-1, x.shape[-2], (*x.shape[:-2], draw.random.randint(1, 2), k))
        if draw.one_in(5):
            init.view(-1)[0] = draw.random.choice((x.shape[-2], -2, *EXTREMES[:3], *EXTREMES[-4:]))
            good = False

    def check(found: tuple[Tensor, ...]) -> None:
        centroids, labels, inertia, n_iter = found
        chosen = check_nearest(x, centroids, labels, normalize)
        torch.testing.assert_close(inertia, chosen, rtol=1e-4, atol=1e-6)
        assert ((n_iter >= 0) & (n_iter <= 5)).all()

    args = draw.laid_out(x), draw.laid_out(init), draw.random.randint(0, 5), 0.0, normalize
    return Case(*args, draw.one_in(4), good=good, check=check)


@case("nearest_centroid")
def _(draw: Draw) -> Case:
    x, k, normalize = points(draw), draw.random.randint(1, 40), draw.one_in(2)
    batch = x.shape[:-2] if draw.one_in(2) else ()
    c = draw.normal((*batch, k, x.shape[-1]))

    def check(found: tuple[Tensor, ...]) -> None:
        labels, distance = found
        d2 = check_nearest(x, c, labels, normalize, each=True)
        some = labels >= 0
        torch.testing.assert_close(distance[some].double(), d2[some], rtol=1e-4, atol=1e-6)
        assert distance[~some].isnan().all()

    return Case(draw.laid_out(x), draw.laid_out(c), normalize, check=check)


@case("nearest_neighbors")
def _(draw: Draw) -> Case:
    x, n, normalize = points(draw), draw.random.randint(1, 60), draw.one_in(2)
    k = draw.random.choice((1, n, draw.random.randint(-1, n + 2)))
    bank = draw.normal((n, x.shape[-1]), special=draw.one_in(4))
    known = bool(reference.kmeans_points(bank, normalize)[1].all())

    def check(found: tuple[Tensor, ...]) -> None:
        exact = reference.nearest_neighbors(x.double(), bank.double(), k, normalize)
        some = found[1] >= 0
        assert torch.equal(
            some, reference.kmeans_points(x, normalize)[1][..., None].expand_as(some)
        )
        torch.testing.assert_close(found[0][some].double(), exact[0][some], rtol=1e-4, atol=1e-6)
        assert found[0][~some].isnan().all()

    return Case(
        draw.laid_out(x),
        draw.laid_out(bank),
        k,
        normalize,
        good=1 <= k <= n and known,
        check=check,
    )


@case("cluster_argmax")
def _(draw: Draw) -> Case:
    shape = (*draw.random.choice(((), (2,), (2, 3))), draw.random.choice((0, 1, 5, 40)))
    k, m = draw.random.randint(1, 8), draw.random.randint(1, 5)
    labels = draw.integers(-2, k + 2, shape)
    if labels.numel() and draw.one_in(4):
        labels.view(-1)[0] = draw.random.choice(EXTREMES)
    return Case(draw.laid_out(labels), draw.laid_out(draw.normal(shape)), k, m)


@case("dos_select")
def _(draw: Draw) -> Case:
    x, k = points(draw, 16), draw.random.randint(1, 6)
    n_select, seed = draw.random.randint(1, x.shape[-2]), draw.random.choice((0, 3, -7, 2**62))
    mode = draw.random.choice(("default", "official"))
    s = draw.normal(x.shape[:-1])

    def check(found: tuple[Tensor, ...]) -> None:
        indices, labels, _, _ = found
        check_labels(x, labels, k, True)
        flat = [t.reshape(-1, t.shape[-1]) for t in (labels, s, indices)]
        for label, score, index in zip(*flat, strict=True):
            expected = reference.dos_selection(label, score, k, n_select, seed, mode)
            assert torch.equal(index, expected), (index, expected)

    args = draw.laid_out(x), draw.laid_out(s), k, n_select, 1, draw.random.randint(0, 3), 1e-4, seed
    return Case(*args, mode, check=check)


# --- running them ---------------------------------------------------------------------------------


def outputs(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def doubled(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def check_reference(op: Op, drawn: Case, found: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    args = drawn.args if op.as_is else tuple(map(doubled, drawn.args))
    expected = outputs(op.reference(*args))
    for i, (f, e) in enumerate(zip(found, expected, strict=True)):
        assert f.shape == e.shape, (i, f.shape, e.shape)
        if f.is_floating_point():
            rtol, atol = op.tolerance(i, dtype)
            torch.testing.assert_close(f.double(), e.double(), rtol=rtol, atol=atol, equal_nan=True)
        elif op.compare is None:
            assert torch.equal(f, e), (i, f, e)
    if op.compare is compare_predictions:
        compare_predictions(Sample(drawn.args), found, expected)


def run_case(op: Op, draw: Draw) -> None:
    drawn = CASES[op.name](draw)
    refused, found = None, ()
    try:
        found = outputs(op.call(*drawn.args))
    except ValueError as error:
        refused = str(error)
    if refused is not None:
        assert refused.startswith(f"{op.says or op.name}: "), refused
        assert not (drawn.good and drawn.known), f"refused: {refused}"
        return
    assert drawn.good, "not refused"
    if drawn.known:
        if drawn.check:
            drawn.check(found)
        else:
            check_reference(op, drawn, found, draw.dtype)


def run(seed: int, numbers: range, marker: mmap.mmap) -> int:
    """Runs cases on this process's instruction set; the number of failures."""
    arenas = [Arena(4 << 20) for _ in range(6)]
    failures = 0
    for number in numbers:
        marker[:8] = struct.pack("q", number)
        op = OPS[number % len(OPS)]
        try:
            run_case(op, Draw(f"{seed}/{number}", arenas))
        except Exception:
            failures += 1
            print(f"FAILED {what(seed, number)}\n{traceback.format_exc()[-1500:]}", flush=True)
            if failures >= MOST_FAILURES:
                break
    return failures


def what(seed: int, number: int) -> str:
    name = OPS[number % len(OPS)].name
    return f"{name}: --seed {seed} --first {number} --cases 1 --capability {_C.cpu_capability()}"


def parts(first: int, cases: int, n: int) -> Iterator[range]:
    for i in range(n):
        yield range(first + cases * i // n, first + cases * (i + 1) // n)


def run_all(seed: int, first: int, cases: int, capabilities: list[str]) -> list[str]:
    """Runs a share of the cases on each instruction set, in a process each; what went wrong."""
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for name, numbers in zip(capabilities, parts(first, cases, len(capabilities)), strict=True):
            marker = Path(folder, name)
            marker.write_bytes(bytes(8))
            command = [
                sys.executable,
                "-m",
                "fuzz.ops",
                "--seed",
                str(seed),
                "--child",
                str(marker),
            ]
            command += ["--first", str(numbers.start), "--cases", str(len(numbers))]
            child = subprocess.Popen(
                command,
                cwd=HERE.parent,
                env={**os.environ, "OODK_CPU_CAPABILITY": name, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            children.append((name, marker, child))
        for name, marker, child in children:
            output, _ = child.communicate()
            if child.returncode < 0:
                (number,) = struct.unpack("q", marker.read_bytes())
                op = OPS[number % len(OPS)].name
                died = signal.Signals(-child.returncode).name
                output += f"{died} in {op}: --seed {seed} --first {number} --cases 1"
                output += f" --capability {name}"
            if child.returncode:
                wrong.append(output)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--capability", help="one instruction set; all without")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        with open(args.child, "r+b") as file:
            marker = mmap.mmap(file.fileno(), 8)
            return min(run(args.seed, range(args.first, args.first + args.cases), marker), 1)
    chosen = [args.capability] if args.capability else _C.available_cpu_capabilities()
    wrong = run_all(args.seed, args.first, args.cases, chosen)
    print("\n".join(wrong))
    print(f"{args.cases} cases, seed {args.seed}, {', '.join(chosen)}: {len(wrong)} of them wrong")
    return min(len(wrong), 1)


if __name__ == "__main__":
    sys.exit(main())
