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
from oodkernels.ops import gen_scores

SAMPLES = [
    *(Sample(7, (300,), dtype, "ties", offset=2) for dtype in DTYPES),
    *(Sample(9, (41,), dtype, "special", gap=3) for dtype in DTYPES),
    Sample(3, (2048,)),
    Sample(1, (5300,), torch.float64),  # no room for a copy
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


@pytest.mark.parametrize(
    "sample",
    [Sample(3, (70,), dtype, kind) for dtype in DTYPES[:3] for kind in ("ties", "special")]
    + [Sample(2, (2,)), Sample(2, (1,)), Sample(2, (60,), torch.float32, "large")],
    ids=str,
)
def test_gen_scores(emulator: Emulator, sample: Sample) -> None:
    gamma, m = [0.1, 0.5], [10, 3]
    if sample.width == 2:  # more than a launch takes
        gamma, m = gamma * 17, m * 17
    m = [min(one, sample.width) for one in m]
    inputs = {
        "logits": sample.storage,
        "gamma": torch.tensor(gamma, dtype=torch.float64),
        "m": torch.tensor(m),
    }
    outputs = {"scores": sample.accumulated}
    (found,) = emulator.run("gen_scores", inputs, outputs, **sample.values(), count=len(m))
    expected = gen_scores(sample.logits.double(), gamma, m).flatten()
    rtol = 1e-10 if sample.dtype == torch.float64 else 4e-6
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("biased", [0, 1])
@pytest.mark.parametrize(
    "sample",
    [Sample(3, (70,), dtype, kind) for dtype in DTYPES[:3] for kind in ("ties", "special")],
    ids=str,
)
def test_scaled_energy(emulator: Emulator, sample: Sample, biased: int) -> None:
    scale = torch.tensor([3.0, 0.5, 40.0]).expand(sample.rows, -1).to(sample.accumulated)
    bias = torch.linspace(-1, 1, sample.width).to(scale)
    inputs = {"logits": sample.storage, "scale": scale.contiguous(), "bias": bias}
    (found,) = emulator.run(
        "scaled_energy",
        inputs,
        {"energy": sample.accumulated},
        **sample.values(),
        count=3,
        biased=biased,
    )
    z = sample.logits.double()
    expected = reference.scaled_energy(z, scale.double(), bias.double() if biased else None)
    rtol = 1e-10 if sample.dtype == torch.float64 else 1e-6
    torch.testing.assert_close(
        found.double(), expected.flatten(), rtol=rtol, atol=1e-5, equal_nan=True
    )


@samples
def test_indexed_distances(emulator: Emulator, sample: Sample) -> None:
    table = torch.linspace(-3, 3, 4 * sample.width).view(4, -1).to(sample.accumulated)
    index = torch.arange(2 * sample.rows).view(-1, 2) % 4
    index[0, 1] = 4  # no row of the table
    found = emulator.run(
        "indexed_distances",
        {"x": sample.storage, "table": table, "index": index},
        dict.fromkeys(("inner", "l1", "l2"), sample.accumulated),
        **sample.values(),
        count=2,
        table_rows=4,
    )
    expected = reference.indexed_distances(sample.logits.double(), table.double(), index % 4)
    for f, e in zip(found, expected, strict=True):
        assert f[1].isnan()
        e[0, 1] = torch.nan
        rtol = 1e-10 if sample.dtype == torch.float64 else 2e-7
        torch.testing.assert_close(f.double(), e.flatten(), rtol=rtol, atol=1e-9, equal_nan=True)


SHAPES = ("clip", "vra", "ash-p", "ash-b", "ash-s", "scale", "optfs")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "sample",
    [Sample(3, (300,), torch.float32, "ties"), Sample(2, (37,), torch.bfloat16)],
    ids=str,
)
def test_shape_features(emulator: Emulator, sample: Sample, shape: str) -> None:
    x = sample.logits.abs()
    x[0, 3] = torch.nan
    ranked = shape in ("ash-p", "ash-b", "ash-s", "scale")
    low = torch.tensor([0.5]) if shape == "vra" else None
    high = None if ranked else torch.linspace(1, 3, sample.width)
    k = sample.width - round(sample.width * 0.8)
    if shape == "optfs":
        low, high, k = torch.tensor([0.25, 1.0, 2.0, 2.5]), torch.tensor([1.0, 2.0, 3.0]), 3
    inputs = {"features": x} | {n: t for n, t in (("low", low), ("high", high)) if t is not None}
    (found,) = emulator.run(
        "shape_features",
        inputs,
        {"shaped": sample.dtype},
        **sample.values(),
        **{"shape": SHAPES.index(shape), "k": k, "low": int(low is not None)},
        high=int(high is not None),
    )
    expected = reference.shape_features(x, shape, 80.0 if ranked else None, low, high).flatten()
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-6, equal_nan=True)
