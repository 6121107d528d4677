"""The CUDA kernels of rows of features, run on the CPU as in test_cuda_emulation.py."""

from __future__ import annotations

import pytest
import torch
from cuda_emulator import DTYPES, Emulator
from test_cuda_emulation import (
    Sample,
    pytestmark,  # noqa: F401
)
from torch import Tensor

from oodkernels import reference

SAMPLES = [
    *(Sample(7, (300,), dtype, "ties", offset=2) for dtype in DTYPES),
    *(Sample(9, (41,), dtype, "special", gap=3) for dtype in DTYPES),
    Sample(3, (2048,)),
    Sample(2, (6200,), torch.float64),  # no room for a copy
    Sample(5, (1,), torch.bfloat16),
]
samples = pytest.mark.parametrize("sample", SAMPLES, ids=str)


def run_stats(emulator: Emulator, sample: Sample, p: Tensor, rectified: bool) -> list[Tensor]:
    outputs = ("l1", "l2", "sum", "threshold", "top_sum")
    return emulator.run(
        "feature_stats",
        {"features": sample.storage, "percentiles": p},
        dict.fromkeys(outputs, sample.accumulated),
        **sample.values(),
        rectified=int(rectified),
        count=p.shape[-1],
        step=p.shape[-1] if p.dim() > 1 else 0,
    )


@samples
def test_feature_stats(emulator: Emulator, sample: Sample) -> None:
    p = torch.tensor([85.0, 0.0, 50.0, 100.0], dtype=torch.float64)
    own = torch.linspace(0, 100, sample.rows, dtype=torch.float64)[:, None]
    x = sample.logits.double()
    for percentiles, rectified in ((p, False), (own, True)):
        found = run_stats(emulator, sample, percentiles, rectified)
        expected = reference.feature_stats(x, percentiles, rectified)
        for f, e in zip(found, expected, strict=True):
            rtol = 1e-12 if sample.dtype == torch.float64 else 2e-7
            torch.testing.assert_close(
                f.double(), e.flatten(), rtol=rtol, atol=1e-9, equal_nan=True
            )
        torch.testing.assert_close(
            found[3].double(), expected[3].flatten(), rtol=0, atol=0, equal_nan=True
        )


def test_percentiles_outside_give_nan(emulator: Emulator) -> None:
    p = torch.tensor([-1.0, 50.0, 100.5, torch.nan], dtype=torch.float64)
    *_, threshold, top = run_stats(emulator, Sample(2, (40,)), p, False)
    for x in (threshold, top):
        assert x.view(2, 4).isnan().tolist() == [[True, False, True, True]] * 2
