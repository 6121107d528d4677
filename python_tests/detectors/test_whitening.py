"""Products with a triangle, and what detectors of one Gaussian or subspace share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from head_world import world
from torch import Tensor, nn

from oodkernels.detectors import (
    DICE,
    FDBD,
    GMM,
    NCI,
    PNML,
    RMDS,
    SHE,
    CADRef,
    HeadDetector,
    KLMatching,
    Mahalanobis,
    MahalanobisPlusPlus,
    OODDetector,
    OpenMax,
    Residual,
    RMDSPlusPlus,
    ViM,
    score_all,
    subspaces,
    whitening,
)

W = world(d=20)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of rows and of columns in little data."""
    monkeypatch.setattr(whitening, "_COLUMNS", 3)
    monkeypatch.setattr(whitening, "_CHUNK", 20 * 17)
    monkeypatch.setattr(whitening, "_CENTRED", 20 * 6)
    monkeypatch.setattr(subspaces, "_CHUNK", 20 * 7)


def counted(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[int]:
    """Rows of each call of a function from now on."""
    calls: list[int] = []
    function: Callable[..., Any] = getattr(module, name)

    def call(x: Tensor, *args: Any, **options: Any) -> Any:
        calls.append(len(x))
        return function(x, *args, **options)

    monkeypatch.setattr(module, name, call)
    return calls


@pytest.mark.parametrize("d", [1, 2, 3, 7, 24, 25, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_triangle_is_the_dense_product(d: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(d)
    x, matrix = torch.randn(9, d, generator=g), torch.randn(d, d, generator=g).triu()
    x, matrix = x.to(dtype), matrix.to(dtype)
    rtol = 1e-12 if dtype == torch.float64 else 1e-4
    expected = (x.double() @ matrix.double()).to(dtype)
    found = whitening.times_triangle(x, matrix)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol)
    out = torch.full((9, d + 1), torch.nan, dtype=dtype)[:, :d]
    assert whitening.times_triangle(x, matrix, out=out) is out
    torch.testing.assert_close(out, expected, rtol=rtol, atol=rtol)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(whitening.times_triangle(x, matrix), found)


def test_triangle_leaves_the_zeros_out() -> None:
    """What is below the diagonal's blocks is not read."""
    x, matrix = torch.randn(4, 24), torch.randn(24, 24).triu()
    spoilt = matrix.clone()
    for begin in range(0, 24, 3):
        spoilt[begin + 3 :, begin : begin + 3] = torch.nan
    assert torch.equal(whitening.times_triangle(x, spoilt), whitening.times_triangle(x, matrix))


def test_triangle_has_gradients() -> None:
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    matrix = torch.randn(7, 7, dtype=torch.float64).triu()
    assert torch.autograd.gradcheck(lambda x: whitening.times_triangle(x, matrix), x)


def test_triangle_in_a_compiled_program() -> None:
    x, matrix = torch.randn(4, 7), torch.randn(7, 7).triu()
    graph = torch.compile(whitening.times_triangle, backend="eager", fullgraph=True)
    assert torch.equal(graph(x, matrix), whitening.times_triangle(x, matrix))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gaussians_share_and_score_as_alone(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: dict[str, OODDetector] = {
        "m": Mahalanobis(),
        "rmds": RMDS(),
        "m++": MahalanobisPlusPlus(),
        "rmds++": RMDSPlusPlus(),
        "shrunk": Mahalanobis(shrinkage=0.1),
        "other": RMDS(),
    }
    for name, detector in used.items():
        if name == "other":
            detector.fit(features=W.features[:300], labels=W.labels[:300])
        else:
            W.fit(detector)
    alone = {name: W.score(detector, dtype) for name, detector in used.items()}
    searches = counted(monkeypatch, whitening, "nearest_centroid")
    products = counted(monkeypatch, whitening, "times_triangle")
    given = {"features": W.test.to(dtype), "logits": W.test_logits.to(dtype)}
    together = score_all(used, **given)
    assert all(torch.equal(together[name], score) for name, score in alone.items())
    n = len(W.test)
    assert sum(searches) == 4 * n  # plain, of unit norm, shrunk, of other data
    assert sum(products) == (4 + 3) * n  # and three Gaussians of all
    assert not torch.equal(together["m"], together["shrunk"])
    reverse = score_all(dict(reversed(used.items())), **given)
    assert all(torch.equal(reverse[name], score) for name, score in alone.items())


def test_what_was_fitted_anew_is_not_shared() -> None:
    first, second = W.fit(Mahalanobis()), W.fit(RMDS())
    before = W.score(second)
    second.partial_fit(features=W.features + 1, labels=W.labels)
    alone = W.score(second)
    assert not torch.equal(alone, before)
    together = score_all({"first": first, "second": second}, features=W.test)
    assert torch.equal(together["second"], alone)


@pytest.mark.parametrize("dims", [(10, 10), (10, 15)])
def test_subspaces_share_and_score_as_alone(
    dims: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    used = {"vim": ViM(dims[0], head=W.head), "residual": Residual(dims[1], head=W.head)}
    alone = {name: W.score(W.fit(detector), torch.float32) for name, detector in used.items()}
    products = counted(monkeypatch, subspaces, "length")
    together = score_all(used, features=W.test.float(), logits=W.test_logits.float())
    assert all(torch.equal(together[name], score) for name, score in alone.items())
    assert len(products) == len(set(dims))
    varied = {name: used[name].varied(dim=4) for name in used}
    fresh = {"vim": ViM(4, head=W.head), "residual": Residual(4, head=W.head)}
    for name, detector in fresh.items():
        torch.testing.assert_close(W.score(varied[name]), W.score(W.fit(detector)))


@pytest.mark.parametrize("kind", [PNML, GMM, FDBD, DICE, NCI, SHE, CADRef, KLMatching, OpenMax])
def test_a_state_taken_in_is_scored_by(kind: type[OODDetector]) -> None:
    """Not by what was made of the one before."""

    def made(head: nn.Linear) -> OODDetector:
        return kind(head=head) if issubclass(kind, HeadDetector) else kind()

    head = nn.Linear(20, 7).double().requires_grad_(False)
    head.weight.copy_(1.25 * W.head.weight.detach().flip(0))
    head.bias.copy_(1.5 * W.head.bias.detach().flip(0))
    one, other = W.fit(made(W.head)), made(head)
    features = 1.2 * W.features
    given = {"features": features, "logits": head(features), "labels": 6 - W.labels}
    other.fit(**{name: given[name] for name in sorted(other.trained_on)})
    assert not torch.equal(other.score(features=W.test, logits=head(W.test)), W.score(one))
    other.load_state_dict(one.state_dict())
    assert torch.equal(W.score(other), W.score(one))


def test_pnml_of_features_that_do_not_span() -> None:
    """A pseudo-inverse, which is no triangle; and close to one, where it is one."""
    features = W.features.clone()
    features[:, 3] = 0
    test = W.test.clone()
    test[:, 3] = 0
    detector = PNML(head=W.head).fit(features=features)
    assert not detector._inverse_root(test)[1]
    u = torch.nn.functional.normalize(features, dim=1)
    v = torch.nn.functional.normalize(test, dim=1)
    share = ((v @ torch.linalg.pinv(u.T @ u)) * v).sum(1)
    logits = torch.nn.functional.linear(test, *detector.head)
    p = torch.nn.functional.linear(v, *detector.head).softmax(1)
    power = (share / (1 + share))[:, None]
    expected = -(p / (p + (1 - p) * p**power)).sum(1).log() / torch.tensor(7.0).log()
    found = detector.score(features=test, logits=logits)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert W.fit(PNML(head=W.head))._inverse_root(W.test)[1]
