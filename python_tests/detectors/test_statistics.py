"""ClassStatistics: what numpy and scikit-learn say of all rows at once, by batch and by process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from processes import ranks
from torch import Tensor

from oodkernels.detectors import Mahalanobis, statistics
from oodkernels.detectors.statistics import ClassStatistics


def labelled(
    n: int = 400, d: int = 6, classes: int = 5, offset: float = 0.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Float64 features of classes of unequal size, with correlated noise, and their labels."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    y = (torch.rand(n, generator=generator).square() * classes).long()
    x = 3 * normal(classes, d)[y] + normal(n, d) @ normal(d, d) + offset
    return x, y


def by_class(x: Tensor, y: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts, means and scatter, class by class in NumPy."""
    x, y = x.double().numpy(), y.numpy()
    classes = range(y.max() + 1)
    means = np.stack([x[y == c].mean(0) for c in classes])
    scatter = sum((x[y == c] - means[c]).T @ (x[y == c] - means[c]) for c in classes)
    return np.bincount(y), means, scatter


def check(found: ClassStatistics, x: Tensor, y: Tensor, rtol: float = 1e-12) -> None:
    counts, means, scatter = by_class(x, y)
    np.testing.assert_array_equal(found.counts, counts)
    np.testing.assert_allclose(found.means, means, rtol=rtol, atol=rtol * np.abs(means).max())
    size = np.sqrt(np.outer(scatter.diagonal(), scatter.diagonal()))
    np.testing.assert_allclose(found.scatter.numpy() / size, scatter / size, rtol=0, atol=rtol)


@pytest.mark.parametrize("batch", [1, 7, 100, 400])
def test_batches_give_what_all_rows_give(batch: int) -> None:
    x, y = labelled()
    found = ClassStatistics()
    for rows, labels in zip(x.split(batch), y.split(batch), strict=True):
        assert found.update(rows, labels) is found
    check(found, x, y)
    assert (found.num_classes, found.width, found.count, found.missing) == (5, 6, 400, [])
    assert repr(found) == "ClassStatistics(num_classes=5, width=6, count=400)"


def test_chunks_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_CHUNK", 6 * 33)
    x, y = labelled()
    check(ClassStatistics().update(x, y), x, y)


def test_covariance_is_scikit_learns() -> None:
    from sklearn.covariance import EmpiricalCovariance

    x, y = labelled()
    means = torch.from_numpy(by_class(x, y)[1])
    theirs = EmpiricalCovariance(assume_centered=True).fit((x - means[y]).numpy())
    np.testing.assert_allclose(ClassStatistics().update(x, y).covariance(), theirs.covariance_)


@pytest.mark.parametrize("batch", [3, 400])
def test_far_from_zero_nothing_cancels(batch: int) -> None:
    """At 1e6 the sum of squares less N times the squared mean has lost 12 of 16 digits."""
    x, y = labelled(offset=1e6)
    found = ClassStatistics()
    for rows, labels in zip(x.split(batch), y.split(batch), strict=True):
        found.update(rows, labels)
    check(found, x, y, rtol=1e-9)
    assert torch.linalg.eigvalsh(found.scatter).min() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_types_are_read_as_they_are(dtype: torch.dtype) -> None:
    x, y = labelled()
    x = x.to(dtype)
    found = ClassStatistics().update(x, y.int())
    check(found, x, y)
    assert found.means.dtype == found.scatter.dtype == torch.float64
    assert found.counts.dtype == torch.int64


def test_device(device: str) -> None:
    x, y = labelled()
    found = ClassStatistics().update(x.to(device), y.to(device))
    assert found.scatter.device.type == device
    check(found.to("cpu"), x, y)


def test_inference_mode_leaves_no_trace() -> None:
    x, y = labelled()
    with torch.inference_mode():
        found = ClassStatistics().update(x[:200] + 0, y[:200])
    check(found.update(x[200:].requires_grad_(), y[200:]), x.detach(), y)
    assert not found.scatter.requires_grad


def test_ood_rows_are_left_out() -> None:
    x, y = labelled()
    mixed = torch.cat([torch.full_like(x[:50], 1e9), x])
    labels = torch.cat([torch.full_like(y[:50], -1), y])
    check(ClassStatistics().update(mixed, labels), x, y)
    nothing = ClassStatistics(3).update(x[:4], torch.full((4,), -1)).update(x[:0], y[:0])
    assert (nothing.count, nothing.width, nothing.missing) == (0, 6, [0, 1, 2])


def test_merge_in_any_order() -> None:
    x, y = labelled()
    y, order = y.sort()  # so that the parts have different classes
    x = x[order]
    parts = [
        ClassStatistics().update(rows, labels)
        for rows, labels in zip(x.split(150), y.split(150), strict=True)
    ]
    first = ClassStatistics().merge(parts[0]).merge(parts[1]).merge(ClassStatistics())
    check(first.merge(parts[2]), x, y)
    check(ClassStatistics(5).merge(parts[2]).merge(parts[1]).merge(parts[0]), x, y)


def test_state_resumes() -> None:
    x, y = labelled()
    half = ClassStatistics().update(x[:200], y[:200])
    state = half.state_dict()
    resumed = ClassStatistics()
    resumed.load_state_dict(state)
    half.update(x[200:], y[200:])
    resumed.update(x[200:], y[200:])
    assert torch.equal(state["counts"], torch.bincount(y[:200], minlength=5))
    for name, tensor in half.state_dict().items():
        assert torch.equal(tensor, getattr(resumed, name))


def share(rank: int, world: int) -> dict[str, Tensor]:
    x, y = labelled(offset=100.0)
    y, order = y.sort()
    x = x[order]
    cuts = [0, 0, 130, 400][-world - 1 :]  # of three processes the first has no rows
    mine = slice(cuts[rank], cuts[rank + 1])
    found = ClassStatistics().update(x[mine], y[mine]).all_reduce()
    detector = Mahalanobis()
    if cuts[rank] < cuts[rank + 1]:
        detector.partial_fit(features=x[mine], labels=y[mine])
    score = detector.all_reduce().score(features=x)
    torch.testing.assert_close(score, Mahalanobis().fit(features=x, labels=y).score(features=x))
    with pytest.raises(ValueError, match=f"of one width, got {7 - world} to 6"):
        ClassStatistics().update(x[:9, : 6 - rank], y[:9]).all_reduce()
    return found.state_dict()


@pytest.mark.parametrize("world", [2, 3])
def test_processes(world: int, tmp_path: Path) -> None:
    states = ranks(tmp_path, world, share)
    x, y = labelled(offset=100.0)
    for state in states:
        for name, tensor in states[0].items():
            assert torch.equal(state[name], tensor)
        found = ClassStatistics()
        found.load_state_dict(state)
        check(found, x, y, rtol=1e-11)


def test_refuses() -> None:
    x, y = labelled()
    fitted = ClassStatistics(5).update(x, y)
    bad = x.clone()
    bad[7, 2] = torch.nan
    state = fitted.state_dict()
    cases = [
        (lambda: ClassStatistics(0), ValueError, "num_classes must be an int >= 1, got 0"),
        (lambda: fitted.update(x[0], y), ValueError, r"must have shape \(N, d\), got \(6,\)"),
        (lambda: fitted.update(x, y[:9]), ValueError, r"shape \(400,\), as there are features"),
        (lambda: fitted.update(x[:, :5], y), ValueError, "must have 6 columns, got 5"),
        (lambda: fitted.update(x, y + 1), ValueError, r"in 0\.\.4, or -1 for OOD, got 5"),
        (lambda: ClassStatistics().update(x, y - 2), ValueError, "at least 0, or -1 for OOD"),
        (lambda: fitted.update(bad, y), ValueError, "got 1 rows that are not, first row 7"),
        (lambda: fitted.update(x.int(), y), TypeError, "features must be float64, float32"),
        (lambda: fitted.update(x, y.double()), TypeError, "must be integers, got torch.float64"),
        (lambda: ClassStatistics().covariance(), ValueError, "there must be rows, got none"),
        (lambda: ClassStatistics(3).merge(fitted), ValueError, "at most 3 classes, got 5"),
        (lambda: ClassStatistics(3).load_state_dict(state), ValueError, "with C = 3"),
        (lambda: fitted.load_state_dict({}), ValueError, "got no counts"),
        (
            lambda: fitted.load_state_dict({**state, "means": x[:2]}),
            ValueError,
            r"\(C,\), \(C, d\) and \(d, d\)",
        ),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()
    check(fitted, x, y)  # a refused update has changed nothing
