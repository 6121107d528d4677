"""K-means where numbers are short of room: far from 0, huge, tiny, equal rows; and Ctrl-C."""

from __future__ import annotations

import pytest
import torch
from op_db import duplicates
from processes import run_code
from torch import Tensor

from oodkernels import kmeans_init, nearest_centroid, reference
from oodkernels.ops import kmeans_lloyd


def blobs(n: int, d: int, k: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """k overlapping clusters around 0."""
    random = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(k, d, generator=random, dtype=torch.float64)
    of = torch.randint(k, (n,), generator=random)
    return (centres[of] + torch.randn(n, d, generator=random, dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize(
    ("n", "d", "k", "dtype", "offset"),
    [
        (2000, 4, 20, torch.float32, 1e4),  # by products of points
        (30_000, 6, 9, torch.float32, -3e4),  # by products with centroids
        (300_000, 50, 3, torch.float32, 1e4),  # rows converted whenever they are read
        (1000, 5, 1, torch.float32, 1e5),
        (2000, 4, 20, torch.float64, 1e10),
    ],
)
def test_far_from_zero(n: int, d: int, k: int, dtype: torch.dtype, offset: float) -> None:
    x = (blobs(n, d, k, torch.float64) + offset * torch.linspace(0.5, 1, d)).to(dtype)
    near = x.double() - x.double().mean(0)  # exactly these points, with room
    init = kmeans_init(x, k, normalize=False)
    assert len(set(init[0].tolist())) == k
    found = kmeans_lloyd(x, init, max_iter=8, tol=0, normalize=False)
    exact = kmeans_lloyd(near, init, max_iter=8, tol=0, normalize=False)
    assert float(found.inertia) == pytest.approx(float(exact.inertia), rel=1e-3)
    assert (found.labels == exact.labels).double().mean() > 0.999
    shift = found.centroids.double() - x.double().mean(0) - exact.centroids
    assert float(shift.abs().max()) < 1e-6 * abs(offset) + 0.02
    labels, distance = nearest_centroid(x, found.centroids)
    assert torch.equal(labels, found.labels)
    assert float(distance.double().sum()) == pytest.approx(float(found.inertia), rel=1e-9)
    again = kmeans_lloyd(x, found.centroids, max_iter=1, tol=0, normalize=False)
    assert float(again.inertia) == pytest.approx(float(found.inertia), rel=1e-2)


def test_a_rows_result_does_not_depend_on_other_rows() -> None:
    x = blobs(500, 7, 6) + 1e4
    centroids = x[:6]
    labels, distance = nearest_centroid(x, centroids)
    other = nearest_centroid(torch.cat([x[100:120], -100 * x]), centroids)
    assert torch.equal(other[0][:20], labels[100:120])
    assert torch.equal(other[1][:20], distance[100:120])


@pytest.mark.parametrize(("n", "k"), [(40, 40), (40, 9), (3000, 30)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda t: str(t)[6:])
def test_norms_next_to_the_largest_number(n: int, k: int, dtype: torch.dtype) -> None:
    x = blobs(n, 5, k, torch.float64)
    x /= x.norm(dim=1, keepdim=True)
    room = torch.linspace(0.5, 0.999, n, dtype=torch.float64)[:, None]
    huge = (x * (torch.finfo(dtype).max * room).sqrt()).to(dtype)
    small = huge.double() / huge.double().norm(dim=1).max()
    for n_init, trials in ((1, 0), (3, 1)):
        init = kmeans_init(huge, k, n_init, trials, normalize=False)
        assert all(len(set(rows)) == k for rows in init.tolist())
        if dtype == torch.float32:
            assert torch.equal(init, kmeans_init(small, k, n_init, trials, normalize=False))
    found = kmeans_lloyd(huge, init, normalize=False)
    exact = kmeans_lloyd(small, init, normalize=False)
    assert torch.equal(found.labels, exact.labels)
    labels, distance = nearest_centroid(huge, found.centroids)
    assert torch.equal(labels, found.labels)
    unit = float(huge.double().norm(dim=1).max()) ** 2
    assert float(found.inertia) == pytest.approx(float(exact.inertia) * unit, rel=1e-4)
    torch.testing.assert_close(
        distance.double() / unit,
        nearest_centroid(small, exact.centroids)[1],
        rtol=1e-3,
        atol=1e-6,
    )


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float32, 3e-41), (torch.float64, 1e-312), (torch.bfloat16, 1e-38)],
    ids=str,
)
def test_subnormal_rows_have_directions(dtype: torch.dtype, scale: float) -> None:
    """The inverse of such a norm is more than the largest number."""
    x = blobs(300, 6, 5, torch.float64)
    x[::2] *= scale
    x = x.to(dtype)
    exact = torch.nn.functional.normalize(x.double() / x.double().abs().amax(1, keepdim=True))
    centroids = exact[:5].to(torch.float64 if dtype == torch.float64 else torch.float32)
    labels, distance = nearest_centroid(x, centroids, normalize=True)
    expected = torch.cdist(exact, centroids.double()).square()
    chosen = expected.gather(1, labels[:, None])[:, 0]
    assert float((chosen - expected.amin(1)).max()) < 1e-5
    torch.testing.assert_close(distance.double(), chosen, rtol=1e-4, atol=1e-6)
    init = kmeans_init(x, 5, normalize=True)
    found = kmeans_lloyd(x, init, 5, 0.0, normalize=True)
    expected_fit = kmeans_lloyd(exact, init, 5, 0.0, normalize=True)
    assert float(found.inertia) == pytest.approx(float(expected_fit.inertia), rel=1e-5)
    points, valid = reference.kmeans_points(x, True)
    assert valid.all()
    torch.testing.assert_close(points.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda t: str(t)[6:])
def test_duplicates_do_not_go_round(dtype: torch.dtype) -> None:
    """Equal points and ties: no run needs as many iterations as there are points."""
    longest = 0
    for seed in range(560):
        x, init, normalize = duplicates(seed)
        found = kmeans_lloyd(x.to(dtype), init, 300, 0.0, normalize=normalize)
        longest = max(longest, int(found.n_iter))
    assert longest < 60


@pytest.mark.parametrize(
    "call",
    [
        "kmeans_lloyd(x, torch.arange(1500)[None], 300, 0.0)",
        "kmeans_init(x, 1500, 8)",
    ],
)
def test_ctrl_c_ends_a_long_call(call: str) -> None:
    code = f"""
import os, signal, threading, time, torch
from oodkernels.ops import kmeans_init, kmeans_lloyd
torch.set_num_threads(2)
x = torch.randn(150_000, 64)
sent = []
def send():
    sent.append(time.monotonic())
    os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
threading.Timer(0.7, send).start()
try:
    {call}
    print("finished")
except KeyboardInterrupt:
    print("ended after", time.monotonic() - sent[0])
"""
    done = run_code(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ended after"), done.stdout
    assert float(done.stdout.split()[-1]) < 4
