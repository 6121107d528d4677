"""mos_score, mos_predict, mos_loss and logit_scores against the official loops and plain torch."""

from __future__ import annotations

from functools import partial
from typing import Any

import peers
import pytest
import torch
from shapes import MOS_SHAPES, MosCase

import oodkernels as oodk

shapes = pytest.mark.parametrize("shape", MOS_SHAPES, ids=lambda s: "x".join(map(str, s)))
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


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
    case = MosCase(shape, dtype)
    fn = partial(peers.mos_scores(case)[peer], case.logits)
    expected = oodk.mos_score(case.logits, case.groups)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(fn().float(), expected, rtol=0, atol=tolerance)
    measure(fn, nbytes=case.nbytes, exps=case.logits.numel())


@shapes
@dtypes
@pytest.mark.parametrize("peer", ["oodk", "official"])
def test_predict(measure: Any, shape: tuple[int, int, int], dtype: torch.dtype, peer: str) -> None:
    case = MosCase(shape, dtype)
    fn = {
        "oodk": lambda: oodk.mos_predict(case.logits, case.groups),
        "official": lambda: peers.official_predict(case.logits, case.slices),
    }[peer]
    measure(fn, nbytes=case.nbytes, exps=case.logits.numel())


@shapes
@dtypes
@pytest.mark.parametrize("peer", LOSSES)
def test_loss(measure: Any, shape: tuple[int, int, int], dtype: torch.dtype, peer: str) -> None:
    """Forward and backward: the logits are read twice and a gradient as large is written."""
    case = MosCase(shape, dtype)
    z = case.logits.clone().requires_grad_()
    fns = {name: partial(peers.gradient, fn, z) for name, fn in peers.mos_losses(case).items()}
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
    case = MosCase(shape, dtype)
    z = case.logits

    fn = {"oodk": lambda: oodk.logit_scores(z), "eager": lambda: peers.eager_logit_scores(z)}[peer]
    measure(fn, nbytes=case.nbytes, exps=z.numel())


@shapes
@dtypes
def test_ceiling_read(measure: Any, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Reading the logits once, all threads: what no score can beat where memory is the limit."""
    logits = MosCase(shape, dtype).logits.view(-1)
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
