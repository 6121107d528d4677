"""Problems of the sizes at which the CUDA kernels change their way: on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch

from oodkernels.ops.keys import keys_of_scores

MANY = (1025, 9000, 70_000)  # beyond one launch for all, beyond a Gram matrix, beyond one sample


@pytest.mark.parametrize("n", MANY)
def test_kmeans_is_a_fixed_point(device: str, n: int) -> None:
    """Labels are the nearest centroids', exactly, and centroids their members' means."""
    generator = torch.Generator().manual_seed(n)
    centers = 4 * torch.randn(12, 10, generator=generator)
    of = torch.randint(12, (n,), generator=generator)
    x = (centers[of] + torch.randn(n, 10, generator=generator)).to(device)
    init = torch.ops.oodk.kmeans_init(x, 12, seed=3, normalize=False)
    assert init.unique().numel() == 12
    centroids, labels, inertia, _ = torch.ops.oodk.kmeans(x, init, 200, 0.0, False)
    squared = torch.cdist(x.double(), centroids.double()).square()
    least, nearest = squared.min(-1)
    assert torch.equal(labels, nearest)
    torch.testing.assert_close(inertia, least.sum())
    means = torch.stack([x[labels == c].double().mean(0) for c in range(12)])
    torch.testing.assert_close(centroids.double(), means, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", MANY)
def test_roc_of_sorted_keys(device: str, n: int, dtype: torch.dtype) -> None:
    """Of integers, so that every figure is exact."""
    generator = torch.Generator().manual_seed(n)
    x, y = torch.randn(2, n, generator=generator, dtype=torch.float64).to(dtype)
    keys = [torch.ops.oodk._roc_keys(side.to(device)) for side in (x, y)]
    for side, found in zip((x, y), keys, strict=True):
        assert torch.equal(found.cpu(), keys_of_scores(side).sort().values)
    counts, areas = torch.ops.oodk._roc_counts(*keys)
    on_cpu, areas_on_cpu = torch.ops.oodk._roc_counts(*(k.cpu() for k in keys))
    assert torch.equal(counts.cpu(), on_cpu)
    torch.testing.assert_close(areas.cpu(), areas_on_cpu, rtol=1e-12, atol=0)
