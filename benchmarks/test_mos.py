"""mos_score, mos_predict, mos_loss and logit_scores against the official loops and plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peers
import pytest
import torch
from shapes import MOS_SHAPES, even_groups, logits_of

import oodkernels as oodk

shapes = pytest.mark.parametrize("shape", MOS_SHAPES, ids=lambda s: "x".join(map(str, s)))
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


class Case:
    """The inputs of one shape, in the layout that each peer wants."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        rows, classes, k = shape
        self.groups = even_groups(classes, k)
        self.logits = logits_of(rows, self.groups.width, dtype)
        self.target = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(1))
        self.slices = torch.as_tensor(self.groups.slices())
        self.sizes = (self.slices[:, 1] - self.slices[:, 0]).tolist()
        self.first = self.slices[:, 0].contiguous()
        widest = max(self.sizes)
        column = self.first[:, None] + torch.arange(widest)
        self.valid = column < self.slices[:, 1:]
        self.index = column.clamp(max=self.groups.width - 1)
        self.segment = torch.repeat_interleave(torch.arange(k), torch.tensor(self.sizes))
        target_column = self.groups.to_column(self.target)
        inside = (target_column[:, None] >= self.slices[:, 0]) & (
            target_column[:, None] < self.slices[:, 1]
        )
        self.group_labels = torch.where(inside, target_column[:, None] - self.first, 0)
        self.columns = self.first + self.group_labels
        self.nbytes = self.logits.numel() * self.logits.element_size()


def scores(case: Case) -> dict[str, Callable[[], Any]]:
    def compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(fn, dynamic=False)

    z, g = case.logits, case.groups
    official = (z, [tuple(s) for s in case.slices.tolist()])
    padded = (z, case.index, case.valid)
    split = (z, case.sizes, case.first)
    return {
        "oodk": lambda: oodk.mos_score(z, g),
        "official": lambda: peers.official_score(*official),
        "eager-padded": lambda: peers.padded_score(*padded),
        "eager-segment": lambda: peers.segment_score(z, case.segment, case.first),
        "eager-split": lambda: peers.split_score(*split),
        "compiled-official": bind(compiled(peers.official_score), *official),
        "compiled-padded": bind(compiled(peers.padded_score), *padded),
        "compiled-split": bind(compiled(peers.split_score), *split),
    }


def bind(fn: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    return lambda: fn(*args)


def losses(case: Case) -> dict[str, Callable[[], Any]]:
    z = case.logits.clone().requires_grad_()
    slices = [tuple(s) for s in case.slices.tolist()]

    def step(fn: Callable[..., Any], *args: Any) -> Callable[[], Any]:
        def run() -> torch.Tensor | None:
            z.grad = None
            fn(z, *args).backward()
            return z.grad

        return run

    def compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(fn, dynamic=False)

    return {
        "oodk": step(oodk.mos_loss, case.target, case.groups),
        "official": step(peers.official_loss, slices, case.group_labels),
        "eager-padded": step(peers.padded_loss, case.index, case.valid, case.group_labels),
        "eager-split": step(peers.split_loss, case.sizes, case.columns),
        "compiled-official": step(compiled(peers.official_loss), slices, case.group_labels),
        "compiled-padded": step(
            compiled(peers.padded_loss), case.index, case.valid, case.group_labels
        ),
        "compiled-split": step(compiled(peers.split_loss), case.sizes, case.columns),
    }


SCORES = [
    "oodk",
    "official",
    "eager-padded",
    "eager-segment",
    "eager-split",
    "compiled-official",
    "compiled-padded",
    "compiled-split",
]
LOSSES = [name for name in SCORES if name != "eager-segment"]


@shapes
@dtypes
@pytest.mark.parametrize("peer", SCORES)
def test_score(measure: Any, shape: tuple[int, int, int], dtype: torch.dtype, peer: str) -> None:
    case = Case(shape, dtype)
    fn = scores(case)[peer]
    expected = oodk.mos_score(case.logits, case.groups)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(fn().float(), expected, rtol=0, atol=tolerance)
    measure(fn, nbytes=case.nbytes, exps=case.logits.numel())


@shapes
@dtypes
@pytest.mark.parametrize("peer", ["oodk", "official"])
def test_predict(measure: Any, shape: tuple[int, int, int], dtype: torch.dtype, peer: str) -> None:
    case = Case(shape, dtype)
    slices = [tuple(s) for s in case.slices.tolist()]
    fn = {
        "oodk": lambda: oodk.mos_predict(case.logits, case.groups),
        "official": lambda: peers.official_predict(case.logits, slices),
    }[peer]
    measure(fn, nbytes=case.nbytes, exps=case.logits.numel())


@shapes
@dtypes
@pytest.mark.parametrize("peer", LOSSES)
def test_loss(measure: Any, shape: tuple[int, int, int], dtype: torch.dtype, peer: str) -> None:
    """Forward and backward: the logits are read twice and a gradient as large is written."""
    case = Case(shape, dtype)
    fns = losses(case)
    scale = case.target.shape[0]
    tolerance = 1e-5 if dtype == torch.float32 else 0.1  # peers round the softmax to bfloat16
    torch.testing.assert_close(fns[peer]() * scale, fns["oodk"]() * scale, rtol=0, atol=tolerance)
    measure(fns[peer], nbytes=3 * case.nbytes, exps=2 * case.logits.numel())


@shapes
@dtypes
@pytest.mark.parametrize("peer", ["oodk", "eager"])
def test_logit_scores(
    measure: Any, shape: tuple[int, int, int], dtype: torch.dtype, peer: str
) -> None:
    case = Case(shape, dtype)
    z = case.logits

    def eager() -> tuple[torch.Tensor, ...]:
        p = z.softmax(-1)
        max_logit, label = z.max(-1)
        return p.amax(-1), max_logit, z.logsumexp(-1), -torch.special.entr(p).sum(-1), label

    fn = {"oodk": lambda: oodk.logit_scores(z), "eager": eager}[peer]
    measure(fn, nbytes=case.nbytes, exps=z.numel())


@shapes
@dtypes
def test_ceiling_read(measure: Any, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Reading the logits once, all threads: what no score can beat where memory is the limit."""
    logits = Case(shape, dtype).logits.view(-1)
    words = logits[: logits.numel() // 4 * 4].view(torch.int64)  # adding integers costs least
    measure(words.sum, nbytes=words.numel() * 8)


@shapes
def test_ceiling_exp(measure: Any, shape: tuple[int, int, int]) -> None:
    """torch's own exp within the caches, all threads."""
    rows, classes, k = shape
    n = rows * (classes + k)
    x = -torch.rand(min(n, 1 << 17))
    out = torch.empty_like(x)
    measure(lambda: torch.exp(x, out=out), exps=x.numel())
