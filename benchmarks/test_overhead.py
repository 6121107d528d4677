"""What one row costs beside the op and the model: Python's share of a detector.

    OMP_NUM_THREADS=1 pytest benchmarks/test_overhead.py --benchmark-only --benchmark-sort=name

Compare the minima: a row of 1,008 logits takes the op itself 4 to 8 us, and a model of 600 modules
that do nothing takes its own call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oodkernels.deploy import Bundle
from oodkernels.detectors import Energy
from oodkernels.ops import logit_scores


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Identity(), nn.Identity()


class Deep(nn.Module):
    """A linear layer beside 600 modules that are not run."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(200)])
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(x)
        return logits


def calls() -> dict[str, Callable[[], Any]]:
    z, x = torch.randn(1, 1008), torch.randn(1, 16)
    energy, model = Energy(), Deep().eval()
    energy.calibrate(torch.randn(1000))
    on_model = Energy(model=model)
    bundle = Bundle(model, on_model, input_shape=(16,))
    bundle.calibrate(torch.randn(1000, 16))
    on_model.threshold = bundle.threshold
    return {
        "logits-op": lambda: logit_scores(z),
        "logits-score": lambda: energy.score(logits=z),
        "logits-predict": lambda: energy.predict(logits=z),
        "600modules-model": lambda: model(x),
        "600modules-score": lambda: on_model.score(x),
        "600modules-predict": lambda: on_model.predict(x),
        "600modules-bundle": lambda: bundle(x),
    }


CALLS = calls()


@pytest.mark.parametrize("name", CALLS)
def test_overhead(name: str, measure: Callable[..., None]) -> None:
    with torch.inference_mode():
        measure(CALLS[name])
