"""The Outlier Exposure loss and its gradient against its authors' loop and plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peers
import pytest
import torch
from shapes import LOSS_SHAPES, logits_of
from torch import Tensor

import oodkernels as oodk

shapes = pytest.mark.parametrize("shape", LOSS_SHAPES, ids=lambda s: "x".join(map(str, s)))
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


class Case:
    """A third of the rows is ID, as in the paper: they come first."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        rows, classes = shape
        self.logits = logits_of(rows, classes, dtype).requires_grad_()
        self.id_target = torch.randint(
            classes, (rows // 3,), generator=torch.Generator().manual_seed(1)
        )
        self.target = torch.cat([self.id_target, torch.full((rows - rows // 3,), -1)])
        self.nbytes = self.logits.numel() * self.logits.element_size()

    def step(self, loss: Callable[..., Tensor], target: Tensor) -> Callable[[], Tensor | None]:
        def run() -> Tensor | None:
            self.logits.grad = None
            loss(self.logits, target).backward()
            return self.logits.grad

        return run


PLAIN = {
    "official": peers.official_outlier_exposure,
    "softmax": peers.softmax_outlier_exposure,
    "logsumexp": peers.logsumexp_outlier_exposure,
}


def step_of(case: Case, peer: str) -> Callable[[], Tensor | None]:
    if peer == "oodk":
        return case.step(oodk.outlier_exposure_loss, case.target)
    if peer == "pytorch-ood":
        return case.step(peers.pytorch_ood("loss.oe").OutlierExposureLoss(), case.target)
    how, name = peer.split("-")
    loss = PLAIN[name]
    return case.step(
        torch.compile(loss, dynamic=False) if how == "compiled" else loss, case.id_target
    )


@shapes
@dtypes
@pytest.mark.parametrize(
    "peer",
    ["oodk", "pytorch-ood", *(f"{how}-{name}" for how in ("eager", "compiled") for name in PLAIN)],
)
def test_outlier_exposure(
    measure: Any, shape: tuple[int, int], dtype: torch.dtype, peer: str
) -> None:
    """Forward and backward: at best one read of the logits and one write of the gradient."""
    if peer == "pytorch-ood" and dtype == torch.bfloat16:
        pytest.skip("pytorch-ood's loss takes float32 alone")
    case = Case(shape, dtype)
    step = step_of(case, peer)
    if peer != "pytorch-ood":  # which weighs OOD samples otherwise
        expected = step_of(case, "oodk")()
        tolerance = 5e-5 if dtype == torch.float32 else 0.1  # peers round the softmax to bfloat16
        rows = shape[0]
        torch.testing.assert_close(step() * rows, expected * rows, rtol=0, atol=tolerance)
    measure(step, nbytes=2 * case.nbytes, exps=case.logits.numel())
