"""Points to cluster, for the tests of K-means and DOS."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

NAN, INF = float("nan"), float("inf")


def features(n: int, d: int, classes: int = 100, noise: float = 1.0, seed: int = 0) -> Tensor:
    """Like a network's penultimate features: not negative, clustered, overlapping."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, d, generator=generator)
    label = torch.randint(classes, (n,), generator=generator)
    return (centres[label] + noise * torch.randn(n, d, generator=generator) - 0.3).relu()


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, int]:
    n, d, k = draw(st.integers(1, 60)), draw(st.integers(1, 40)), draw(st.integers(1, 20))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    x = torch.randn(n, d, generator=generator)
    if draw(st.booleans()):  # duplicates, zeros, ties
        x = x.round()
    for value in draw(st.lists(st.sampled_from([NAN, INF, -INF, 0.0]), max_size=4)):
        row = draw(st.integers(0, n - 1))
        x[row, draw(st.integers(0, d - 1))] = value
        if value == 0:
            x[row] = 0
    return x.to(dtype), k


def distributed_problems() -> list[tuple[Tensor, int, dict[str, object]]]:
    x = features(900, 24)
    x[5, 5] = x[800, 0] = NAN
    few = features(6, 24)
    lumps = torch.cat([torch.zeros(40, 3), torch.ones(2, 3), torch.full((1, 3), 9.0)])
    return [
        (x, 20, {"n_init": 3, "normalize": True, "seed": 4}),
        (x, 7, {"max_iter": 3, "tol": 0.0}),
        (x.double(), 7, {"renormalize": True, "normalize": True, "tol": 1e-2}),
        (few, 8, {}),
        (lumps, 5, {}),
        (torch.randn(66000, 3, generator=torch.Generator().manual_seed(0)), 4, {"max_iter": 5}),
        (features(900, 24, 9, 0.3, seed=1) + 1e4, 9, {}),
    ]
